"""Localise-and-noise on one core: the authors' way beside ours, on the same images and the same attention
maps.

    python benchmarks/lesion_noise.py [--sizes 512 1024] [--modes L RGB] [--formats jpeg png] [--images DIR]
    [--json FILE]

The authors' way (their curation script, one image at a time): open with Pillow; spread the attention grid
with OpenCV, blur it, draw noise for every value of the image, copy it under the threshold, clip; save with
OpenCV. Ours is what `mmedpo curate` runs for a pair: the default (diffusion noise under a hard mask of 15 %)
and the compatibility mode (``released``). "noise" is from the decoded image and the grid to the noised image,
"file" from the image file to the noised file. A pair of ours also keeps its heat map as a file, which the
authors' does not: "with heat map".

Bytes are checked on every image before anything is timed: the default against the paper's formula written out
over the whole image, ``released`` against the authors' way given the same noise, both after a trip through
our PNG file. Times are CPU seconds of this process with one thread everywhere; the ways take turns, a round
each, so that a slow moment hits all of them. Milliseconds are those of a way's fastest round, which other
work on the machine disturbed least, and so is their ratio; in brackets the lowest and highest ratio of a
round.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
from PIL import Image

from mmedpo_ray.curate.visual.tools.base import upsample
from mmedpo_ray.curate.visual.visual_pairs import HEAT_MAP_SIDE, heat_map_pixels
from mmedpo_ray.io import images as image_files
from mmedpo_ray.io import png, storage
from mmedpo_ray.noise.lesion_noise import add_lesion_noise
from mmedpo_ray.noise.noise_schedule import signal_share
from mmedpo_ray.noise.settings import NoiseConfig

GRID, PATCH = 14, 16
DEFAULT, RELEASED = NoiseConfig(), NoiseConfig(mode="released")
# Called with the name of a step when it is done.
Lap = Callable[[str], None]
Way = Callable[[Path, np.ndarray, Lap], None]
# What is compared → its steps.
SPANS = {
    "noise": ("noise",),
    "file": ("read", "noise", "save"),
    "with heat map": ("read", "noise", "save", "save heat map"),
}
COLUMNS = [
    ("authors", "noise"),
    ("diffusion", "noise"),
    ("released", "noise"),
    ("authors", "file"),
    ("diffusion", "file"),
    ("diffusion", "with heat map"),
]


def main() -> int:
    """Checks, measures, prints the table as Markdown; stops where bytes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--modes", nargs="+", choices=["L", "RGB"], default=["L", "RGB"])
    parser.add_argument("--formats", nargs="+", choices=["jpeg", "png"], default=["jpeg", "png"])
    parser.add_argument("--images", type=Path, help="also measure on the image files of this folder")
    parser.add_argument("--count", type=int, default=6, help="synthetic images a case")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = {
            f"{mode} {size}×{size} {kind}": synthetic(folder, mode, size, kind, arguments.count)
            for size in arguments.sizes
            for mode in arguments.modes
            for kind in arguments.formats
        }
        if arguments.images:
            copies = [
                shutil.copy(path, folder) for path in sorted(arguments.images.iterdir()) if path.is_file()
            ]
            cases[f"files of {arguments.images.name}"] = [Path(copy) for copy in copies]
        for name, paths in cases.items():
            if problem := check(paths):
                sys.exit(f"{name}: {problem}")
        figures = {name: measure(paths, arguments.rounds) for name, paths in cases.items()}
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"one core of {_processor()}",
        "versions": {"numpy": np.__version__, "opencv": cv2.__version__, "pillow": Image.__version__},
        "cases": figures,
    }
    sys.stdout.write(markdown(summary))
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


# ---------------------------------------------------------------------- the two ways


def authors_noised(
    pixels: np.ndarray, grid: np.ndarray, draw: Callable[[tuple[int, ...]], np.ndarray]
) -> np.ndarray:
    """The authors' noising step for step: a pixel array and its attention grid → the noised pixel array."""
    height, width = pixels.shape[:2]
    heat = cv2.resize(grid.repeat(PATCH, 0).repeat(PATCH, 1), (width, height), interpolation=cv2.INTER_LINEAR)
    heat = cv2.GaussianBlur(heat, (15, 15), 0)
    replaced = heat > np.mean(heat) - np.std(heat)
    noise = draw(pixels.shape)
    noised = pixels.copy()
    noised[replaced] = noise[replaced]
    return np.clip(noised, 0, 255).astype(np.uint8)


