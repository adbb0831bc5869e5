"""What every stage shares: skipping finished work, resuming, dropped rows, the manifest.

A stage that writes a table hands its rows, kept and dropped, to :meth:`StageRunner.write_rows`. Ray Data tasks write
them in parts as they come (``.parts/``); a stage that died finds these parts and works only on the rows not yet
there. When all rows are there the parts are merged by id (:mod:`mmedpo_ray.tables.merge`) beside the table (``.merged/``), checked,
and moved into its place, so its content does not depend on crashes or on the number of workers. The manifest is written
last: a table without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence, Set
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from pydantic import BaseModel

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.errors import DroppedShareError, UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import commit, lineage, parts, schemas
from mmedpo_ray.tables.commit import PARTS
from mmedpo_ray.tables.manifest import (
    MANIFEST,
    Manifest,
    counts_in_words,
    image_example,
    read_manifest,
    versions,
    write_manifest,
)
from mmedpo_ray.tables.merge import DROPPED, Merge, Merged, merge
from mmedpo_ray.tables.parts import DoneIds, MakingWriter, Part, PartWriter, Work
from mmedpo_ray.tables.run_folder import RunFolder

log = logging.getLogger(__name__)

__all__ = [
    "MANIFEST",
    "DoneIds",
    "Extra",
    "Manifest",
    "StageRunner",
    "Tally",
    "digest",
    "read_manifest",
    "read_table",
    "without",
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
    """One step of the road, writing one folder.

    Args:
        name: the stage's name in messages and manifests.
        folder: folder it writes (its table, ``dropped/`` and ``manifest.json``).
        config: all settings.
        settings: the settings its result depends on; changing any of them makes it run again.
        inputs: folders of the stages it reads; they must be finished and belong to what they were made of
            (:mod:`mmedpo_ray.tables.lineage`), and their identities enter this one's key.

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
        self._parts: dict[str, Part] = {}

    # ------------------------------------------------------------------ skipping

    def finished(
        self, *, accept_failed: bool = False, mended: Callable[[], bool] | None = None
    ) -> Manifest | None:
        """The manifest if this stage already ran with the same settings and inputs, else ``None``.

        Args:
            accept_failed: whether it counts as finished while rows are dropped for a reason that it is to try again.
            mended: asked where there are such rows: whether any of them would fare otherwise now. Without it they are tried.
        """
        commit.resume(self.folder, self.key)
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.key != self.key:
            return None
        failed = {} if accept_failed else manifest.to_retry()
        if failed and (mended is None or mended()):
            console.print(
                f"[dim]{self.name}: {sum(failed.values()):,} rows failed ({counts_in_words(failed)}); trying them again[/dim]"
            )
            return None
        console.print(f"[dim]{manifest.line()} (already done)[/dim]", soft_wrap=True)
        return manifest

    # ------------------------------------------------------------------ table stages

    def done_ids(self, id_column: str, retry_reasons: Sequence[str] = ()) -> DoneIds:
        """Ids that need no work any more, since an earlier attempt of the same key has written their rows.

        Args:
            id_column: the id's column.
            retry_reasons: as for :meth:`write_rows`.
        """
        commit.resume(self.folder, self.key)
        folder = storage.join(self.folder, PARTS)
        try:
            stored = json.loads(storage.read_bytes(storage.join(folder, _KEY)))
        except FileNotFoundError:
            stored = None
        if stored != self.key:
            storage.remove(folder)
            storage.write_bytes(storage.join(folder, _KEY), json.dumps(self.key).encode())
        # What counts is this list and what this attempt adds to it: a task that outlives a killed driver may still write.
        self._parts = {}
        codes: list[np.ndarray] = []
        kept = self._kept_for_retry(folder, id_column, retry_reasons)
        if retry_reasons:
            # Rows of an attempt that did not end, as where too many of them failed.
            for path in storage.list_files(folder, ".parquet"):
                parts.leave_out_reasons(path, id_column, retry_reasons)
        for path in [*storage.list_files(folder, ".parquet"), *kept]:
            ids = parts.read_ids(path, id_column)
            if ids:
                self._add([Part.of(path, ids)])
                codes.append(parts.encode(ids))
        done = DoneIds(list(self._parts), id_column, codes)
        if done:
            console.print(f"[dim]{self.name}: resuming, {len(done):,} rows are already there[/dim]")
        return done

    def write_rows(
        self,
        build: Callable[[DoneIds], ray.data.Dataset | Work | None],
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

        Every block that the pipeline yields is written at once, in parts of ``ray.rows_per_part`` rows at most, so the
        size of its blocks is what a crash can cost.

        Args:
            build: gets the ids already written (:class:`~mmedpo_ray.tables.parts.DoneIds`) and returns the dataset of the
                remaining rows, or the :class:`~mmedpo_ray.tables.parts.Work` that makes them (``None``: none remain). Rows have the
                columns of ``schema``; a row to leave out sets ``drop_reason`` (and ``drop_detail``).
            schema: schema of the final table.
            id_column: unique id of a row, kept or dropped.
            total: expected rows, for the progress bar; without it what the work says.
            extra: figures for the manifest, from the final table: a function of the table, or a :class:`Tally`, which
                holds a batch at a time.
            extra_columns: the columns that a function looks at; without it the table is read whole on the driver.
            allow_empty: whether a table without rows is a result rather than an error.
            retry_reasons: drop reasons that may pass. As long as rows are dropped for one of them the stage runs again
                when called again, for these rows only, also where that was too many of them for a table; if that
                changes its table, the stages after it run again too.
            limit_dropped: whether ``run.max_dropped_share`` holds for this table.
            intended_reasons: drop reasons that the user's settings ask for; ``run.max_dropped_share`` is about the others.

        Raises:
            UserError: no row is left, an id occurs twice, or an actor's process died more often than it may.
            DroppedShareError: more than ``run.max_dropped_share`` of the rows were dropped.
        """
        done = self.done_ids(id_column, retry_reasons)
        work = build(done)
        if work is not None:
            write = self._writer(schema, id_column)
            # No batch size: with one, Ray Data would gather as many rows from the source before the first task starts.
            written = (work.blocks if isinstance(work, Work) else work).map_batches(
                MakingWriter(work.make, write) if isinstance(work, Work) else write,
                batch_format="pyarrow",
                batch_size=None,
                zero_copy_batch=True,
                num_cpus=self.config.ray.data_cpus,
            )
            with progress_bar() as bar:
                planned = work.rows if isinstance(work, Work) and total is None else total
                task = bar.add_task(self.name, total=planned, completed=len(done), note="")
                try:
                    for row in written.iter_rows():
                        self._add([Part(**row)])
                        bar.update(task, advance=row["rows"])
                except ray.exceptions.ActorDiedError as error:
                    # One whose constructor raised says what is wrong itself.
                    if error.actor_init_failed:
                        raise
                    raise UserError(
                        f"{self.name}: the process that holds a model died again and again. Mostly its memory does not suffice: "
                        "lower replicas, max_num_seqs or max_model_len of its engine, or the batch size, or use larger nodes; "
                        f"Ray's logs (worker-*.err) say more. What is written stays: the same command resumes."
                    ) from error
        return self.finish_parts(
            schema=schema,
            id_column=id_column,
            extra=extra,
            extra_columns=extra_columns,
            allow_empty=allow_empty,
            retry_reasons=retry_reasons,
            limit_dropped=limit_dropped,
            intended_reasons=intended_reasons,
        )

    def write_part(self, rows: Iterable[dict[str, Any]], schema: pa.Schema, id_column: str) -> None:
        """Writes rows from the driver as one part (for stages that are no Ray Data pipeline)."""
        table = schemas.to_table(rows, schemas.with_drop_columns(schema))
        if table.num_rows:
            self._add([self._writer(schema, id_column).write(table)])

    def finish_parts(
        self,
        *,
        schema: pa.Schema,
        id_column: str,
        extra: Extra | None = None,
        extra_columns: Sequence[str] | None = None,
        allow_empty: bool = False,
        retry_reasons: Sequence[str] = (),
        limit_dropped: bool = True,
        intended_reasons: Sequence[str] = (),
    ) -> Manifest:
        """Turns the parts written so far into the final table; for the arguments see :meth:`write_rows`."""
        staged = commit.staged(self.folder)
        storage.remove(staged)
        how = Merge(staged, schema, id_column, self.name)
        try:
            merged = merge(list(self._parts.values()), how, self.config.ray.data_cpus)
            self._check(merged, id_column, allow_empty, intended_reasons if limit_dropped else None)
            if merged.rows == 0:
                storage.write_parquet(storage.join(staged, "part-00000.parquet"), schema.empty_table())
            figures = _figures(staged, schema, extra, extra_columns) if extra else {}
        except Exception:
            storage.remove(staged)
            raise
        manifest = self._manifest(
            rows_in=merged.rows + sum(merged.dropped.values()),
            rows_out=merged.rows,
            dropped=merged.dropped,
            extra=figures,
        )
        manifest.retry_reasons = list(retry_reasons)
        manifest.content = digest(merged.digests)
        before = read_manifest(self.folder)
        if before is not None and before.key == self.key and before.retry_reasons:
            same = before.content == manifest.content
            manifest.revision = before.revision if same else manifest.content
        commit.publish(self.folder, manifest)
        console.print(manifest.line(), soft_wrap=True)
        return manifest

    def _writer(self, schema: pa.Schema, id_column: str) -> PartWriter:
        folder = storage.join(self.folder, PARTS)
        raw = schemas.with_drop_columns(schema)
        return PartWriter(folder, raw, id_column, self.config.ray.rows_per_part)

    def _add(self, written: Iterable[Part]) -> None:
        self._parts.update({part.path: part for part in written})

    def _kept_for_retry(self, folder: str, id_column: str, retry_reasons: Sequence[str]) -> list[str]:
        """Files of a finished table whose rows stay while others are tried again; dropped rows that stay become parts."""
        manifest = read_manifest(self.folder)
        if not retry_reasons or manifest is None or manifest.key != self.key:
            return []
        for path in storage.list_files(storage.join(self.folder, DROPPED), ".parquet"):
            stays = parts.without_reasons(storage.read_parquet(path), retry_reasons)
            if stays.num_rows:
                PartWriter(folder, stays.schema, id_column, stays.num_rows).write(stays)
        return storage.list_files(self.folder, ".parquet")

    def _check(
        self, merged: Merged, id_column: str, allow_empty: bool, intended_reasons: Sequence[str] | None
    ) -> None:
        """Refuses a table; with ``intended_reasons`` of ``None`` any share of its rows may be dropped."""
        if merged.example is not None:
            name, times = merged.example
            raise UserError(
                f"{self.name}: {id_column} {name!r} occurs {times} times ({merged.repeated:,} ids repeat). Ids must be "
                "unique."
            )
        dropped, limit = sum(merged.dropped.values()), self.config.run.max_dropped_share
        total = merged.rows + dropped
        faults = {} if intended_reasons is None else dict(merged.dropped)
        for reason in intended_reasons or ():
            faults.pop(reason, None)
        if total and sum(faults.values()) / total > limit:
            raise DroppedShareError(
                f"{self.name}: {sum(faults.values()):,} of {total:,} rows would be dropped ({counts_in_words(faults)}), more than "
                f"run.max_dropped_share={limit}. Mend the input and run again, or raise the limit{self._image_example()}."
            )
        if merged.rows == 0 and not allow_empty:
            why = f" (dropped: {counts_in_words(merged.dropped)}; see {storage.join(self.folder, PARTS)}{self._image_example()})"
            raise UserError(
                f"{self.name}: no row is left of {total:,}{why if dropped else ''}. Check the input and the settings of "
                "this stage."
            )

    def _image_example(self) -> str:
        return image_example(storage.join(commit.staged(self.folder), DROPPED))

    # ------------------------------------------------------------------ every stage

    def finish(
        self,
        *,
        rows_in: int = 0,
        rows_out: int = 0,
        dropped: dict[str, int] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest, which marks the stage as finished, and prints its line."""
        manifest = self._manifest(
            rows_in=rows_in, rows_out=rows_out, dropped=dropped or {}, extra=extra or {}
        )
        write_manifest(self.folder, manifest)
        console.print(manifest.line(), soft_wrap=True)
        return manifest

    def _manifest(self, **figures: Any) -> Manifest:
        return Manifest(
            stage=self.name,
            key=self.key,
            inputs=self.inputs,
            settings=self.config.model_dump(mode="json"),
            seconds=round(time.monotonic() - self._started, 2),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            **figures,
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


def without(dataset: ray.data.Dataset, id_column: str, ids: Set[str]) -> ray.data.Dataset:
    """Leaves out the rows whose id is in ``ids``."""
    if not ids:
        return dataset
    done = ids if isinstance(ids, DoneIds) else DoneIds(codes=[parts.encode(list(ids))])
    reference = ray.put(done)

    def keep(batch: pa.Table) -> pa.Table:
        return ray.get(reference).leave_out(batch, id_column)

    return dataset.map_batches(keep, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
