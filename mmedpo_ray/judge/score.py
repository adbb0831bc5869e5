"""Station ``score``: pairs → scored pairs.

Three steps, each with tables of its own, so that a crash costs little and a new weighting costs no judging:

1. ``scored/.debate/pass-…``: one table a debate pass, over the text pairs still open (:mod:`mmedpo_ray.judge.debate`).
2. ``scored/.scores``: every pair with its score, from the debate, from the data, or from the visual tool's confidence.
3. ``scored``: the same with weights, which need the scores of all pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray import cluster, storage, tables
from mmedpo_ray.config import Config, WeightConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.judge import agents as judges
from mmedpo_ray.judge import debate, weights
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.stage import Manifest, Station, read_manifest

log = logging.getLogger(__name__)

# Everything of a scored pair but its weight.
_SCORES = pa.schema([field for field in tables.SCORED if field.name != "weight"])


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
    station = Station(
        "score",
        run.scored,
        config,
        settings=[judging, settings.keep_source_scores, settings.weights],
        inputs=[run.pairs],
    )
    if manifest := station.finished():
        return manifest
    total = _rows(run.pairs)
    scores = _scores(config, judging, total)
    columns = storage.dataset(scores).to_table(columns=["score", "kind", "dataset"])
    groups = _groups(columns, settings.weights)
    moments = weights.fit(columns["score"].to_numpy(), groups)

    def build(done: set[str]) -> ray.data.Dataset | None:
        rows = _rows_of([scores, storage.join(scores, "dropped")], tables.with_drop_columns(_SCORES), done)
        weighted = _attach_weights(rows, moments=moments, settings=settings.weights)
        return _blocks(weighted, config.ray.rows_per_part)

    return station.write_rows(
        build,
        schema=tables.SCORED,
        id_column="pair_id",
        total=total,
        extra=partial(_figures, config=config),
    )


# ---------------------------------------------------------------------- step 1: the debate


def _hold_debate(config: Config, judging: Sequence[Any]) -> list[str]:
    """Runs the passes that are needed; returns their folders."""
    run = RunFolder(config.run.folder)
    settings = config.score
    open_pairs = storage.dataset(run.pairs).count_rows(filter=_needs_debate(settings.keep_source_scores))
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
        folder = storage.join(run.scored, ".debate", which.name)
        station = Station(
            f"debate {which.index + 1}",
            folder,
            config,
            settings=[judging, settings.keep_source_scores, which.name],
            inputs=[source],
        )
        manifest = station.finished() or station.write_rows(
            partial(_build_pass, which=which, config=config, source=source, options=options),
            schema=debate.DEBATE,
            id_column="pair_id",
            total=open_pairs,
            extra=lambda table: {"open": pc.sum(pc.invert(table["settled"])).as_py() or 0},
            allow_empty=True,
        )
        folders.append(folder)
        open_pairs = manifest.extra["open"]
        if not open_pairs:
            break
    return folders


def _build_pass(
    done: set[str],
    *,
    which: debate.Pass,
    config: Config,
    source: str,
    options: dict[str, dict[str, Any]],
) -> ray.data.Dataset | None:
    """The open pairs of the pass before (or of ``pairs``) through the agents of this one."""
    settings = config.score
    if which.index:
        rows = _rows_of([source], debate.DEBATE, done)
        rows = rows.filter(pc.invert(rows["settled"]))
    else:
        rows = _rows_of([source], tables.PAIRS, done)
        rows = _open_debate(rows, keep_source_scores=settings.keep_source_scores)
    chosen = options[which.agents[0].name]
    blocks = _blocks(rows, chosen["batch_size"])
    if blocks is None:
        return None
    if "concurrency" in chosen:
        return blocks.map_batches(
            debate.HoldPass,
            fn_constructor_args=(which, settings.agents, settings.max_rounds),
            batch_format="pyarrow",
            **chosen,
        )
    return blocks.map_batches(
        debate.HoldPass(which, settings.agents, settings.max_rounds), batch_format="pyarrow", **chosen
    )


def _needs_debate(keep_source_scores: bool) -> pc.Expression:
    text = pc.field("kind") == "text"
    return text & pc.field("source_score").is_null() if keep_source_scores else text


def _open_debate(batch: pa.Table, *, keep_source_scores: bool) -> pa.Table:
    batch = batch.filter(_needs_debate(keep_source_scores))
    history = pa.array([[]] * batch.num_rows, tables.HISTORY)
    return batch.append_column("history", history).append_column(
        "settled", pa.array([False] * batch.num_rows, pa.bool_())
    )


# ---------------------------------------------------------------------- step 2: scores


def _scores(config: Config, judging: Sequence[Any], total: int) -> str:
    """Writes ``scored/.scores``; returns its folder. Kept afterwards, so that other weights need no judging."""
    run = RunFolder(config.run.folder)
    settings = config.score
    folder = storage.join(run.scored, ".scores")
    station = Station(
        "scores", folder, config, settings=[judging, settings.keep_source_scores], inputs=[run.pairs]
    )
    if station.finished():
        return folder
    passes = _hold_debate(config, judging)
    held = [part for path in passes for part in (path, storage.join(path, "dropped"))]

    def build(done: set[str]) -> ray.data.Dataset | None:
        pairs = _rows_of([run.pairs], tables.with_drop_columns(tables.PAIRS), done)
        debated = _rows_of(held, tables.with_drop_columns(debate.DEBATE), done)
        parts = [
            _score_undebated(pairs, keep_source_scores=settings.keep_source_scores),
            _score_debated(debated, num_agents=len(settings.agents)),
        ]
        names = tables.with_drop_columns(_SCORES).names
        return _blocks(pa.concat_tables([part.select(names) for part in parts]), config.ray.rows_per_part)

    station.write_rows(build, schema=_SCORES, id_column="pair_id", total=total)
    storage.remove(storage.join(run.scored, ".debate"))
    return folder


def _score_undebated(batch: pa.Table, *, keep_source_scores: bool) -> pa.Table:
    """Scores of pairs that bring one: from the data, or the visual tool's confidence."""
    batch = batch.filter(~_needs_debate(keep_source_scores))
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
        history=pa.array([[]] * batch.num_rows, tables.HISTORY),
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


