"""The part of a mask that a question is about, by the labelled boxes that SLAKE ships beside its masks.

SLAKE's `mask.png` marks every organ and lesion of an image; `detection.json` beside it is a list of `{label:
[x, y, w, h]}`. The boxes of the labels that the answer or the question names cut the mask down to what was
asked.
"""

from __future__ import annotations

import json
import math
import posixpath
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedpo_ray.io import images as image_files
from mmedpo_ray.io import storage
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS

_MASK = "mask.png"
_BOXES = "detection.json"
_SIDES = frozenset({"left", "right"})
# They ask for whatever is wrong.
_GENERAL = frozenset({"abnormality", "abnormal", "disease", "diseased", "unhealthy", "healthy"})


@dataclass(frozen=True)
class Box:
    """A labelled box; left, top, right, bottom in pixels, right and bottom excluded."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


def asked_region(
    mask: np.ndarray, mask_uri: str, question: str, answer: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """The part of a mask that question and answer are about.

    Args:
        mask: bool (H, W), all that is marked.
        mask_uri: its address; only a `mask.png` has boxes beside it.
        question: what was asked.
        answer: reference answer.

    Returns:
        bool (H, W), and the choice, for the column ``noise``: ``region`` is the list of the labels, or
        "whole" with ``region_reason``: ``no_boxes``, ``boxes_unreadable``, ``nothing_named`` or
        ``boxes_beside_mask``. Empty for other masks.

    Raises:
        OSError: a store does not give out the boxes now, but may another time.
    """
    if posixpath.basename(mask_uri) != _MASK:
        return mask, {}
    try:
        boxes = parse(image_files.read_file(storage.join(posixpath.dirname(mask_uri), _BOXES)))
    except image_files.ImageError:
        return mask, _whole("no_boxes")
    except ValueError:
        return mask, _whole("boxes_unreadable")
    names = named_labels(list(dict.fromkeys(box.label for box in boxes)), question, answer)
    if not names:
        return mask, _whole("nothing_named")
    region = mask & _inside(mask.shape, [box for box in boxes if box.label in names])
    if not region.any():
        return mask, _whole("boxes_beside_mask")
    return region, {"region": names}


def parse(data: bytes) -> list[Box]:
    """Reads a `detection.json`.

    Raises:
        ValueError: it is no list of objects of four finite numbers of pixels, with a width and a height above
            0.
    """
    try:
        rows = json.loads(data)
    except RecursionError:
        raise ValueError("brackets too deep") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no list of objects")
    return [_box(label, value) for row in rows for label, value in row.items()]


def _box(label: str, value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError("a box is [x, y, w, h]")
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        raise ValueError("a box has four numbers")
    try:
        left, top, width, height = map(float, value)
    except OverflowError:
        raise ValueError("a number is too large") from None
    if not all(map(math.isfinite, (left, top, left + width, top + height))) or min(width, height) <= 0:
        raise ValueError("a box has finite numbers, width and height above 0")
    return Box(label, left, top, left + width, top + height)


def named_labels(labels: list[str], question: str, answer: str) -> list[str]:
    """The labels that question and answer are about, in their order.

    A finding comes before the organ that it is in, and the answer before the question. A question for
    anything abnormal means every finding, unless it names an organ. A label with a side ("Left Lung") is
    meant where that side is named, or none.
    """
    texts = (answer, question)
    findings = [label for label in labels if _findings(label)]
    together = f"{question}\n{answer}"
    for text in texts:
        if found := [label for label in findings if _names_finding(text, label, together)]:
            return found
    organs = [label for label in labels if label not in findings]
    of_answer, of_question = (
        [label for label in organs if _names_organ(text, label, together)] for text in texts
    )
    if findings and not of_question and _GENERAL & {term.name for term in lexicon.terms(together)}:
        return findings
    return of_answer or of_question


def _names_finding(text: str, label: str, together: str) -> bool:
    stated = {fact.finding for fact in lexicon.facts(text) if fact.finding in CONCEPTS}
    if not any(lexicon.are_kin(name, stated) for name in _findings(label)):
        return False
    places = _of_axis(label, "anatomy")
    asked = _of_axis(together, "anatomy")
    return _side_fits(label, together) and (not places or not asked or bool(places & asked))


def _names_organ(text: str, label: str, together: str) -> bool:
    names = {term.name for term in lexicon.terms(label)} - _SIDES
    if not names or not names <= {term.name for term in lexicon.terms(text)}:
        return False
    # "Where is the right kidney?" "On the left of the image."
    return _side_fits(label, text if _sides(text) else together)


def _side_fits(label: str, text: str) -> bool:
    own, stated = _sides(label), _sides(text)
    return not own or not stated or bool(own & stated)


def _sides(text: str) -> set[str]:
    return {term.name for term in lexicon.terms(text)} & _SIDES


def _findings(label: str) -> set[str]:
    return _of_axis(label, "finding")


def _of_axis(text: str, axis: str) -> set[str]:
    return {term.name for term in lexicon.terms(text) if term.is_concept and CONCEPTS[term.name].axis == axis}


def _inside(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    height, width = shape
    inside = np.zeros(shape, bool)
    for box in boxes:
        top, bottom = (math.floor(min(max(edge, 0), height)) for edge in (box.top, math.ceil(box.bottom)))
        left, right = (math.floor(min(max(edge, 0), width)) for edge in (box.left, math.ceil(box.right)))
        inside[top:bottom, left:right] = True
    return inside


def _whole(reason: str) -> dict[str, Any]:
    return {"region": "whole", "region_reason": reason}
