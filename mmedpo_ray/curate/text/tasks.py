"""What Ray tasks do with rows of `samples`: join the other tables, leave out what is done, make rows.

Apart from the stages, so that a worker imports no model code for them.
"""

from __future__ import annotations

from dataclasses import dataclass
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

# The columns of `samples` that each task below wants.
SAMPLE_COLUMNS = [name for name in schemas.SAMPLES.names if name not in ("image_sha256", "mask_uri")]
CONCEPT_COLUMNS = ["answer", "split"]
REWRITE_COLUMNS = ["sample_id", "question", "answer", "answer_type", "split"]
CHOOSE_COLUMNS = ["sample_id", "question", "answer", "split"]
_CANDIDATES = pa.schema(
    [
        schemas.CANDIDATES.field(name)
        for name in ("sample_id", "candidate_id", "candidate", "generator", "prompt_sha256", "seed")
    ]
)
_ASKED = pa.schema(
    [
        ("sample_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("candidate_ids", pa.list_(pa.string())),
        ("candidates", pa.list_(pa.string())),
    ]
)
_CONCEPT = pa.schema([("concept", pa.string())])


@dataclass(frozen=True)
class Joined:
    """The other tables about a sample, as far as the method has them."""

    candidates: joins.BySample | None
    choices: joins.BySample | None
    rewrites: joins.BySample | None

    @classmethod
    def of(cls, config: Config, *, choices: bool = True, rewrites: bool = True) -> Joined:
        """Opens the tables that :func:`prepare` has made."""
        run, text = RunFolder(config.run.folder), config.curate.text
        is_sampled = text.method == "on_policy"
        is_rewritten = text.method == "rewrite" or (is_sampled and text.fallback == "rewrite")
        return cls(
            joins.BySample([run.candidates], _CANDIDATES) if is_sampled else None,
            _with_dropped(run.choices, schemas.CHOICES)
            if choices and is_sampled and text.judge == "endpoint"
            else None,
            _with_dropped(run.rewrites, schemas.REWRITES) if rewrites and is_rewritten else None,
        )

    def material(self, samples: pa.Table) -> dict[str, Material]:
        """What the tables hold about each of these samples."""
        ids = samples["sample_id"]
        candidates = self.candidates.rows(ids) if self.candidates else {}
        choices = self.choices.rows(ids) if self.choices else {}
        rewrites = self.rewrites.rows(ids) if self.rewrites else {}
        return {
            name: Material(
                [_candidate(row) for row in candidates.get(name, ())],
                next(iter(choices.get(name, ())), None),
                next(iter(rewrites.get(name, ())), None),
            )
            for name in ids.to_pylist()
        }


def _train(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["split"], "train"))


def make_pairs(
    rows: pa.Table,
    *,
    skip: Skip,
    joined: Joined,
    settings: TextCurationConfig,
    vocabulary: ray.ObjectRef,
    seed: int,
    counts: str,
) -> pa.Table:
    samples = skip(_train(rows))
    material, known = joined.material(samples), ray.get(vocabulary)
    made = [text_pair(row, material[row["sample_id"]], settings, known, seed) for row in samples.to_pylist()]
    # Before the rows themselves are written, so that none is there without its counts.
    rejections.write(counts, {pair.row["pair_id"]: pair.turned_down for pair in made})
    return schemas.to_table((pair.row for pair in made), schemas.with_drop_columns(schemas.PAIRS))


def released_pairs(
    rows: pa.Table, *, skip: Skip, train: ray.ObjectRef, settings: TextCurationConfig
) -> pa.Table:
    rows = skip(rows)
    rows = rows.filter(pc.is_in(rows["sample_id"], value_set=ray.get(train)))
    made = (
        # The same answer beside another image: the filters of answers have nothing to say.
        row if row["kind"] == "visual" else released_pair(row, settings.max_length_ratio)
        for row in rows.to_pylist()
    )
    return schemas.to_table(made, schemas.with_drop_columns(schemas.PAIRS))


def read_concepts(rows: pa.Table) -> pa.Table:
    answers = _train(rows)["answer"].to_pylist()
    return pa.table({"concept": sorted(vocabulary_of(answers))}, _CONCEPT)


def to_rewrite(rows: pa.Table, *, skip: Skip, joined: Joined, settings: TextCurationConfig) -> pa.Table:
    samples = skip(_train(rows))
    asked = samples.to_pylist()
    if settings.method == "on_policy":
        material = joined.material(samples)
        asked = [row for row in asked if needs_rewrite(row, material[row["sample_id"]], settings)]
    return schemas.to_table(asked, _ASKED)


def to_choose(rows: pa.Table, *, skip: Skip, joined: Joined, settings: TextCurationConfig) -> pa.Table:
    samples = skip(_train(rows))
    material = joined.material(samples)
    asked = []
    for row in samples.to_pylist():
        candidates = material[row["sample_id"]].candidates
        fit, _ = usable(row["answer"], row["question"], candidates, settings.max_length_ratio)
        if fit:
            offered = {"candidate_ids": [c.candidate_id for c in fit], "candidates": [c.text for c in fit]}
            asked.append(row | offered)
    return schemas.to_table(asked, _ASKED)


def _with_dropped(folder: str, schema: pa.Schema) -> joins.BySample:
    return joins.BySample([folder, join(folder, "dropped")], schemas.with_drop_columns(schema))


def _candidate(row: dict[str, Any]) -> Candidate:
    return Candidate(
        row["candidate"], row["generator"], row["prompt_sha256"], row["seed"], row["candidate_id"]
    )
