"""`mmedpo show`: writes what a model will see of image files, and says how it was made.

Every picture goes through the decoder that sampling, training and evaluation use. Nothing but sizes, depths,
frames and the numbers and terms of the display is printed: DICOM tags hold patient data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.settings import DataConfig
from mmedpo_ray.io import images, storage
from mmedpo_ray.io.image_error import MADE_BY, ImageError


def show(files: Sequence[str], out: Path, *, frames: str = "refuse", as_json: bool = False) -> int:
    """Writes one PNG for each picture, named after the stem of its file, and prints a line for each.

    A stem that occurs twice gets a number (``STEM-2.png``); a frame of several is ``STEM-frame3.png``.

    Args:
        files: paths or addresses (s3://, gs://) of image files.
        out: folder of the PNG files; made if needed.
        frames: as ``data.frames``.
        as_json: prints objects, one a line, instead of words.

    Returns:
        0; 2 where a file cannot be used.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {out} ({type(error).__name__}); choose another --out."
        ) from error
    taken: set[str] = set()
    failed = False
    for file in files:
        for line in _shown(file, out, DataConfig(frames=frames), taken):
            failed |= "reason" in line
            print(json.dumps(line, ensure_ascii=False) if as_json else _in_words(line), flush=True)
    return 2 if failed else 0


def _shown(file: str, out: Path, settings: DataConfig, taken: set[str]) -> Iterator[dict[str, Any]]:
    limits: dict[str, Any] = {"max_pixels": settings.max_pixels, "max_bytes": settings.max_image_bytes}
    try:
        path, named = images.file_and_frame(storage.absolute(file))
        data = images.read_file(path, settings.max_image_bytes)
        wanted = (
            (named,) if named else images.wanted_frames(data, path, settings.frames, settings.max_image_bytes)
        )
        for frame in wanted or (None,):
            image = images.decode(data, file, frame=frame, **limits)
            name = _free_name(Path(path).stem + (f"-frame{frame}" if frame else ""), taken)
            picture = images.to_rgb(image)
            picture.save(out / f"{name}.png")
            yield {
                "file": file,
                "png": str(out / f"{name}.png"),
                "width": picture.width,
                "height": picture.height,
                "made_by": [*image.info.get(MADE_BY, []), *_to_rgb_notes(image)],
            }
    except ImageError as error:
        yield {"file": file, "reason": error.reason, "detail": error.detail}
    except (OSError, UserError) as error:
        yield {"file": file, "reason": images.UNREADABLE, "detail": type(error).__name__}


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def _to_rgb_notes(image: Image.Image) -> list[str]:
    """What :func:`mmedpo_ray.io.images.to_rgb` does to an image of this mode."""
    if image.mode in images.DEEP:
        return ["its range as 8 bits"]
    if images.has_alpha(image):
        return ["transparency over black"]
    return [] if image.mode in ("L", "RGB") else [f"{image.mode} as RGB"]


def _in_words(line: dict[str, Any]) -> str:
    if "reason" in line:
        return f"{line['file']}: {line['reason']}: {line['detail'].removeprefix(line['file'] + ': ')}"
    return f"{line['file']} -> {line['png']}: {line['width']}×{line['height']}, {', '.join(line['made_by'])}"
