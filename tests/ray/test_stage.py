"""The stage contract on a real cluster: nothing lost, skipped when done, resumed to the same table."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import DroppedShareError, UserError, user_message
from mmedpo_ray.io import storage
from mmedpo_ray.tables import merge, parts, schemas, stage_runner
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.slices import Skip, map_slices

SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("value", pa.int64(), nullable=False)]
)


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def config_of(folder: Path, *overrides: str) -> Config:
    return load(None, [f"run.folder={folder}", "ray.rows_per_part=7", *overrides])


def table_of(folder: Path) -> pa.Table:
    return stage_runner.read_table(str(folder / "t"), SCHEMA, "t")


def without(dataset: ray.data.Dataset, done: IdSet) -> ray.data.Dataset:
    """The rows whose id is not done."""
    return dataset.map_batches(Skip(done, "id"), batch_format="pyarrow", batch_size=None)


def write(stage: stage_runner.StageRunner, *tables: list[dict], **options: Any) -> stage_runner.Manifest:
    """Writes rows from the driver, a part per list, as a table of its own."""

    def build(done: IdSet) -> None:
        for rows in tables:
            stage.write_part(rows, SCHEMA, "id")

    return stage.write_rows(build, schema=SCHEMA, id_column="id", **options)


def run_squares(
    folder: Path,
    count: int = 100,
    fail_at: int | None = None,
    settings: tuple = (1,),
    limit: str = "run.max_dropped_share=0.9",
) -> stage_runner.Manifest:
    """A stage that squares numbers and drops the multiples of ten."""
    stage = stage_runner.StageRunner(
        "squares", str(folder / "t"), config_of(folder, limit), settings=settings
    )
    if manifest := stage.finished():
        return manifest

    def square(row: dict) -> dict:
        number = int(row["id"])
        if number == fail_at:
            raise RuntimeError("killed")
        if number % 10 == 0:
            return {"id": row["id"], "value": None, "drop_reason": "round", "drop_detail": f"row {number}"}
        return {"id": row["id"], "value": number**2, "drop_reason": None, "drop_detail": None}

    def build(done: IdSet) -> ray.data.Dataset | None:
        ids = pa.table({"id": [f"{number:04d}" for number in range(count)]})
        return without(ray.data.from_arrow(ids), done).map(square, num_cpus=0.25)

    return stage.write_rows(build, schema=SCHEMA, id_column="id", total=count)


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


def test_a_finished_stage_is_skipped_and_changed_settings_rerun_it(tmp_path: Path) -> None:
    first = run_squares(tmp_path)
    assert run_squares(tmp_path, fail_at=5) == first, "a finished stage must not run again"
    second = run_squares(tmp_path, count=50, settings=(2,))
    assert second.rows_in == 50
    assert table_of(tmp_path).num_rows == 45


def test_an_interrupted_stage_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_squares(whole)
    with pytest.raises(Exception, match="killed"):
        run_squares(broken, fail_at=83)
    # What a crash leaves: some parts, no manifest. (The failing map may hand over all or no block, so write
    # one too.)
    stage = stage_runner.StageRunner("squares", str(broken / "t"), config_of(broken), settings=(1,))
    stage.done_ids("id")
    rows = [{"id": f"{number:04d}", "value": number**2} for number in range(1, 8)]
    stage.write_part(rows, SCHEMA, "id")
    assert stage_runner.read_manifest(str(broken / "t")) is None
    done = stage.done_ids("id")
    assert "0001" in done and "0007" in done
    manifest = run_squares(broken)
    assert manifest.rows_in == 100
    assert (broken / "t" / "part-00000.parquet").read_bytes() == (
        whole / "t" / "part-00000.parquet"
    ).read_bytes()


def test_parts_of_other_settings_are_not_reused(tmp_path: Path) -> None:
    other = stage_runner.StageRunner("squares", str(tmp_path / "t"), config_of(tmp_path), settings=("other",))
    other.done_ids("id")
    other.write_part([{"id": "0001", "value": -1}], SCHEMA, "id")
    run_squares(tmp_path)
    assert table_of(tmp_path)["value"].to_pylist()[0] == 1


def test_too_many_drops_fail_and_leave_no_table(tmp_path: Path) -> None:
    with pytest.raises(DroppedShareError, match=r"10 of 100 rows.*round 10.*max_dropped_share=0.05"):
        run_squares(tmp_path, limit="run.max_dropped_share=0.05")
    assert stage_runner.read_manifest(str(tmp_path / "t")) is None
    assert run_squares(tmp_path).rows_out == 90, "raising the limit finishes from the rows already there"


def test_repeated_ids_and_empty_tables_are_errors(tmp_path: Path) -> None:
    stage = stage_runner.StageRunner("s", str(tmp_path / "t"), config_of(tmp_path))
    with pytest.raises(UserError, match="id 'a' occurs 2 times"):
        write(stage, [{"id": name, "value": 1} for name in "aba"])
    empty = stage_runner.StageRunner("e", str(tmp_path / "e"), config_of(tmp_path))
    with pytest.raises(UserError, match="no row is left"):
        write(empty)
    assert write(empty, allow_empty=True).rows_out == 0


def test_inputs_must_be_finished_and_enter_the_key(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="missing or unfinished"):
        stage_runner.StageRunner("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")])
    run_squares(tmp_path)
    before = stage_runner.StageRunner("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")]).key
    shutil.rmtree(tmp_path / "t")
    run_squares(tmp_path, settings=(3,))
    assert (
        stage_runner.StageRunner("next", str(tmp_path / "n"), config, inputs=[str(tmp_path / "t")]).key
        != before
    )


def test_a_foreign_file_in_a_table_is_an_error(tmp_path: Path) -> None:
    run_squares(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t" / "part-99999.parquet")
    with pytest.raises(UserError):
        table_of(tmp_path)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.booleans()), unique_by=lambda item: item[0], min_size=1, max_size=30
    )
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    stage = stage_runner.StageRunner("s", str(folder / "t"), config_of(folder, "run.max_dropped_share=1.0"))
    made = [{"id": name, "value": 1, schemas.DROP_REASON: "no" if drop else None} for name, drop in rows]
    manifest = write(stage, *(made[start : start + 4] for start in range(0, len(made), 4)), allow_empty=True)
    assert manifest.rows_in == len(rows) == manifest.rows_out + sum(manifest.dropped.values())


def test_a_user_error_in_a_task_reaches_the_user_without_the_traceback() -> None:
    def fail(batch: dict) -> dict:
        raise UserError("row 5 of rows.json: do this")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.data.range(3).map_batches(fail, num_cpus=0.25).take_all()
    assert user_message(caught.value) == "row 5 of rows.json: do this"
    assert user_message(ValueError("something else")) is None


@settings(max_examples=8)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3), st.none() | st.integers(1, 30), st.integers(1, 30)
)
def test_slices_hold_every_row_once_in_blocks_of_their_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rows: int | None, group: int
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    written = []
    for index, size in enumerate(sizes):
        table = pa.table({"id": [f"{index}-{number}" for number in range(size)], "other": [1] * size})
        storage.write_parquet(folder / f"{index % 2}" / f"{index}.parquet", table, row_group_size=group)
        written += table["id"].to_pylist()
    schema = pa.schema([("id", pa.string()), ("value", pa.int64())])

    def count(batch: pa.Table) -> pa.Table:
        assert batch.schema == schema and batch["value"].null_count == len(batch)
        return batch.append_column("rows", pa.array([len(batch)] * len(batch)))

    folders = [str(folder / "0"), str(folder / "1"), str(folder / "nowhere")]
    dataset = map_slices(folders, schema, count, num_cpus=0.25, rows=rows)
    if not written:
        assert dataset is None
        return
    found = dataset.take_all()
    assert sorted(row["id"] for row in found) == sorted(written)
    assert rows is None or max(row["rows"] for row in found) <= rows


# ---------------------------------------------------------------------- rows tried again


def run_asked(folder: Path, fails: set[str], seen: list[str] | None = None) -> stage_runner.Manifest:
    """A stage that asks something which fails for some ids, and drops one for good."""
    stage = stage_runner.StageRunner("asked", str(folder / "t"), config_of(folder), settings=["ask"])
    if manifest := stage.finished():
        return manifest

    def ask(row: dict) -> dict:
        if row["id"] in fails:
            return {"id": row["id"], "value": None, "drop_reason": "no_answer", "drop_detail": "503"}
        if row["id"] == "0001":
            return {"id": row["id"], "value": None, "drop_reason": "useless", "drop_detail": "empty"}
        return {"id": row["id"], "value": len(row["id"]), "drop_reason": None, "drop_detail": None}

    def build(done: IdSet) -> ray.data.Dataset | None:
        names = [f"{number:04d}" for number in range(20)]
        if seen is not None:
            seen.extend(name for name in names if name not in done)
        return without(ray.data.from_arrow(pa.table({"id": names})), done).map(ask, num_cpus=0.25)

    return stage.write_rows(build, schema=SCHEMA, id_column="id", retry_reasons=("no_answer",))


def next_key(folder: Path) -> str:
    return stage_runner.StageRunner(
        "next", str(folder / "n"), config_of(folder), inputs=[str(folder / "t")]
    ).key


def test_rows_that_failed_are_tried_again_and_only_a_change_reaches_later_stages(tmp_path: Path) -> None:
    first = run_asked(tmp_path, {"0003", "0004"})
    assert first.dropped == {"no_answer": 2, "useless": 1}
    key = next_key(tmp_path)

    seen: list[str] = []
    again = run_asked(tmp_path, {"0003", "0004"}, seen)
    assert seen == ["0003", "0004"], "kept rows and those dropped for good stay"
    assert (again.rows_in, again.dropped) == (first.rows_in, first.dropped)
    assert next_key(tmp_path) == key, "nothing changed"

    better = run_asked(tmp_path, {"0004"}, seen := [])
    assert seen == ["0003", "0004"]
    assert (better.rows_in, better.rows_out, better.dropped) == (20, 18, {"no_answer": 1, "useless": 1})
    changed = next_key(tmp_path)
    assert changed != key

    run_asked(tmp_path, {"0004"})
    assert next_key(tmp_path) == changed, "again nothing changed"
    done = run_asked(tmp_path, set(), seen := [])
    assert seen == ["0004"] and done.dropped == {"useless": 1}
    assert next_key(tmp_path) not in {key, changed}
    seen = []
    assert run_asked(tmp_path, {"0002"}, seen) == done and not seen, "nothing failed: skipped"

    whole = tmp_path / "whole"
    run_asked(whole, set())
    assert files_of(tmp_path / "t") == files_of(whole / "t")


def test_a_second_attempt_that_dies_keeps_the_finished_table(tmp_path: Path) -> None:
    first = run_asked(tmp_path, {"0003"})
    stage = stage_runner.StageRunner("asked", str(tmp_path / "t"), config_of(tmp_path), settings=["ask"])

    def build(done: IdSet) -> None:
        raise RuntimeError("endpoint is down")

    with pytest.raises(RuntimeError, match="down"):
        stage.write_rows(build, schema=SCHEMA, id_column="id", retry_reasons=("no_answer",))
    assert stage_runner.read_manifest(str(tmp_path / "t")) == first
    assert table_of(tmp_path).num_rows == first.rows_out
    assert run_asked(tmp_path, set()).rows_out == 19


# ---------------------------------------------------------------------- large tables


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file of a table but the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def shuffled_table(
    folder: Path, order: list[int], part_rows: int, extra: stage_runner.Extra | None = None
) -> stage_runner.Manifest:
    """A table of 300 rows, every seventh dropped, whose rows come in the given order."""
    stage = stage_runner.StageRunner("s", str(folder / "t"), config_of(folder, "ray.rows_per_part=1000"))
    rows = [
        {"id": f"{number}", "value": number, schemas.DROP_REASON: None if number % 7 else "seventh"}
        for number in order
    ]
    return write(
        stage, *(rows[start : start + part_rows] for start in range(0, len(rows), part_rows)), extra=extra
    )


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of about 40 rows, cut at one id in four."""
    monkeypatch.setattr(merge, "ROWS_PER_FILE", 40)
    monkeypatch.setattr(parts, "_SAMPLED", 4)


