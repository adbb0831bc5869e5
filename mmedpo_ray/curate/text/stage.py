"""The text half of `curate` as Ray Data maps: slices of `samples` → candidates, choices, rewrites → text pairs.

Which tables there are depends on the method; each is a stage of its own, and each reads what the one before it left:

    on_policy: candidates [→ choices, judge: endpoint] [→ rewrites of the samples without a wrong candidate, fallback: rewrite]
    rewrite:   rewrites
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.text import choices, rewrites, tasks
from mmedpo_ray.curate.text.candidates import sample_candidates
from mmedpo_ray.curate.text.endpoint_stage import Asking
from mmedpo_ray.tables import joins, schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices


def prepare(config: Config, narrow_samples: Any) -> list[str]:
    """Runs the stages that the method needs; returns the folders that the pairs are made of.

    Args:
        config: all settings.
        narrow_samples: called for the train samples as the sampling of candidates wants them.

    Raises:
        UserError: a model or an endpoint cannot be used.
    """
    run = RunFolder(config.run.folder)
    text = config.curate.text
    inputs = [run.samples]
    if text.method == "released":
        inputs.append(run.released)
    if text.method == "on_policy":
        sample_candidates(config, narrow_samples())
        inputs.append(run.candidates)
        if text.judge == "endpoint":
            _choose(config, inputs)
            inputs.append(run.choices)
    if "rewrite" in (text.method, text.fallback if text.method == "on_policy" else None):
        _rewrite(config, inputs)
        inputs.append(run.rewrites)
    return inputs


def text_pairs(config: Config, done: IdSet, counts: str) -> ray.data.Dataset | None:
    """The text pairs, kept and dropped, of the train samples that have none yet; None without a method.

    Args:
        config: all settings.
        done: ids of the pairs that are there.
        counts: folder for what is turned down on the way (:mod:`~mmedpo_ray.curate.text.rejections`).
    """
    run = RunFolder(config.run.folder)
    settings = config.curate.text
    if settings.method == "none":
        return None
    if settings.method == "released":
        skip = Skip(done, "pair_id")
        task = partial(tasks.released_pairs, skip=skip, train=_train_ids(run.samples), settings=settings)
        return _map(run.released, schemas.PAIRS, task, config)
    task = partial(
        tasks.make_pairs,
        skip=Skip(done, "sample_id", ":text"),
        joined=tasks.Joined.of(config),
        settings=settings,
        vocabulary=ray.put(_vocabulary(config)),
        seed=config.run.seed,
        counts=counts,
    )
    return _map(run.samples, _columns(tasks.SAMPLE_COLUMNS), task, config)


# ---------------------------------------------------------------------- stages behind an endpoint


def _choose(config: Config, inputs: list[str]) -> None:
    run, text = RunFolder(config.run.folder), config.curate.text
    seed = stable_seed(config.run.seed, "choose")
    asking = Asking(
        name="choices",
        folder=run.choices,
        endpoint=text.endpoint,
        task=choices.ChooseTask(text.endpoint.model, seed),
        settings=[choices.prompt_key(), text.max_length_ratio, seed],
        inputs=list(inputs),
    )

    def build(done: IdSet) -> ray.data.Dataset | None:
        joined = tasks.Joined.of(config, choices=False, rewrites=False)
        task = partial(tasks.to_choose, skip=Skip(done, "sample_id"), joined=joined, settings=text)
        return _map(run.samples, _columns(tasks.CHOOSE_COLUMNS), task, config)

    asking.run(config, build)


def _rewrite(config: Config, inputs: list[str]) -> None:
    run, text = RunFolder(config.run.folder), config.curate.text
    seed = stable_seed(config.run.seed, "rewrite")
    asking = Asking(
        name="rewrites",
        folder=run.rewrites,
        endpoint=text.endpoint,
        task=rewrites.RewriteTask(text.endpoint.model, text.max_length_ratio, seed),
        settings=[rewrites.prompt_key(), text.method, text.judge, text.max_length_ratio, seed],
        inputs=list(inputs),
    )

    def build(done: IdSet) -> ray.data.Dataset | None:
        joined = tasks.Joined.of(config, rewrites=False)
        task = partial(tasks.to_rewrite, skip=Skip(done, "sample_id"), joined=joined, settings=text)
        return _map(run.samples, _columns(tasks.REWRITE_COLUMNS), task, config)

    asking.run(config, build)


# ---------------------------------------------------------------------- shared


def _vocabulary(config: Config) -> frozenset[str]:
    """The concepts of all reference answers, read in tasks; empty where no rule edit can be asked for."""
    text = config.curate.text
    if "rule_edit" not in (text.method, text.fallback):
        return frozenset()
    columns = _columns(tasks.CONCEPT_COLUMNS)
    found = _map(RunFolder(config.run.folder).samples, columns, tasks.read_concepts, config)
    return frozenset(row["concept"] for row in found.iter_rows()) if found else frozenset()


def _train_ids(folder: str) -> ray.ObjectRef:
    return ray.put(joins.column(folder, "sample_id", split="train"))


def _columns(names: list[str]) -> pa.Schema:
    return pa.schema([schemas.SAMPLES.field(name) for name in names])


def _map(folder: str, columns: pa.Schema, task: Any, config: Config) -> ray.data.Dataset | None:
    return map_slices([folder], columns, task, num_cpus=config.ray.data_cpus)