def authors_way(path: Path, grid: np.ndarray, lap: Lap) -> None:
    """One image from file to file, as the script does it."""
    pixels = np.array(Image.open(path))
    lap("read")
    noised = authors_noised(pixels, grid, lambda shape: np.random.normal(0, 10, shape))
    lap("noise")
    cv2.imwrite(str(path.with_suffix(".authors.png")), noised)
    lap("save")


def our_way(config: NoiseConfig) -> Way:
    """One image from file to files with these settings."""

    def run(path: Path, grid: np.ndarray, lap: Lap) -> None:
        image = image_files.load_image(str(path))
        lap("read")
        heat_map = upsample(grid, image.height, image.width)
        noised = add_lesion_noise(image, heat_map, config, np.random.default_rng(0))
        lap("noise")
        storage.write_bytes(path.with_suffix(f".{config.mode}.png"), png.encode_pixels(noised.pixels))
        lap("save")
        heat = heat_map_pixels(heat_map, HEAT_MAP_SIDE)
        storage.write_bytes(path.with_suffix(".heat.png"), png.encode_pixels(heat))
        lap("save heat map")

    return run


WAYS: dict[str, Way] = {"authors": authors_way, "diffusion": our_way(DEFAULT), "released": our_way(RELEASED)}


# ---------------------------------------------------------------------- bytes


def check(paths: list[Path]) -> str | None:
    """Compares the pixels in our files with the formulas written out; returns what differs, or None."""
    for index, path in enumerate(paths):
        grid, pixels = attention(index), np.asarray(Image.open(path))
        WAYS["diffusion"](path, grid, lambda _: None)
        expected = paper_noised(pixels, upsample(grid, *pixels.shape[:2]))
        if not np.array_equal(np.asarray(Image.open(path.with_suffix(".diffusion.png"))), expected):
            return f"{path.name}: the default differs from the formula"
        # The same heat map for both: the grid spread as the authors do.
        spread = cv2.resize(grid.repeat(PATCH, 0).repeat(PATCH, 1), pixels.shape[1::-1])
        ours = add_lesion_noise(Image.open(path), spread, RELEASED, np.random.default_rng(0))
        noise = (10.0 * spread_draws(ours.mask, pixels.shape, grey=False)).astype(np.float64)
        theirs = authors_noised(pixels, grid, partial(np.broadcast_to, noise))
        saved = Image.open(io.BytesIO(png.encode_pixels(ours.pixels)))
        same = (np.asarray(saved) == theirs).reshape(*ours.mask.shape, -1).all(axis=2)
        # SciPy and OpenCV round the smoothed map differently in the last bit, which can move a pixel of the
        # mask's edge.
        if (~same).mean() > 1e-5:
            return f"{path.name}: released differs from the authors' way in {(~same).sum()} pixels"
    return None


