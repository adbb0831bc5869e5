"""The embedded phantom world as a data set: draws every image and its lesion mask, asks its questions.

Fresh images of the "align" split for making pairs, of the "test" split (which never has text priors) for evaluation;
the embedded model has seen neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, get_args

import pyarrow as pa
from PIL import Image

from mmedpo_ray import storage
from mmedpo_ray.data import phantom
from mmedpo_ray.data.reader import UNITS, Reader
from mmedpo_ray.images import encode_png
from mmedpo_ray.run_folder import RunFolder

_SPLITS: dict[str, phantom.Split] = {"train": "align", "test": "test"}
assert set(_SPLITS.values()) <= set(get_args(phantom.Split))


class PhantomReader(Reader):
    """Draws phantoms; a unit is an image."""

    def units(self) -> pa.Table:
        counts = {"train": self.data.phantom.images, "test": self.data.phantom.test_images}
        return pa.concat_tables(self._units(split, count) for split, count in counts.items())

    def _units(self, split: str, count: int) -> pa.Table:
        source, prior = _SPLITS[split], self._prior(split)
        # The seeds of a split are consecutive, so any task can draw any image of it.
        first = next(phantom.generate(source, 1, self.config.run.seed, prior)).seed
        columns = {
            "unit_id": [f"{number:05d}" for number in range(count)],
            "split": [split] * count,
            "file": ["phantom"] * count,
            "position": list(range(count)),
            "payload": [str(first + number) for number in range(count)],
            "drop_reason": pa.nulls(count, pa.string()),
        }
        return pa.table(columns, UNITS)

    def samples(self, unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        split, number = unit["split"], unit["unit_id"]
        case = phantom.make_phantom(int(unit["payload"]), prior=self._prior(split))
        folder = storage.absolute(storage.join(RunFolder(self.config.run.folder).raw, self.dataset, split))
        image_uri, mask_uri = (storage.join(folder, f"{number}{suffix}.png") for suffix in ("", "_mask"))
        data = encode_png(Image.fromarray(case.image))
        storage.write_bytes(image_uri, data)
        storage.write_bytes(mask_uri, encode_png(Image.fromarray(case.mask)))
        sha256 = hashlib.sha256(data).hexdigest()
        for index, question in enumerate(case.questions):
            yield {
                "sample_id": self.sample_id(split, f"{number}/{index}"),
                "image_id": self.sample_id(split, number),
                "dataset": self.dataset,
                "split": split,
                "task": question.task,
                "answer_type": question.answer_type,
                "image_uri": image_uri,
                "image_sha256": sha256,
                "question": question.question,
                "answer": question.answer,
                "mask_uri": mask_uri,
            }

    def _prior(self, split: str) -> phantom.Prior:
        return self.data.phantom.prior if split == "train" else "uniform"
