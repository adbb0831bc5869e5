"""What a request may say: the bodies of chat and text completions, with their limits.

A subset of the OpenAI API and of vLLM's sampling parameters. Everything else is refused by name, so that no
field reaches the engine unchecked (chat templates, adapters or plugins of the client's choice, for example).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

MAX_LOGPROBS = 20
_MAX_MESSAGES = 256
_MAX_PARTS = 64
_MAX_STOPS = 16
_INT64 = 2**63

# Fields of OpenAI's clients that say nothing to an engine; they are accepted and left out.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """The address of an image: a data URL, or HTTPS where the server allows its host."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=_MAX_PARTS)]
    name: str | None = Field(None, max_length=64)


class JsonSchema(_Strict):
    """The schema of an answer."""

    name: str = Field("answer", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


class StreamOptions(_Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(_Strict):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=_MAX_STOPS)]
        | None
    ) = None
    ignore_eos: bool = False
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None


class ChatRequest(_Sampling):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def images(self) -> Iterator[tuple[str, ImageUrl]]:
        """Every image with its place in the body."""
        for number, message in enumerate(self.messages):
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, ImagePart):
                    yield f"messages.{number}.content.{place}.image_url.url", part.image_url

    def length(self) -> int:
        """Characters of all texts."""
        return sum(
            len(content)
            if isinstance(content := message.content, str)
            else sum(len(part.text) for part in content if isinstance(part, TextPart))
            for message in self.messages
        )


class CompletionRequest(_Sampling):
    """Body of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    best_of: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: None = None

    def images(self) -> Iterator[tuple[str, ImageUrl]]:
        """None: text completions have no images."""
        return iter(())

    def length(self) -> int:
        """Characters of all prompts."""
        return len(self.prompt) if isinstance(self.prompt, str) else sum(map(len, self.prompt))


Request = ChatRequest | CompletionRequest
KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
}


def parse_request(kind: str, data: bytes, settings: ServeConfig) -> Request:
    """Reads and checks the body of a request.

    Args:
        kind: ``chat`` or ``completions``.
        data: the body.
        settings: limits.

    Raises:
        RequestError: 400, naming the field that is wrong.
    """
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not valid JSON in UTF-8", reason="json") from error
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object", reason="json")
    body = {name: value for name, value in body.items() if name not in _IGNORED}
    try:
        request = KINDS[kind].model_validate(body)
    except (ValidationError, RecursionError) as error:
        raise _describe(error) from error
    _check_limits(request, settings)
    return request


def engine_body(request: Request) -> dict[str, Any]:
    """The body that the engine gets: what the client set."""
    return request.model_dump(mode="json", exclude_unset=True, by_alias=True)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _describe(error: ValidationError | RecursionError) -> RequestError:
    if isinstance(error, RecursionError):
        return RequestError(400, "the body is nested too deeply", reason="limit")
    # The branch of a union that came closest is the one with the longest path.
    problem = max(error.errors(include_url=False, include_input=False, include_context=False), key=_depth)
    place = [str(part) for part in problem["loc"] if not _is_branch(part)]
    if problem["type"] == "extra_forbidden":
        return RequestError(
            400, f"{'.'.join(place)}: not supported by this endpoint", param=".".join(place), reason="field"
        )
    return RequestError(
        400, f"{'.'.join(place)}: {problem['msg']}", param=".".join(place) or None, reason="field"
    )


def _depth(problem: Any) -> int:
    return len(problem["loc"])


def _is_branch(part: int | str) -> bool:
    """Whether a part of a pydantic location names the branch of a union instead of a field."""
    return isinstance(part, str) and (part in ("str", "text", "image_url") or "[" in part)


def _check_limits(request: Request, settings: ServeConfig) -> None:
    prompts = getattr(request, "prompt", "")
    samples = request.n * (len(prompts) if isinstance(prompts, list) else 1)
    limits: list[tuple[str, float | None, float]] = [
        ("n", samples, settings.max_samples),
        ("max_tokens", request.max_tokens, settings.max_output_tokens),
        ("min_tokens", request.min_tokens, settings.max_output_tokens),
    ]
    if isinstance(request, ChatRequest):
        limits += [
            ("max_completion_tokens", request.max_completion_tokens, settings.max_output_tokens),
            ("messages", sum(1 for _ in request.images()), settings.max_images),
        ]
    else:
        limits.append(("best_of", request.best_of, settings.max_samples))
    for name, value, most in limits:
        if value is not None and value > most:
            what = "images" if name == "messages" else name
            raise RequestError(400, f"{what} is {value}; at most {most} here", param=name, reason="limit")
    if request.length() > settings.max_prompt_chars:
        raise RequestError(
            400,
            f"the prompt has {request.length()} characters; at most {settings.max_prompt_chars} here",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            reason="limit",
        )
    if request.n > 1 and request.temperature == 0:
        raise RequestError(400, "n above 1 needs a temperature above 0", param="n", reason="field")
    if request.response_format is not None and request.response_format.json_schema is not None:
        _check_schema(request.response_format.json_schema.schema_, settings)


def _check_schema(schema: dict[str, Any], settings: ServeConfig) -> None:
    param = "response_format.json_schema.schema"
    size = len(json.dumps(schema))
    if size > settings.max_schema_kib * 1024:
        raise RequestError(
            400,
            f"the schema has {size} bytes; at most {settings.max_schema_kib} KiB here",
            param=param,
            reason="limit",
        )
    level: list[Any] = [schema]
    for _ in range(settings.max_schema_depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RequestError(
        400,
        f"the schema is nested deeper than {settings.max_schema_depth} levels",
        param=param,
        reason="limit",
    )
