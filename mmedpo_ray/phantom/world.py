"""Phantoms: synthetic frontal chest radiographs with ground truth, deterministic by seed.

    phantom = make_phantom(7, prior="uniform")
    phantom.image, phantom.mask, phantom.findings, phantom.questions
    clean, _ = render(7, ())                       # the same patient, lesions truly removed

`generate` gives disjoint splits: the embedded model was trained on "train" and "tower"; "align" is for
alignment and "test" for evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmedpo_ray.phantom.findings import Finding, Prior, sample_findings
from mmedpo_ray.phantom.render import render
from mmedpo_ray.phantom.text import Question, write_questions

Split = Literal["train", "align", "test", "tower"]
SPLITS: tuple[Split, ...] = ("train", "align", "test", "tower")
DEFAULT_PRIOR: dict[Split, Prior] = {
    "train": "biased",
    "align": "uniform",
    "test": "uniform",
    "tower": "uniform",
}
MAX_PER_SPLIT = 10_000_000
_FINDINGS_STREAM, _TEXT_STREAM = 1, 2


@dataclass(frozen=True)
class Phantom:
    """One image with everything that is known about it.

    Attributes:
        case_id: Unique name, made of the split, the generator's seed and the running number.
        seed: Patient seed; `render(seed, ())` gives the lesion-removed image.
        image: uint8 grey values, shape (H, W).
        mask: bool, shape (H, W): union of the lesions.
        findings: What is drawn, in the order of `KINDS`.
        questions: Closed, open and report questions with reference answers.
    """

    case_id: str
    seed: int
    image: np.ndarray
    mask: np.ndarray
    findings: tuple[Finding, ...]
    questions: tuple[Question, ...]


def make_phantom(seed: int, *, prior: Prior, size: int = 64) -> Phantom:
    """Make one phantom; the same arguments always give the same one.

    Args:
        seed: Patient seed, 0 or more.
        prior: World to draw the findings from, see `findings`.
        size: Height and width of the image in pixels, at least 32.

    Raises:
        ValueError: If an argument is out of range.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    findings = sample_findings(np.random.default_rng([_FINDINGS_STREAM, seed]), prior)
    image, mask = render(seed, findings, size)
    questions = write_questions(np.random.default_rng([_TEXT_STREAM, seed]), findings)
    return Phantom(f"phantom-{prior}-{seed}", seed, image, mask, findings, questions)


def generate(
    split: Split, count: int, seed: int = 0, prior: Prior | None = None, size: int = 64
) -> Iterator[Phantom]:
    """Make `count` phantoms of a split. No patient seed occurs in two splits or under two values of `seed`.

    Args:
        split: "train", "align", "test" or "tower".
        count: Number of images, at most 10 million.
        seed: Which draw of the split, 0 or more.
        prior: World; by default "biased" for train and "uniform" for the others.
        size: Height and width of the images in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if not 0 <= count <= MAX_PER_SPLIT:
        raise ValueError(f"count must be between 0 and {MAX_PER_SPLIT}, not {count}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    first = (seed * len(SPLITS) + SPLITS.index(split)) * MAX_PER_SPLIT
    for number in range(count):
        phantom = make_phantom(first + number, prior=prior or DEFAULT_PRIOR[split], size=size)
        yield replace(phantom, case_id=f"phantom-{split}-{seed}-{number:05d}")
