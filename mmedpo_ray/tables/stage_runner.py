"""What every stage shares: skipping finished work, resuming, dropped rows, the manifest.

A stage that writes a table hands its rows, kept and dropped, to :meth:`StageRunner.write_rows`. Ray Data
tasks write them in parts as they come (``.parts/``). A stage that died finds these parts and works only on
the missing rows. When all rows are there, the parts are merged by id (:mod:`mmedpo_ray.tables.merge`) next to
the table (``.merged/``), checked, and moved into its place, so the table does not depend on crashes or on the
number of workers. The manifest is written last: a table without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import ray
from pydantic import BaseModel

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.errors import DroppedShareError, UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import commit, lineage, parts, schemas
from mmedpo_ray.tables.commit import PARTS
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.manifest import (
    MANIFEST,
    Manifest,
    counts_in_words,
    image_example,
    read_manifest,
    versions,
    write_manifest,
)
from mmedpo_ray.tables.merge import DROPPED, Merged, Target, merge
from mmedpo_ray.tables.parts import Part, PartWriter, Work
from mmedpo_ray.tables.run_folder import RunFolder

__all__ = [
    "MANIFEST",
    "Extra",
    "IdSet",
    "Manifest",
    "StageRunner",
    "Tally",
    "digest",
    "read_manifest",
    "read_table",
]

_KEY = "key.json"


def digest(*parts: Any) -> str:
    """A stable hash of JSON-able values, 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tally(Protocol):
    """Figures of a table of any size, added up batch by batch."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns it looks at."""
        ...

    def add(self, rows: pa.RecordBatch) -> None:
        """Adds the next rows, in the table's order; at least one."""
        ...

    def figures(self) -> dict[str, Any]:
        """The figures of all that was added."""
        ...


Extra = Callable[[pa.Table], dict[str, Any]] | Tally


