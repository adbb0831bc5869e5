"""The debate (:mod:`mmedpo_ray.judge.debate`) as tables: one per pass, over the pairs still open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.clients.chat import TRANSIENT
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.usage_log import UsageLog
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.io import storage
from mmedpo_ray.judge import debate
from mmedpo_ray.judge.agents import JUDGES
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices
from mmedpo_ray.tables.stage_runner import StageRunner, digest

DEBATE_FOLDER = ".debate"
# An endpoint that could not judge a pair may do so later: the next run asks again, about these pairs only.
RETRY_REASONS = (TRANSIENT,)


@dataclass(frozen=True)
class Retry:
    """Pairs to debate again, since an earlier run could not judge them.

    Attributes:
        key: tells this try from others.
        pairs: their ids.
    """

    key: str
    pairs: IdSet


@dataclass(frozen=True)
class Passes:
    """The passes of a debate, over all pairs that need one or over those to retry.

    Attributes:
        config: all settings.
        judging: what decides a judgement, for the passes' keys.
        retry: the pairs to debate again; None: all that need a debate.
    """

    config: Config
    judging: Sequence[Any]
    retry: Retry | None = None

    def run(self, open_pairs: int) -> list[str]:
        """Runs passes until no pair is open; returns the folders of their tables.

        Args:
            open_pairs: number of pairs to debate.
        """
        settings, run = self.config.score, RunFolder(self.config.run.folder)
        if not open_pairs:
            return []
        # All agents first: a wrong setting of any of them must show before the first pass.
        data_cpus, has_gpu = self.config.ray.data_cpus, cluster.has_gpu()
        options = {
            agent.name: JUDGES[agent.kind].map_options(agent, data_cpus=data_cpus, has_gpu=has_gpu)
            for agent in settings.agents
        }
        folders: list[str] = []
        for which in debate.plan(settings.agents, settings.max_rounds):
            source = folders[-1] if folders else run.pairs
            folder = storage.join(run.scored, DEBATE_FOLDER, which.name)
            retry = [self.retry.key] if self.retry else []
            stage = StageRunner(
                f"debate {which.index + 1}",
                folder,
                self.config,
                settings=[self.judging, settings.keep_source_scores, which.name, *retry],
                inputs=[source],
            )
            # A pass is over when all pairs have had their turn: pairs that failed return in a debate of their
            # own.
            manifest = stage.finished(accept_failed=True) or stage.write_rows(
                partial(
                    self._dataset, which=which, source=source, options=dict(options[which.agents[0].name])
                ),
                schema=debate.DEBATE,
                id_column="pair_id",
                total=open_pairs,
                extra=lambda table: {"open": pc.sum(pc.invert(table["settled"])).as_py() or 0},
                extra_columns=["settled"],
                allow_empty=True,
                retry_reasons=RETRY_REASONS,
                # A later pass has few pairs, of which many may fail.
                limit_dropped=which.index == 0 and self.retry is None,
            )
            folders.append(folder)
            open_pairs = manifest.extra["open"]
            if not open_pairs:
                break
        return folders

    def _dataset(
        self, done: IdSet, which: debate.Pass, source: str, options: dict[str, Any]
    ) -> ray.data.Dataset | None:
        """The open pairs of the previous pass (or of ``pairs``), judged by the agents of this one."""
        settings, first = self.config.score, which.agents[0]
        batch_size, actors = options.pop("batch_size"), options.pop("concurrency", None)
        keep_source_scores = settings.keep_source_scores
        skip, wanted = Skip(done, "pair_id"), ray.put(self.retry.pairs) if self.retry else None

        def still_open(rows: pa.Table) -> pa.Table:
            rows = skip(rows)
            if which.index:
                return rows.filter(pc.invert(rows["settled"]))
            if wanted is not None:
                rows = rows.filter(ray.get(wanted).mask(rows["pair_id"]))
            return _open_debate(rows.filter(needs_debate(keep_source_scores)))

        rows = map_slices(
            [source],
            debate.DEBATE if which.index else schemas.PAIRS,
            still_open,
            num_cpus=self.config.ray.data_cpus,
            # Judgements of a model are written when its batch is whole.
            rows=batch_size if actors else None,
            alone=actors is not None,
        )
        if rows is None:
            return None
        arguments = (which, settings.agents, settings.max_rounds)
        if actors is None:
            hold = debate.HoldPass(*arguments)
            return rows.map_batches(hold, batch_format="pyarrow", batch_size=None, **options)
        usage = _usage_log(self.config, self.judging, first.name)
        return rows.map_batches(
            debate.HoldPass,
            fn_constructor_args=arguments,
            fn_constructor_kwargs={"usage": usage, **options.pop("fn_constructor_kwargs", {})},
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **options,
        )


def needs_debate(keep_source_scores: bool) -> pc.Expression:
    """Which pairs the agents judge: text pairs, without a score of their own if such scores are kept."""
    text = pc.field("kind") == "text"
    return text & pc.field("source_score").is_null() if keep_source_scores else text


def _open_debate(batch: pa.Table) -> pa.Table:
    history = pa.array([[]] * batch.num_rows, schemas.HISTORY)
    return debate.with_columns(batch, history=history, settled=pa.array([False] * batch.num_rows, pa.bool_()))


def _usage_log(config: Config, judging: Sequence[Any], agent: str) -> UsageLog:
    """Where an agent that is charged by the token leaves its counters; removed with the debate's tables."""
    folder = storage.join(RunFolder(config.run.folder).scored, DEBATE_FOLDER, ".usage")
    return UsageLog(storage.join(folder, digest(judging, agent)))


def usage_logs(config: Config, judging: Sequence[Any]) -> dict[str, tuple[UsageLog, EndpointConfig]]:
    """For each agent behind an endpoint its usage log, and the endpoint."""
    endpoints = {agent.name: getattr(agent, "endpoint", None) for agent in config.score.agents}
    return {
        name: (_usage_log(config, judging, name), endpoint)
        for name, endpoint in endpoints.items()
        if isinstance(endpoint, EndpointConfig)
    }
