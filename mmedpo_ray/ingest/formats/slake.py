"""SLAKE as its publishers ship it.

`train.json`, `validate.json`, `test.json` and `imgs/xmlabN/{source.jpg, mask.png}`.

Rows are English or Chinese (`q_lang`), answers OPEN or CLOSED as stated. A `mask.png` marks every labelled
organ and lesion of its image.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace
from typing import Any

from mmedpo_ray.datasets.cleaning import clean, stated_answer_type
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.annotations import AnnotationReader, Turn
from mmedpo_ray.ingest.image_checker import ImageChecker, ImageFacts

_MASK = "mask.png"
_OTHER_LANGUAGE = "other_language"


class SlakeReader(AnnotationReader):
    """Reads SLAKE; the validation part keeps its own split."""

    intended_reasons = (_OTHER_LANGUAGE,)
    id_key = "qid"
    image_key = "img_name"
    image_folders = ("imgs",)
    train_name = "train.json"
    test_name = "test.json"
    validate_name = "validate.json"

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        language = row.get("q_lang")
        # Copies of the English half leave the member out.
        wanted = self.data.language
        if wanted != "all" and isinstance(language, str) and language.strip().lower() != wanted:
            raise UnusableError(_OTHER_LANGUAGE)
        question, answer = clean(row.get("question")), clean(row.get("answer"))
        return [Turn(question, answer, stated_answer_type(row.get("answer_type")))]

    def image(self, row: dict[str, Any], folder: str, checker: ImageChecker) -> ImageFacts:
        found = super().image(row, folder, checker)
        if found.mask_uri is not None:
            return found
        mask = posixpath.join(posixpath.dirname(found.uri), _MASK)
        return replace(found, mask_uri=mask if checker.exists(mask) else None)
