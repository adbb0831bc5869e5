"""An image sheet of visual pairs to look at before curation: ``mmedpo curate --preview N``.

One process, no Ray, only `samples` is read and only ``preview.png`` is written. The pairs on the sheet are
those that `curate` would make of the same samples, from the same tool, seed and settings.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.curate.samples import train_samples
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.visual.stage import NO_FINDING_ASKED, draw_visual_samples
from mmedpo_ray.curate.visual.visual_pairs import PairMaker, VisualPair, visual_pair_id
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.io.images import to_rgb
from mmedpo_ray.io.png import encode_pixels
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder

_COLUMNS = ("original", "heat map", "mask outline", "noised")
_CELL, _GAP, _LINE = 256, 8, 16
_FONT_SIZE = 12
_INK, _PAPER, _OUTLINE = (20, 20, 20), (255, 255, 255), (255, 80, 0)
_HEAT_OPACITY = 0.6
_MOST_ROWS = 64
# Samples tried per row of the sheet, so that the search ends if a tool finds nothing.
_TRIES_PER_ROW = 4


def preview(config: Config, count: int) -> Path:
    """Draws ``count`` visual pairs on ``preview.png``: original, heat map, mask outline, noised image.

    The samples are drawn by the seed over the whole data set. Captions hold ids and parameters; questions and
    answers only with ``report.show_text``. Samples that give no pair are counted by reason.

    Args:
        config: all settings; `samples` must exist.
        count: 1 to 64.

    Returns:
        The sheet, whose path is printed too.

    Raises:
        UserError: ``count`` or the settings make no sheet, `samples` is missing, or no sample tried gives a
            pair.
    """
    if not 1 <= count <= _MOST_ROWS:
        raise UserError(f"--preview takes 1 to {_MOST_ROWS} pairs, not {count}.")
    if config.curate.visual.tool == "none":
        raise UserError("curate.visual.tool=none makes no visual pairs to preview. Choose a tool.")
    path = storage.local_path(RunFolder(config.run.folder).root, "the preview sheet") / "preview.png"
    pairs, dropped = _make(config, _candidates(config, count * _TRIES_PER_ROW), count)
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
    if not pairs:
        raise UserError(
            f"none of the {dropped.total()} samples tried gives a visual pair ({reasons}). See "
            "curate.visual.tool and curate.visual.min_confidence."
        )
    sheet = draw_sheet(pairs, show_text=config.report.show_text)
    storage.write_bytes(path, encode_pixels(np.asarray(sheet)))
    left_out = f"; without a pair: {reasons}" if reasons else ""
    console.print(f"{len(pairs)} visual pairs in {path}{left_out}", soft_wrap=True, markup=False)
    return path


def draw_sheet(pairs: list[VisualPair], *, show_text: bool) -> Image.Image:
    """The sheet, RGB: for each pair a row of four pictures and a caption.

    Args:
        pairs: what to show.
        show_text: whether the caption gives question and answer.
    """
    width = len(_COLUMNS) * (_CELL + _GAP) + _GAP
    rows = [_draw_pair(pair, width, show_text) for pair in pairs]
    font = ImageFont.load_default(_FONT_SIZE)
    header = Image.new("RGB", (width, _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(header)
    for column, title in enumerate(_COLUMNS):
        draw.text((_GAP + column * (_CELL + _GAP), _GAP // 2), title, _INK, font)
    strips = [header, *rows]
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _candidates(config: Config, most: int) -> list[dict[str, Any]]:
    """Samples of planned visual pairs, drawn by the seed; one per image if there are enough images."""
    seed = config.run.seed
    samples = train_samples(config)
    settings = config.curate.visual
    planned = draw_visual_samples(samples, settings.model_copy(update={"per_image": 1}), seed)
    if planned.num_rows == 0:
        raise UserError(f"{NO_FINDING_ASKED}, so there is no visual pair to preview.")
    if planned.num_rows < most:
        planned = draw_visual_samples(samples, settings, seed)
    order = [stable_seed(seed, "preview", name) for name in planned["sample_id"].to_pylist()]
    return planned.take(np.argsort(order, kind="stable")[:most]).to_pylist()


def _make(config: Config, rows: list[dict[str, Any]], count: int) -> tuple[list[VisualPair], Counter[str]]:
    """The first ``count`` pairs of these samples, and how many of those tried were dropped by reason."""
    maker = PairMaker(config)
    pairs: list[VisualPair] = []
    dropped: Counter[str] = Counter()
    step = config.curate.visual.batch_images
    for start in range(0, len(rows), step):
        for made in maker.make(rows[start : start + step]):
            if not isinstance(made, VisualPair):
                dropped[made[schemas.DROP_REASON]] += 1
            elif len(pairs) < count:
                pairs.append(made)
        if len(pairs) == count:
            break
    return pairs, dropped


def _draw_pair(pair: VisualPair, width: int, show_text: bool) -> Image.Image:
    original, noised = to_rgb(pair.image), to_rgb(pair.noised.image)
    scale = _CELL / max(original.size)
    size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
    pictures = (
        _scaled(original, size),
        _with_heat(_scaled(original, size), pair.heat_map),
        _with_outline(_scaled(original, size), pair.noised.mask),
        _scaled(noised, size),
    )
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [piece for line in _caption(pair, show_text) for piece in _wrapped(line, width - 2 * _GAP, font)]
    strip = Image.new("RGB", (width, size[1] + len(lines) * _LINE + 2 * _GAP), _PAPER)
    for column, picture in enumerate(pictures):
        strip.paste(picture, (_GAP + column * (_CELL + _GAP), 0))
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((_GAP, size[1] + _GAP // 2 + number * _LINE), line, _INK, font)
    return strip


def _caption(pair: VisualPair, show_text: bool) -> list[str]:
    parameters = ", ".join(f"{name} {json.dumps(value)}" for name, value in pair.parameters.items())
    lines = [
        f"{visual_pair_id(pair.row['sample_id'])}   confidence {pair.confidence:.3f}, seed {pair.seed}",
        parameters.replace('"', ""),
    ]
    if show_text:
        lines.append(f"question: {pair.row['question']}")
        lines.append(f"answer: {pair.row['answer']}")
    return [" ".join(line.split()) for line in lines]


def _wrapped(line: str, width: int, font: Any) -> list[str]:
    """The line in pieces that fit the sheet, broken at blanks or inside a word that is too long."""
    pieces = [""]
    for word in line.split():
        longer = f"{pieces[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            pieces[-1] = longer
            continue
        if pieces[-1]:
            pieces.append("")
        for character in word:
            if font.getlength(pieces[-1] + character) > width:
                pieces.append("")
            pieces[-1] += character
    return pieces


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A resized copy: small images keep their pixels visible, large ones are averaged."""
    enlarged = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def _with_heat(image: Image.Image, heat_map: np.ndarray) -> Image.Image:
    """A heat map (H, W) over the image, the more opaque the hotter."""
    spread = Image.fromarray(heat_map).resize(image.size, Image.Resampling.BILINEAR)
    heat = np.clip(np.asarray(spread), 0.0, 1.0)
    colours = np.asarray(colormaps["inferno"](heat))[..., :3] * 255.0
    opacity = (heat * _HEAT_OPACITY)[..., None]
    return Image.fromarray(np.round(np.asarray(image) * (1 - opacity) + colours * opacity).astype(np.uint8))


def _with_outline(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Draws the inner border of the mask, bool (H, W), at the size of the picture, so that it can be seen."""
    # A mask of a few pixels in a large image must not vanish: a pixel of the picture is in where any of its
    # pixels is.
    spread = Image.fromarray(mask.astype(np.float32)).resize(image.size, Image.Resampling.BOX)
    inside = np.asarray(spread) > 0
    border = inside & ~ndimage.binary_erosion(inside, iterations=2, border_value=0)
    pixels = np.array(image)
    pixels[border] = _OUTLINE
    return Image.fromarray(pixels)
