"""Raw data in a bucket: the stations read annotations, images and masks from a real S3 server, and can keep a run there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import running
from PIL import Image

from mmedpo_ray import images, stage, storage, tables
from mmedpo_ray.png import encode_pixels

pytestmark = pytest.mark.engine
IMAGES = 4
QUESTIONS = [
    ("Is there an effusion in the left lung?", "Yes", "CLOSED"),
    ("What is wrong?", "Pneumonia", "OPEN"),
]
# Workers learn of the server from the environment, so the run has a cluster of its own.
STATIONS = """
import sys
from mmedpo_ray import cluster
from mmedpo_ray.config import load
from mmedpo_ray.curate.curate import curate
from mmedpo_ray.data.ingest import ingest
from mmedpo_ray.judge.score import score
config = load(None, sys.argv[1:])
cluster.start(config.ray)
for station in (ingest, curate, score):
    station(config)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with running("hospital") as address:
        yield address


def write_slake(root: str) -> None:
    """A data set as SLAKE is published, with a broken and a missing image."""
    rows: list[dict[str, Any]] = []
    for number in range(IMAGES + 2):
        folder = storage.join(root, "imgs", f"xmlab{number}")
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        mask = np.zeros((40, 50), np.uint8)
        mask[5:15, 5:20] = 255
        data = encode_pixels(pixels)
        if number <= IMAGES:
            storage.write_bytes(storage.join(folder, "source.jpg"), data[:200] if number == IMAGES else data)
            storage.write_bytes(storage.join(folder, "mask.png"), encode_pixels(mask))
        for question, answer, kind in QUESTIONS:
            rows.append(
                {
                    "qid": len(rows),
                    "img_id": number,
                    "img_name": f"xmlab{number}/source.jpg",
                    "question": question,
                    "answer": answer,
                    "answer_type": kind,
                    "q_lang": "en",
                }
            )
    storage.write_bytes(storage.join(root, "train.json"), json.dumps(rows).encode())


def run_stations(folder: str, root: str) -> list[dict[str, Any]]:
    options = (
        f"run.folder={folder}",
        "data.format=slake",
        f"data.root={root}",
        "data.test_share=0",
        "run.max_dropped_share=0.9",
        "curate.text.method=rule_edit",
        "curate.visual.tool=dataset_mask",
    )
    done = subprocess.run(
        [sys.executable, "-c", STATIONS, *options], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = stage.read_table(storage.join(folder, "scored"), tables.SCORED, "scored").to_pylist()
    return sorted(rows, key=lambda row: row["pair_id"])


def test_a_run_on_a_bucket_equals_one_on_paths(bucket: str, tmp_path: Path) -> None:
    remote, local = storage.join(bucket, "slake"), str(tmp_path / "slake")
    write_slake(remote)
    write_slake(local)
    # The data in the bucket with the run on a path, as `mmedpo run` wants it; both in the bucket; both on paths.
    mixed = run_stations(str(tmp_path / "mixed"), remote)
    inside = run_stations(storage.join(bucket, "run"), remote)
    outside = run_stations(str(tmp_path / "outside"), local)
    assert {row["kind"] for row in outside} == {"text", "visual"}
    assert sum(row["kind"] == "visual" for row in outside) == IMAGES
    places = {"image_uri", "rejected_image_uri", "heat_map_uri"}
    for rows in (mixed, inside):
        assert [{key: row[key] for key in row.keys() - places} for row in rows] == [
            {key: row[key] for key in row.keys() - places} for row in outside
        ]
        for row, expected in zip(rows, outside, strict=True):
            assert row["image_uri"].startswith(remote)
            noised, same = (images.load_image(item["rejected_image_uri"]) for item in (row, expected))
            assert np.array_equal(np.asarray(noised), np.asarray(same))
    dropped = [
        stage.read_manifest(storage.join(folder, "samples"))
        for folder in (str(tmp_path / "mixed"), storage.join(bucket, "run"))
    ]
    assert all(
        manifest is not None and manifest.dropped == {"image_undecodable": 2, "image_missing": 2}
        for manifest in dropped
    )
    assert isinstance(images.load_image(inside[0]["rejected_image_uri"]), Image.Image)
