"""The debate between judges (MMedPO, section 3.2): sequential, until all agree or the rounds are over.

Agent 1 scores the dispreferred answer. Each next agent sees the score and reason before it and agrees
(repeats the score) or gives another score. As soon as all agents in turn have given the same score, that
score counts; after ``max_rounds`` without consensus the mean of all scores given counts. Turn t (from 0) of n
agents belongs to agent t mod n in round t div n + 1.

A *pass* is one Ray Data map over the pairs that are still open: one agent, one model loaded at a time.
    Consecutive turns of agents that hold no model share a pass; the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any

import pyarrow as pa

from mmedpo_ray.clients.usage_log import UsageLog
from mmedpo_ray.judge.agents import JUDGES
from mmedpo_ray.judge.agents.base import Agent, AgentConfig, Case, Judgement, Refusal
from mmedpo_ray.tables import schemas

# Pairs in the middle of a debate.
DEBATE = pa.schema(
    [
        *schemas.PAIRS,
        pa.field("history", schemas.HISTORY, nullable=False, metadata={"meaning": "every judgement so far"}),
        pa.field(
            "settled", pa.bool_(), nullable=False, metadata={"meaning": "no further judgement is needed"}
        ),
    ]
)

# Two scores closer than this are equal (they were written and read as decimals).
_SAME = 1e-9


@dataclass(frozen=True)
class Outcome:
    """How a debate ended."""

    score: float
    consensus: bool
    rounds: int


@dataclass(frozen=True)
class Pass:
    """Consecutive turns that one map holds.

    Attributes:
        index: position in the debate.
        turns: turn numbers, from 0.
        agents: agents of these turns, each once, in the order of speaking.
    """

    index: int
    turns: range
    agents: tuple[AgentConfig, ...]

    @property
    def name(self) -> str:
        """Name of its folder, and in messages."""
        speakers = "+".join(agent.name for agent in self.agents)
        safe = "".join(letter if letter.isalnum() or letter in "+-_" else "_" for letter in speakers)
        return f"pass-{self.index:02d}-{safe[:60]}"


def agree(history: Sequence[Judgement], num_agents: int) -> bool:
    """Whether all agents, one after the other, have given the same score."""
    last = history[-num_agents:]
    return len(last) == num_agents and all(abs(item.score - last[0].score) < _SAME for item in last)


def settled(history: Sequence[Judgement], num_agents: int, max_rounds: int) -> bool:
    """Whether the debate is over: consensus, or no turn left."""
    return agree(history, num_agents) or len(history) >= num_agents * max_rounds


def outcome(history: Sequence[Judgement], num_agents: int) -> Outcome:
    """The result of a settled debate: the score agreed on, or the mean of all scores given.

    Args:
        history: all judgements, at least one.
        num_agents: agents in the debate.
    """
    consensus = agree(history, num_agents)
    score = history[-1].score if consensus else fmean(item.score for item in history)
    return Outcome(score, consensus, history[-1].round)


def plan(agents: Sequence[AgentConfig], max_rounds: int) -> list[Pass]:
    """Cuts the turns of a debate into passes: one agent each, but neighbours without a model share one."""

    def pass_of(turn: int) -> int | str:
        agent = agents[turn % len(agents)]
        return turn if JUDGES[agent.kind].holds_model else "no model"

    groups = [list(turns) for _, turns in groupby(range(len(agents) * max_rounds), pass_of)]
    return [
        Pass(
            index,
            range(turns[0], turns[-1] + 1),
            tuple(agents[position] for position in dict.fromkeys(turn % len(agents) for turn in turns)),
        )
        for index, turns in enumerate(groups)
    ]


def hold(
    cases: Sequence[Case], turns: range, speakers: Sequence[Agent | None], max_rounds: int
) -> list[tuple[tuple[Judgement, ...], Refusal | None]]:
    """Holds some turns of several debates.

    Args:
        cases: open debates, each with ``turns.start`` judgements.
        turns: turn numbers to hold.
        speakers: all agents in order; those without a turn here may be None.
        max_rounds: rounds after which a debate is over.

    Returns:
        For each case its longer history, and the refusal that ended it, if there was one.
    """
    cases = list(cases)
    refusals: list[Refusal | None] = [None] * len(cases)
    for turn in turns:
        agent, round_number = speakers[turn % len(speakers)], turn // len(speakers) + 1
        open_cases = [
            index
            for index, case in enumerate(cases)
            if refusals[index] is None and not settled(case.history, len(speakers), max_rounds)
        ]
        if not open_cases:
            break
        assert agent is not None
        shown = [replace(cases[index], round=round_number) for index in open_cases]
        for index, answer in zip(open_cases, agent.judge(shown), strict=True):
            if isinstance(answer, Refusal):
                refusals[index] = answer
            else:
                cases[index] = replace(cases[index], history=(*cases[index].history, answer))
    return [(case.history, refusal) for case, refusal in zip(cases, refusals, strict=True)]


class HoldPass:
    """One pass as a Ray Data map function: open debates (:data:`DEBATE`) → the same with more turns held.

    Used as an actor class by agents that hold a model, and as a plain function by the others.

    Args:
        which: the pass.
        agents: all agents of the debate, in order.
        max_rounds: rounds after which a debate is over.
        secrets: keys of endpoints, by agent; a missing one is read from the environment of the process that
            judges.
        usage: where agents that are charged by the token leave their counters, batch by batch; None: nowhere.
    """

    def __init__(
        self,
        which: Pass,
        agents: Sequence[AgentConfig],
        max_rounds: int,
        secrets: Mapping[str, str | None] | None = None,
        usage: UsageLog | None = None,
    ) -> None:
        self._pass = which
        self._max_rounds = max_rounds
        self._usage = usage
        names, secrets = {agent.name for agent in which.agents}, secrets or {}
        self._speakers: list[Agent | None] = [
            JUDGES[agent.kind](agent, secrets.get(agent.name)) if agent.name in names else None
            for agent in agents
        ]

    def __call__(self, batch: pa.Table) -> pa.Table:
        cases = [
            Case(row["question"], row["chosen"], row["rejected"], from_rows(row["history"]), 1)
            for row in batch.select(["question", "chosen", "rejected", "history"]).to_pylist()
        ]
        try:
            held = hold(cases, self._pass.turns, self._speakers, self._max_rounds)
        finally:
            # What was charged counts even if the batch fails.
            for speaker in filter(None, self._speakers):
                if self._usage is not None and (usage := speaker.take_usage()) is not None:
                    self._usage.add(usage)
        over = [settled(history, len(self._speakers), self._max_rounds) for history, _ in held]
        reasons = [refusal and refusal.reason for _, refusal in held]
        details = [refusal and self._detail(history, refusal) for history, refusal in held]
        return with_columns(
            batch,
            history=to_column([history for history, _ in held]),
            settled=pa.array(over, pa.bool_()),
            drop_reason=pa.array(reasons, pa.string()),
            drop_detail=pa.array(details, pa.string()),
        )

    def _detail(self, history: Sequence[Judgement], refusal: Refusal) -> str:
        where = f"{self._pass.name}, after {len(history)} judgements"
        return f"{where}: {refusal.detail}" if refusal.detail else where


def from_rows(rows: Sequence[dict[str, Any]] | None) -> tuple[Judgement, ...]:
    """Judgements from a value of the ``history`` column."""
    return tuple(Judgement(**row) for row in rows or ())


def to_column(histories: Sequence[Sequence[Judgement]]) -> pa.Array:
    """The ``history`` column of some rows."""
    return pa.array([[asdict(item) for item in history] for history in histories], schemas.HISTORY)


def with_columns(batch: pa.Table, **columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with these columns added or replaced."""
    kept = batch.select([name for name in batch.column_names if name not in columns])
    for name, values in columns.items():
        kept = kept.append_column(name, values)
    return kept
