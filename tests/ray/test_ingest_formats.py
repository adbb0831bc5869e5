"""`ingest` of the publishers' layouts on a real cluster: streams, resumes, counts, and fails with a clear message."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from mmedpo_ray import stage, storage, tables
from mmedpo_ray.config import Config, load
from mmedpo_ray.data.ingest import FORMATS, ingest
from mmedpo_ray.errors import UserError, user_message
from mmedpo_ray.run_folder import RunFolder

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def config_of(root: Path, kind: str, *overrides: str) -> Config:
    return load(None, (f"data.format={kind}", f"data.root={root}", f"run.folder={root}/run", *overrides))


def samples_of(root: Path) -> list[dict[str, Any]]:
    return stage.read_table(RunFolder(f"{root}/run").samples, tables.SAMPLES, "samples").to_pylist()


def slake(root: Path, rows: int) -> None:
    for number in range(3):
        folder = root / "imgs" / f"xmlab{number}"
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), number).save(folder / "source.jpg")
    train = [
        {
            "img_name": f"xmlab{number % 4}/source.jpg",
            "question": f"Is it {number}?",
            "answer": "Yes",
            "answer_type": "CLOSED",
            "q_lang": "zh" if number % 5 == 0 else "en",
            "qid": number // 2 if number < 4 else number,
        }
        for number in range(rows)
    ]
    (root / "train.json").write_text(json.dumps(train))
    (root / "test.json").write_text(json.dumps(train[-1:]))


def test_slake_is_counted_and_resumed(tmp_path: Path) -> None:
    slake(tmp_path, 700)
    config = config_of(tmp_path, "slake")
    # What an attempt that died has left: its rows are not read again.
    reader = FORMATS["slake"](config)
    first, *_ = reader.units()
    written = list(reader.samples(first))[:100]
    station = stage.Station(
        "ingest",
        RunFolder(config.run.folder).samples,
        config,
        settings=[config.data, config.run.seed, reader.fingerprint()],
    )
    station.done_ids("sample_id")
    station.write_part(written, tables.SAMPLES, "sample_id")
    manifest = ingest(config)
    assert manifest.rows_in == 701 == manifest.rows_out + sum(manifest.dropped.values())
    # Rows 1 and 3 repeat an id; of the others every fifth is Chinese and every fourth has no image.
    left = [number for number in range(700) if number not in (1, 3)]
    chinese = [number for number in left if number % 5 == 0]
    missing = [number for number in left if number % 5 and number % 4 == 3]
    assert manifest.dropped == {
        "duplicate_id": 2,
        "other_language": len(chinese),
        "image_missing": len(missing) + 1,
    }
    assert manifest.extra["train"]["images"] == 3
    resumed = samples_of(tmp_path)
    storage.remove(RunFolder(config.run.folder).samples)
    ingest(config)
    assert samples_of(tmp_path) == resumed


def test_parquet_images_become_files(tmp_path: Path) -> None:
    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("L", (8, 8), value).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {"image": {"bytes": png(number % 5), "path": None}, "question": "Is it?", "answer": "Yes"}
        for number in range(600)
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-0.parquet", row_group_size=100)
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data" / "test-0.parquet")
    manifest = ingest(config_of(tmp_path, "hf_parquet"))
    assert (manifest.rows_in, manifest.rows_out) == (601, 601)
    assert {split: manifest.extra[split]["images"] for split in ("train", "test")} == {"train": 5, "test": 1}
    written = [path for path in (tmp_path / "run" / "raw").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in written) == sorted(png(number) for number in range(5))
    assert {row["image_uri"] for row in samples_of(tmp_path)} == {str(path) for path in written}


def test_a_source_that_breaks_meanwhile_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slake(tmp_path, 10)
    reader = FORMATS["slake"]
    whole = reader.units

    def units_then_change(self: Any) -> Any:
        found = list(whole(self))
        (tmp_path / "train.json").write_text("[}")
        return iter(found)

    monkeypatch.setattr(reader, "units", units_then_change)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ingest(config_of(tmp_path, "slake"))
    assert "was changed while it was being read" in (user_message(caught.value) or "")
    monkeypatch.undo()
    with pytest.raises(UserError, match="not valid JSON"):
        ingest(config_of(tmp_path, "slake"))
