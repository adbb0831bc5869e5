"""The debate between judges (MMedPO, section 3.2): sequential, until all agree or the rounds are over.

Agent 1 scores the dispreferred answer; each next agent sees the score and reason before it and agrees (repeats the score) or
gives another. As soon as every agent in turn has stood by the same score it counts; after ``max_rounds`` without consensus
the mean of all scores given counts. Turn t (from 0) of n agents belongs to agent t mod n in round t div n + 1.

A *pass* is one Ray Data map over the pairs still open: one agent, one model loaded at a time. Turns of agents that hold no
model are cheap and share a pass; the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

import pyarrow as pa

from mmedpo_ray.clients.chat import UsageLog
from mmedpo_ray.judge import agents as judges
from mmedpo_ray.judge.agents import Agent, Case, ChargedAgent, Judgement, Refusal
from mmedpo_ray.judge.settings import AgentConfig
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

# Two scores closer than this are the same one (they were written and read as decimals).
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
        """For its folder and messages."""
        speakers = "+".join(agent.name for agent in self.agents)
        safe = "".join(letter if letter.isalnum() or letter in "+-_" else "_" for letter in speakers)
        return f"pass-{self.index:02d}-{safe[:60]}"


def agree(history: Sequence[Judgement], num_agents: int) -> bool:
    """Whether each of the agents, one after the other, has stood by the same score."""
    last = history[-num_agents:]
    return len(last) == num_agents and all(abs(item.score - last[0].score) < _SAME for item in last)


def settled(history: Sequence[Judgement], num_agents: int, max_rounds: int) -> bool:
    """Whether the debate is over: consensus, or no turn left."""
    return agree(history, num_agents) or len(history) >= num_agents * max_rounds


def outcome(history: Sequence[Judgement], num_agents: int) -> Outcome:
    """The result of a settled debate.

    Args:
        history: all judgements, at least one.
        num_agents: agents in the debate.

    Returns:
        The score agreed on, or without consensus the mean of all scores given.
    """
    consensus = agree(history, num_agents)
    score = history[-1].score if consensus else fmean(item.score for item in history)
    return Outcome(score, consensus, history[-1].round)


def plan(agents: Sequence[AgentConfig], max_rounds: int) -> list[Pass]:
    """Cuts the turns of a debate into passes: one agent each, except that neighbours without a model share one."""
    groups: list[list[int]] = []
    for turn in range(len(agents) * max_rounds):
        cheap = judges.is_cheap(agents[turn % len(agents)])
        if groups and cheap and judges.is_cheap(agents[groups[-1][-1] % len(agents)]):
            groups[-1].append(turn)
        else:
            groups.append([turn])
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
        speakers: all agents in order; those without a turn here may be ``None``.
        max_rounds: rounds after which a debate is over.

    Returns:
        For each case its longer history, and the refusal that ended it, if one did.
    """
    histories = [case.history for case in cases]
    refusals: list[Refusal | None] = [None] * len(cases)
    for turn in turns:
        agent, round_number = speakers[turn % len(speakers)], turn // len(speakers) + 1
        still_open = [
            index
            for index, history in enumerate(histories)
            if refusals[index] is None and not settled(history, len(speakers), max_rounds)
        ]
        if not still_open:
            break
        assert agent is not None
        shown = [
            Case(
                cases[index].question,
                cases[index].reference,
                cases[index].answer,
                histories[index],
                round_number,
            )
            for index in still_open
        ]
        for index, answer in zip(still_open, agent.judge(shown), strict=True):
            if isinstance(answer, Refusal):
                refusals[index] = answer
            else:
                histories[index] = (*histories[index], answer)
    return list(zip(histories, refusals, strict=True))


class HoldPass:
    """One pass as a Ray Data map function: a table of open debates (:data:`DEBATE`) to the same with more turns held.

    Used as an actor class by agents that hold a model, and as a plain function by the others.

    Args:
        which: the pass.
        agents: all agents of the debate, in order.
        max_rounds: rounds after which a debate is over.
        secrets: keys of endpoints, by agent; where one is missing, from the environment of the process that judges.
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
        names = {agent.name for agent in which.agents}
        self._speakers = [
            judges.build(agent, (secrets or {}).get(agent.name)) if agent.name in names else None
            for agent in agents
        ]

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(["question", "chosen", "rejected", "history"]).to_pylist()
        cases = [
            Case(
                row["question"],
                row["chosen"],
                row["rejected"],
                from_rows(row["history"]),
                self._pass.turns.start // len(self._speakers) + 1,
            )
            for row in rows
        ]
        try:
            held = hold(cases, self._pass.turns, self._speakers, self._max_rounds)
        finally:
            self._note_usage()
        columns: dict[str, pa.Array] = {
            "history": to_column([history for history, _ in held]),
            "settled": pa.array(
                [settled(history, len(self._speakers), self._max_rounds) for history, _ in held], pa.bool_()
            ),
            schemas.DROP_REASON: pa.array(
                [refusal.reason if refusal else None for _, refusal in held], pa.string()
            ),
            schemas.DROP_DETAIL: pa.array(
                [self._detail(history, refusal) if refusal else None for history, refusal in held],
                pa.string(),
            ),
        }
        kept = batch.select([name for name in batch.column_names if name not in columns])
        for name, values in columns.items():
            kept = kept.append_column(name, values)
        return kept

    def _detail(self, history: Sequence[Judgement], refusal: Refusal) -> str:
        where = f"{self._pass.name}, after {len(history)} judgements"
        return f"{where}: {refusal.detail}" if refusal.detail else where

    def _note_usage(self) -> None:
        """What was charged is noted also where the batch then failed."""
        for speaker in self._speakers:
            if self._usage is not None and isinstance(speaker, ChargedAgent):
                self._usage.add(speaker.take_usage())


def from_rows(rows: Sequence[dict[str, Any]] | None) -> tuple[Judgement, ...]:
    """Judgements from a value of the ``history`` column."""
    return tuple(Judgement(**row) for row in rows or ())


def to_column(histories: Sequence[Sequence[Judgement]]) -> pa.Array:
    """The ``history`` column of some rows."""
    flat = [item for history in histories for item in history]
    kinds = schemas.HISTORY.value_type
    values = [pa.array([getattr(item, field.name) for item in flat], field.type) for field in kinds]
    ends = accumulate((len(history) for history in histories), initial=0)
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), pa.StructArray.from_arrays(values, fields=list(kinds))
    )
