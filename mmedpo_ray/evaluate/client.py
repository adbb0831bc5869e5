"""Asks an OpenAI-compatible endpoint about images, many at a time.

Requests go out in order, at most ``evaluate.concurrency`` at once; a request is repeated with growing pauses where that
can help (no connection, time-out, too many requests, a server's failure). One that fails for good costs its own row only.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import openai

from mmedpo_ray.clients.http import async_client
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.settings import EvaluateConfig
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import MAX_PIXELS, plain_bytes

# Why a request brought no answer that another try may bring; an image or a request that is refused stays so.
RETRY_REASONS = (
    "request_timeout",
    "request_failed",
    "empty_response",
    *(f"http_{status}" for status in (408, 409, 425, 429, 500, 502, 503, 504)),
)

_CACHED_IMAGES = 256


@dataclass(frozen=True)
class Question:
    """One question to one model.

    Attributes:
        answer_id: unique id, carried along.
        model: served name.
        image_uri: image file.
        text: the question.
    """

    answer_id: str
    model: str
    image_uri: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        answer_id: of the question.
        text: the answer, stripped; ``None`` where there is none.
        seconds: latency, repetitions included.
        reason: why there is none (``image_missing``, ``request_timeout``, ``http_400``, …).
        detail: where and what, without question or answer.
    """

    answer_id: str
    text: str | None
    seconds: float
    reason: str | None = None
    detail: str | None = None


class Endpoint:
    """A client of one endpoint.

    Args:
        base_url: ``http://host:port/v1``.
        settings: concurrency, time-outs, sampling.
        max_pixels: larger images are refused undecoded.
    """

    def __init__(self, base_url: str, settings: EvaluateConfig, max_pixels: int = MAX_PIXELS) -> None:
        self._base_url = base_url.rstrip("/")
        self._settings = settings
        self._max_pixels = max_pixels
        self._images: OrderedDict[str, str] = OrderedDict()

    def model_names(self) -> list[str]:
        """Names the endpoint answers for.

        Raises:
            UserError: it cannot be reached or is no OpenAI endpoint.
        """
        return asyncio.run(self._model_names())

    async def _model_names(self) -> list[str]:
        async with self._client() as client:
            try:
                return [model.id async for model in client.models.list()]
            except (openai.OpenAIError, ValueError) as error:
                raise UserError(
                    f"the endpoint {self._base_url} does not list its models ({type(error).__name__}). Check that it "
                    "runs and that evaluate.endpoint ends in /v1."
                ) from error

    async def ask(self, questions: Sequence[Question]) -> AsyncIterator[Reply]:
        """Answers as they come, each question exactly once."""
        todo = iter(questions)
        replies: asyncio.Queue[Reply | BaseException] = asyncio.Queue()

        async def work(client: openai.AsyncOpenAI) -> None:
            # The shared iterator hands every question to one worker only.
            for question in todo:
                await replies.put(await self._ask_one(client, question))

        async with self._client() as client:
            workers = [
                asyncio.create_task(work(client))
                for _ in range(min(self._settings.concurrency, max(1, len(questions))))
            ]
            for worker in workers:
                worker.add_done_callback(
                    lambda task: (
                        replies.put_nowait(error)
                        if not task.cancelled() and (error := task.exception())
                        else None
                    )
                )
            try:
                for _ in range(len(questions)):
                    reply = await replies.get()
                    if isinstance(reply, BaseException):
                        raise reply
                    yield reply
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _client(self) -> openai.AsyncOpenAI:
        # The client repeats what can succeed later, with exponential pauses. The key is a placeholder unless the
        # environment has a real one for an endpoint behind a gateway.
        return openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=self._settings.timeout_s,
            max_retries=self._settings.retries,
            http_client=async_client(self._base_url),
        )

    async def _ask_one(self, client: openai.AsyncOpenAI, question: Question) -> Reply:
        started = time.monotonic()
        try:
            url = self._image(question.image_uri)
            completion = await client.chat.completions.create(
                model=question.model,
                max_tokens=self._settings.max_tokens,
                temperature=self._settings.temperature,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {"type": "text", "text": question.text},
                        ],
                    }
                ],
            )
        except ImageError as error:
            return self._failure(question, started, error.reason, error.detail)
        except openai.APITimeoutError:
            return self._failure(question, started, "request_timeout", f"{self._settings.timeout_s:.0f} s")
        except openai.APIStatusError as error:
            return self._failure(question, started, f"http_{error.status_code}", _code(error))
        except openai.APIError as error:
            return self._failure(question, started, "request_failed", type(error).__name__)
        if not completion.choices:
            return self._failure(question, started, "empty_response", "no choices")
        text = (completion.choices[0].message.content or "").strip()
        return Reply(question.answer_id, text, time.monotonic() - started)

    @staticmethod
    def _failure(question: Question, started: float, reason: str, detail: str) -> Reply:
        return Reply(question.answer_id, None, time.monotonic() - started, reason, detail)

    def _image(self, uri: str) -> str:
        """The image as data URL; questions about one image follow each other, so the last ones are kept."""
        if uri in self._images:
            self._images.move_to_end(uri)
            return self._images[uri]
        url = image_data_url(uri, self._max_pixels)
        self._images[uri] = url
        if len(self._images) > _CACHED_IMAGES:
            self._images.popitem(last=False)
        return url


def image_data_url(uri: str, max_pixels: int = MAX_PIXELS) -> str:
    """An image file as a ``data:`` URL; see :func:`mmedpo_ray.io.images.plain_bytes`.

    Raises:
        ImageError: the file is missing, damaged or too large.
    """
    data, kind = plain_bytes(uri, max_pixels)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _code(error: openai.APIStatusError) -> str:
    """The error's kind; its message may repeat the question."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("type") or body.get("code") or type(error).__name__)[:80]
