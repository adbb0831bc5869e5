"""Visual pairs: a tool finds the lesion, noise hides it, the answer stays the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mmedpo_ray import images as image_files
from mmedpo_ray import storage, tables
from mmedpo_ray.config import Config
from mmedpo_ray.curate.hallucinate import common, stable_seed
from mmedpo_ray.curate.lesion_noise import add_lesion_noise
from mmedpo_ray.curate.tools import TOOLS, Localisation
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.tables import DROP_DETAIL, DROP_REASON


def visual_pair_id(sample_id: str) -> str:
    return f"{sample_id}:visual"


class VisualPairs:
    """Ray Data batch function: samples → visual pairs. Noised images and heat maps go to the run's ``noised/``.

    Args:
        config: all settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.curate.visual
        self._tool = TOOLS[self._settings.tool](config)
        self._folder = storage.absolute(RunFolder(config.run.folder).noised)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        results: list[dict[str, Any]] = []
        usable: list[dict[str, Any]] = []
        decoded: list[Image.Image] = []
        for row in rows:
            try:
                decoded.append(image_files.load_image(row["image_uri"], self._config.data.max_pixels))
                usable.append(row)
            except image_files.ImageError as error:
                results.append(self._dropped(row, error.reason, error.detail))
        found = self._tool.localise(decoded, usable) if usable else []
        for row, image, localisation in zip(usable, decoded, found, strict=True):
            results.append(self._pair(row, image, localisation))
        return tables.to_table(results, tables.with_drop_columns(tables.PAIRS))

    def _pair(self, row: dict[str, Any], image: Image.Image, found: Localisation) -> dict[str, Any]:
        if found.heat_map is None:
            return self._dropped(row, found.problem or "tool_failed", found.detail)
        if found.confidence <= 0 or found.confidence < self._settings.min_confidence:
            return self._dropped(
                row, "tool_found_nothing", f"{row['sample_id']}: confidence {found.confidence:.3f}"
            )
        pair_id = visual_pair_id(row["sample_id"])
        seed = stable_seed(self._config.run.seed, pair_id)
        noised = add_lesion_noise(image, found.heat_map, self._settings.noise, np.random.default_rng(seed))
        name = hashlib.sha256(pair_id.encode()).hexdigest()[:24]
        noised_uri = storage.join(self._folder, f"{name}.png")
        heat_map_uri = storage.join(self._folder, f"{name}_heat.png")
        heat_map = Image.fromarray(np.round(found.heat_map * 255).astype(np.uint8))
        storage.write_bytes(noised_uri, image_files.encode_png(noised.image))
        storage.write_bytes(heat_map_uri, image_files.encode_png(heat_map))
        return {
            "pair_id": pair_id,
            "kind": "visual",
            "rejected_image_uri": noised_uri,
            "chosen": row["answer"],
            "rejected": row["answer"],
            "generator": self._settings.tool,
            "seed": seed,
            "tool": self._settings.tool,
            "tool_confidence": round(found.confidence, 6),
            "heat_map_uri": heat_map_uri,
            "noise": json.dumps(noised.parameters),
            **common(row),
        }

    def _dropped(self, row: dict[str, Any], reason: str, detail: str | None) -> dict[str, Any]:
        return {
            "pair_id": visual_pair_id(row["sample_id"]),
            "sample_id": row["sample_id"],
            "image_id": row["image_id"],
            "kind": "visual",
            DROP_REASON: reason,
            DROP_DETAIL: detail or row["sample_id"],
        }
