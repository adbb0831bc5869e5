"""OmniMedVQA (arXiv 2402.09181) as its publishers ship it: `QA_information/Open-access/*.json` and `Images/`.

A row has `question_id`, `question`, `option_A` to `option_D` (some only two), `gt_answer` (the words of the
right option) and `image_path` from the root (`Images/…`). It is a test set: there is no training part.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from mmedpo_ray.datasets.cleaning import clean
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.annotations import AnnotationReader, Turn
from mmedpo_ray.ingest.choices import LETTERS, choice_turns
from mmedpo_ray.io import storage

_FOLDER = "QA_information/Open-access"


class OmniMedVqaReader(AnnotationReader):
    """Reads OmniMedVQA; all of it is the test part, unless ``data.train_file`` names a file to train on."""

    counts_rows = False
    id_key = "question_id"
    image_key = "image_path"
    image_folders = ("",)

    def files(self) -> list[tuple[str, str | None]]:
        if self.data.train_file is not None:
            return super().files()
        if self.data.test_file is not None:
            return [(self.data.test_file, "test")]
        found = storage.list_files(self.file(_FOLDER), ".json")
        if not found:
            raise UserError(
                f"{self.file(_FOLDER)} has no .json file. Set data.root to the folder that holds it."
            )
        return [(f"{_FOLDER}/{PurePosixPath(uri).name}", "test") for uri in sorted(found)]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        texts = [clean(row.get(f"option_{letter}")) for letter in LETTERS[:4]]
        options = [text for text in texts if text]
        answer = clean(row.get("gt_answer"))
        if answer not in options:
            raise UnusableError("malformed_options", "gt_answer is none of the options")
        question, right = clean(row.get("question")), options.index(answer)
        return choice_turns(question, options, right, rotate=self.data.rotate_options)
