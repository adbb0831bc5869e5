"""Raw data in a bucket: the stages read annotations, images and masks from a real S3 server, and can keep a
run there."""

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

from mmedpo_ray.io import images, storage
from mmedpo_ray.io.png import encode_pixels
from mmedpo_ray.tables import schemas, stage_runner

pytestmark = pytest.mark.engine
IMAGES = 4
QUESTIONS = [
    ("Is there an effusion in the left lung?", "Yes", "CLOSED"),
    ("What is wrong?", "Pneumonia", "OPEN"),
]
# Workers learn of the server from the environment, so the run has a cluster of its own.
STAGES = """
import json, sys
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import load
from mmedpo_ray.curate.stage import curate
from mmedpo_ray.ingest.stage import ingest
from mmedpo_ray.judge.stage import score
configs = [load(None, options) for options in json.loads(sys.argv[1])]
cluster.start(configs[0].ray)
for config in configs:
    for stage in (ingest, curate, score):
        stage(config)
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


def run_stages(runs: list[tuple[str, str]]) -> None:
    """Runs the stages for each (run folder, data root), all in one cluster."""
    shared = (
        "data.format=slake",
        "data.test_share=0",
        "run.max_dropped_share=0.9",
        "curate.text.method=rule_edit",
        "curate.visual.tool=dataset_mask",
    )
    options = [[f"run.folder={folder}", f"data.root={root}", *shared] for folder, root in runs]
    done = subprocess.run(
        [sys.executable, "-c", STAGES, json.dumps(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def scored(folder: str) -> list[dict[str, Any]]:
    rows = stage_runner.read_table(storage.join(folder, "scored"), schemas.SCORED, "scored").to_pylist()
    return sorted(rows, key=lambda row: row["pair_id"])


def test_a_run_on_a_bucket_equals_one_on_paths(bucket: str, tmp_path: Path) -> None:
    remote, local = storage.join(bucket, "slake"), str(tmp_path / "slake")
    write_slake(remote)
    write_slake(local)
    # The data in the bucket with the run on a path, as `mmedpo run` wants it; both in the bucket; both on
    # paths.
    folders = [str(tmp_path / "mixed"), storage.join(bucket, "run"), str(tmp_path / "paths")]
    run_stages(list(zip(folders, (remote, remote, local), strict=True)))
    mixed, inside, outside = map(scored, folders)
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
    for folder in folders:
        manifest = stage_runner.read_manifest(storage.join(folder, "samples"))
        assert manifest is not None
        assert manifest.dropped == {"image_undecodable": 2, "image_missing": 2}
