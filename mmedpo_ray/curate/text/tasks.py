"""What Ray tasks do with rows of `samples`: join the other tables, leave out what is done, make rows.

Apart from the stages, so that a worker imports no model code for them.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.settings import TextCurationConfig
from mmedpo_ray.curate.text import rejections
from mmedpo_ray.curate.text.text_pairs import (
    Candidate,
    Material,
    needs_rewrite,
    released_pair,
    text_pair,
    usable,
)
from mmedpo_ray.io.storage import join
from mmedpo_ray.radiology.edits.rule_edit import vocabulary_of
from mmedpo_ray.tables import joins, schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip

# The columns of `samples` that each task below reads.
SAMPLE_COLUMNS = [name for name in schemas.SAMPLES.names if name not in ("image_sha256", "mask_uri")]
CONCEPT_COLUMNS = ["answer", "split"]
REWRITE_COLUMNS = ["sample_id", "question", "answer", "answer_type", "split"]
CHOICE_COLUMNS = ["sample_id", "question", "answer", "split"]
# The columns of `candidates` that are fields of a Candidate.
_CANDIDATE_COLUMNS = ["candidate_id", "candidate", "generator", "prompt_sha256", "seed"]
_REQUESTS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("candidate_ids", pa.list_(pa.string())),
        ("candidates", pa.list_(pa.string())),
    ]
)
_CONCEPT = pa.schema([("concept", pa.string())])


class OtherTables:
    """What the other tables hold about samples. Made on the driver once the tables are finished; travels to the tasks.

    Args:
        config: all settings; they decide which of the tables exist.
        names: tables to look into, of candidates, choices and rewrites.
    """

    def __init__(self, config: Config, *names: str) -> None:
        run, text = RunFolder(config.run.folder), config.curate.text
        sampled = text.method == "on_policy"
        self._tables: dict[str, joins.BySample] = {}
        if "candidates" in names and sampled:
            fields = [schemas.CANDIDATES.field(name) for name in ("sample_id", *_CANDIDATE_COLUMNS)]
            self._tables["candidates"] = joins.BySample([run.candidates], pa.schema(fields))
        if "choices" in names and sampled and text.judge == "endpoint":
            self._tables["choices"] = _with_dropped(run.choices, schemas.CHOICES)
        if "rewrites" in names and (text.method == "rewrite" or (sampled and text.fallback == "rewrite")):
            self._tables["rewrites"] = _with_dropped(run.rewrites, schemas.REWRITES)

    def material(self, samples: pa.Table) -> dict[str, Material]:
        """What the tables hold about each of these samples, by its id."""
        ids = samples["sample_id"]
        found = {name: table.rows(ids) for name, table in self._tables.items()}

        def rows(table: str, sample_id: str) -> list[dict[str, Any]]:
            return found.get(table, {}).get(sample_id, [])

        return {
            name: Material(
                [Candidate(*(row[name] for name in _CANDIDATE_COLUMNS)) for row in rows("candidates", name)],
                next(iter(rows("choices", name)), None),
                next(iter(rows("rewrites", name)), None),
            )
            for name in ids.to_pylist()
        }


def _train(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["split"], "train"))


def make_pairs(
    rows: pa.Table,
    *,
    skip: Skip,
    other_tables: OtherTables,
    settings: TextCurationConfig,
    vocabulary: ray.ObjectRef,
    seed: int,
    counts: str,
) -> pa.Table:
    """Samples → their text pairs; writes the counts of what was turned down on the way."""
    samples = skip(_train(rows))
    material, known = other_tables.material(samples), ray.get(vocabulary)
    made = [text_pair(row, material[row["sample_id"]], settings, known, seed) for row in samples.to_pylist()]
    # Before the rows themselves are written, so that no row is there without its counts.
    rejections.write(counts, {pair.row["pair_id"]: pair.turned_down for pair in made})
    return schemas.to_table((pair.row for pair in made), schemas.with_drop_columns(schemas.PAIRS))


def released_pairs(
    rows: pa.Table, *, skip: Skip, train: ray.ObjectRef, settings: TextCurationConfig
) -> pa.Table:
    """Pairs that came with the data → those of the train samples, unfit ones dropped."""
    rows = skip(rows)
    rows = rows.filter(pc.is_in(rows["sample_id"], value_set=ray.get(train)))
    made = (
        # A visual pair has the same answer twice, so the filters of answers do not apply.
        row if row["kind"] == "visual" else released_pair(row, settings.max_length_ratio)
        for row in rows.to_pylist()
    )
    return schemas.to_table(made, schemas.with_drop_columns(schemas.PAIRS))


def read_concepts(rows: pa.Table) -> pa.Table:
    """Samples → the concepts that their answers name."""
    answers = _train(rows)["answer"].to_pylist()
    return pa.table({"concept": sorted(vocabulary_of(answers))}, _CONCEPT)


def to_rewrite(
    rows: pa.Table, *, skip: Skip, other_tables: OtherTables, settings: TextCurationConfig
) -> pa.Table:
    """Samples → those that need a rewrite."""
    samples = skip(_train(rows))
    asked = samples.to_pylist()
    if settings.method == "on_policy":
        material = other_tables.material(samples)
        asked = [row for row in asked if needs_rewrite(row, material[row["sample_id"]], settings)]
    return schemas.to_table(asked, _REQUESTS)


def to_choose(
    rows: pa.Table, *, skip: Skip, other_tables: OtherTables, settings: TextCurationConfig
) -> pa.Table:
    """Samples → those with candidates to choose from, and these candidates."""
    samples = skip(_train(rows))
    material = other_tables.material(samples)
    asked = []
    for row in samples.to_pylist():
        candidates = material[row["sample_id"]].candidates
        fit, _ = usable(row["answer"], row["question"], candidates, settings.max_length_ratio)
        if fit:
            offered = {"candidate_ids": [c.candidate_id for c in fit], "candidates": [c.text for c in fit]}
            asked.append(row | offered)
    return schemas.to_table(asked, _REQUESTS)


def _with_dropped(folder: str, schema: pa.Schema) -> joins.BySample:
    return joins.BySample([folder, join(folder, "dropped")], schemas.with_drop_columns(schema))
