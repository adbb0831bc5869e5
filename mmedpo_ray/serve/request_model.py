"""What a request may say: the bodies of chat and text completions, with their limits.

A subset of the OpenAI API and of vLLM's sampling parameters. Everything else is refused by name, so that no
field reaches the engine unchecked (chat templates, adapters or plugins of the client's choice, for example).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_limits import check_limits
from mmedpo_ray.serve.settings import ServeConfig

MAX_LOGPROBS = 20
_MAX_MESSAGES = 256
_MAX_PARTS = 64
_MAX_STOPS = 16
_MAX_BIASES = 300
_INT64 = 2**63
# Bodies above this size are looked at before they are read as JSON.
_MANY_BYTES = 2**18
_MANY_ITEMS = 20_000
_STRUCTURE = (b",", b"[", b"{")

# Fields of OpenAI's clients that say nothing to an engine; they are accepted and left out.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_set(cls, body: Any) -> Any:
        return (
            {name: value for name, value in body.items() if value is not None} if _is_object(body) else body
        )


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """The address of an image: a data URL, or HTTPS where the server allows its host."""

    url: str = Field(min_length=1)
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

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, body: Any) -> Any:
        # An answer's message that is sent back has empty fields, such as tool_calls.
        return {name: value for name, value in body.items() if value != []} if _is_object(body) else body


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


Bias = Annotated[float, Field(ge=-100, le=100)]


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
    return_token_ids: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=_MAX_BIASES
    )
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

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return sum(1 for _ in self.images())

    @property
    def num_prompts(self) -> int:
        """How many prompts there are: one."""
        return 1

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

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    )
    best_of: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    num_images: ClassVar[int] = 0

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.prompt) if isinstance(self.prompt, list) else 1

    def images(self) -> Iterator[tuple[str, ImageUrl]]:
        """None: text completions have no images."""
        return iter(())

    def length(self) -> int:
        """Characters of all prompts."""
        return len(self.prompt) if isinstance(self.prompt, str) else sum(map(len, self.prompt))


CompletionBody = ChatRequest | CompletionRequest
KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
}


def parse_request(kind: str, data: bytes, settings: ServeConfig) -> CompletionBody:
    """Reads and checks the body of a request.

    Args:
        kind: ``chat`` or ``completions``.
        data: the body.
        settings: limits.

    Raises:
        RequestError: 400, naming the field that is wrong.
    """
    if len(data) > _MANY_BYTES and sum(map(data.count, _STRUCTURE)) > settings.max_prompt_chars + _MANY_ITEMS:
        # Only images and texts may be large; a million lists take seconds to read.
        raise RequestError(400, "the body has too many fields and items", reason="limit")
    try:
        body = json.loads(data, parse_constant=_no_constant)
        if b"\\ud" in data or b"\\uD" in data:
            # Half a surrogate pair is no Unicode; tokenizers fail on it.
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not valid JSON in UTF-8", reason="json") from None
    if not _is_object(body):
        raise RequestError(400, "the body must be a JSON object", reason="json")
    body = {name: value for name, value in body.items() if name not in _IGNORED}
    try:
        request = KINDS[kind].model_validate(body)
    except ValidationError as error:
        raise _describe(error) from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply", reason="limit") from None
    check_limits(request, settings)
    return request


def engine_body(request: CompletionBody) -> dict[str, Any]:
    """The body that the engine gets: what the client set; a stream always ends with the tokens used."""
    body = request.model_dump(mode="json", exclude_unset=True, by_alias=True)
    body.pop("best_of", None)
    if request.stream:
        body["stream_options"] = (body.get("stream_options") or {}) | {"include_usage": True}
    return body


def _is_object(body: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(body, dict)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _describe(error: ValidationError) -> RequestError:
    # The branch of a union that came closest is the one with the longest path.
    problem = max(
        error.errors(include_url=False, include_input=False, include_context=False),
        key=lambda problem: len(problem["loc"]),
    )
    param = ".".join(_place(problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return RequestError(400, f"{param}: not supported by this endpoint", param=param, reason="field")
    message = f"{param}: {problem['msg']}" if param else problem["msg"]
    return RequestError(400, message, param=param or None, reason="field")


def _place(loc: tuple[int | str, ...]) -> Iterator[str]:
    """The names in a pydantic location, without those of branches of unions."""
    for before, part in zip((None, *loc), loc, strict=False):
        is_tag = isinstance(before, int) and part in ("text", "image_url")
        if not is_tag and not (isinstance(part, str) and (part == "str" or "[" in part)):
            yield str(part)[:64]
