"""The station `ingest`: raw data → `samples` (and `released`, where the data brings pairs).

A new format is a file with a :class:`~mmedpo_ray.data.reader.Reader` and a line in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray import tables
from mmedpo_ray.config import Config
from mmedpo_ray.data.llava_json import LlavaJsonReader
from mmedpo_ray.data.mmedpo_json import MMedPOJsonReader
from mmedpo_ray.data.phantom_source import PhantomReader
from mmedpo_ray.data.reader import Reader
from mmedpo_ray.errors import UserError
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.stage import Manifest, Station, read_table

FORMATS: dict[str, type[Reader]] = {
    "phantom": PhantomReader,
    "mmedpo_json": MMedPOJsonReader,
    "llava_json": LlavaJsonReader,
}
# Few tasks: each new worker process costs a second of imports.
_UNITS_PER_TASK = 256


def ingest(config: Config) -> Manifest:
    """Reads the data set of ``config.data`` into the run's `samples` table. Ray must be initialised.

    Raises:
        UserError: the source is missing or not of the given format, or no usable row is left.
        DroppedShareError: too many rows are unusable.
    """
    if config.data.format not in FORMATS:
        raise UserError(f"unknown data.format {config.data.format!r}; known are {', '.join(FORMATS)}.")
    reader = FORMATS[config.data.format](config)
    manifest = _ingest_samples(config, reader)
    if isinstance(reader, MMedPOJsonReader):
        _ingest_released(config, reader)
    return manifest


def _ingest_samples(config: Config, reader: Reader) -> Manifest:
    run = RunFolder(config.run.folder)
    settings = [config.data, config.run.seed, reader.fingerprint()]
    station = Station("ingest", run.samples, config, settings=settings)
    if (manifest := station.finished()) is not None:
        return manifest
    units = reader.units()
    schema = tables.with_drop_columns(tables.SAMPLES)

    def convert(batch: pa.Table, done: Any) -> pa.Table:
        written = _get(done)
        rows = (row for unit in batch.to_pylist() for row in reader.samples(unit))
        return tables.to_table((row for row in rows if row["sample_id"] not in written), schema)

    return station.write_rows(
        lambda done: _map(units, convert, ray.put(done), config),
        schema=tables.SAMPLES,
        id_column="sample_id",
        extra=_count_samples,
    )


def _ingest_released(config: Config, reader: MMedPOJsonReader) -> Manifest:
    """Writes the pairs that came with the data; their samples say which rows are usable, and their split."""
    run = RunFolder(config.run.folder)
    station = Station("released", run.released, config, settings=[config.data], inputs=[run.samples])
    if (manifest := station.finished()) is not None:
        return manifest
    samples = read_table(run.samples, tables.SAMPLES, "samples")
    by_id = ray.put({row["sample_id"]: row for row in samples.to_pylist()})
    schema = tables.with_drop_columns(tables.PAIRS)

    def convert(batch: pa.Table, done: Any) -> pa.Table:
        written, known = _get(done), _get(by_id)
        rows = (row for unit in batch.to_pylist() for row in reader.pairs(unit, known))
        return tables.to_table((row for row in rows if row["pair_id"] not in written), schema)

    return station.write_rows(
        lambda done: _map(reader.units(), convert, ray.put(done), config),
        schema=tables.PAIRS,
        id_column="pair_id",
        total=None,
        allow_empty=True,
    )


def _map(units: pa.Table, convert: Any, done: ray.ObjectRef, config: Config) -> ray.data.Dataset:
    """Runs ``convert`` over the units in Ray tasks, neighbours together."""
    starts: Iterable[int] = range(0, units.num_rows, _UNITS_PER_TASK)
    blocks = [units.slice(start, _UNITS_PER_TASK) for start in starts]
    return ray.data.from_arrow(blocks).map_batches(
        convert,
        fn_kwargs={"done": [done]},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=config.ray.data_cpus,
    )


def _get(reference: Any) -> Any:
    """Fetches a broadcast object; Ray resolves a bare reference argument only at the top level of a task."""
    return ray.get(reference[0] if isinstance(reference, list) else reference)


def _count_samples(samples: pa.Table) -> dict[str, Any]:
    """Figures for the manifest: images and questions of each split, questions of each kind."""
    figures: dict[str, Any] = {}
    for split in ("train", "test"):
        part = samples.filter(pc.equal(samples["split"], split))
        kinds = {item["values"]: item["counts"] for item in pc.value_counts(part["answer_type"]).to_pylist()}
        images = pc.count_distinct(part["image_id"]).as_py()
        figures[split] = {"images": images, "questions": part.num_rows, "answer_types": kinds}
    return figures
