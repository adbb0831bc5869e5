"""Chat requests to an OpenAI-compatible endpoint: many in flight, paced, retried, counted.

The ``openai`` client does the protocol, the pauses between retries and their ``Retry-After``. What it cannot know is done
here: which failures are the user's to mend, which belong to one row, and which may pass when tried again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.settings.endpoint import EndpointConfig

# Drop reason of a row that the endpoint did not answer although it may at another time.
TRANSIENT = "endpoint_failed"


@dataclass(frozen=True)
class ChatRequest:
    """One chat request.

    Attributes:
        messages: in OpenAI's form.
        schema: JSON schema that the answer must follow; None: free text.
        seed: sampling seed, where the endpoint knows one.
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
    """

    reason: str
    detail: str


class EndpointClient:
    """Sends chat requests; one instance serves a Ray actor.

    Args:
        settings: address, model, limits.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """

    def __init__(self, settings: EndpointConfig) -> None:
        import openai

        self._openai = openai
        self._settings = settings
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get(settings.api_key_env)
        if not key and not base_url:
            raise UserError(
                f"no key for {settings.model}: set the environment variable {settings.api_key_env}, or base_url to a server "
                "that needs none."
            )
        self._place = base_url or "OpenAI"
        self._arguments: dict[str, Any] = {
            "base_url": base_url,
            # A local server takes any key, the client refuses none.
            "api_key": key or "none",
            "timeout": settings.timeout_s,
            "max_retries": settings.retries,
        }

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        """Answers to the requests, in order.

        Raises:
            UserError: the address, the key or the model name is wrong, so that no request can succeed.
        """
        return asyncio.run(self._complete(requests))

    async def _complete(self, requests: Sequence[ChatRequest]) -> list[Completion | Failure]:
        slots = asyncio.Semaphore(self._settings.concurrency)
        pace = Pace(self._settings.requests_per_minute)
        async with self._openai.AsyncOpenAI(**self._arguments) as client:

            async def one(request: ChatRequest) -> Completion | Failure:
                async with slots:
                    await pace.wait()
                    return await self._one(client, request)

            return list(await asyncio.gather(*(one(request) for request in requests)))

    async def _one(self, client: Any, request: ChatRequest) -> Completion | Failure:
        openai, settings = self._openai, self._settings
        extra: dict[str, Any] = {}
        if request.schema is not None:
            extra["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema, "strict": True},
            }
        if request.seed is not None:
            extra["seed"] = request.seed
        try:
            answer = await client.chat.completions.create(
                model=settings.model,
                messages=request.messages,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                **extra,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{self._place} refuses the key in {settings.api_key_env} (HTTP {error.status_code}). Set a valid one."
            ) from None
        except openai.NotFoundError:
            raise UserError(
                f"{self._place} does not know the model {settings.model!r} or is no OpenAI-compatible endpoint (HTTP 404). "
                "Check base_url (it ends in /v1) and model."
            ) from None
        except (openai.APITimeoutError, openai.APIConnectionError) as error:
            return Failure(TRANSIENT, type(error).__name__)
        except openai.APIStatusError as error:
            if error.status_code == 429 or error.status_code >= 500:
                return Failure(TRANSIENT, f"HTTP {error.status_code}")
            return Failure("endpoint_refused", f"HTTP {error.status_code}")
        choice = answer.choices[0] if answer.choices else None
        if choice is None or not (choice.message.content or "").strip():
            return Failure("endpoint_empty_answer", f"finish reason {choice and choice.finish_reason}")
        if choice.finish_reason == "length":
            return Failure("endpoint_answer_cut", f"after max_tokens={settings.max_tokens}")
        usage = answer.usage
        return Completion(
            choice.message.content,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )


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
