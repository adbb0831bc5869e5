"""Routes of the page: its files, decoded images for the viewer, examples, and votes.

Questions go from the page to ``/v1/chat/completions`` like those of any other client.
"""

from __future__ import annotations

import asyncio
import functools
import json
from importlib import resources
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, ValidationError

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import decode, encode_png, to_rgb
from mmedpo_ray.phantom.world import generate
from mmedpo_ray.serve.completions import Completions
from mmedpo_ray.serve.page.heat_map import HeatMapRequest, HeatMaps
from mmedpo_ray.serve.page.votes import Vote, Votes
from mmedpo_ray.serve.request_body import read_body
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

# Nothing from elsewhere, no inline scripts or styles; images of the viewer are blobs and data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "client.js": "text/javascript; charset=utf-8",
}
PUBLIC_ROUTES = ("/", *(f"/page/{name}" for name in _FILES))
_EXAMPLES = 6
_MIB = 2**20
_Model = TypeVar("_Model", bound=BaseModel)


def page_router(
    settings: ServeConfig,
    completions: Completions,
    votes: Votes | None,
    heat_maps: HeatMaps | None,
    max_pixels: int,
) -> APIRouter:
    """The routes of the page.

    Args:
        settings: limits of images.
        completions: whose queue and decoder of images are used.
        votes: where votes are written; None: the page offers no vote.
        heat_maps: of a visual tool; None: the page offers none.
        max_pixels: larger images are refused.
    """
    router = APIRouter()
    one_at_a_time = asyncio.Lock()
    most_pixels = min(max_pixels, settings.max_image_pixels)

    @router.get("/")
    async def index() -> Response:
        return _static("index.html")

    @router.get("/page/examples/{number}")
    async def example(number: int) -> Response:
        if not 0 <= number < _EXAMPLES:
            raise RequestError(404, f"there are examples 0 to {_EXAMPLES - 1}", reason="route")
        return Response(_example(number), media_type="image/png")

    @router.get("/page/settings")
    async def of_page() -> dict[str, Any]:
        return {
            "examples": _EXAMPLES,
            "votes": votes is not None,
            "heat_map": settings.heat_map,
            "max_image_mib": settings.max_image_mib,
        }

    @router.post("/page/decode")
    async def decoded(request: Request) -> Response:
        with completions.admission.enter(_key(request)) as place:
            data = await read_body(request, settings, place, "application/octet-stream")
            if len(data) > settings.max_image_mib * _MIB:
                raise RequestError(
                    413, f"an image has at most {settings.max_image_mib:g} MiB", reason="limit"
                )
            async with one_at_a_time:
                return await asyncio.to_thread(_pixels, data, most_pixels)

    @router.post("/page/votes")
    async def vote(request: Request) -> dict[str, int]:
        if votes is None:
            raise RequestError(404, "votes are switched off (serve.votes_folder)", reason="route")
        with completions.admission.enter(_key(request)) as place:
            given = _read(Vote, await read_body(request, settings, place))
            image, _ = await completions.images.plain_file(given.image, "image")
            return {"votes": await asyncio.to_thread(votes.add, given, image)}

    @router.post("/page/heat_map")
    async def heat_map(request: Request) -> Response:
        if heat_maps is None:
            raise RequestError(404, "there is no visual tool (serve.heat_map)", reason="route")
        with completions.admission.enter(_key(request)) as place:
            asked = _read(HeatMapRequest, await read_body(request, settings, place))
            image, _ = await completions.images.plain_file(asked.image, "image")
            found, confidence = await heat_maps(image, asked.question, asked.answer)
        return Response(found, media_type="image/png", headers={"X-Confidence": f"{confidence:.3f}"})

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise RequestError(404, "there is no such file", reason="route")
        return _static(name)

    return router


def _key(request: Request) -> str:
    return getattr(request.state, "key", "")


def _static(name: str) -> Response:
    content = (resources.files("mmedpo_ray.serve.page") / "static" / name).read_bytes()
    headers = {
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=_FILES[name], headers=headers)


@functools.cache
def _example(number: int) -> bytes:
    [phantom] = [item for place, item in enumerate(generate("test", number + 1, size=256)) if place == number]
    return encode_png(Image.fromarray(phantom.image))


def _pixels(data: bytes, max_pixels: int) -> Response:
    """The pixels of an image file for a canvas, row by row: grey uint16 (little-endian) or RGB bytes."""
    try:
        image = decode(data, "the file", max_pixels)
    except ImageError as error:
        raise RequestError(400, f"{error.reason}: {error.detail}", reason="image") from None
    if image.mode in ("L", "I;16"):
        pixels, kind = np.asarray(image).astype("<u2"), "grey16" if image.mode == "I;16" else "grey8"
    else:
        rgb = np.asarray(to_rgb(image))
        is_grey = bool((rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 1] == rgb[..., 2]).all())
        pixels, kind = (rgb[..., 0].astype("<u2"), "grey8") if is_grey else (rgb, "rgb")
    headers = {"X-Width": str(image.width), "X-Height": str(image.height), "X-Kind": kind}
    return Response(pixels.tobytes(), media_type="application/octet-stream", headers=headers)


def _read(kind: type[_Model], body: bytes) -> _Model:
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise RequestError(400, f"{place}: {problem['msg']}", param=place, reason="field") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not valid JSON", reason="json") from error
