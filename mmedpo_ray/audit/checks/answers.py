"""Checks of single answers: equal sides, empty ones, leaked prompts, talk about the task."""

from __future__ import annotations

from mmedpo_ray.audit.check import Audited, Check, Count, Measured, count_rows
from mmedpo_ray.audit.features import COMMENT_CHOSEN, COMMENT_REJECTED, LEAK_CHOSEN, LEAK_REJECTED

_ANOTHER = "remove them (--fix), or make another rejected answer"


def _commentary(audited: Audited) -> Measured:
    features = audited.features
    chosen, rejected = (features.leak & COMMENT_CHOSEN) > 0, (features.leak & COMMENT_REJECTED) > 0
    counts = {"chosen": int(chosen.sum()), "rejected": int((rejected & features.text).sum())}
    values = {side: Count(count) for side, count in counts.items()}
    return count_rows(chosen | rejected, values=values, details=counts)


CHECKS = (
    Check(
        "leaked_prompt_chosen",
        "{n:chosen answer} with lines of the prompt that made them: the model learns to write prompts",
        "remove them (--fix), or restore the reference answer",
        lambda audited: (audited.features.leak & LEAK_CHOSEN) > 0,
        {"high": 0.01, "medium": 0},
        fixable=True,
    ),
    Check(
        "leaked_prompt_rejected",
        "{n:rejected answer} with lines of the prompt that made them: easy to tell apart, nothing learned",
        _ANOTHER,
        lambda audited: (
            (audited.features.leak & (LEAK_CHOSEN | LEAK_REJECTED) == LEAK_REJECTED) & audited.features.text
        ),
        {"medium": 0.01, "low": 0},
        fixable=True,
    ),
    Check(
        "task_commentary",
        "{chosen} chosen and {rejected} rejected answers that speak of the task (original, candidate or "
        "preferred answer) or refuse",
        "remove them (--fix), or make the answer again",
        _commentary,
        {"high": 0.05, "medium": 0.01, "low": 0},
        fixable=True,
    ),
    Check(
        "equal_sides",
        "{n:pair} with the same text on both sides: nothing to prefer",
        _ANOTHER,
        lambda audited: audited.features.equal,
        {"high": 0.01, "medium": 0.001, "low": 0},
        kind="text",
        fixable=True,
    ),
    Check(
        "near_equal_sides",
        "{n:pair} whose sides differ only in case, spacing or punctuation (also typographic or full-width): "
        "they teach form",
        _ANOTHER,
        lambda audited: audited.features.near_equal,
        {"high": 0.01, "medium": 0.001, "low": 0},
        kind="text",
        fixable=True,
    ),
    Check(
        "empty_side",
        "{n:pair} with a side without text",
        "remove them (--fix)",
        lambda audited: audited.features.empty,
        {"high": 0.01, "medium": 0},
        fixable=True,
    ),
    Check(
        "untrimmed_text",
        "{n:pair} with an answer that begins or ends with white space, which the model has to produce too",
        "trim both sides (--fix)",
        lambda audited: audited.features.untrimmed,
        {"low": 0},
        fixable=True,
    ),
)
