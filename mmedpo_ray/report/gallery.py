"""Examples for the page: pairs over the whole range of weights, with small copies of their images inlined."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from PIL import Image

from mmedpo_ray.io import images

_LONGEST_SIDE = 320
_HEAT_OPACITY = 0.6
_LONGEST_TEXT = 600


class Thumbnails:
    """Makes small inlined copies of images until a budget of bytes is used up.

    Args:
        budget: bytes of data URIs in all.
    """

    def __init__(self, budget: int = 1_800_000) -> None:
        self._left = budget
        self.left_out = 0

    def of(self, uri: str | None, heat_map_uri: str | None = None) -> str | None:
        """The image as a data URI, with a heat map over it if given; None if it cannot be shown."""
        if uri is None or self._left <= 0:
            self.left_out += uri is not None
            return None
        try:
            image = images.load_rgb(uri)
            if heat_map_uri is not None:
                image = overlay(image, images.load_image(heat_map_uri))
        except (images.ImageError, OSError):
            return None
        address = data_uri(image)
        self._left -= len(address)
        return address


def overlay(image: Image.Image, heat_map: Image.Image) -> Image.Image:
    """Lays a heat map (8-bit, 255 = 1.0) over an image, the more opaque the hotter."""
    heat = np.asarray(heat_map.convert("L").resize(image.size), dtype=np.float64) / 255.0
    colours = np.asarray(colormaps["inferno"](heat))[..., :3] * 255.0
    opacity = (heat * _HEAT_OPACITY)[..., None]
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    return Image.fromarray(np.round(grey * (1 - opacity) + colours * opacity).astype(np.uint8))


def data_uri(image: Image.Image) -> str:
    """A small copy as a data URI: PNG for small images, which compression would blur, else JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= _LONGEST_SIDE // 2:
        image.save(buffer, format="PNG")
        kind = "png"
    else:
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        image.save(buffer, format="JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def text_pairs(scored: pa.Table, count: int, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Text pairs from the lowest to the highest weight, evenly spaced."""
    rows = _spread(scored.filter(pc.equal(scored["kind"], "text")), count)
    for row in rows:
        row["image"] = thumbnails.of(row["image_uri"])
        row["history"] = row["history"] or []
        for key in ("question", "chosen", "rejected"):
            row[key] = _shorten(row[key])
    return rows


def visual_pairs(scored: pa.Table, count: int, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Visual pairs from the lowest to the highest weight: original, heat map over it, noised image."""
    rows = _spread(scored.filter(pc.equal(scored["kind"], "visual")), count)
    for row in rows:
        row["original"] = thumbnails.of(row["image_uri"])
        row["heat"] = thumbnails.of(row["image_uri"], row["heat_map_uri"]) if row["heat_map_uri"] else None
        row["noised"] = thumbnails.of(row["rejected_image_uri"])
        row["noise_words"] = _noise_words(row["noise"])
        for key in ("question", "chosen"):
            row[key] = _shorten(row[key])
    return rows


def _spread(table: pa.Table, count: int) -> list[dict[str, Any]]:
    if not table.num_rows or not count:
        return []
    order = pc.sort_indices(table, sort_keys=[("weight", "descending"), ("pair_id", "ascending")])
    places = np.unique(np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).round().astype(int))
    return table.take(order.take(pa.array(places))).to_pylist()


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT].rstrip() + " …"


def _noise_words(noise: str | None) -> str:
    """The noise parameters as "name value, …"."""
    try:
        parameters = json.loads(noise or "{}")
    except json.JSONDecodeError:
        return ""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in parameters.items()
        if not isinstance(value, dict | list)
    )
