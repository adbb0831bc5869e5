"""Stage ``score``: pairs → scored pairs.

Three steps, each with tables of its own, so that a crash costs little and a new weighting costs no judging:

1. ``scored/.debate/pass-…``: one table a debate pass, over the text pairs still open (:mod:`mmedpo_ray.judge.debate`).
2. ``scored/.scores``: every pair with its score, from the debate, from the data, or from the visual tool's confidence.
3. ``scored``: the same with weights, which need the scores of all pairs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.clients.chat import Usage
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.judge import agents as judges
from mmedpo_ray.judge import debate, weights
from mmedpo_ray.judge.debate_rounds import (
    DEBATE_FOLDER,
    RETRY_REASONS,
    Again,
    hold_debate,
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

log = logging.getLogger(__name__)

# Everything of a scored pair but its weight.
_SCORES = pa.schema([field for field in schemas.SCORED if field.name != "weight"])
_RAW_SCORES = schemas.with_drop_columns(_SCORES)


def score(config: Config) -> Manifest:
    """Judges every pair and gives it a weight. Ray must be initialised.

    Returns:
        The manifest of ``scored``; its ``extra`` holds ``debate`` (rows judged, rounds, consensus) and ``weights`` (per kind:
        mean, effective sample share, histograms; see :func:`mmedpo_ray.judge.weights.summary`).

    Raises:
        UserError: the pairs are missing, an agent cannot run, or all weights are 0.
        DroppedShareError: more pairs than allowed could not be judged.
    """
    run = RunFolder(config.run.folder)
    settings = config.score
    judging = [[judges.key(agent) for agent in settings.agents], settings.max_rounds]
    if manifest := _stage(config, judging).finished():
        return manifest
    total = _rows(run.pairs)
    scores = _scores(config, judging, total)
    # Judgements that came on another try move the weights of all pairs: this is another table then.
    stage = _stage(config, judging)
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
        extra=_Figures(settings, _usage(scores)),
        retry_reasons=RETRY_REASONS,
    )


def _stage(config: Config, judging: Sequence[Any]) -> StageRunner:
    run, settings = RunFolder(config.run.folder), config.score
    scores = read_manifest(_scores_folder(run))
    revision = [scores.revision] if scores is not None and scores.revision else []
    return StageRunner(
        "score",
        run.scored,
        config,
        settings=[judging, settings.keep_source_scores, settings.weights, *revision],
        inputs=[run.pairs],
    )


def _scores_folder(run: RunFolder) -> str:
    return storage.join(run.scored, ".scores")


# ---------------------------------------------------------------------- step 2: scores


def _scores(config: Config, judging: Sequence[Any], total: int) -> str:
    """Writes ``scored/.scores``; returns its folder. Kept afterwards, so that other weights need no judging."""
    run = RunFolder(config.run.folder)
    settings = config.score
    folder = _scores_folder(run)
    stage = StageRunner(
        "scores", folder, config, settings=[judging, settings.keep_source_scores], inputs=[run.pairs]
    )
    debates = storage.join(run.scored, DEBATE_FOLDER)
    if stage.finished():
        storage.remove(debates)
        return folder
    again = _to_debate_again(stage)
    _carry_usage(config, judging, stage)
    debatable = storage.dataset(run.pairs).count_rows(filter=needs_debate(settings.keep_source_scores))
    open_pairs = len(again.pairs) if again else debatable
    passes = hold_debate(config, judging, open_pairs=open_pairs, again=again)
    num_agents, keep_source_scores = len(settings.agents), settings.keep_source_scores

    def build(done: IdSet) -> ray.data.Dataset | None:
        skip = Skip(done, "pair_id")

        def give_scores(rows: pa.Table) -> pa.Table:
            rows = skip(rows)
            # Only rows of a debate say whether it is settled.
            debated = pc.is_valid(rows["settled"])
            undebated = _score_undebated(
                rows.filter(pc.invert(debated)), keep_source_scores=keep_source_scores
            )
            found = [undebated, _score_debated(rows.filter(debated), num_agents=num_agents)]
            return pa.concat_tables([part.select(_RAW_SCORES.names) for part in found])

        sources = [path for held in passes for path in _with_dropped(held)]
        if debatable < total:
            sources.insert(0, run.pairs)
        schema = schemas.with_drop_columns(debate.DEBATE)
        return map_slices(sources, schema, give_scores, num_cpus=config.ray.data_cpus)

    def usage(_: pa.Table) -> dict[str, Any]:
        logs = usage_logs(config, judging)
        return {"usage": {name: log.total().figures(endpoint) for name, (log, endpoint) in logs.items()}}

    stage.write_rows(
        build,
        schema=_SCORES,
        id_column="pair_id",
        total=total,
        extra=usage,
        extra_columns=[],
        retry_reasons=RETRY_REASONS,
        # Whether too many failed is for the table after this one to say: here they can be tried again.
        limit_dropped=False,
    )
    storage.remove(debates)
    return folder


def _to_debate_again(stage: StageRunner) -> Again | None:
    """The pairs that an earlier run of the same judges had to leave; None: there was none."""
    before = read_manifest(stage.folder)
    if before is None or before.key != stage.key:
        return None
    dropped = storage.dataset(storage.join(stage.folder, DROPPED))
    failed = dropped.to_table(
        columns=["pair_id"], filter=pc.field(schemas.DROP_REASON).isin(list(RETRY_REASONS))
    )
    return Again(digest(before.content, before.finished_at), IdSet(failed["pair_id"].to_pylist()))


def _carry_usage(config: Config, judging: Sequence[Any], stage: StageRunner) -> None:
    """What an earlier run of the same judges was charged for stays in the counters."""
    before = read_manifest(stage.folder)
    if before is None or before.key != stage.key:
        return
    for name, (log, _) in usage_logs(config, judging).items():
        if not storage.list_files(log.folder):
            log.add(Usage.of(before.extra.get("usage", {}).get(name, {})))


def _score_undebated(batch: pa.Table, *, keep_source_scores: bool) -> pa.Table:
    """Scores of pairs that bring one: from the data, or the visual tool's confidence."""
    batch = batch.filter(~needs_debate(keep_source_scores))
    is_visual = pc.equal(batch["kind"], "visual")
    given = pc.if_else(is_visual, batch["tool_confidence"], batch["source_score"])
    if keep_source_scores:
        given = pc.coalesce(batch["source_score"], given)
    in_range = pc.fill_null(pc.and_(pc.greater_equal(given, 0.0), pc.less_equal(given, 1.0)), False)
    reason = pc.if_else(
        in_range,
        pa.scalar(None, pa.string()),
        pc.if_else(pc.is_null(given), "no_tool_confidence", "score_out_of_range"),
    )
    detail = pc.if_else(in_range, pa.scalar(None, pa.string()), pc.cast(given, pa.string()))
    return _with_columns(
        batch,
        score=given,
        consensus=pa.array([True] * batch.num_rows, pa.bool_()),
        rounds=pa.array([0] * batch.num_rows, pa.int32()),
        history=pa.array([[]] * batch.num_rows, schemas.HISTORY),
        drop_reason=reason,
        drop_detail=detail,
    )


