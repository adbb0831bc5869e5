"""Does the model look? Every question again about a blank, another and a lesion-noised image.

What a model still answers right without the image comes from the question and from what it learnt by heart.
Closed and open questions are asked, since an answer to them is right or wrong; reports are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.io import images as image_files
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.masks import marked_pixels
from mmedpo_ray.noise.lesion_noise import add_lesion_noise
from mmedpo_ray.noise.settings import NoiseConfig
from mmedpo_ray.radiology.labelled_boxes import asked_region

BLANK, SHUFFLED, LESION_NOISED = "blank", "shuffled", "lesion_noised"
CONDITIONS = (BLANK, SHUFFLED, LESION_NOISED)
# Drop reason where the mask marks nothing of what a question is about.
NO_LESION = "no_lesion"
_GREY = (128, 128, 128)

# What is done to an image before it is shown; hashable, equal ones give equal images.
Alteration = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Shown:
    """An image that a question is asked about instead of its own.

    Attributes:
        condition: blank, shuffled or lesion_noised.
        image_uri: image file.
        alteration: what is done to it; None: nothing.
    """

    condition: str
    image_uri: str
    alteration: Alteration | None = None


def blank(image: Image.Image) -> Image.Image:
    """A mid-grey image of the same size."""
    return Image.new("RGB", image.size, _GREY)


@dataclass(frozen=True)
class LesionNoise:
    """Noise in the part of the lesion mask that a question is about, as visual pairs have it.

    Attributes:
        mask_uri: lesion mask of the image.
        question: as asked.
        answer: reference answer; both choose among the labels of SLAKE's masks.
        seed: of the noise.
        noise: mode and strength.
        max_pixels: larger masks are refused undecoded.
    """

    mask_uri: str
    question: str
    answer: str
    seed: int
    noise: NoiseConfig = field(compare=False)
    max_pixels: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """The noised image.

        Raises:
            ImageError: the mask cannot be used, or marks nothing (``no_lesion``).
        """
        try:
            mask = image_files.load_image(self.mask_uri, self.max_pixels)
        except ImageError as error:
            raise ImageError(error.reason.replace("image_", "mask_"), error.detail) from error
        if mask.size != image.size:
            raise ImageError("mask_size", f"{self.mask_uri}: mask {mask.size}, image {image.size}")
        region, _ = asked_region(marked_pixels(mask), self.mask_uri, self.question, self.answer)
        if not region.any():
            raise ImageError(NO_LESION, f"{self.mask_uri} marks nothing")
        generator = np.random.default_rng(self.seed)
        return add_lesion_noise(image, region.astype(np.float32), self.noise, generator).image


def shown_instead(
    samples: Sequence[dict[str, Any]], noise: NoiseConfig, seed: int, max_pixels: int
) -> Iterator[tuple[dict[str, Any], Shown]]:
    """What each closed or open question is asked about besides its own image.

    The shuffled image is the next one in a random order of the distinct files, so it is never the question's
    own, nor a copy of it; there is none if all questions are about one file. Questions about one image share
    it.

    Args:
        samples: rows of `samples`.
        noise: of the lesion-noised images, for samples with a lesion mask.
        seed: of the order and of the noise.
        max_pixels: larger masks are refused.
    """
    asked = [row for row in samples if row["answer_type"] != "report"]
    files = {row["image_sha256"]: row["image_uri"] for row in reversed(asked)}
    order = [str(name) for name in np.random.default_rng(seed).permutation(sorted(files))]
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    for row in asked:
        yield row, Shown(BLANK, row["image_uri"], blank)
        if len(order) > 1:
            yield row, Shown(SHUFFLED, files[following[row["image_sha256"]]])
        if row["mask_uri"] is not None:
            own_seed = hashlib.sha256(f"{seed}:{row['sample_id']}".encode()).digest()[:8]
            lesion = LesionNoise(
                row["mask_uri"],
                row["question"],
                row["answer"],
                int.from_bytes(own_seed, "big"),
                noise,
                max_pixels,
            )
            yield row, Shown(LESION_NOISED, row["image_uri"], lesion)
