"""The text half of `curate` as Ray Data maps: slices of `samples` → candidates, choices, rewrites → text pairs.

The method decides which tables there are. Each is a stage of its own and reads what the one before it wrote:

    on_policy: candidates [→ choices, judge: endpoint] [→ rewrites if no candidate is wrong, fallback: rewrite]
    rewrite:   rewrites
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.text import tasks
from mmedpo_ray.curate.text.candidates import sample_candidates
from mmedpo_ray.curate.text.choices import ChoiceTask
from mmedpo_ray.curate.text.endpoint_stage import ask_endpoint
from mmedpo_ray.curate.text.rewrites import RewriteTask
from mmedpo_ray.tables import joins, schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices


def prepare(config: Config, train_samples: Callable[[], pa.Table]) -> list[str]:
    """Runs the stages that the method needs; returns the folders that the pairs are made of.

    Args:
        config: all settings.
        train_samples: gives the train rows of `samples` with the columns that sampling needs.

    Raises:
        UserError: a model or an endpoint cannot be used.
    """
    run, text = RunFolder(config.run.folder), config.curate.text
    inputs = [run.samples]
    if text.method == "released":
        inputs.append(run.released)
    if text.method == "on_policy":
        sample_candidates(config, train_samples())
        inputs.append(run.candidates)
        if text.judge == "endpoint":
            seed = stable_seed(config.run.seed, "choose")
            ask_endpoint(
                "choices",
                run.choices,
                ChoiceTask(text.endpoint.model, seed),
                partial(_samples, config, tasks.to_choose, tasks.CHOICE_COLUMNS, "candidates"),
                config=config,
                settings=[text.max_length_ratio],
                inputs=inputs,
            )
            inputs.append(run.choices)
    if "rewrite" in (text.method, text.fallback if text.method == "on_policy" else None):
        seed = stable_seed(config.run.seed, "rewrite")
        ask_endpoint(
            "rewrites",
            run.rewrites,
            RewriteTask(text.endpoint.model, text.max_length_ratio, seed),
            partial(_samples, config, tasks.to_rewrite, tasks.REWRITE_COLUMNS, "candidates", "choices"),
            config=config,
            settings=[text.method, text.judge, text.max_length_ratio],
            inputs=inputs,
        )
        inputs.append(run.rewrites)
    return inputs


def text_pairs(config: Config, done: IdSet, counts: str) -> ray.data.Dataset | None:
    """The text pairs, kept and dropped, of the train samples that have none yet; None without a method.

    Args:
        config: all settings.
        done: ids of the pairs that are there.
        counts: folder for what is turned down on the way (:mod:`~mmedpo_ray.curate.text.rejections`).
    """
    run, settings = RunFolder(config.run.folder), config.curate.text
    if settings.method == "none":
        return None
    if settings.method == "released":
        train = ray.put(joins.column(run.samples, "sample_id", split="train"))
        task = partial(tasks.released_pairs, skip=Skip(done, "pair_id"), train=train, settings=settings)
        return _map(config, run.released, schemas.PAIRS, task)
    task = partial(
        tasks.make_pairs,
        skip=Skip(done, "sample_id", ":text"),
        other_tables=tasks.OtherTables(config, "candidates", "choices", "rewrites"),
        settings=settings,
        vocabulary=ray.put(_vocabulary(config)),
        seed=config.run.seed,
        counts=counts,
    )
    return _map(config, run.samples, _columns(tasks.SAMPLE_COLUMNS), task)


def _samples(
    config: Config, task: Callable[..., pa.Table], columns: Sequence[str], *tables: str, done: IdSet
) -> ray.data.Dataset | None:
    """The samples that a task of :mod:`tasks` selects to ask about, given some of the other tables."""
    task = partial(
        task,
        skip=Skip(done, "sample_id"),
        other_tables=tasks.OtherTables(config, *tables),
        settings=config.curate.text,
    )
    return _map(config, RunFolder(config.run.folder).samples, _columns(columns), task)


def _vocabulary(config: Config) -> frozenset[str]:
    """The concepts of all reference answers, read in tasks; empty if no rule edit can be asked for."""
    text = config.curate.text
    if "rule_edit" not in (text.method, text.fallback):
        return frozenset()
    samples = RunFolder(config.run.folder).samples
    found = _map(config, samples, _columns(tasks.CONCEPT_COLUMNS), tasks.read_concepts)
    return frozenset(row["concept"] for row in found.iter_rows()) if found else frozenset()


def _columns(names: Sequence[str]) -> pa.Schema:
    return pa.schema([schemas.SAMPLES.field(name) for name in names])


def _map(config: Config, folder: str, columns: pa.Schema, task: Any) -> ray.data.Dataset | None:
    return map_slices([folder], columns, task, num_cpus=config.ray.data_cpus)