def paper_noised(pixels: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """The paper's formula over a whole 8-bit image, h being 1 on the hottest 15 % of the map and 0
    elsewhere."""
    count = int(DEFAULT.area_share * heat_map.size)
    threshold = np.sort(heat_map, axis=None)[-count]
    hard = heat_map >= threshold
    if hard.sum() > count:
        # Equal values stay together, and these would exceed the share.
        hard = heat_map > threshold
    h = hard.reshape(*hard.shape, *[1] * (pixels.ndim - 2)).astype(np.float32)
    share = signal_share(DEFAULT.steps, DEFAULT.schedule)
    grey = pixels.ndim == 2 or bool((pixels[hard] == pixels[hard][:, :1]).all())
    noise = spread_draws(hard, pixels.shape, grey=grey, side=DEFAULT.model_side)
    # [-1, 1] is the middle grey 127.5 plus and minus 127.5.
    x = pixels.astype(np.float32) - 127.5
    noised = (math.sqrt(share) * x + math.sqrt(1 - share) * 127.5 * noise) * h + x * (1 - h) + 127.5
    return np.rint(np.clip(noised, 0, 255)).astype(np.uint8)


def spread_draws(
    mask: np.ndarray, shape: tuple[int, ...], *, grey: bool, side: int | None = None
) -> np.ndarray:
    """Standard normal noise of the image's shape, 0 outside the mask: what seed 0 draws, band by band.

    A draw for each pixel under the mask or, on an image larger than ``side``, for each grain that the mask
    touches: a square of two pixels of the image shrunk to it.
    """
    grain = 2 * min(mask.shape) / side if side and min(mask.shape) > side else 1.0
    y, x = (((np.arange(length) + 0.5) / grain).astype(int) for length in mask.shape)
    cells = y[:, None] * (x[-1] + 1) + x
    touched, number = np.unique(cells[mask], return_inverse=True)
    noise = np.zeros(shape, np.float32).reshape(*mask.shape, -1)
    bands = noise.shape[2]
    draws = np.random.default_rng(0).standard_normal((1 if grey else bands, len(touched)), np.float32)
    noise[mask] = np.broadcast_to(draws, (bands, len(touched))).T[number]
    return noise.reshape(shape)


# ---------------------------------------------------------------------- time


def measure(paths: list[Path], rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU an image, and how many times the authors' that is."""
    # Way and span → seconds of every round; the first warms caches and is not counted.
    seconds = {(name, span): np.zeros(rounds + 1) for name in WAYS for span in SPANS}
    for turn in range(rounds + 1):
        for name in WAYS:
            # Not counted: pays for the memory that the way before has given back to the system.
            _steps(name, paths[-1], attention(len(paths) - 1))
            for index, path in enumerate(paths):
                laps = _steps(name, path, attention(index))
                for span, steps in SPANS.items():
                    seconds[name, span][turn] += sum(laps.get(step, 0.0) for step in steps) / len(paths)
    result: dict[str, Any] = {"images": len(paths), "rounds": rounds}
    for (name, span), values in seconds.items():
        ratios = (seconds["authors", span] / values)[1:]
        result[f"{name}: {span}"] = {
            "milliseconds": round(1000 * float(values[1:].min()), 2),
            "times_faster": round(float(seconds["authors", span][1:].min() / values[1:].min()), 2),
            "lowest": round(float(ratios.min()), 2),
            "highest": round(float(ratios.max()), 2),
        }
    for kind in ("authors", "diffusion"):
        sizes = [path.with_suffix(f".{kind}.png").stat().st_size for path in paths]
        result[f"{kind} kib"] = round(sum(sizes) / len(sizes) / 1024)
    return result


def _steps(name: str, path: Path, grid: np.ndarray) -> dict[str, float]:
    """CPU seconds of each step of one image."""
    seconds: dict[str, float] = {}
    # In a run every file is new.
    for kind in (name, "heat"):
        path.with_suffix(f".{kind}.png").unlink(missing_ok=True)
    last = time.process_time()

    def lap(step: str) -> None:
        nonlocal last
        now = time.process_time()
        seconds[step], last = now - last, now

    WAYS[name](path, grid, lap)
    return seconds


def attention(index: int) -> np.ndarray:
    """A 14 × 14 attention map in [0, 1] with one warm spot on a restless ground, as a tool's is."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:GRID, 0:GRID]
    centre_y, centre_x = rng.uniform(3, GRID - 4, 2)
    spot = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / 12)
    values = spot + 0.2 * rng.random((GRID, GRID))
    # The ends of the range are reached, so that both ways work on the very same map.
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)


def synthetic(folder: Path, mode: str, size: int, kind: str, count: int) -> list[Path]:
    """Image files like radiographs: large soft shapes under film grain."""
    paths = []
    for index in range(count):
        rng = np.random.default_rng([size, index])
        blobs = Image.fromarray(rng.uniform(20, 235, (9, 9)).astype(np.float32))
        shapes = np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC))
        pixels = np.clip(shapes + rng.normal(0, 3, (size, size)), 0, 255).astype(np.uint8)
        path = folder / f"{mode}-{size}-{index}.{kind}"
        Image.fromarray(pixels).convert(mode).save(path, quality=90)
        paths.append(path)
    return paths


def markdown(summary: dict[str, Any]) -> str:
    """The table of the documentation."""
    columns = ["images"]
    for name, span in COLUMNS:
        columns += [f"{name}: {span}"] + (["faster"] if name != "authors" else [])
    columns.append("KiB: authors, diffusion")
    lines = [
        f"{summary['command']}  ({summary['hardware']})",
        "",
        _row(columns),
        "|" + " --- |" * len(columns),
    ]
    for case, figures in summary["cases"].items():
        cells = [case]
        for name, span in COLUMNS:
            figure = figures[f"{name}: {span}"]
            cells.append(f"{figure['milliseconds']:.1f} ms")
            if name != "authors":
                cells.append(
                    f"{figure['times_faster']:.1f}× ({figure['lowest']:.1f}–{figure['highest']:.1f})"
                )
        cells.append(", ".join(str(figures[f"{kind} kib"]) for kind in ("authors", "diffusion")))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    sys.exit(main())