def _score_debated(batch: pa.Table, *, num_agents: int) -> pa.Table:
    """Scores of the pairs whose debate a pass has settled or ended; those still open belong to a later pass."""
    batch = batch.filter(pc.or_(pc.fill_null(batch["settled"], False), pc.is_valid(batch["drop_reason"])))
    refused = pc.is_valid(batch["drop_reason"]).to_pylist()
    outcomes = [
        None if dropped else debate.outcome(debate.from_rows(history), num_agents)
        for history, dropped in zip(batch["history"].to_pylist(), refused, strict=True)
    ]
    return _with_columns(
        batch,
        score=pa.array([item and item.score for item in outcomes], pa.float64()),
        consensus=pa.array([item and item.consensus for item in outcomes], pa.bool_()),
        rounds=pa.array([item and item.rounds for item in outcomes], pa.int32()),
    )


# ---------------------------------------------------------------------- step 3: weights


def _moments(scores: str, settings: WeightConfig) -> dict[str, weights.Moments]:
    """The moments of the scores in a table, read batch by batch."""
    fit = weights.Fit()
    columns = ["score", "kind", "dataset"]
    for batch in storage.read_batches(scores, columns):
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
    return _with_columns(batch, weight=pa.array(values, pa.float64(), mask=~kept))


def _groups(rows: pa.Table | pa.RecordBatch, settings: WeightConfig) -> list[str]:
    return [
        weights.group_of(kind, dataset, settings)
        for kind, dataset in zip(rows["kind"].to_pylist(), rows["dataset"].to_pylist(), strict=True)
    ]


class _Figures:
    """What the manifest tells of the final table (a :class:`~mmedpo_ray.tables.stage_runner.Tally`)."""

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
                f"score: every weight is 0 with score.weights.mode={mode}, so nothing could be learned. Use match_moments, "
                "or check the scores in the data."
            )
        held = {
            "agents": [agent.name for agent in self._settings.agents],
            "judged": self._rounds.total(),
            "consensus": self._agreed,
            "rounds": {str(number): count for number, count in sorted(self._rounds.items())},
        }
        if self._usage:
            held["usage"] = self._usage
        return {
            "debate": held,
            "weights": {"mode": mode, "per": per, "kinds": self._summary.figures()},
        }


# ---------------------------------------------------------------------- tables


def _rows(folder: str) -> int:
    manifest = read_manifest(folder)
    return manifest.rows_out if manifest else 0


def _usage(scores: str) -> dict[str, Any]:
    manifest = read_manifest(scores)
    return manifest.extra.get("usage", {}) if manifest else {}


def _with_dropped(folder: str) -> list[str]:
    return [folder, storage.join(folder, DROPPED)]


def _with_columns(batch: pa.Table, **columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    kept = batch.select([name for name in batch.column_names if name not in columns])
    for name, values in columns.items():
        kept = kept.append_column(name, values)
    return kept
