"""How much a request may ask for: samples, tokens, images, text, and the schema of its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

if TYPE_CHECKING:
    from mmedpo_ray.serve.request_model import ChatRequest, CompletionBody, CompletionRequest

_SCHEMA = "response_format.json_schema.schema"
# Keywords of JSON Schema that a grammar writes out so many times.
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_MOST_COUNT = 4096
_LONGEST_PATTERN = 256
_REPEATS = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def check_limits(request: CompletionBody, settings: ServeConfig) -> None:
    """Checks a body whose fields are valid each on its own.

    Raises:
        RequestError: 400, naming the field.
    """
    is_chat = hasattr(request, "messages")
    texts = "messages" if is_chat else "prompt"
    _at_most(texts, "images", request.num_images, settings.max_images)
    _at_most(texts, "characters of text", request.length(), settings.max_prompt_chars)
    _at_most("n", "answers", request.n * request.num_prompts, settings.max_samples)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        _at_most(name, name, getattr(request, name, None) or 0, settings.max_output_tokens)
    if request.n > 1 and request.temperature == 0:
        raise _wrong("n", "n above 1 needs a temperature above 0")
    if request.stream_options is not None and not request.stream:
        raise _wrong("stream_options", "stream_options needs stream: true")
    if is_chat:
        _check_chat(request)  # type: ignore[arg-type]
    else:
        _check_completion(request)  # type: ignore[arg-type]
    if request.response_format is not None and request.response_format.json_schema is not None:
        check_schema(request.response_format.json_schema.schema_, settings)


def check_schema(schema: dict[str, Any], settings: ServeConfig) -> None:
    """Checks that a grammar is made of a JSON schema within a moment.

    Raises:
        RequestError: 400.
    """
    size = len(json.dumps(schema))
    _at_most(_SCHEMA, "bytes of schema", size, settings.max_schema_kib * 1024)
    for depth, item in _walk(schema):
        _at_most(_SCHEMA, "levels of schema", depth, settings.max_schema_depth)
        for name in _COUNTS:
            if isinstance(item.get(name), int | float):
                _at_most(_SCHEMA, name, item[name], _MOST_COUNT)
        if isinstance(reference := item.get("$ref"), str) and not reference.startswith("#"):
            raise _wrong(_SCHEMA, "$ref may only name a part of the same schema")
        if isinstance(pattern := item.get("pattern"), str):
            _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    _at_most(_SCHEMA, "characters of pattern", len(pattern), _LONGEST_PATTERN)
    counts = [int(number) for found in _REPEATS.findall(pattern) for number in found if number]
    _at_most(_SCHEMA, "repetitions in pattern", max(counts, default=0), _MOST_COUNT)
    # Counts inside counts multiply.
    _at_most(_SCHEMA, "counted repetitions in pattern", len(_REPEATS.findall(pattern)), 4)
    product = 1
    for count in counts:
        product *= max(1, count)
    _at_most(_SCHEMA, "repetitions in pattern", product, _MOST_COUNT**2)


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise _wrong("top_logprobs", "top_logprobs needs logprobs: true")
    most = request.max_completion_tokens or request.max_tokens
    _check_least(request.min_tokens, most)


def _check_completion(request: CompletionRequest) -> None:
    if request.best_of not in (None, request.n):
        raise _wrong("best_of", "best_of must be n: all answers are returned")
    _check_least(request.min_tokens, request.max_tokens)


def _check_least(least: int | None, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise _wrong("min_tokens", "min_tokens is above max_tokens")


def _walk(schema: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object in a schema with its level, from 1; lists count as levels too."""
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        yield from ((depth, item if isinstance(item, dict) else {}) for item in level)
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]


def _at_most(param: str, what: str, value: float, most: float) -> None:
    if value > most:
        raise RequestError(
            400, f"{param}: {value:g} {what}; at most {most:g} here", param=param, reason="limit"
        )


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(400, message, param=param, reason="field")
