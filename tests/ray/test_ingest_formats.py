"""`ingest` of the publishers' layouts on a real cluster: streams, resumes, counts, and fails with a clear
message."""

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

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import DroppedShareError, UserError, user_message
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.ingest.stage import ingest
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas, stage_runner
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def config_of(root: Path, kind: str, *overrides: str) -> Config:
    return load(None, (f"data.format={kind}", f"data.root={root}", f"run.folder={root}/run", *overrides))


def samples_of(root: Path) -> list[dict[str, Any]]:
    return stage_runner.read_table(RunFolder(f"{root}/run").samples, schemas.SAMPLES, "samples").to_pylist()


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
    stage = stage_runner.StageRunner(
        "ingest",
        RunFolder(config.run.folder).samples,
        config,
        settings=[config.data, config.run.seed, reader.fingerprint()],
    )
    stage.done_ids("sample_id")
    stage.write_part(written, schemas.SAMPLES, "sample_id")
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


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, format="PNG")
    return buffer.getvalue()


def files_of(root: Path) -> dict[str, bytes]:
    folder = Path(RunFolder(f"{root}/run").samples)
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_parquet_images_become_files(tmp_path: Path) -> None:
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
    assert manifest.extra["train"]["with_mask"] == 0
    written = [path for path in (tmp_path / "run" / "raw").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in written) == sorted(png(number) for number in range(5))
    assert {row["image_uri"] for row in samples_of(tmp_path)} == {str(path) for path in written}


def later_key(root: Path, config: Config) -> str:
    """Of a stage that reads the samples."""
    return stage_runner.StageRunner(
        "later", f"{root}/later", config, inputs=[RunFolder(config.run.folder).samples]
    ).key


def test_rows_whose_image_was_mended_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slake(tmp_path, 60)
    (tmp_path / "imgs" / "xmlab0" / "source.jpg").write_text("no image")
    config = config_of(tmp_path, "slake")
    first = ingest(config)
    assert first.dropped["image_missing"] and first.dropped["image_undecodable"]
    key, files = later_key(tmp_path, config), files_of(tmp_path)

    monkeypatch.setattr(FORMATS["slake"], "units", None)
    assert ingest(config) == first, "nothing was repaired: no annotation is read, no table written"
    (tmp_path / "imgs" / "xmlab0" / "source.jpg").write_text("still no image")
    assert ingest(config) == first
    assert (later_key(tmp_path, config), files_of(tmp_path)) == (key, files)
    monkeypatch.undo()

    (tmp_path / "imgs" / "xmlab3").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "imgs" / "xmlab3" / "source.jpg")
    second = ingest(config)
    assert "image_missing" not in second.dropped
    assert second.rows_in == first.rows_in
    assert second.rows_out == first.rows_out + first.dropped["image_missing"]
    repaired = later_key(tmp_path, config)
    assert repaired != key
    assert ingest(config) == second and later_key(tmp_path, config) == repaired

    Image.new("L", (8, 8), 0).save(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    whole = ingest(config)
    assert set(whole.dropped) == {"duplicate_id", "other_language"}
    found = samples_of(tmp_path)
    storage.remove(RunFolder(config.run.folder).samples)
    ingest(config)
    assert samples_of(tmp_path) == found


def test_after_too_many_missing_images_a_rerun_looks_for_them_again(tmp_path: Path) -> None:
    slake(tmp_path, 60)
    config = config_of(tmp_path, "slake", "run.max_dropped_share=0.15")
    for _ in range(2):
        with pytest.raises(DroppedShareError, match="image_missing"):
            ingest(config)
    (tmp_path / "imgs" / "xmlab3").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "imgs" / "xmlab3" / "source.jpg")
    manifest = ingest(config)
    assert set(manifest.dropped) == {"duplicate_id", "other_language"}


def test_the_other_language_is_no_fault_of_the_data(tmp_path: Path) -> None:
    slake(tmp_path, 60)
    (tmp_path / "imgs" / "xmlab3").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "imgs" / "xmlab3" / "source.jpg")
    manifest = ingest(config_of(tmp_path, "slake", "run.max_dropped_share=0.05"))
    assert manifest.dropped == {"duplicate_id": 2, "other_language": 12}


def test_a_crash_within_a_large_row_group_costs_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row group, as pandas writes it, is one task; what it has done before it dies is not done again."""
    rows = [
        {"image": {"bytes": png(number), "path": None}, "question": "Is it?", "answer": "Yes"}
        for number in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    config = config_of(tmp_path, "hf_parquet", "ray.rows_per_part=20", "data.test_share=0")

    class Dying(FORMATS["hf_parquet"]):  # type: ignore[misc]  # a class of the test's own is known to its workers
        def samples(self, unit: Any, done: Any = ()) -> Any:
            for number, sample in enumerate(super().samples(unit, done)):
                if number == 150:
                    raise RuntimeError("killed")
                yield sample

    monkeypatch.setattr("mmedpo_ray.ingest.stage.FORMATS", {"hf_parquet": Dying})
    with pytest.raises(Exception, match="killed"):
        ingest(config)
    monkeypatch.undo()
    parts = storage.list_files(storage.join(RunFolder(config.run.folder).samples, ".parts"), ".parquet")
    assert len(parts) == 7
    assert all(pq.read_metadata(part).num_rows == 20 for part in parts)
    manifest = ingest(config)
    assert (manifest.rows_in, manifest.rows_out) == (200, 200)


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
