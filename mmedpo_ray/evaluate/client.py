"""Asks an OpenAI-compatible endpoint about images, many questions at a time.

A request is repeated with growing pauses if that can help (no connection, time-out, too many requests, a
server's failure). One that fails for good costs its own row only.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import openai
from PIL import Image

from mmedpo_ray.clients.chat import first_choice, text_of
from mmedpo_ray.clients.http import HttpClient, error_code
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.settings import EvaluateConfig
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import MAX_PIXELS, encode_png, load_image
from mmedpo_ray.io.plain_images import plain_bytes, plain_file

# Reasons for no answer that another try may cure; a refused image or request stays refused.
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
        alteration: what is done to the image before it is sent; hashable; None: nothing.
    """

    answer_id: str
    model: str
    image_uri: str
    text: str
    alteration: Callable[[Image.Image], Image.Image] | None = None


@dataclass(frozen=True)
class Reply:
    """The answer to a question, or why there is none.

    Attributes:
        answer_id: of the question.
        text: the answer, stripped; None if there is none.
        seconds: latency, retries included.
        reason: why there is none (``image_missing``, ``request_timeout``, ``http_400``, …).
        detail: where and what, without question or answer.
    """

    answer_id: str
    text: str | None
    seconds: float
    reason: str | None = None
    detail: str | None = None


class QuestionClient:
    """Asks the models of one endpoint.

    Args:
        base_url: ``http://host:port/v1``.
        settings: concurrency, time-outs, sampling.
        max_pixels: larger images are refused undecoded.
        key: API key; None: OPENAI_API_KEY, for an endpoint behind a gateway.
    """

    def __init__(
        self, base_url: str, settings: EvaluateConfig, max_pixels: int = MAX_PIXELS, key: str | None = None
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._key = key or os.environ.get("OPENAI_API_KEY", "none")
        self._settings = settings
        # Questions about one image follow each other, so the last images are kept.
        self._image = lru_cache(_CACHED_IMAGES)(
            lambda uri, alteration: image_data_url(uri, max_pixels, alteration)
        )

    def model_names(self) -> list[str]:
        """Names of the models that the endpoint offers.

        Raises:
            UserError: it cannot be reached or is no OpenAI endpoint.
        """
        return asyncio.run(self._model_names())

    async def _model_names(self) -> list[str]:
        http = self._http()
        try:
            return await http.model_names()
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(
                f"the endpoint {self._base_url} does not list its models ({type(error).__name__}). Check "
                "that it runs and that evaluate.endpoint ends in /v1."
            ) from error
        finally:
            await http.close()

    async def ask(self, questions: Sequence[Question]) -> AsyncIterator[Reply]:
        """Answers as they come, each question exactly once."""
        http = self._http()

        async def work(question: Question) -> Reply:
            started = time.monotonic()
            text, reason, detail = await self._answer(http, question)
            return Reply(question.answer_id, text, time.monotonic() - started, reason, detail)

        try:
            async for reply in http.as_completed(work, questions):
                yield reply
        finally:
            await http.close()

    def _http(self) -> HttpClient:
        return HttpClient(self._base_url, self._key, self._settings)

    async def _answer(
        self, http: HttpClient, question: Question
    ) -> tuple[str | None, str | None, str | None]:
        """The answer, the reason for none, and its detail."""
        try:
            url = self._image(question.image_uri, question.alteration)
            image = {"type": "image_url", "image_url": {"url": url}}
            body = await http.chat(
                model=question.model,
                max_tokens=self._settings.max_tokens,
                temperature=self._settings.temperature,
                messages=[{"role": "user", "content": [image, {"type": "text", "text": question.text}]}],
            )
        except ImageError as error:
            return None, error.reason, error.detail
        except openai.APITimeoutError:
            return None, "request_timeout", f"{self._settings.timeout_s:.0f} s"
        except openai.APIStatusError as error:
            return None, f"http_{error.status_code}", error_code(error) or type(error).__name__
        except openai.APIError as error:
            return None, "request_failed", type(error).__name__
        _, choice, message = first_choice(body)
        if not choice or (text := text_of(message)) is None:
            return None, "empty_response", "no choices" if not choice else "malformed message"
        return text.strip(), None, None


def image_data_url(
    uri: str,
    max_pixels: int = MAX_PIXELS,
    alteration: Callable[[Image.Image], Image.Image] | None = None,
) -> str:
    """An image file as a ``data:`` URL; see :func:`mmedpo_ray.io.plain_images.plain_bytes`.

    Args:
        uri: image file.
        max_pixels: a larger image is not decoded.
        alteration: what is done to the image, in its own mode, first.

    Raises:
        ImageError: the file is missing, damaged or too large, or the alteration needs what it has not.
    """
    if alteration is None:
        data, kind = plain_bytes(uri, max_pixels)
    else:
        altered = encode_png(alteration(load_image(uri, max_pixels)))
        data, kind = plain_file(altered, uri, max_pixels)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
