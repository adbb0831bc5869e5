"""The stage `ingest`: raw data → `samples` (and `released`, where the data brings pairs)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.ingest.image_checker import IMAGE_REASONS
from mmedpo_ray.ingest.preference_reader import SAMPLE_COLUMNS, PreferenceReader, SortedSamples
from mmedpo_ray.ingest.reader import ROWS_PER_UNIT, UNITS, Reader, Unit
from mmedpo_ray.ingest.retry_images import could_retry_succeed
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.parts import Work
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner


def ingest(config: Config) -> Manifest:
    """Reads the data set of ``config.data`` into the run's `samples` table. Ray must be initialised.

    Raises:
        UserError: the source is missing or not of the given format, or no usable row is left.
        DroppedShareError: too many rows are unusable.
    """
    reader: Reader = FORMATS[config.data.format](config)
    manifest = _ingest_samples(config, reader)
    if isinstance(reader, PreferenceReader):
        _ingest_released(config, reader)
    return manifest


def _ingest_samples(config: Config, reader: Reader) -> Manifest:
    run = RunFolder(config.run.folder)
    settings = [config.data, config.run.seed, reader.fingerprint()]
    stage = StageRunner("ingest", run.samples, config, settings=settings)
    if (manifest := stage.finished(could_retry_succeed=lambda: could_retry_succeed(config))) is not None:
        return manifest
    schema = schemas.with_drop_columns(schemas.SAMPLES)

    def convert(unit: Unit, done: Any) -> Iterator[dict[str, Any]]:
        return (row for row in reader.samples(unit, done) if row["sample_id"] not in done)

    return stage.write_rows(
        lambda done: _map_units(reader, convert, schema, ray.put(done), config),
        schema=schemas.SAMPLES,
        id_column="sample_id",
        extra=_Figures(),
        retry_reasons=IMAGE_REASONS,
        intended_reasons=reader.intended_reasons,
    )


def _ingest_released(config: Config, reader: PreferenceReader) -> Manifest:
    """Writes the pairs that came with the data; their samples say which rows are usable, and their split."""
    run = RunFolder(config.run.folder)
    stage = StageRunner("released", run.released, config, settings=[config.data], inputs=[run.samples])
    if (manifest := stage.finished()) is not None:
        return manifest
    # Read by a task and fetched by the others from shared memory: the driver never holds it.
    samples = ray.remote(_read_samples).options(num_cpus=config.ray.data_cpus).remote(run.samples)
    schema = schemas.with_drop_columns(schemas.PAIRS)

    def convert(unit: Unit, done: Any) -> Iterator[dict[str, Any]]:
        return reader.pairs(unit, SortedSamples(ray.get(samples)), done)

    return stage.write_rows(
        lambda done: _map_units(reader, convert, schema, ray.put(done), config),
        schema=schemas.PAIRS,
        id_column="pair_id",
        allow_empty=True,
    )


def _read_samples(folder: str) -> pa.Table:
    return (
        storage.dataset(folder).to_table(columns=list(SAMPLE_COLUMNS)).sort_by("sample_id").combine_chunks()
    )


def _map_units(
    reader: Reader,
    convert: Callable[[Unit, Any], Iterator[dict[str, Any]]],
    schema: pa.Schema,
    done: ray.ObjectRef,
    config: Config,
) -> Work:
    """Runs ``convert`` over the units in Ray tasks, small neighbours together, and writes its rows.

    The driver holds of a unit only where it is: about 100 bytes for hundreds of rows.
    """
    most = config.ray.rows_per_part

    def convert_units(block: pa.Table) -> Iterator[pa.Table]:
        written = ray.get(done)
        rows = (row for unit in block.to_pylist() for row in convert(Unit(**unit), written))
        # One at least, be it without rows, that Ray Data may know the columns.
        yield schemas.to_table(islice(rows, most), schema)
        while (table := schemas.to_table(islice(rows, most), schema)).num_rows:
            yield table

    blocks = list(_blocks(reader.units()))
    total = sum(pc.sum(block["rows"]).as_py() for block in blocks) if reader.counts_rows else None
    return Work(ray.data.from_blocks(blocks), convert_units, total)


def _blocks(units: Iterable[Unit]) -> Iterator[pa.Table]:
    """Tables of neighbouring units, each a task's work."""
    block: list[dict[str, Any]] = []
    rows = 0
    for unit in units:
        if block and rows + unit.rows > ROWS_PER_UNIT:
            yield pa.Table.from_pylist(block, UNITS)
            block, rows = [], 0
        block.append(asdict(unit))
        rows += unit.rows
    if block:
        yield pa.Table.from_pylist(block, UNITS)


class _Figures:
    """The manifest's figures: images and questions of each split, questions by kind and with a mask.

    A :class:`~mmedpo_ray.tables.stage_runner.Tally`; images are counted in eight bytes each.
    """

    columns = ("split", "image_id", "answer_type", "mask_uri")

    def __init__(self) -> None:
        self._images: defaultdict[str, IdSet] = defaultdict(IdSet)
        self._kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._masked: Counter[str] = Counter()

    def add(self, rows: pa.RecordBatch) -> None:
        for split in pc.unique(rows["split"]).to_pylist():
            part = rows.filter(pc.equal(rows["split"], split))
            self._images[split].add(pc.unique(part["image_id"]).to_pylist())
            self._kinds[split].update(part["answer_type"].to_pylist())
            self._masked[split] += part.num_rows - part["mask_uri"].null_count

    def figures(self) -> dict[str, Any]:
        splits = ["train", "test", *sorted(set(self._kinds) - {"train", "test"})]
        return {
            split: {
                "images": len(self._images[split]),
                "questions": self._kinds[split].total(),
                "answer_types": dict(self._kinds[split]),
                "with_mask": self._masked[split],
            }
            for split in splits
        }
