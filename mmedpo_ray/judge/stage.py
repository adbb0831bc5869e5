"""Stage ``score``: pairs → scored pairs.

Three steps, each with tables of its own, so that a crash costs little and a new weighting costs no judging:

1. ``scored/.debate/pass-…``: one table per debate pass, over the text pairs still open
    (:mod:`mmedpo_ray.judge.debate`).
2. ``scored/.scores``: every pair with its score, from the debate, from the data, or from the visual tool's
    confidence.
3. ``scored``: the same with weights, which need the scores of all pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.judge import debate, weights
from mmedpo_ray.judge.agents import JUDGES
from mmedpo_ray.judge.debate import with_columns
from mmedpo_ray.judge.debate_passes import (
    DEBATE_FOLDER,
    RETRY_REASONS,
    Passes,
    Retry,
    needs_debate,
    usage_logs,
)
from mmedpo_ray.judge.settings import ScoreConfig, WeightConfig
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.merge import DROPPED
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, digest, read_manifest

# Everything of a scored pair but its weight.
_SCORES = pa.schema([field for field in schemas.SCORED if field.name != "weight"])
_RAW_SCORES = schemas.with_drop_columns(_SCORES)


def score(config: Config) -> Manifest:
    """Judges every pair and gives it a weight. Ray must be initialised.

    Returns:
        The manifest of ``scored``; its ``extra`` holds ``debate`` (rows judged, rounds, consensus) and
        ``weights`` (per kind: mean, effective sample share, histograms; see
        :class:`mmedpo_ray.judge.weights.Summary`).

    Raises:
        UserError: the pairs are missing, an agent cannot run, or all weights are 0.
        DroppedShareError: more pairs than allowed could not be judged.
    """
    run, settings = RunFolder(config.run.folder), config.score
    judging = [[JUDGES[agent.kind].key(agent) for agent in settings.agents], settings.max_rounds]
    scores = storage.join(run.scored, ".scores")
    if manifest := _stage(config, judging, scores).finished():
        return manifest
    pairs = read_manifest(run.pairs)
    total = pairs.rows_out if pairs else 0
    usage = _write_scores(config, judging, scores, total)
    # Judgements of a retry change the weights of all pairs, so the key of this table may be another one now.
    stage = _stage(config, judging, scores)
    moments = _moments(scores, settings.weights)

    def build(done: IdSet) -> ray.data.Dataset | None:
        skip = Skip(done, "pair_id")

        def weigh(rows: pa.Table) -> pa.Table:
            return _attach_weights(skip(rows), moments=moments, settings=settings.weights)

        return map_slices(_with_dropped(scores), _RAW_SCORES, weigh, num_cpus=config.ray.data_cpus)

    return stage.write_rows(
        build,
        schema=schemas.SCORED,
        id_column="pair_id",
        total=total,
        extra=_Figures(settings, usage),
        retry_reasons=RETRY_REASONS,
    )


def _stage(config: Config, judging: Sequence[Any], scores_folder: str) -> StageRunner:
    run, settings = RunFolder(config.run.folder), config.score
    scores = read_manifest(scores_folder)
    revision = [scores.revision] if scores is not None and scores.revision else []
    return StageRunner(
        "score",
        run.scored,
        config,
        settings=[judging, settings.keep_source_scores, settings.weights, *revision],
        inputs=[run.pairs],
    )


# ---------------------------------------------------------------------- step 2: scores


def _write_scores(config: Config, judging: Sequence[Any], folder: str, total: int) -> dict[str, Any]:
    """Writes ``scored/.scores``; returns what the agents were charged. Other weights use this table again."""
    run, settings = RunFolder(config.run.folder), config.score
    keep_source_scores, num_agents = settings.keep_source_scores, len(settings.agents)
    stage = StageRunner("scores", folder, config, settings=[judging, keep_source_scores], inputs=[run.pairs])
    debates = storage.join(run.scored, DEBATE_FOLDER)
    if manifest := stage.finished():
        storage.remove(debates)
        return manifest.extra.get("usage", {})
    logs = usage_logs(config, judging)
    retry = None
    before = read_manifest(folder)
    if before is not None and before.key == stage.key:
        # An earlier run of the same judges: its pairs that failed are debated again, its charges stay in the
        # counters.
        retry = _pairs_to_retry(before, folder)
        for name, (log, _) in logs.items():
            log.carry_over(before.extra.get("usage", {}).get(name, {}))
    debatable = storage.dataset(run.pairs).count_rows(filter=needs_debate(keep_source_scores))
    passes = Passes(config, judging, retry).run(len(retry.pairs) if retry else debatable)

    def build(done: IdSet) -> ray.data.Dataset | None:
        skip = Skip(done, "pair_id")

        def give_scores(rows: pa.Table) -> pa.Table:
            rows = skip(rows)
            # Only rows of a debate have a value in the column "settled".
            debated = pc.is_valid(rows["settled"])
            found = [
                _score_undebated(rows.filter(pc.invert(debated)), keep_source_scores=keep_source_scores),
                _score_debated(rows.filter(debated), num_agents=num_agents),
            ]
            return pa.concat_tables([part.select(_RAW_SCORES.names) for part in found])

        sources = [run.pairs] if debatable < total else []
        sources += [path for held in passes for path in _with_dropped(held)]
        schema = schemas.with_drop_columns(debate.DEBATE)
        return map_slices(sources, schema, give_scores, num_cpus=config.ray.data_cpus)

    manifest = stage.write_rows(
        build,
        schema=_SCORES,
        id_column="pair_id",
        total=total,
        extra=lambda _: {
            "usage": {name: log.total().figures(endpoint) for name, (log, endpoint) in logs.items()}
        },
        extra_columns=[],
        retry_reasons=RETRY_REASONS,
        # The next table checks whether too many pairs failed: from here they can be tried again.
        limit_dropped=False,
    )
    storage.remove(debates)
    return manifest.extra["usage"]


def _pairs_to_retry(before: Manifest, folder: str) -> Retry:
    dropped = storage.dataset(storage.join(folder, DROPPED))
    failed = pc.field(schemas.DROP_REASON).isin(list(RETRY_REASONS))
    pair_ids = dropped.to_table(columns=["pair_id"], filter=failed)["pair_id"].to_pylist()
    return Retry(digest(before.content, before.finished_at), IdSet(pair_ids))


def _score_undebated(batch: pa.Table, *, keep_source_scores: bool) -> pa.Table:
    """Scores of pairs that bring one: from the data, or the visual tool's confidence."""
    batch = batch.filter(~needs_debate(keep_source_scores))
    is_visual = pc.equal(batch["kind"], "visual")
    given = pc.if_else(is_visual, batch["tool_confidence"], batch["source_score"])
    if keep_source_scores:
        given = pc.coalesce(batch["source_score"], given)
    in_range = pc.fill_null(pc.and_(pc.greater_equal(given, 0.0), pc.less_equal(given, 1.0)), False)
    nothing = pa.scalar(None, pa.string())
    reason = pc.if_else(pc.is_null(given), "no_tool_confidence", "score_out_of_range")
    return with_columns(
        batch,
        score=given,
        consensus=pa.array([True] * batch.num_rows, pa.bool_()),
        rounds=pa.array([0] * batch.num_rows, pa.int32()),
        history=pa.array([[]] * batch.num_rows, schemas.HISTORY),
        drop_reason=pc.if_else(in_range, nothing, reason),
        drop_detail=pc.if_else(in_range, nothing, pc.cast(given, pa.string())),
    )


