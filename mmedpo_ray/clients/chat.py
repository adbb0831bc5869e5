"""Chat requests to an OpenAI-compatible endpoint: many in flight, paced, retried, counted.

The ``openai`` client does the protocol, the pauses between retries (growing, with jitter) and their ``Retry-After``. What it
cannot know is done here: which failures are the user's to mend, which belong to one row, and which may pass when tried again.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeGuard

from mmedpo_ray.clients.http import async_client
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.io.text import storable

# Drop reason of a row that the endpoint did not answer although it may at another time.
TRANSIENT = "endpoint_failed"
# Drop reason of a row whose request the endpoint will not take (too long, filtered).
REFUSED = "endpoint_refused"
# Drop reason of a row whose answer is not what an OpenAI-compatible endpoint sends, or no text that can be stored.
UNREADABLE = "endpoint_unreadable"

# Statuses that the client retries; after the last retry another run may still succeed.
_RETRIED_BELOW_500 = frozenset({408, 409, 429})
# Error codes that no retry cures, whatever the status.
_HOPELESS = {
    "insufficient_quota": "has no quota left for this key. Raise the quota, then run again; finished rows are kept",
    "billing_hard_limit_reached": "has reached its billing limit. Raise it, then run again; finished rows are kept",
}
# Refusals that say something about one request, not about the settings: by status, by code, and by the message where a server
# names no code (vLLM).
_OWN_STATUSES = frozenset({413})
_OWN_CODES = frozenset(
    {
        "context_length_exceeded",
        "string_above_max_length",
        "exceed_context_size_error",
        "content_filter",
        "content_policy_violation",
    }
)
_TOO_LONG = re.compile(r"maximum (?:context|model) length|context (?:length|size|window)", re.IGNORECASE)
# Requests without one answer that show that the settings are at fault and not a few rows.
_FEWEST_FOR_HOPELESS = 8
# The same where not even the form is that of an answer: a page, at a wrong address.
_FEWEST_FOR_FOREIGN = 2
# What a count above it counts is no tokens; the columns end at 2^63.
_MOST_TOKENS = 2**40
_FOREIGN = "no chat completion"
_MALFORMED = "malformed chat completion"
# Failures one after the other that mean an outage: at least these, and all slots twice.
_FEWEST_FOR_OUTAGE = 16
# What may be shown of an error body: an identifier, never a sentence, which could repeat the texts sent.
_IDENTIFIER = re.compile(r"[\w.\-]{1,60}")


@dataclass(frozen=True)
class ChatRequest:
    """One chat request.

    Attributes:
        messages: in OpenAI's form.
        schema: JSON schema that the answer must follow; None: free text.
        seed: sampling seed, where the endpoint knows one; not sent at temperature 0, where nothing is drawn.
    """

    messages: list[dict[str, Any]]
    schema: dict[str, Any] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """An answer, with the tokens that the endpoint counted."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Failure:
    """No usable answer.

    Attributes:
        reason: drop reason; :data:`TRANSIENT` where another run may succeed.
        detail: what happened, without the texts.
        input_tokens: of an answer that was paid for and could not be used, else 0.
        output_tokens: the same.
    """

    reason: str
    detail: str
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Usage:
    """What a client sent and was charged for.

    Attributes:
        requests: HTTP requests sent, retries included.
        retries: those of them that repeat another.
        input_tokens: as the endpoint counts, of all answers, also of unusable ones.
        output_tokens: the same.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    @classmethod
    def of(cls, figures: dict[str, Any]) -> Usage:
        """The counters in what :meth:`figures` made."""
        return cls(**{item.name: figures.get(item.name, 0) for item in fields(cls)})

    def figures(self, settings: EndpointConfig) -> dict[str, Any]:
        """For a manifest: the counters, the model, and the cost at the configured prices in US dollars."""
        cost = (
            self.input_tokens * settings.usd_per_million_input
            + self.output_tokens * settings.usd_per_million_output
        ) / 1e6
        return {"model": settings.model, **asdict(self), "cost_usd": round(cost, 6)}


def read_key(settings: EndpointConfig) -> str | None:
    """The key that the settings name, from this process's environment; None where there is none and none is needed.

    Raises:
        UserError: OpenAI's own endpoint is meant and its key is not set.
    """
    key = os.environ.get(settings.api_key_env)
    if not key and not _base_url(settings):
        raise UserError(
            f"no key for {settings.model}: set the environment variable {settings.api_key_env}, or base_url to a server "
            "that needs none."
        )
    return key or None


def as_data(record: dict[str, Any]) -> str:
    """A record as one line of ASCII JSON that holds no character with which chat templates mark turns.

    Texts written by others go into a prompt in this form: none can end its JSON string, open a turn of its own, or spell
    a special token. That nothing in it is an instruction must be said beside it.

    Args:
        record: strings, numbers and further records; no lists, whose brackets would be escaped as well.
    """
    text = json.dumps(record, ensure_ascii=True)
    # Without lists these occur inside strings only, where an escape means the same.
    for letter in "<>[]|&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def read_json(text: str | bytes, **options: Any) -> Any:
    """A JSON value written by others; None where the text is none, or nests too deep to be read.

    Args:
        options: of :func:`json.loads`.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError):
        return None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8, and so a table, can hold: JSON allows half of a surrogate pair, UTF-8 does not."""
    return isinstance(value, str) and storable(value) == value


class EndpointClient:
    """Sends chat requests; one instance serves a Ray actor. Pace, connections and counters last as long as the instance.

    Args:
        settings: address, model, limits.
        key: the key; None: from the environment of this process.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """

    def __init__(self, settings: EndpointConfig, key: str | None = None) -> None:
        import openai

        self._openai = openai
        self._settings = settings
        self._place = _base_url(settings) or "OpenAI"
        # A local server takes any key, the client refuses none.
        self._key = key or read_key(settings) or "none"
        self._runner = asyncio.Runner()
        self._client: Any = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._pace = Pace(settings.requests_per_minute)
        self._usage = Usage()
        self._reached = False
        self._answered = False
        # Failures before the first answer that may be due to the settings, by reason and detail.
        self._suspects: Counter[tuple[str, str]] = Counter()
        self._failures_in_a_row = 0
        self._stopping = False

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        """Answers to the requests, in order.

        Raises:
            UserError: the address, the key or the model name is wrong, or nothing answers, so that no request can succeed.
        """
        return self._runner.run(self._complete(requests))

    def take_usage(self) -> Usage:
        """What was sent and charged since the last call."""
        taken, self._usage = self._usage, Usage()
        return taken

    def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            self._runner.run(self._client.close())
        self._runner.close()

    async def _complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        if self._client is None:
            self._client = self._openai.AsyncOpenAI(
                base_url=_base_url(self._settings),
                api_key=self._key,
                timeout=self._settings.timeout_s,
                max_retries=self._settings.retries,
                # Every try passes here, so that retries are paced and counted as well.
                http_client=async_client(
                    _base_url(self._settings), event_hooks={"request": [self._before_try]}
                ),
            )
        self._stopping = False
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(request)) for request in requests]
        except* UserError as errors:
            raise errors.exceptions[0] from None
        answers = [task.result() for task in tasks]
        self._refuse_hopeless()
        return answers

    async def _before_try(self, request: Any) -> None:
        await self._pace.wait()
        self._usage.requests += 1
        self._usage.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def _one(self, request: ChatRequest) -> Completion | Failure:
        async with self._slots:
            if self._stopping:
                # The slot was freed by a failure of all; being cancelled comes a moment later.
                raise asyncio.CancelledError
            try:
                answer = await self._ask(request)
            except UserError:
                self._stopping = True
                raise
        self._usage.input_tokens += answer.input_tokens
        self._usage.output_tokens += answer.output_tokens
        if isinstance(answer, Failure) and answer.reason == TRANSIENT:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= max(_FEWEST_FOR_OUTAGE, 2 * self._settings.concurrency):
                raise UserError(
                    f"{self._place} failed {self._failures_in_a_row} requests one after the other, each tried "
                    f"{self._settings.retries + 1} times (last: {answer.detail}). Run again when it answers; finished "
                    "rows are kept."
                )
        else:
            self._failures_in_a_row = 0
        return answer

    async def _ask(self, request: ChatRequest) -> Completion | Failure:
        openai = self._openai
        try:
            # Unparsed, as the client takes what it is sent for what it should be.
            response = await self._client.chat.completions.with_raw_response.create(
                **self._arguments(request)
            )
        except openai.APITimeoutError as error:
            if not self._reached:
                self._unreachable(error)
            return Failure(TRANSIENT, f"no answer within {self._settings.timeout_s:g} s")
        except openai.APIConnectionError as error:
            if not self._reached:
                self._unreachable(error)
            return Failure(TRANSIENT, "connection failed")
        except openai.APIStatusError as error:
            self._reached = True
            return self._refused(error)
        except (ValueError, RecursionError):
            # An error body that nests too deep for the client.
            self._reached = True
            return self._suspect(Failure(UNREADABLE, _MALFORMED))
        self._reached = True
        answer = _read(response.content, self._settings.max_tokens)
        if isinstance(answer, Failure) and answer.detail in (_FOREIGN, _MALFORMED):
            return self._suspect(answer)
        self._answered = True
        return answer

    def _arguments(self, request: ChatRequest) -> dict[str, Any]:
        settings = self._settings
        arguments: dict[str, Any] = {
            "model": settings.model,
            "messages": request.messages,
            settings.max_tokens_name: settings.max_tokens,
        }
        if settings.temperature is not None:
            arguments["temperature"] = settings.temperature
        if request.seed is not None and settings.temperature != 0:
            arguments["seed"] = request.seed
        if request.schema is not None:
            arguments["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema, "strict": True},
            }
        return arguments

    # ------------------------------------------------------------------ failures

    def _refused(self, error: Any) -> Failure:
        status, code = error.status_code, _code(error)
        if code in _HOPELESS:
            raise UserError(f"{self._place} {_HOPELESS[code]}.") from None
        if status in (401, 403):
            raise UserError(
                f"{self._place} refuses the key in {self._settings.api_key_env} (HTTP {status}). Set a valid one."
            ) from None
        if status == 404 or code == "model_not_found":
            raise UserError(
                f"{self._place} does not know the model {self._settings.model!r} or is no OpenAI-compatible endpoint "
                f"(HTTP {status}). Check base_url (it ends in /v1) and model."
            ) from None
        detail = f"HTTP {status}" + (f" {code}" if code else "")
        if status >= 500 or status in _RETRIED_BELOW_500:
            return Failure(TRANSIENT, detail)
        refusal = Failure(REFUSED, detail)
        return refusal if _is_of_the_row(error) else self._suspect(refusal)

    def _unreachable(self, error: Any) -> NoReturn:
        cause = type(error.__cause__ or error).__name__
        raise UserError(
            f"{self._place} cannot be reached ({cause}, {self._settings.retries + 1} tries of at most "
            f"{self._settings.timeout_s:g} s). Start the server, or correct base_url (where it is not set, OPENAI_BASE_URL); "
            "it ends in /v1."
        ) from None

    def _suspect(self, failure: Failure) -> Failure:
        """Counts a failure that may be that of every request. A wrong address is not asked for all rows."""
        self._suspects[failure.reason, failure.detail] += 1
        if not self._answered and self._suspects[UNREADABLE, _FOREIGN] >= _FEWEST_FOR_HOPELESS:
            self._refuse_hopeless()
        return failure

    def _refuse_hopeless(self) -> None:
        """Raises where requests were refused for one reason again and again and none was answered: it lies in the settings."""
        if self._answered or not self._suspects:
            return
        ((reason, detail), count) = self._suspects.most_common(1)[0]
        if count < (_FEWEST_FOR_FOREIGN if detail == _FOREIGN else _FEWEST_FOR_HOPELESS):
            return
        if reason == UNREADABLE:
            raise UserError(
                f"{self._place} answers, but not as an OpenAI-compatible endpoint does ({detail}). Check base_url (it ends in "
                "/v1)."
            )
        raise UserError(
            f"{self._place} refuses every request ({detail}). Check what model {self._settings.model!r} takes: "
            "JSON schemas (structured outputs), temperature, max_tokens (some models want "
            "max_tokens_name=max_completion_tokens and temperature=null)."
        )


def _read(body: bytes, max_tokens: int) -> Completion | Failure:
    """The answer in the body of a response, whose every part may be of another type than the protocol has it."""
    answer = read_json(body)
    if not isinstance(answer, dict) or not ("choices" in answer or "error" in answer):
        return Failure(UNREADABLE, _FOREIGN)
    spent = _tokens(answer.get("usage"))
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Failure(UNREADABLE, _MALFORMED, *spent)
    finish, text = choice.get("finish_reason"), _content(message)
    if finish == "length":
        return Failure("endpoint_answer_cut", f"after max_tokens={max_tokens}", *spent)
    if finish == "content_filter" or _declines(message):
        return Failure(REFUSED, "declined by the model or its content filter", *spent)
    if text is None:
        return Failure(UNREADABLE, _MALFORMED, *spent)
    if not text.strip():
        return Failure("endpoint_empty_answer", f"finish reason {_identifier(finish) or 'unknown'}", *spent)
    if not is_text(text):
        return Failure(UNREADABLE, "text that is no Unicode", *spent)
    return Completion(text, *spent)


def _content(message: dict[str, Any]) -> str | None:
    """The text of a message, that of its text parts where it has parts; None where it is neither."""
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    if not all(isinstance(part, dict) for part in content):
        return None
    texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(texts) else None


def _declines(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return bool(message.get("refusal")) or any(
        isinstance(part, dict) and part.get("type") == "refusal" for part in parts
    )


def _tokens(usage: Any) -> tuple[int, int]:
    """Tokens of prompt and answer; 0 for what is no count."""
    counts = usage if isinstance(usage, dict) else {}
    return _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))


def _count(value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value <= _MOST_TOKENS and value == int(value) else 0


def _base_url(settings: EndpointConfig) -> str | None:
    return settings.base_url or os.environ.get("OPENAI_BASE_URL") or None


def _code(error: Any) -> str:
    """The error's code as an identifier; its message may repeat the texts."""
    body = error.body if isinstance(error.body, dict) else {}
    return _identifier(body.get("code")) or _identifier(body.get("type"))


def _identifier(value: Any) -> str:
    return value if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else ""


def _is_of_the_row(error: Any) -> bool:
    """Whether a refusal speaks of this request alone, so that another may pass."""
    if error.status_code in _OWN_STATUSES or _code(error) in _OWN_CODES:
        return True
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    return isinstance(message, str) and _TOO_LONG.search(message) is not None


class Pace:
    """Spreads the starts of requests evenly, at most ``per_minute``; None: as fast as they come."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = time.monotonic()

    async def wait(self) -> None:
        """Returns when the next request may start."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap
        if start > now:
            await asyncio.sleep(start - now)


class UsageLog:
    """Counters in a folder, one small file a batch: what a crash interrupted was paid for all the same.

    Args:
        folder: of the stage's attempt; made by the first entry.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add(self, usage: Usage) -> None:
        """Writes the counters of a batch."""
        path = storage.join(self.folder, f"{uuid.uuid4().hex}.json")
        storage.write_bytes(path, json.dumps(asdict(usage)).encode())

    def total(self) -> Usage:
        """The sum of all entries."""
        total = Usage()
        for path in storage.list_files(self.folder, ".json"):
            total += Usage(**json.loads(storage.read_bytes(path)))
        return total
