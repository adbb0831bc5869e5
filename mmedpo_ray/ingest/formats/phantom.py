"""The embedded phantom world as a data set: draws every image and its lesion mask, asks its questions.

Fresh images of the "align" split for making pairs, of the "test" split (which never has text priors) for
evaluation; the embedded model has seen neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from typing import Any, get_args

from PIL import Image

from mmedpo_ray.ingest.reader import ROWS_PER_UNIT, Reader, Unit
from mmedpo_ray.io import storage
from mmedpo_ray.io.images import encode_png
from mmedpo_ray.phantom import world
from mmedpo_ray.phantom.findings import Prior

_SPLITS: dict[str, world.Split] = {"train": "align", "test": "test"}
assert set(_SPLITS.values()) <= set(get_args(world.Split))


class PhantomReader(Reader):
    """Draws phantoms; a unit is a range of images."""

    needs_root = False
    counts_rows = False

    def units(self) -> Iterator[Unit]:
        counts = {"train": self.data.phantom.images, "test": self.data.phantom.test_images}
        for split, count in counts.items():
            for start in range(0, count, ROWS_PER_UNIT):
                stop = min(start + ROWS_PER_UNIT, count)
                yield Unit("phantom", None, split, start, stop, start, stop - start)

    def samples(self, unit: Unit, done: Container[str] = ()) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - drawing is cheap
        split = unit.split or "train"
        # The seeds of a split are consecutive, so any task can draw any image of it.
        first = next(world.generate(_SPLITS[split], 1, self.config.run.seed, self._prior(split))).seed
        for number in range(unit.start, unit.stop):
            yield from self._image_samples(split, f"{number:05d}", first + number)

    def _image_samples(self, split: str, number: str, seed: int) -> Iterator[dict[str, Any]]:
        case = world.make_phantom(seed, prior=self._prior(split))
        folder = storage.join(self.raw_folder(), split)
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

    def _prior(self, split: str) -> Prior:
        return self.data.phantom.prior if split == "train" else "uniform"