def _attach_weights(
    batch: pa.Table, *, moments: dict[str, weights.Moments], settings: WeightConfig
) -> pa.Table:
    values = np.full(batch.num_rows, np.nan)
    kept = pc.is_null(batch["drop_reason"]).to_numpy()
    rows = batch.filter(pa.array(kept))
    values[kept] = weights.apply(rows["score"].to_numpy(), _groups(rows, settings), moments, settings)
    return _with_columns(batch, weight=pa.array(values, pa.float64(), mask=~kept))


def _groups(table: pa.Table, settings: WeightConfig) -> list[str]:
    return [
        weights.group_of(kind, dataset, settings)
        for kind, dataset in zip(table["kind"].to_pylist(), table["dataset"].to_pylist(), strict=True)
    ]


def _figures(table: pa.Table, *, config: Config) -> dict[str, Any]:
    """What the manifest tells of the final table."""
    settings = config.score
    values = table["weight"].to_numpy()
    if not values.any():
        raise UserError(
            f"score: every weight is 0 with score.weights.mode={settings.weights.mode}, so nothing could be learned. "
            "Use match_moments, or check the scores in the data."
        )
    rounds = table["rounds"].to_numpy()
    judged = rounds > 0
    by_round = {str(number): int((rounds == number).sum()) for number in sorted(set(rounds[judged]))}
    return {
        "debate": {
            "agents": [agent.name for agent in settings.agents],
            "judged": int(judged.sum()),
            "consensus": int((table["consensus"].to_numpy(zero_copy_only=False) & judged).sum()),
            "rounds": by_round,
        },
        "weights": {
            "mode": settings.weights.mode,
            "per": settings.weights.per,
            "kinds": weights.summary(
                table["score"].to_numpy(), values, table["kind"].to_pylist(), settings.weights
            ),
        },
    }


# ---------------------------------------------------------------------- tables


def _rows(folder: str) -> int:
    manifest = read_manifest(folder)
    return manifest.rows_out if manifest else 0


def _rows_of(folders: Sequence[str], schema: pa.Schema, done: set[str]) -> pa.Table:
    """The rows of several table folders that are not done yet, with the columns of ``schema`` (absent ones null).

    Tables are read here and handed to the workers in blocks: they hold text only, every station sorts its table as a whole
    in the end, and a small run spends its time on starting readers otherwise.
    """
    nullable = pa.schema([field.with_nullable(True).remove_metadata() for field in schema])
    parts = [
        storage.dataset(folder, nullable).to_table()
        for folder in folders
        if storage.list_files(folder, ".parquet")
    ]
    rows = pa.concat_tables(parts) if parts else nullable.empty_table()
    finished = pa.array(sorted(done), pa.string())
    return rows.filter(pc.invert(pc.is_in(rows["pair_id"], value_set=finished)))


def _blocks(rows: pa.Table, size: int) -> ray.data.Dataset | None:
    """The rows as a Ray dataset in blocks of ``size`` rows, so that workers share them; ``None`` where there is none."""
    if not rows.num_rows:
        return None
    return ray.data.from_arrow(
        [rows.slice(start, size).combine_chunks() for start in range(0, rows.num_rows, size)]
    )


def _with_columns(batch: pa.Table, **columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    kept = batch.select([name for name in batch.column_names if name not in columns])
    for name, values in columns.items():
        kept = kept.append_column(name, values)
    return kept
