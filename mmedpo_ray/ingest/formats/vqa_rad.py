"""VQA-RAD as its publishers ship it: `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder/`.

The official test part is the rows whose `phrase_type` begins with "test" (test_freeform, test_para); its
images also occur in the training part. Stated answer types may end in a space, answers may be numbers.
"""

from __future__ import annotations

from typing import Any

from mmedpo_ray.datasets.cleaning import clean, stated_answer_type
from mmedpo_ray.ingest.annotations import AnnotationReader, Turn


class VqaRadReader(AnnotationReader):
    """Reads VQA-RAD; with ``data.test_file`` the files decide the split instead."""

    id_key = "qid"
    image_key = "image_name"
    image_folders = ("VQA_RAD Image Folder", "images")
    train_name = "VQA_RAD Dataset Public.json"

    def files(self) -> list[tuple[str, str | None]]:
        if self.data.test_file is not None:
            return super().files()
        return [(self.data.train_file or self.train_name, None)]

    def split_of(self, row: dict[str, Any], split: str | None) -> str | None:
        phrase = row.get("phrase_type")
        is_test = isinstance(phrase, str) and phrase.strip().lower().startswith("test")
        return split or ("test" if is_test else "train")

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        question, answer = clean(row.get("question")), clean(row.get("answer"))
        return [Turn(question, answer, stated_answer_type(row.get("answer_type")))]
