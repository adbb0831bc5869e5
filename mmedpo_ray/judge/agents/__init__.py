"""What a judge is, and the kinds there are.

A judge sees question, reference answer, dispreferred answer and the judgements given so far, and gives a score in [0, 1] with
a reason: how clinically relevant it is that the dispreferred answer is wrong (0: it says the same or nothing that matters,
1: acting on it could harm the patient). A new kind is one file here, one entry in :data:`_KINDS` and its settings in
``settings.judge.AgentConfig``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mmedpo_ray.clients.chat import Usage
from mmedpo_ray.judge.settings import AgentConfig

# An agent whose own view has no fixed grid agrees with a score this close to it, and then repeats that score.
AGREEMENT = 0.1


@dataclass(frozen=True)
class Judgement:
    """One agent's word in a debate; a row of the ``history`` column.

    Attributes:
        agent: name of the agent.
        round: debate round, from 1.
        score: clinical relevance in [0, 1]. An agent that agrees repeats the score before it exactly.
        rationale: the agent's reason.
    """

    agent: str
    round: int
    score: float
    rationale: str


@dataclass(frozen=True)
class Case:
    """What an agent is shown.

    Attributes:
        question: question or instruction about the image.
        reference: preferred answer.
        answer: dispreferred answer, the one to judge.
        history: judgements so far, oldest first; the last one is agreed with or replaced.
        round: debate round, from 1.
    """

    question: str
    reference: str
    answer: str
    history: tuple[Judgement, ...]
    round: int


@dataclass(frozen=True)
class Refusal:
    """An agent that could not judge a case; the pair is dropped.

    Attributes:
        reason: drop reason.
        detail: what happened, without the texts.
    """

    reason: str
    detail: str = ""


class Agent(Protocol):
    """A judge, loaded and ready."""

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges cases independently of one another; one answer a case, in order."""
        ...


@runtime_checkable
class ChargedAgent(Agent, Protocol):
    """An agent whose judgements are charged by the token."""

    def take_usage(self) -> Usage:
        """What was sent and charged since the last call."""
        ...


# Kind → module. A module offers `build(settings, secret) -> Agent`, `map_options(settings, data_cpus, has_gpu) -> dict` (how Ray
# Data runs it), `key(settings)` (what its judgements depend on) and `CHEAP` (whether passes of such agents may share one map).
_KINDS = {
    "rules": "mmedpo_ray.judge.agents.rules",
    "vllm": "mmedpo_ray.judge.agents.vllm",
    "openai": "mmedpo_ray.judge.agents.openai",
}


def build(settings: AgentConfig, secret: str | None = None) -> Agent:
    """Loads the agent that the settings describe.

    Args:
        settings: of the agent.
        secret: key of the endpoint behind it, if there is one; None: from the environment of this process.
    """
    return _module(settings).build(settings, secret)


def map_options(settings: AgentConfig, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:
    """Keyword arguments of ``Dataset.map_batches`` for this agent; with ``concurrency`` it runs in a pool of so many actors."""
    return _module(settings).map_options(settings, data_cpus=data_cpus, has_gpu=has_gpu)


def key(settings: AgentConfig) -> list[Any]:
    """What this agent's judgements depend on; part of the stage's key."""
    return _module(settings).key(settings)


def is_cheap(settings: AgentConfig) -> bool:
    """Whether the agent holds no model, so that it needs no pass of its own."""
    return _module(settings).CHEAP


def _module(settings: AgentConfig) -> Any:
    return importlib.import_module(_KINDS[settings.kind])