class StageRunner:
    """One stage of the pipeline, which writes one folder.

    Args:
        name: the stage's name in messages and manifests.
        folder: folder it writes (its table, ``dropped/`` and ``manifest.json``).
        config: all settings.
        settings: the settings its result depends on; if any of them changes, the stage runs again.
        inputs: folders of the tables it reads. They must be finished and not stale
            (:mod:`mmedpo_ray.tables.lineage`); their identities enter this stage's key.

    Raises:
        UserError: an input is missing, or is stale.
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
        self.inputs = lineage.check(name, config.run.folder, [str(path) for path in inputs])
        keys = [self.inputs[lineage.name_of(config.run.folder, str(path))] for path in inputs]
        values = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in settings]
        self.key = digest(name, values, keys)
        self._started = time.monotonic()
        self._parts_folder = storage.join(self.folder, PARTS)
        self._parts: dict[str, Part] = {}

    # ------------------------------------------------------------------ skipping

    def finished(
        self, *, accept_failed: bool = False, could_retry_succeed: Callable[[], bool] | None = None
    ) -> Manifest | None:
        """The manifest if this stage already ran with the same settings and inputs, else ``None``.

        Args:
            accept_failed: whether the stage counts as finished while rows are dropped for a retryable reason.
            could_retry_succeed: called if rows were dropped for a retryable reason; returns True if a retry
                could change any of them. Without it they are always retried.
        """
        commit.resume(self.folder, self.key)
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.key != self.key:
            return None
        failed = {} if accept_failed else manifest.to_retry()
        if failed and (could_retry_succeed is None or could_retry_succeed()):
            console.print(
                f"[dim]{self.name}: {sum(failed.values()):,} rows failed ({counts_in_words(failed)}); trying "
                "them again[/dim]"
            )
            return None
        console.print(f"[dim]{manifest.line()} (already done)[/dim]", soft_wrap=True)
        return manifest

    # ------------------------------------------------------------------ stages that write a table

    def done_ids(self, id_column: str, retry_reasons: Sequence[str] = ()) -> IdSet:
        """The ids whose rows an earlier attempt with the same key has written.

        Args:
            id_column: the id's column.
            retry_reasons: as for :meth:`write_rows`.
        """
        commit.resume(self.folder, self.key)
        key_file = storage.join(self._parts_folder, _KEY)
        try:
            stored = json.loads(storage.read_bytes(key_file))
        except FileNotFoundError:
            stored = None
        if stored != self.key:
            storage.remove(self._parts_folder)
            storage.write_bytes(key_file, json.dumps(self.key).encode())
        kept = self._kept_for_retry(id_column, retry_reasons)
        if retry_reasons:
            # Left by an attempt that did not finish, for example because too many rows failed.
            for path in storage.list_files(self._parts_folder, ".parquet"):
                parts.leave_out_reasons(path, id_column, retry_reasons)
        # This list and what this attempt adds to it count: a task that outlives a killed driver may still
        # write.
        self._parts = {}
        done = IdSet()
        for path in [*storage.list_files(self._parts_folder, ".parquet"), *kept]:
            if ids := storage.read_parquet(path, [id_column])[id_column].to_pylist():
                self._parts[path] = Part.of(path, ids)
                done.add(ids)
        if done:
            console.print(f"[dim]{self.name}: resuming, {len(done):,} rows are already there[/dim]")
        return done

    def _kept_for_retry(self, id_column: str, retry_reasons: Sequence[str]) -> list[str]:
        """The files of a finished table to retry; its dropped rows that are not retried become parts."""
        manifest = read_manifest(self.folder)
        if not retry_reasons or manifest is None or manifest.key != self.key:
            return []
        for path in storage.list_files(storage.join(self.folder, DROPPED), ".parquet"):
            remaining = parts.without_reasons(storage.read_parquet(path), retry_reasons)
            if remaining.num_rows:
                PartWriter(self._parts_folder, remaining.schema, id_column, remaining.num_rows).write(
                    remaining
                )
        return storage.list_files(self.folder, ".parquet")

    def write_rows(
        self,
        build: Callable[[IdSet], ray.data.Dataset | Work | None],
        *,
        schema: pa.Schema,
        id_column: str,
        total: int | None = None,
        extra: Extra | None = None,
        extra_columns: Sequence[str] | None = None,
        allow_empty: bool = False,
        retry_reasons: Sequence[str] = (),
        limit_dropped: bool = True,
        intended_reasons: Sequence[str] = (),
    ) -> Manifest:
        """Runs a Ray Data pipeline and turns its rows into this stage's table.

        Every block that the pipeline yields is written at once, in parts of at most ``ray.rows_per_part``
        rows, so a crash costs at most the rows of the blocks being made.

        Args:
            build: gets the ids already written and returns the dataset of the remaining rows, or the
                :class:`~mmedpo_ray.tables.parts.Work` that makes them (``None``: none remain, or
                :meth:`write_part` has written them). Rows have the columns of ``schema``; a row to leave out
                sets ``drop_reason`` (and ``drop_detail``).
            schema: schema of the final table.
            id_column: unique id of a row, kept or dropped.
            total: expected rows, for the progress bar; by default what the work says.
            extra: figures for the manifest, from the final table: a function of the table, or a
                :class:`Tally`, which holds one batch at a time.
            extra_columns: the columns that a function reads; by default it gets the whole table on the
                driver.
            allow_empty: whether a table without rows is a result rather than an error.
            retry_reasons: drop reasons that may pass. While rows are dropped for one of them, the stage runs
                again when called again, for these rows only, also if they were too many for a table. If that
                changes its table, the stages after it run again too.
            limit_dropped: whether ``run.max_dropped_share`` holds for this table.
            intended_reasons: drop reasons that the user's settings ask for; ``run.max_dropped_share`` ignores
                them.

        Raises:
            UserError: no row is left, an id occurs twice, or the process of an actor died too often.
            DroppedShareError: more than ``run.max_dropped_share`` of the rows were dropped.
        """
        done = self.done_ids(id_column, retry_reasons)
        work = build(done)
        if isinstance(work, Work):
            writer = self._writer(schema, id_column, work.make)
            self._run(work.blocks, writer, len(done), work.rows if total is None else total)
        elif work is not None:
            self._run(work, self._writer(schema, id_column), len(done), total)
        target = Target(commit.staged(self.folder), schema, id_column, self.name)
        storage.remove(target.folder)
        try:
            merged = merge(list(self._parts.values()), target, self.config.ray.data_cpus)
            self._check(merged, id_column, allow_empty, intended_reasons if limit_dropped else None)
            if merged.rows == 0:
                storage.write_parquet(storage.join(target.folder, "part-00000.parquet"), schema.empty_table())
            figures = _figures(target.folder, schema, extra, extra_columns) if extra else {}
        except Exception:
            storage.remove(target.folder)
            raise
        manifest = self._manifest(merged.rows + merged.dropped.total(), merged.rows, merged.dropped, figures)
        manifest.retry_reasons = list(retry_reasons)
        manifest.content = digest(merged.digests)
        before = read_manifest(self.folder)
        if before is not None and before.key == self.key and before.retry_reasons:
            same = before.content == manifest.content
            manifest.revision = before.revision if same else manifest.content
        commit.publish(self.folder, manifest)
        console.print(manifest.line(), soft_wrap=True)
        return manifest

    def write_part(self, rows: Iterable[dict[str, Any]], schema: pa.Schema, id_column: str) -> None:
        """Writes rows from the driver as one part (for stages that are no Ray Data pipeline)."""
        table = schemas.to_table(rows, schemas.with_drop_columns(schema))
        if table.num_rows:
            part = self._writer(schema, id_column).write(table)
            self._parts[part.path] = part

    def _writer(
        self, schema: pa.Schema, id_column: str, make: Callable[[pa.Table], Iterator[pa.Table]] | None = None
    ) -> PartWriter:
        raw = schemas.with_drop_columns(schema)
        return PartWriter(self._parts_folder, raw, id_column, self.config.ray.rows_per_part, make)

    def _run(self, blocks: ray.data.Dataset, writer: PartWriter, done: int, total: int | None) -> None:
        """Writes the rows of a dataset as parts, with a progress bar."""
        # No batch size: with one, Ray Data would gather that many rows before the first task starts.
        written = blocks.map_batches(
            writer,
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=self.config.ray.data_cpus,
        )
        with progress_bar() as bar:
            task = bar.add_task(self.name, total=total, completed=done, note="")
            try:
                for row in written.iter_rows():
                    self._parts[row["path"]] = Part(**row)
                    bar.update(task, advance=row["rows"])
            except ray.exceptions.ActorDiedError as error:
                # If the constructor raised, its own error says what is wrong.
                if error.actor_init_failed:
                    raise
                raise UserError(
                    f"{self.name}: the process that holds a model died again and again, mostly for lack of "
                    "memory. Lower replicas, max_num_seqs or max_model_len of its engine, or the batch size, "
                    "or use larger nodes; Ray's logs (worker-*.err) say more. Written rows stay: the same "
                    "command resumes."
                ) from error

    def _check(
        self, merged: Merged, id_column: str, allow_empty: bool, intended_reasons: Sequence[str] | None
    ) -> None:
        """Refuses a table; with ``intended_reasons`` of ``None`` any share of its rows may be dropped."""
        if merged.example is not None:
            name, times = merged.example
            raise UserError(
                f"{self.name}: {id_column} {name!r} occurs {times} times ({merged.repeated:,} ids repeat). "
                "Ids must be unique."
            )
        dropped, limit = merged.dropped.total(), self.config.run.max_dropped_share
        total = merged.rows + dropped
        faults = {
            reason: count
            for reason, count in merged.dropped.items()
            if intended_reasons is not None and reason not in intended_reasons
        }
        if total and sum(faults.values()) / total > limit:
            raise DroppedShareError(
                f"{self.name}: {sum(faults.values()):,} of {total:,} rows would be dropped "
                f"({counts_in_words(faults)}), more than run.max_dropped_share={limit}. Correct the input "
                f"and run again, or raise the limit{self._image_example()}."
            )
        if merged.rows == 0 and not allow_empty:
            reasons = counts_in_words(merged.dropped)
            why = f" (dropped: {reasons}; see {self._parts_folder}{self._image_example()})" if dropped else ""
            raise UserError(
                f"{self.name}: no row is left of {total:,}{why}. Check the input and the settings of this "
                f"stage."
            )

    def _image_example(self) -> str:
        return image_example(storage.join(commit.staged(self.folder), DROPPED))

    # ------------------------------------------------------------------ every stage

    def finish(
        self,
        *,
        rows_in: int = 0,
        rows_out: int = 0,
        dropped: Mapping[str, int] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest, which marks the stage as finished, and prints its line."""
        manifest = self._manifest(rows_in, rows_out, dropped or {}, extra or {})
        write_manifest(self.folder, manifest)
        console.print(manifest.line(), soft_wrap=True)
        return manifest

    def _manifest(
        self, rows_in: int, rows_out: int, dropped: Mapping[str, int], extra: dict[str, Any]
    ) -> Manifest:
        return Manifest(
            stage=self.name,
            key=self.key,
            rows_in=rows_in,
            rows_out=rows_out,
            dropped=dict(dropped),
            extra=extra,
            inputs=self.inputs,
            settings=self.config.model_dump(mode="json"),
            seconds=round(time.monotonic() - self._started, 2),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )


def _figures(folder: str, schema: pa.Schema, extra: Extra, columns: Sequence[str] | None) -> dict[str, Any]:
    if callable(extra):
        batches = list(storage.read_batches(folder, columns))
        return extra(pa.Table.from_batches(batches) if batches else schema.empty_table())
    for rows in storage.read_batches(folder, extra.columns):
        if rows.num_rows:
            extra.add(rows)
    return extra.figures()


def read_table(folder: str, schema: pa.Schema, name: str) -> pa.Table:
    """Reads a finished table whole, checked against its schema."""
    return schemas.check(storage.dataset(folder).to_table(), schema, name)
