"""Batches of chat requests to an OpenAI-compatible endpoint, and what each failure means.

A failure is one of three: only the user can fix it (wrong address, key, model: an error ends the stage), it
    belongs to one row (too long, filtered: a drop reason), or it may pass when tried again
    (:data:`TRANSIENT`).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mmedpo_ray.clients.http import HttpClient, as_identifier, error_code
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.untrusted_text import is_text, read_json
from mmedpo_ray.clients.usage import Usage
from mmedpo_ray.errors import UserError

# Drop reasons. The endpoint did not answer but may do so later.
TRANSIENT = "endpoint_failed"
# The endpoint does not accept this row's request (too long, filtered).
REFUSED = "endpoint_refused"
# The answer is not what an OpenAI-compatible endpoint sends, or is no text that can be stored.
UNREADABLE = "endpoint_unreadable"

# Statuses below 500 that the client retries; after the last retry another run may still succeed.
_RETRIED_BELOW_500 = frozenset({408, 409, 429})
# Error codes that no retry cures, whatever the status.
_HOPELESS = {
    "insufficient_quota": "has no quota left for this key. Raise the quota, then run again; finished rows "
    "are kept",
    "billing_hard_limit_reached": "has reached its billing limit. Raise it, then run again; finished rows "
    "are kept",
}
# Refusals of one request that say nothing about the settings: by status, by code, and by the message if a
# server sends no code (vLLM).
_ROW_STATUSES = frozenset({413})
_ROW_CODES = frozenset(
    {
        "context_length_exceeded",
        "string_above_max_length",
        "exceed_context_size_error",
        "content_filter",
        "content_policy_violation",
    }
)
_TOO_LONG = re.compile(r"maximum (?:context|model) length|context (?:length|size|window)", re.IGNORECASE)
_FOREIGN = "no chat completion"
_MALFORMED = "malformed chat completion"
# So many equal failures before the first answer mean that the settings are wrong; of bodies that are no chat
# completion at all (a web page at a wrong address), fewer.
_SUSPECTS_FOR_HOPELESS = 8
_FOREIGN_FOR_HOPELESS = 2
# So many failures in a row, and twice the concurrency, mean an outage.
_FAILURES_FOR_OUTAGE = 16
# A larger token count is an error of the endpoint; the columns end at 2^63.
_MOST_TOKENS = 2**40


@dataclass(frozen=True)
class ChatRequest:
    """One chat request.

    Attributes:
        messages: in OpenAI's form.
        schema: JSON schema that the answer must follow; None: free text.
        seed: sampling seed, if the endpoint knows one; not sent at temperature 0, where nothing is drawn.
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
        reason: drop reason; :data:`TRANSIENT` if another run may succeed.
        detail: what happened, without any question or answer.
        input_tokens: of an answer that was paid for and could not be used, else 0.
        output_tokens: the same.
    """

    reason: str
    detail: str
    input_tokens: int = 0
    output_tokens: int = 0


def read_key(settings: EndpointConfig) -> str | None:
    """The key that the settings name, from the environment; None if there is none and none is needed.

    Raises:
        UserError: OpenAI's own endpoint is meant and its key is not set.
    """
    key = os.environ.get(settings.api_key_env)
    if not key and not _base_url(settings):
        raise UserError(
            f"no key for {settings.model}: set the environment variable {settings.api_key_env}, or base_url "
            "to a server that needs none."
        )
    return key or None


class ChatClient:
    """Sends batches of chat requests; its pace, connections and counters last as long as the instance.

    Args:
        settings: address, model, limits.
        key: the key; None: from the environment of this process.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """

    def __init__(self, settings: EndpointConfig, key: str | None = None) -> None:
        self._settings = settings
        self._place = _base_url(settings) or "OpenAI"
        self._runner = asyncio.Runner()
        # A local server accepts any key, the client refuses none.
        key = key or read_key(settings) or "none"
        self._http = HttpClient(_base_url(settings), key, settings, settings.requests_per_minute)
        self._reached = False
        self._answered = False
        # Failures before the first answer that the settings may have caused, by reason and detail.
        self._suspects: Counter[tuple[str, str]] = Counter()
        self._failures_in_a_row = 0

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        """Answers to the requests, in order.

        Raises:
            UserError: the address, the key or the model name is wrong, or nothing answers, so no request can
                succeed.
        """
        answers = self._runner.run(self._complete(requests))
        self._refuse_hopeless()
        return answers

    def take_usage(self) -> Usage:
        """What was sent and charged since the last call."""
        taken, self._http.usage = self._http.usage, Usage()
        return taken

    def close(self) -> None:
        """Closes the connections."""
        self._runner.run(self._http.close())
        self._runner.close()

    async def _complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        async def answer(numbered: tuple[int, ChatRequest]) -> tuple[int, Completion | Failure]:
            return numbered[0], await self._answer(numbered[1])

        found = dict([item async for item in self._http.as_completed(answer, enumerate(requests))])
        return [found[number] for number in range(len(requests))]

    async def _answer(self, request: ChatRequest) -> Completion | Failure:
        answer = await self._ask(request)
        self._http.usage += Usage(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
        if not isinstance(answer, Failure) or answer.reason != TRANSIENT:
            self._failures_in_a_row = 0
            return answer
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= max(_FAILURES_FOR_OUTAGE, 2 * self._settings.concurrency):
            raise UserError(
                f"{self._place} failed {self._failures_in_a_row} requests one after the other, each tried "
                f"{self._settings.retries + 1} times (last: {answer.detail}). Run again when it answers; "
                "finished rows are kept."
            )
        return answer

    async def _ask(self, request: ChatRequest) -> Completion | Failure:
        import openai

        try:
            body = await self._http.chat(**self._arguments(request))
        except openai.APIConnectionError as error:
            if not self._reached:
                self._refuse_unreachable(error)
            timed_out = isinstance(error, openai.APITimeoutError)
            detail = f"no answer within {self._settings.timeout_s:g} s" if timed_out else "connection failed"
            return Failure(TRANSIENT, detail)
        except openai.APIStatusError as error:
            self._reached = True
            return self._failure_of_status(error)
        except (ValueError, RecursionError):
            # An error body that nests too deep for the client.
            self._reached = True
            return self._suspect(Failure(UNREADABLE, _MALFORMED))
        self._reached = True
        answer = _read(body, self._settings.max_tokens)
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

    def _failure_of_status(self, error: Any) -> Failure:
        status, code = error.status_code, error_code(error)
        if code in _HOPELESS:
            raise UserError(f"{self._place} {_HOPELESS[code]}.") from None
        if status in (401, 403):
            raise UserError(
                f"{self._place} refuses the key in {self._settings.api_key_env} (HTTP {status}). Set a valid "
                "one."
            ) from None
        if status == 404 or code == "model_not_found":
            raise UserError(
                f"{self._place} does not know the model {self._settings.model!r} or is no OpenAI-compatible "
                f"endpoint (HTTP {status}). Check base_url (it ends in /v1) and model."
            ) from None
        detail = f"HTTP {status}" + (f" {code}" if code else "")
        if status >= 500 or status in _RETRIED_BELOW_500:
            return Failure(TRANSIENT, detail)
        refusal = Failure(REFUSED, detail)
        return refusal if _is_of_the_row(error) else self._suspect(refusal)

    def _refuse_unreachable(self, error: Any) -> NoReturn:
        cause = type(error.__cause__ or error).__name__
        raise UserError(
            f"{self._place} cannot be reached ({cause}, {self._settings.retries + 1} tries of at most "
            f"{self._settings.timeout_s:g} s). Start the server, or correct base_url (if it is not set, "
            "OPENAI_BASE_URL); it ends in /v1."
        ) from None

    def _suspect(self, failure: Failure) -> Failure:
        """Counts a failure that all requests may share, so that a wrong address is not asked for all rows."""
        self._suspects[failure.reason, failure.detail] += 1
        if self._suspects[UNREADABLE, _FOREIGN] >= _SUSPECTS_FOR_HOPELESS:
            self._refuse_hopeless()
        return failure

    def _refuse_hopeless(self) -> None:
        """Raises if nothing was answered yet and the same failure came too often for good settings."""
        if self._answered or not self._suspects:
            return
        ((reason, detail), count) = self._suspects.most_common(1)[0]
        if count < (_FOREIGN_FOR_HOPELESS if detail == _FOREIGN else _SUSPECTS_FOR_HOPELESS):
            return
        if reason == UNREADABLE:
            raise UserError(
                f"{self._place} answers, but not as an OpenAI-compatible endpoint does ({detail}). Check "
                "base_url (it ends in /v1)."
            )
        raise UserError(
            f"{self._place} refuses every request ({detail}). Check what model {self._settings.model!r} "
            "accepts: JSON schemas (structured outputs), temperature, max_tokens (some models want "
            "max_tokens_name=max_completion_tokens and temperature=null)."
        )


def first_choice(body: bytes) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]:
    """The parts of a chat completion, each of which may be of another type than the protocol says.

    Returns:
        The completion (None: the body is no chat completion), its first choice and the choice's message ({}:
        malformed).
    """
    answer = read_json(body)
    if not isinstance(answer, dict) or not ("choices" in answer or "error" in answer):
        return None, {}, {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    return answer, choice, message if isinstance(message, dict) else {}


def _read(body: bytes, max_tokens: int) -> Completion | Failure:
    """The answer in the body of a response."""
    answer, choice, message = first_choice(body)
    if answer is None:
        return Failure(UNREADABLE, _FOREIGN)
    spent = _tokens(answer.get("usage"))
    if not isinstance(choice.get("message"), dict):
        return Failure(UNREADABLE, _MALFORMED, *spent)
    finish, text = choice.get("finish_reason"), text_of(message)
    if finish == "length":
        return Failure("endpoint_answer_cut", f"after max_tokens={max_tokens}", *spent)
    if finish == "content_filter" or _declines(message):
        return Failure(REFUSED, "declined by the model or its content filter", *spent)
    if text is None:
        return Failure(UNREADABLE, _MALFORMED, *spent)
    if not text.strip():
        return Failure("endpoint_empty_answer", f"finish reason {as_identifier(finish) or 'unknown'}", *spent)
    if not is_text(text):
        return Failure(UNREADABLE, "text that is no Unicode", *spent)
    return Completion(text, *spent)


def text_of(message: dict[str, Any]) -> str | None:
    """The text of a message or of its text parts; "" without content, None if the content is malformed."""
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


def _is_of_the_row(error: Any) -> bool:
    """Whether a refusal is about this request alone, so that another may pass."""
    if error.status_code in _ROW_STATUSES or error_code(error) in _ROW_CODES:
        return True
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    return isinstance(message, str) and _TOO_LONG.search(message) is not None
