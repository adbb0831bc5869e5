"""The station contract on a real cluster: nothing lost, skipped when done, resumed to the same table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray import stage, storage, tables
from mmedpo_ray.config import Config, load
from mmedpo_ray.errors import DroppedShareError, UserError, user_message

SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("value", pa.int64(), nullable=False)]
)


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def config_of(folder: Path, *overrides: str) -> Config:
    return load(None, [f"run.folder={folder}", "ray.rows_per_part=7", *overrides])


def table_of(folder: Path) -> pa.Table:
    return stage.read_table(str(folder / "t"), SCHEMA, "t")


def run_squares(
    folder: Path,
    count: int = 100,
    fail_at: int | None = None,
    settings: tuple = (1,),
    limit: str = "run.max_dropped_share=0.9",
) -> stage.Manifest:
    """A station that squares numbers and drops the multiples of ten."""
    station = stage.Station("squares", str(folder / "t"), config_of(folder, limit), settings=settings)
    if manifest := station.finished():
        return manifest

    def square(row: dict) -> dict:
        number = int(row["id"])
        if number == fail_at:
            raise RuntimeError("killed")
        if number % 10 == 0:
            return {"id": row["id"], "value": None, "drop_reason": "round", "drop_detail": f"row {number}"}
        return {"id": row["id"], "value": number**2, "drop_reason": None, "drop_detail": None}

    def build(done: set[str]) -> ray.data.Dataset | None:
        ids = pa.table({"id": [f"{number:04d}" for number in range(count)]})
        dataset = stage.without(ray.data.from_arrow(ids), "id", done)
        return dataset.map(square, num_cpus=0.25)

    return station.write_rows(build, schema=SCHEMA, id_column="id", total=count)


def test_in_is_out_plus_dropped_and_order_is_fixed(tmp_path: Path) -> None:
    manifest = run_squares(tmp_path)
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (100, 90, {"round": 10})
    table = table_of(tmp_path)
    assert table["id"].to_pylist() == [f"{number:04d}" for number in range(100) if number % 10]
    assert table["value"].to_pylist() == [number**2 for number in range(100) if number % 10]
    dropped = storage.dataset(tmp_path / "t" / "dropped").to_table()
    assert dropped["drop_detail"].to_pylist() == [f"row {number}" for number in range(0, 100, 10)]
    assert not (tmp_path / "t" / ".parts").exists()
    assert manifest.versions["ray"] == ray.__version__


def test_a_finished_station_is_skipped_and_changed_settings_rerun_it(tmp_path: Path) -> None:
    first = run_squares(tmp_path)
    assert run_squares(tmp_path, fail_at=5) == first, "a finished station must not run again"
    second = run_squares(tmp_path, count=50, settings=(2,))
    assert second.rows_in == 50
    assert table_of(tmp_path).num_rows == 45


def test_an_interrupted_station_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_squares(whole)
    with pytest.raises(Exception, match="killed"):
        run_squares(broken, fail_at=83)
    # What a crash leaves: some parts, no manifest. (The failing map may hand over all or no block, so write one too.)
    station = stage.Station("squares", str(broken / "t"), config_of(broken), settings=(1,))
    station.done_ids("id")
    rows = [{"id": f"{number:04d}", "value": number**2} for number in range(1, 8)]
    station.write_part(rows, SCHEMA, "id")
    assert stage.read_manifest(str(broken / "t")) is None
    assert set(station.done_ids("id")) >= {"0001", "0007"}
    manifest = run_squares(broken)
    assert manifest.rows_in == 100
    assert (broken / "t" / "part-00000.parquet").read_bytes() == (
        whole / "t" / "part-00000.parquet"
    ).read_bytes()


def test_parts_of_other_settings_are_not_reused(tmp_path: Path) -> None:
    other = stage.Station("squares", str(tmp_path / "t"), config_of(tmp_path), settings=("other",))
    other.done_ids("id")
    other.write_part([{"id": "0001", "value": -1}], SCHEMA, "id")
    run_squares(tmp_path)
    assert table_of(tmp_path)["value"].to_pylist()[0] == 1


def test_too_many_drops_fail_and_leave_no_table(tmp_path: Path) -> None:
    with pytest.raises(DroppedShareError, match=r"10 of 100 rows.*round 10.*max_dropped_share=0.05"):
        run_squares(tmp_path, limit="run.max_dropped_share=0.05")
    assert stage.read_manifest(str(tmp_path / "t")) is None
    assert run_squares(tmp_path).rows_out == 90, "raising the limit finishes from the rows already there"


def test_repeated_ids_and_empty_tables_are_errors(tmp_path: Path) -> None:
    station = stage.Station("s", str(tmp_path / "t"), config_of(tmp_path))
    station.done_ids("id")
    station.write_part(
        [{"id": "a", "value": 1}, {"id": "b", "value": 2}, {"id": "a", "value": 3}], SCHEMA, "id"
    )
    with pytest.raises(UserError, match="id 'a' occurs 2 times"):
        station.finish_parts(schema=SCHEMA, id_column="id")
    empty = stage.Station("e", str(tmp_path / "e"), config_of(tmp_path))
    empty.done_ids("id")
    with pytest.raises(UserError, match="no row is left"):
        empty.finish_parts(schema=SCHEMA, id_column="id")
    assert empty.finish_parts(schema=SCHEMA, id_column="id", allow_empty=True).rows_out == 0


def test_inputs_must_be_finished_and_enter_the_key(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="missing or unfinished"):
        stage.Station("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")])
    run_squares(tmp_path)
    before = stage.Station("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")]).key
    shutil.rmtree(tmp_path / "t")
    run_squares(tmp_path, settings=(3,))
    assert stage.Station("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")]).key != before


def test_a_foreign_file_in_a_table_is_an_error(tmp_path: Path) -> None:
    run_squares(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t" / "part-99999.parquet")
    with pytest.raises(UserError):
        table_of(tmp_path)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.booleans()), unique_by=lambda item: item[0], min_size=1, max_size=30
    )
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    station = stage.Station("s", str(folder / "t"), config_of(folder, "run.max_dropped_share=1.0"))
    station.done_ids("id")
    for start in range(0, len(rows), 4):
        part = [
            {"id": name, "value": 1, tables.DROP_REASON: "no" if drop else None}
            for name, drop in rows[start : start + 4]
        ]
        station.write_part(part, SCHEMA, "id")
    manifest = station.finish_parts(schema=SCHEMA, id_column="id", allow_empty=True)
    assert manifest.rows_in == len(rows) == manifest.rows_out + sum(manifest.dropped.values())


def test_a_user_error_in_a_task_reaches_the_user_without_the_traceback() -> None:
    def fail(batch: dict) -> dict:
        raise UserError("row 5 of rows.json: do this")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.data.range(3).map_batches(fail, num_cpus=0.25).take_all()
    assert user_message(caught.value) == "row 5 of rows.json: do this"
    assert user_message(ValueError("something else")) is None