def test_a_table_of_many_ranges_is_the_same_however_its_rows_came(
    tmp_path: Path, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = list(range(300))
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        on_driver = shuffled_table(tmp_path / "driver", numbers, 40)
    in_tasks = shuffled_table(tmp_path / "tasks", numbers[::-1], 17)
    random.Random(0).shuffle(numbers)
    # Parts of five rows from anywhere meet every range, so they are sorted into longer runs first.
    scattered = shuffled_table(tmp_path / "scattered", numbers, 5)
    monkeypatch.setattr(merge, "_MAX_READS", 0)
    through_runs = shuffled_table(tmp_path / "runs", numbers, 5)
    found = files_of(tmp_path / "driver" / "t")
    assert len([name for name in found if not name.startswith("dropped")]) > 3
    for name in ("tasks", "scattered", "runs"):
        assert files_of(tmp_path / name / "t") == found, name
    assert on_driver.content == in_tasks.content == scattered.content == through_runs.content
    assert table_of(tmp_path / "driver")["id"].to_pylist() == sorted(
        str(number) for number in range(300) if number % 7
    )
    assert on_driver.dropped == {"seventh": 43} and on_driver.rows_in == 300


class Sum:
    """A tally of one column."""

    columns = ("value",)

    def __init__(self) -> None:
        self.total = 0

    def add(self, rows: pa.RecordBatch) -> None:
        assert rows.schema.names == ["value"] and rows.num_rows
        self.total += sum(rows["value"].to_pylist())

    def figures(self) -> dict[str, int]:
        return {"total": self.total}


@pytest.mark.parametrize("extra", [Sum(), lambda table: {"total": sum(table["value"].to_pylist())}])
def test_figures_come_from_the_kept_rows(
    tmp_path: Path, small_ranges: None, extra: stage_runner.Extra
) -> None:
    expected = {"total": sum(number for number in range(300) if number % 7)}
    assert shuffled_table(tmp_path, list(range(300)), 40, extra).extra == expected


def test_an_id_in_two_parts_of_a_large_table_is_found(tmp_path: Path, small_ranges: None) -> None:
    with pytest.raises(UserError, match=r"id '199' occurs 3 times \(2 ids repeat\)"):
        shuffled_table(tmp_path, [*range(300), 199, 250, 199], 40)
    assert not (tmp_path / "t" / ".merged").exists()
    assert stage_runner.read_manifest(str(tmp_path / "t")) is None


@pytest.mark.parametrize("moves", range(6))
def test_a_crash_while_files_take_their_places_is_mended(
    tmp_path: Path, small_ranges: None, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    whole = shuffled_table(tmp_path / "whole", list(range(300)), 60)
    shuffled_table(tmp_path / "broken", list(range(80)), 60)
    move, left = storage.move, moves

    def move_some(source: str, target: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "move", move_some)
        with pytest.raises(KeyboardInterrupt):
            shuffled_table(tmp_path / "broken", list(range(300)), 60)
    assert stage_runner.read_manifest(str(tmp_path / "broken" / "t")) is None
    (tmp_path / "broken" / "t" / "manifest.json.0123.tmp").write_bytes(b"half")
    stage = stage_runner.StageRunner("s", str(tmp_path / "broken" / "t"), config_of(tmp_path))
    found = stage.finished()
    assert found is not None and found.content == whole.content
    assert files_of(tmp_path / "broken" / "t") == files_of(tmp_path / "whole" / "t")


def test_written_ids_are_found_again(tmp_path: Path) -> None:
    stage = stage_runner.StageRunner("s", str(tmp_path / "t"), config_of(tmp_path))
    assert not stage.done_ids("id")
    for name in ("a", "", "c"):
        stage.write_part([{"id": name, "value": 1}], SCHEMA, "id")
    done = stage.done_ids("id")
    assert len(done) == 3 and done.mask(pa.array(["a", "b", "", "c"])).to_pylist() == [
        True,
        False,
        True,
        True,
    ]


def test_an_actor_that_always_dies_ends_the_stage_with_what_to_do_and_its_rows_stay(tmp_path: Path) -> None:
    class DiesAt:
        """An actor whose process is killed when it meets a value, as for want of memory."""

        def __init__(self, value: int) -> None:
            self._value = value

        def __call__(self, rows: pa.Table) -> pa.Table:
            if self._value in rows["value"].to_pylist():
                os.kill(os.getpid(), signal.SIGKILL)
            return rows

    already: list[int] = []

    def run(value: int) -> stage_runner.Manifest:
        stage = stage_runner.StageRunner("judge", str(tmp_path / "t"), config_of(tmp_path), settings=["dies"])

        def build(done: IdSet) -> ray.data.Dataset | None:
            already.append(len(done))
            blocks = [pa.table({"id": [f"{number}"], "value": [number]}) for number in range(4)]
            return without(ray.data.from_blocks(blocks), done).map_batches(
                DiesAt,
                fn_constructor_args=(value,),
                batch_format="pyarrow",
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=1,
                max_restarts=1,
            )

        return stage.write_rows(build, schema=SCHEMA, id_column="id")

    with pytest.raises(UserError, match="judge: the process that holds a model died"):
        run(3)
    assert run(-1).rows_out == 4
    assert already[0] == 0 < already[1], "rows that were written before stay"


def test_tasks_give_memory_back_that_arrow_has_used() -> None:
    pool = ray.get(ray.remote(lambda: pa.default_memory_pool().backend_name).remote())
    assert pool == "system", "every thread of another pool would keep a heap of its own"
