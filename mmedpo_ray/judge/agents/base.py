"""What a judge is.

A judge sees question, reference answer, dispreferred answer and the judgements given so far. It gives a score
in [0, 1] with a reason: how clinically relevant it is that the dispreferred answer is wrong. 0: both answers
mean the same, or the difference does not matter. 1: acting on it could harm the patient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmedpo_ray.config.base import Section

if TYPE_CHECKING:
    from mmedpo_ray.clients.usage import Usage

# An agent whose own view has no fixed grid agrees with a score this close to it, and then repeats that score.
AGREEMENT = 0.1


class AgentConfig(Section):
    """Settings that every kind of judge has; a kind adds its own."""

    kind: str
    name: str = "judge"


@dataclass(frozen=True)
class Judgement:
    """One agent's score in a debate; a row of the ``history`` column.

    Attributes:
        agent: name of the agent.
        round: debate round, from 1.
        score: clinical relevance in [0, 1]. An agent that agrees repeats the previous score exactly.
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
        history: judgements so far, oldest first; the agent agrees with the last one or replaces it.
        round: debate round, from 1.
    """

    question: str
    reference: str
    answer: str
    history: tuple[Judgement, ...]
    round: int


@dataclass(frozen=True)
class Refusal:
    """An agent could not judge a case; the pair is dropped.

    Attributes:
        reason: drop reason.
        detail: what happened, without any question or answer.
    """

    reason: str
    detail: str = ""


class Agent(ABC):
    """A judge, loaded and ready.

    Attributes:
        settings_class: its settings; their field ``kind`` has the name in the registry as its default.
        holds_model: False if the agent is so cheap that consecutive agents may share one Ray Data map.

    Args:
        settings: an instance of ``settings_class``.
        secret: key of the endpoint behind the agent; None: from the environment of this process.
    """

    settings_class: ClassVar[type[AgentConfig]]
    holds_model: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, settings: Any, secret: str | None = None) -> None: ...

    @abstractmethod
    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges cases independently of one another; one answer per case, in order."""

    def take_usage(self) -> Usage | None:
        """What was sent and charged since the last call; None if nothing is charged by the token."""
        return None

    @classmethod
    @abstractmethod
    def map_options(cls, settings: Any, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:
        """How Ray Data runs the agent: keyword arguments of ``map_batches``, ``batch_size`` among them.

        With ``concurrency`` the agent runs in that many actors, else in tasks.
        """

    @classmethod
    def key(cls, settings: Any) -> list[Any]:
        """What this agent's judgements depend on; part of the stage's key. Default: all settings."""
        return [settings.model_dump(mode="json")]
