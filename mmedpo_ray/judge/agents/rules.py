"""A judge made of the radiology lexicon: how severe is the dispreferred answer's contradiction?

Three of them with different focus make a debate without any model: each counts the conflicts on its own axes
    in full and the others at half, so they start apart where an answer errs on several axes, and move towards
    each other as rounds go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from mmedpo_ray.judge.agents.base import AGREEMENT, Agent, AgentConfig, Case, Judgement, Refusal

if TYPE_CHECKING:
    from mmedpo_ray.radiology import lexicon

# What a conflict outside the agent's focus counts for.
_OUTSIDE_SHARE = 0.5
# The wording differs, but on nothing the lexicon knows: an error is likely (the pair was made of it) and its
# weight unknown.
_UNKNOWN = 0.3
# A wider word ("mass" for "cancer") is less than an error.
_WIDER = 0.2
# How far an agent moves towards the score before it, in its first round: if every conflict is on its own
# axes, and if none is.
_OPENNESS = (0.25, 0.75)

# Every other axis belongs to the focus "findings".
_AXES: dict[str, tuple[str, ...]] = {"laterality": ("side", "zone"), "polarity": ("polarity",)}


class RulesAgentConfig(AgentConfig):
    """A judge made of a radiology lexicon."""

    kind: Literal["rules"] = "rules"
    name: str = "rules"
    focus: Literal["findings", "laterality", "polarity", "all"] = "all"


class RulesAgent(Agent):
    """Scores by lexicon; deterministic."""

    settings_class = RulesAgentConfig
    holds_model = False

    def __init__(self, settings: RulesAgentConfig, secret: str | None = None) -> None:  # noqa: ARG002
        self._name = settings.name
        self._focus = settings.focus

    @classmethod
    def map_options(cls, settings: RulesAgentConfig, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:  # noqa: ARG003
        """Stateless tasks on a share of a CPU."""
        return {"num_cpus": data_cpus, "batch_size": 1024}

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges each case; never refuses."""
        return [self._judge(case) for case in cases]

    def _judge(self, case: Case) -> Judgement:
        view, focus_share, reason = _view(self._focus, case.reference, case.answer, case.question)
        if not case.history:
            return Judgement(self._name, case.round, view, reason)
        previous = case.history[-1]
        if abs(view - previous.score) <= AGREEMENT:
            return Judgement(self._name, case.round, previous.score, f"agrees; {reason}")
        low, high = _OPENNESS
        share = min(1.0, (high - (high - low) * focus_share) * case.round)
        score = round(view + (previous.score - view) * share, 2)
        if abs(score - previous.score) <= AGREEMENT:
            return Judgement(self._name, case.round, previous.score, f"agrees, own view {view:.2f}; {reason}")
        return Judgement(self._name, case.round, score, f"own view {view:.2f}; {reason}")


# Every round asks again, and short answers repeat.
@lru_cache(maxsize=8192)
def _view(focus: str, reference: str, answer: str, question: str) -> tuple[float, float, str]:
    """An agent's own score, the share of the evidence in its focus (0..1), and the evidence in words."""
    from mmedpo_ray.radiology import lexicon

    every = lexicon.conflicts(reference, answer, question)
    found = lexicon.without_wider(reference, answer, every)
    if not found:
        if every:
            return _WIDER, 0.0, "names the finding in a wider word"
        if lexicon.equivalent(reference, answer):
            return 0.0, 1.0, "says the same"
        return _UNKNOWN, 0.0, "differs in words that the lexicon does not know"
    remaining, inside, total = 1.0, 0.0, 0.0
    for conflict in found:
        in_focus = _in_focus(focus, conflict)
        remaining *= 1.0 - conflict.severity * (1.0 if in_focus else _OUTSIDE_SHARE)
        inside += conflict.severity * in_focus
        total += conflict.severity
    reason = ", ".join(_words(conflict) for conflict in found[:3])
    return round(1.0 - remaining, 2), inside / total if total else 0.0, reason


def _in_focus(focus: str, conflict: lexicon.Conflict) -> bool:
    if focus == "all":
        return True
    if focus == "findings":
        return not any(conflict.axis in axes for axes in _AXES.values())
    if conflict.axis in _AXES[focus]:
        return True
    # A finding both stated and denied is a matter of polarity too.
    return focus == "polarity" and conflict.kind == "contradicted"


def _words(conflict: lexicon.Conflict) -> str:
    change = f" ({conflict.expected or 'nothing'} → {conflict.stated or 'nothing'})"
    subject = "" if conflict.subject in (conflict.expected, conflict.axis) else f" {conflict.subject}"
    return f"{conflict.axis}{subject} {conflict.kind}{change}"