def _score_debated(batch: pa.Table, *, num_agents: int) -> pa.Table:
    """Scores of the pairs whose debate has ended; pairs still open belong to a later pass."""
    batch = batch.filter(pc.or_(pc.fill_null(batch["settled"], False), pc.is_valid(batch["drop_reason"])))
    refused = pc.is_valid(batch["drop_reason"]).to_pylist()
    outcomes = [
        None if dropped else debate.outcome(debate.from_rows(history), num_agents)
        for history, dropped in zip(batch["history"].to_pylist(), refused, strict=True)
    ]
    return with_columns(
        batch,
        score=pa.array([item and item.score for item in outcomes], pa.float64()),
        consensus=pa.array([item and item.consensus for item in outcomes], pa.bool_()),
        rounds=pa.array([item and item.rounds for item in outcomes], pa.int32()),
    )


# ---------------------------------------------------------------------- step 3: weights


def _moments(scores: str, settings: WeightConfig) -> dict[str, weights.Moments]:
    """The moments of the scores in a table, read batch by batch."""
    fit = weights.Fit()
    for batch in storage.read_batches(scores, ["score", "kind", "dataset"]):
        if batch.num_rows:
            fit.add(batch["score"].to_numpy(), _groups(batch, settings))
    return fit.moments()


def _attach_weights(
    batch: pa.Table, *, moments: dict[str, weights.Moments], settings: WeightConfig
) -> pa.Table:
    values = np.full(batch.num_rows, np.nan)
    kept = pc.is_null(batch["drop_reason"]).to_numpy()
    rows = batch.filter(pa.array(kept))
    values[kept] = weights.apply(rows["score"].to_numpy(), _groups(rows, settings), moments, settings)
    return with_columns(batch, weight=pa.array(values, pa.float64(), mask=~kept))


def _groups(rows: pa.Table | pa.RecordBatch, settings: WeightConfig) -> list[str]:
    return [
        weights.group_of(kind, dataset, settings)
        for kind, dataset in zip(rows["kind"].to_pylist(), rows["dataset"].to_pylist(), strict=True)
    ]


class _Figures:
    """Figures of the final table for the manifest (a :class:`~mmedpo_ray.tables.stage_runner.Tally`).

    Args:
        settings: of the stage.
        usage: what each agent behind an endpoint was charged.
    """

    columns = ("score", "weight", "kind", "rounds", "consensus")

    def __init__(self, settings: ScoreConfig, usage: dict[str, Any]) -> None:
        self._settings = settings
        self._usage = usage
        self._summary = weights.Summary(settings.weights)
        self._rounds: Counter[int] = Counter()
        self._agreed = 0

    def add(self, rows: pa.RecordBatch) -> None:
        self._summary.add(rows["score"].to_numpy(), rows["weight"].to_numpy(), rows["kind"].to_pylist())
        judged = rows.filter(pc.greater(rows["rounds"], 0))
        self._rounds.update(judged["rounds"].to_pylist())
        self._agreed += judged["consensus"].true_count

    def figures(self) -> dict[str, Any]:
        mode, per = self._settings.weights.mode, self._settings.weights.per
        if not self._summary.any_weight:
            raise UserError(
                f"score: every weight is 0 with score.weights.mode={mode}, so nothing could be learned. Use "
                "match_moments, or check the scores in the data."
            )
        held = {
            "agents": [agent.name for agent in self._settings.agents],
            "judged": self._rounds.total(),
            "consensus": self._agreed,
            "rounds": {str(number): count for number, count in sorted(self._rounds.items())},
        }
        if self._usage:
            held["usage"] = self._usage
        return {"debate": held, "weights": {"mode": mode, "per": per, "kinds": self._summary.figures()}}


def _with_dropped(folder: str) -> list[str]:
    return [folder, storage.join(folder, DROPPED)]
