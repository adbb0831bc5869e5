"""Reads a table into `Features`: by Ray Data tasks where Ray runs, else batch by batch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.audit.features import Features, features_of
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.console import progress_bar
from mmedpo_ray.datasets.pair_table import PairTable, as_expected
from mmedpo_ray.errors import UserError, user_message
from mmedpo_ray.tables.slices import plan_files, read_rows

_MOST_ROWS = 16_384
# First row of a slice, beside its features.
_ROW = "row"
_WORDS = {"first_word": "first_words", "answer_type": "answer_types"}


def extract(pairs: PairTable, samples: Samples | None, *, num_cpus: float = 1.0) -> Features:
    """Reads the table once and keeps its numbers.

    Args:
        pairs: the table.
        samples: the samples behind it, or None.
        num_cpus: CPUs a task asks for.

    Raises:
        UserError: the table cannot be read.
    """
    plan = _plan(pairs, num_cpus) if ray.is_initialized() else []
    blocks = _in_tasks(plan, pairs, samples, num_cpus) if plan else _here(pairs, samples)
    parts: list[tuple[int, pa.Table]] = []
    with progress_bar() as bar:
        task = bar.add_task("audit", total=pairs.num_rows, note="")
        for start, block in blocks:
            parts.append((start, block))
            bar.update(task, advance=block.num_rows)
    # Tasks end in any order.
    parts.sort(key=lambda part: part[0])
    table = pa.concat_tables([part for _, part in parts])
    found: dict[str, Any] = {}
    for name in table.column_names:
        if name in _WORDS:
            found[name], found[_WORDS[name]] = _coded(table[name])
        else:
            found[name] = table[name].to_numpy()
    held_out = frozenset(samples.held_out) if samples is not None else frozenset()
    return Features(columns=pairs.columns, has_samples=samples is not None, held_out=held_out, **found)


def _here(pairs: PairTable, samples: Samples | None) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for batch in pairs.batches():
        yield start, _block(batch, samples)
        start += batch.num_rows
    if start == 0:
        yield 0, _block(as_expected(pa.table({}), sorted(pairs.columns), pairs.path), samples)


def _plan(pairs: PairTable, num_cpus: float) -> list[pa.Table]:
    """The slices of a Parquet table, each with the number of its first row; empty for JSON."""
    plan, start = [], 0
    for planned in plan_files(pairs.files(), num_cpus=num_cpus, most=_MOST_ROWS):
        plan.append(planned.append_column(_ROW, pa.array([start])))
        start += planned["stop"][0].as_py() - planned["start"][0].as_py()
    return plan


def _in_tasks(
    plan: list[pa.Table], pairs: PairTable, samples: Samples | None, num_cpus: float
) -> Iterator[tuple[int, pa.Table]]:
    names = sorted(pairs.columns)
    known = ray.put(samples.for_tasks()) if samples is not None else None

    def work(planned: pa.Table) -> pa.Table:
        ((path, start, stop, row),) = zip(*planned.to_pydict().values(), strict=True)
        rows = as_expected(read_rows(path, start, stop, names), names, path)
        block = _block(rows, ray.get(known) if known is not None else None)
        return block.append_column(_ROW, pa.array(np.full(block.num_rows, row)))

    made = ray.data.from_blocks(plan).map_batches(
        work, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=num_cpus
    )
    blocks: Iterable[Any] = made.iter_batches(batch_format="pyarrow", batch_size=None)
    try:
        for block in blocks:
            if block.num_rows:
                yield block[_ROW][0].as_py(), block.drop_columns([_ROW])
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        raise UserError(message) from error


def _block(rows: pa.Table, samples: Samples | None) -> pa.Table:
    found = features_of(rows, samples)
    return pa.table(
        {
            name: pc.dictionary_encode(values) if name in _WORDS else pa.array(values)
            for name, values in found.items()
        }
    )


def _coded(strings: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32, each text's place among the different ones in order of appearance, and these."""
    whole = strings.unify_dictionaries().combine_chunks()
    return whole.indices.to_numpy(zero_copy_only=False), tuple(whole.dictionary.to_pylist())
