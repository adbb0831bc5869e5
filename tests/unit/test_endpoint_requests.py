"""What the endpoint answers to requests that are odd, too large or not allowed: a table."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from endpoint_app import Endpoint, ask, data_url, png

LIMITS: dict[str, Any] = {
    "max_samples": 4,
    "max_output_tokens": 64,
    "max_images": 2,
    "max_prompt_chars": 500,
    "max_schema_kib": 1,
    "max_schema_depth": 5,
    "max_body_mib": 0.05,
    "max_image_mib": 0.02,
}


@pytest.fixture(scope="module")
def endpoint() -> Endpoint:
    return Endpoint(**LIMITS)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def in_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


IMAGE = data_url(png())
TEXT = {"type": "text", "text": "Q"}
WRONG: list[Any] = [None, True, "one", -1, 0, 1.5, [], {}, [1]]

# Fields of a chat request, and the field that the error names.
FIELDS: list[tuple[dict[str, Any], str]] = [
    *(({"max_tokens": value}, "max_tokens") for value in WRONG[1:]),
    *(({"max_completion_tokens": value}, "max_completion_tokens") for value in WRONG[1:]),
    *(({"n": value}, "n") for value in WRONG[1:]),
    *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, "hot", True, [], {})),
    *(({"top_p": value}, "top_p") for value in (0, 1.1, -1, "all", True, [])),
    *(({"top_k": value}, "top_k") for value in (-2, 1.5, "many", True, 10**9)),
    *(({"min_p": value}, "min_p") for value in (-0.1, 1.1, "few")),
    *(({"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1, "none")),
    *(({"frequency_penalty": value}, "frequency_penalty") for value in (-2.1, 2.1, "none")),
    *(({"repetition_penalty": value}, "repetition_penalty") for value in (0, 2.1, "none")),
    *(({"seed": value}, "seed") for value in (2**63, -(2**63) - 1, 1.5, "x", True)),
    *(({"stream": value}, "stream") for value in (1, "yes", [])),
    *(({"stream_options": value}, "stream_options") for value in (1, [], {"usage": True})),
    *(({"logprobs": value}, "logprobs") for value in (1, "yes")),
    *(({"top_logprobs": value}, "top_logprobs") for value in (-1, 21, "all", True)),
    *(({"stop": value}, "stop") for value in (1, "", [""], ["x" * 257], ["x"] * 17, [1], {})),
    *(({"min_tokens": value}, "min_tokens") for value in (-1, "x", 65)),
    *(({"ignore_eos": value}, "ignore_eos") for value in (1, "no")),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_completion_tokens": 65}, "max_completion_tokens"),
    ({"n": 5}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens"),
    ({"logit_bias": {str(number): 1 for number in range(301)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}]},
        "messages",
    ),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 257}, "messages"),
    ({"messages": [1]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "nurse", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": [TEXT] * 65}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "x"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 501}]}, "messages"),
    ({"messages": ask(IMAGE, IMAGE, IMAGE)}, "messages"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    (in_schema("x"), "response_format"),
    (in_schema(nested(6)), "response_format"),
    (in_schema({"enum": ["x" * 1100]}), "response_format"),
    *(
        ({name: value}, name)
        for name, value in {
            "chat_template": "{{ messages }}",
            "chat_template_kwargs": {},
            "mm_processor_kwargs": {"max_pixels": 1},
            "lora_request": {},
            "guided_json": {},
            "structured_outputs": {"choice": ["a"]},
            "prompt_logprobs": 5,
            "allowed_token_ids": [1],
            "logit_bias": {"1": 101},
            "bad_words": ["x"],
            "tools": [],
            "tool_choice": "auto",
            "functions": [],
            "use_beam_search": True,
            "documents": [],
            "cache_salt": "x",
            "priority": 1,
            "vllm_xargs": {},
            "kv_transfer_params": {},
            "echo": True,
            "modalities": ["audio"],
            "unknown": 1,
        }.items()
    ),
]


@pytest.mark.parametrize(("fields", "param"), FIELDS)
def test_a_wrong_field_is_named(endpoint: Endpoint, fields: dict[str, Any], param: str) -> None:
    answer = endpoint.chat(**fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param
    assert "Traceback" not in answer.text and "pydantic" not in answer.text


SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 5000},
    {"type": "array", "minItems": 5000},
    {"properties": {"a": {"maxItems": 5000}}},
    {"maxProperties": 1e9},
    {"$ref": "https://other.example/schema"},
    {"$ref": "other.json"},
    {"type": "string", "pattern": "a" * 257},
    {"type": "string", "pattern": "a{5000}"},
    {"type": "string", "pattern": "a{1,5000}"},
    {"type": "string", "pattern": "a{2}b{2}c{2}d{2}e{2}"},
    {"anyOf": [{"items": {"pattern": "a{5000}"}}]},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_whose_grammar_is_too_large_is_refused(endpoint: Endpoint, schema: dict[str, Any]) -> None:
    answer = endpoint.chat(**in_schema(schema))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema"


ACCEPTED: list[dict[str, Any]] = [
    {
        "n": None,
        "stop": None,
        "logprobs": None,
        "stream": None,
        "user": "x",
        "metadata": {"a": "b"},
        "store": False,
    },
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [], "refusal": None, "audio": None}]},
    {
        "messages": [
            {"role": "developer", "content": [TEXT, TEXT]},
            {"role": "user", "content": "x", "name": "a"},
        ]
    },
    {"messages": ask(IMAGE, IMAGE)},
    {"max_completion_tokens": 64, "temperature": 0, "top_p": 1, "seed": 0, "stop": ["a"] * 16},
    {"logprobs": True, "top_logprobs": 20, "logit_bias": {"5": -100}},
    {"n": 4, "temperature": 1},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"response_format": {"type": "json_object"}},
    in_schema({"type": "string", "pattern": "^[ !#-~]{1,300}$", "maxLength": 4096}),
    in_schema({"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["x"]}}}),
]


@pytest.mark.parametrize("fields", ACCEPTED)
def test_what_real_clients_send_is_accepted(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert endpoint.chat(**fields).status_code == 200


def test_a_body_of_very_many_items_is_refused_before_it_is_read() -> None:
    endpoint = Endpoint(max_prompt_chars=1000)
    body = b'{"model": "base", "messages": [' + b"[]," * 100_000 + b"[]]}"
    headers = {"Content-Type": "application/json"}
    answer = endpoint.send("POST", "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400 and "too many" in answer.json()["error"]["message"]


def test_the_published_description_is_whole(endpoint: Endpoint) -> None:
    text = endpoint.send("GET", "/openapi.json").text
    document = json.loads(text)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert {"ChatRequest", "CompletionRequest", "Error"} <= named
    assert named <= set(document["components"]["schemas"])
    routes = {f"{method} {path}" for path, item in document["paths"].items() for method in item}
    assert {"post /v1/chat/completions", "get /v1/models", "get /metrics", "get /ready"} <= routes


ADDRESSES = [
    ("http://192.0.2.1/a.png", 400),
    ("https://images.example/a.png", 400),
    ("file:///etc/hostname", 400),
    ("ftp://images.example/a.png", 400),
    ("//images.example/a.png", 400),
    ("a.png", 400),
    ("", 400),
    ("https://[broken", 400),
    ("https://images.example:x/", 400),
    ("data:,hello", 400),
    ("data:image/png,hello", 400),
    ("data:image/png;base64,###", 400),
    (data_url(b""), 400),
    (data_url(b"hello"), 400),
    (data_url(png()[:50]), 400),
    (data_url(b"\0" * 21_000), 413),
]


@pytest.mark.parametrize(("url", "status"), ADDRESSES)
def test_an_image_that_cannot_be_used_is_refused(endpoint: Endpoint, url: str, status: int) -> None:
    answer = endpoint.chat(messages=ask(IMAGE, url))
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == "messages.0.content.1.image_url.url"


BODIES = [
    (b"", 400),
    (b"hello", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"1", 400),
    (b"{", 400),
    (b'{"model": "base", "messages": NaN}', 400),
    (b'{"model": "base", "temperature": Infinity, "messages": []}', 400),
    (b"\xff\xfe", 400),
    (b'{"a": "\xff"}', 400),
    (b"{}", 400),
    (rb'{"model": "base", "messages": [{"role": "user", "content": "\ud83d"}]}', 400),
    (rb'{"model": "base", "messages": [{"role": "user", "content": "\ud83d\ude00"}]}', 200),
    (b'{"model": "base", "messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
    (b'{"messages": [{"role": "user", "content": "x"}]}', 400),
    (b'{"model": 1, "messages": [{"role": "user", "content": "x"}]}', 400),
    (b'{"model": null, "messages": [{"role": "user", "content": "x"}]}', 400),
    (b'{"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}', 404),
    (b'{"model": "", "messages": [{"role": "user", "content": "x"}]}', 404),
    (b"x" * 53_000, 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
def test_a_body_that_is_no_request_is_refused(endpoint: Endpoint, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = endpoint.send("POST", "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"]


COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["x"] * 5}, "n"),
    ({"prompt": ["x", "y", "z"], "n": 2}, "n"),
    ({"prompt": "x" * 501}, "prompt"),
    ({"best_of": 5}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 2}, "best_of"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"prompt_embeds": "x"}, "prompt_embeds"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETIONS)
def test_a_wrong_field_of_a_completion_is_named(
    endpoint: Endpoint, fields: dict[str, Any], param: str
) -> None:
    answer = endpoint.send("POST", "/v1/completions", json={"model": "base", "prompt": "Hello"} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].split(".")[0] == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/admin", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 200),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/completions", 405),
        ("PUT", "/health", 405),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/models/base", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("GET", "/metrics", 200),
    ],
)
def test_routes(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    answer = endpoint.send(method, path)
    assert answer.status_code == status
    if status >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_a_form_of_a_web_page_is_no_request(endpoint: Endpoint, kind: str | None) -> None:
    body = json.dumps({"model": "base", "messages": ask()}).encode()
    headers = {"content-type": kind} if kind else {}
    answer = endpoint.send("POST", "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 415
