"""The debate as a chain of tables: one a pass, over the text pairs that are still open (:mod:`mmedpo_ray.judge.debate`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.clients.chat import TRANSIENT, UsageLog
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.io import storage
from mmedpo_ray.judge import agents as judges
from mmedpo_ray.judge import debate
from mmedpo_ray.judge.settings import AgentConfig, OpenAIAgentConfig
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices
from mmedpo_ray.tables.stage_runner import StageRunner, digest

DEBATE_FOLDER = ".debate"
# What an endpoint could not judge at one time it may at another: the next run asks again, about these pairs only.
RETRY_REASONS = (TRANSIENT,)


@dataclass(frozen=True)
class Again:
    """Pairs to debate that an earlier run had to leave.

    Attributes:
        key: tells this try from others.
        pairs: their ids.
    """

    key: str
    pairs: IdSet


def hold_debate(
    config: Config, judging: Sequence[Any], *, open_pairs: int, again: Again | None = None
) -> list[str]:
    """Runs the passes that are needed, over all pairs or those to debate again; returns their folders.

    Args:
        config: all settings.
        judging: what decides a judgement, for the passes' keys.
        open_pairs: how many pairs that is.
        again: the pairs to debate again; None: all that need it.
    """
    run = RunFolder(config.run.folder)
    settings = config.score
    if not open_pairs:
        return []
    has_gpu = cluster.has_gpu()
    options = {
        agent.name: judges.map_options(agent, data_cpus=config.ray.data_cpus, has_gpu=has_gpu)
        for agent in settings.agents
    }
    folders: list[str] = []
    for which in debate.plan(settings.agents, settings.max_rounds):
        source = folders[-1] if folders else run.pairs
        folder = storage.join(run.scored, DEBATE_FOLDER, which.name)
        stage = StageRunner(
            f"debate {which.index + 1}",
            folder,
            config,
            settings=[judging, settings.keep_source_scores, which.name, *([again.key] if again else [])],
            inputs=[source],
        )
        # A pass is over when all pairs have had their turn: those that failed come back as a debate of their own.
        manifest = stage.finished(accept_failed=True) or stage.write_rows(
            partial(
                _build_pass,
                which=which,
                config=config,
                source=source,
                options=options,
                judging=judging,
                again=again,
            ),
            schema=debate.DEBATE,
            id_column="pair_id",
            total=open_pairs,
            extra=lambda table: {"open": pc.sum(pc.invert(table["settled"])).as_py() or 0},
            extra_columns=["settled"],
            allow_empty=True,
            retry_reasons=RETRY_REASONS,
            # Of the few pairs of a later pass many may fail.
            limit_dropped=which.index == 0 and again is None,
        )
        folders.append(folder)
        open_pairs = manifest.extra["open"]
        if not open_pairs:
            break
    return folders


def _build_pass(
    done: IdSet,
    *,
    which: debate.Pass,
    config: Config,
    source: str,
    options: dict[str, dict[str, Any]],
    judging: Sequence[Any],
    again: Again | None,
) -> ray.data.Dataset | None:
    """The open pairs of the pass before (or of ``pairs``) through the agents of this one."""
    settings = config.score
    first = which.agents[0]
    chosen = dict(options[first.name])
    batch_size = chosen.pop("batch_size")
    actors = chosen.pop("concurrency", None)
    holds_model = actors is not None
    keep_source_scores = settings.keep_source_scores

    skip, wanted = Skip(done, "pair_id"), ray.put(again.pairs) if again else None

    def still_open(rows: pa.Table) -> pa.Table:
        rows = skip(rows)
        if which.index:
            return rows.filter(pc.invert(rows["settled"]))
        if wanted is not None:
            rows = rows.filter(ray.get(wanted).mask(rows["pair_id"]))
        return _open_debate(rows, keep_source_scores=keep_source_scores)

    rows = map_slices(
        [source],
        debate.DEBATE if which.index else schemas.PAIRS,
        still_open,
        num_cpus=config.ray.data_cpus,
        # What a judge has answered is written when its batch is whole.
        rows=batch_size if holds_model else None,
        alone=holds_model,
    )
    if rows is None:
        return None
    if not holds_model:
        hold = debate.HoldPass(which, settings.agents, settings.max_rounds)
        return rows.map_batches(hold, batch_format="pyarrow", batch_size=None, **chosen)
    extra = {"usage": _usage_log(config, judging, first), **chosen.pop("fn_constructor_kwargs", {})}
    return rows.map_batches(
        debate.HoldPass,
        fn_constructor_args=(which, settings.agents, settings.max_rounds),
        fn_constructor_kwargs=extra,
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **chosen,
    )


def _usage_log(config: Config, judging: Sequence[Any], agent: AgentConfig) -> UsageLog:
    """Where an agent that is charged by the token leaves its counters; goes with the debate's tables."""
    folder = storage.join(RunFolder(config.run.folder).scored, DEBATE_FOLDER, ".usage")
    return UsageLog(storage.join(folder, digest(judging, agent.name)))


def needs_debate(keep_source_scores: bool) -> pc.Expression:
    text = pc.field("kind") == "text"
    return text & pc.field("source_score").is_null() if keep_source_scores else text


def _open_debate(batch: pa.Table, *, keep_source_scores: bool) -> pa.Table:
    batch = batch.filter(needs_debate(keep_source_scores))
    history = pa.array([[]] * batch.num_rows, schemas.HISTORY)
    return batch.append_column("history", history).append_column(
        "settled", pa.array([False] * batch.num_rows, pa.bool_())
    )


def usage_logs(config: Config, judging: Sequence[Any]) -> dict[str, tuple[UsageLog, EndpointConfig]]:
    """Where each agent that is charged leaves its counters, and whom it asks."""
    charged = [agent for agent in config.score.agents if isinstance(agent, OpenAIAgentConfig)]
    return {agent.name: (_usage_log(config, judging, agent), agent.endpoint) for agent in charged}
