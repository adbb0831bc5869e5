"""Where a visual tool sees the lesion, for the page's overlay: one replica holds the tool.

The tool is that of `curate.visual`, so the page shows what the noise of visual pairs would cover.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import decode, encode_png
from mmedpo_ray.serve.request_error import RequestError

log = logging.getLogger(__name__)

_MOST_WAITING = 16

HeatMaps = Callable[[bytes, str, str], Awaitable[tuple[bytes, float]]]
"""Image file, question and answer → PNG of the heat map (grey, 255 the hottest) and confidence, 0 to 1.

Raises:
    RequestError: the tool cannot be used on this image, or does not run.
"""


class HeatMapRequest(BaseModel):
    """What the page asks: where the tool looks for this question, given an answer to it."""

    model_config = ConfigDict(extra="forbid")

    image: str
    question: str = Field(max_length=4000)
    answer: str = Field("", max_length=20_000)


class HeatMapTool:
    """A visual tool in a Serve replica.

    Args:
        settings: all settings, as plain data.
        max_pixels: of an image.
    """

    def __init__(self, settings: dict[str, Any], max_pixels: int) -> None:
        config = Config.model_validate(settings)
        # Tools with a model always get this many images.
        config.curate.visual.batch_images = 1
        name = config.serve.heat_map
        assert name is not None
        self._tool = TOOLS[name](config)
        self._max_pixels = max_pixels

    def __call__(self, data: bytes, question: str, answer: str) -> tuple[bytes, float] | str:
        """PNG of the heat map and confidence; a text says why there is none."""
        try:
            image = decode(data, "the image", self._max_pixels)
        except ImageError as error:
            return error.reason
        row = {"sample_id": "page", "question": question, "answer": answer or "Yes.", "mask_uri": None}
        [found] = self._tool.localise([image], [row])
        if found.heat_map is None:
            return str(found.problem)
        grey = Image.fromarray(np.round(found.heat_map * 255).astype(np.uint8))
        return encode_png(grey), float(found.confidence)


def build_heat_maps(config: Config, max_pixels: int) -> Application | None:
    """The deployment of ``serve.heat_map``; None if there is none.

    Raises:
        UserError: there is no such tool.
    """
    if config.serve.heat_map is None:
        return None
    try:
        TOOLS.check(config.serve.heat_map)
    except ValueError as error:
        raise UserError(f"serve.heat_map: {error}") from None
    make = serve.deployment(
        name="heat_map", num_replicas=1, max_ongoing_requests=1, max_queued_requests=_MOST_WAITING
    )
    return make(HeatMapTool).bind(config.model_dump(mode="json"), max_pixels)


def ask_tool(handle: DeploymentHandle) -> HeatMaps:
    """Heat maps from the deployment."""

    async def heat_map(data: bytes, question: str, answer: str) -> tuple[bytes, float]:
        try:
            found = await handle.remote(data, question, answer)
        except RayError as error:
            # Its text may quote the request.
            log.error("the visual tool failed: %s", type(error).__name__)
            raise RequestError(503, "the visual tool does not answer; try again", reason="tool") from None
        if isinstance(found, str):
            raise RequestError(400, f"the visual tool cannot use this image: {found}", reason="tool")
        return found

    return heat_map
