"""Checks of single answers: equal sides, empty ones, leaked prompts, talk about the task."""

from __future__ import annotations

from mmedpo_ray.audit.features import COMMENT_CHOSEN, COMMENT_REJECTED, LEAK_CHOSEN, LEAK_REJECTED, Features
from mmedpo_ray.audit.finding import Check, Finding, finding_of_rows, noun, share_severity, text_pairs
from mmedpo_ray.audit.settings import AuditConfig


def equal_sides(features: Features, _: AuditConfig) -> Finding:
    """Text pairs whose two answers are the same text."""
    text = text_pairs(features)
    mask, of = text & features.equal, int(text.sum())
    return finding_of_rows(
        "equal_sides",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, medium=0.001),
        f"{noun(int(mask.sum()), 'pair')} with the same text on both sides: nothing to prefer",
        "remove them (--fix), or make another rejected answer",
        fixed=True,
    )


def near_equal_sides(features: Features, _: AuditConfig) -> Finding:
    """Text pairs whose answers differ in case, spacing, punctuation or typographic characters only."""
    text = text_pairs(features)
    mask, of = text & features.near_equal, int(text.sum())
    return finding_of_rows(
        "near_equal_sides",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, medium=0.001),
        f"{noun(int(mask.sum()), 'pair')} whose sides differ in case, spacing or punctuation (also typographic or full-width) only: they teach form",
        "remove them (--fix), or make another rejected answer",
        fixed=True,
    )


def empty_side(features: Features, _: AuditConfig) -> Finding:
    """Pairs with a side that has no text."""
    count, of = int(features.empty.sum()), len(features)
    return finding_of_rows(
        "empty_side",
        features.empty,
        of,
        share_severity(count, of, high=0.01, least="medium"),
        f"{noun(count, 'pair')} with a side without text",
        "remove them (--fix)",
        fixed=True,
    )


def untrimmed_text(features: Features, _: AuditConfig) -> Finding:
    """Answers with white space around them."""
    count, of = int(features.untrimmed.sum()), len(features)
    return finding_of_rows(
        "untrimmed_text",
        features.untrimmed,
        of,
        share_severity(count, of),
        f"{noun(count, 'pair')} with an answer that begins or ends with white space, which the model has to produce too",
        "trim both sides (--fix)",
        fixed=True,
    )


def leaked_prompt_chosen(features: Features, _: AuditConfig) -> Finding:
    """Chosen answers that repeat the prompt which made the pair, or a chat template."""
    mask, of = (features.leak & LEAK_CHOSEN) > 0, len(features)
    return finding_of_rows(
        "leaked_prompt_chosen",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, least="medium"),
        f"{noun(int(mask.sum()), 'chosen answer')} with lines of the prompt that made them: the model learns to write prompts",
        "remove them (--fix), or restore the reference answer",
        fixed=True,
    )


def leaked_prompt_rejected(features: Features, _: AuditConfig) -> Finding:
    """The same on the rejected side only."""
    mask = (features.leak & LEAK_REJECTED > 0) & (features.leak & LEAK_CHOSEN == 0) & features.text
    of = len(features)
    return finding_of_rows(
        "leaked_prompt_rejected",
        mask,
        of,
        share_severity(int(mask.sum()), of, medium=0.01),
        f"{noun(int(mask.sum()), 'rejected answer')} with lines of the prompt that made them: easy to tell apart, nothing learned",
        "remove them (--fix), or make another rejected answer",
        fixed=True,
    )


def task_commentary(features: Features, _: AuditConfig) -> Finding:
    """Answers that talk about the pair-making task, or refuse, instead of answering."""
    chosen, rejected = (features.leak & COMMENT_CHOSEN) > 0, (features.leak & COMMENT_REJECTED) > 0
    mask, of = chosen | rejected, len(features)
    return finding_of_rows(
        "task_commentary",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.05, medium=0.01),
        f"{int(chosen.sum()):,} chosen and {int((rejected & features.text).sum()):,} rejected answers that speak of the task (original, "
        "candidate or preferred answer) or refuse",
        "remove them (--fix), or make the answer again",
        fixed=True,
        details={"chosen": int(chosen.sum()), "rejected": int((rejected & features.text).sum())},
    )


TEXT_CHECKS: dict[str, Check] = {
    "leaked_prompt_chosen": leaked_prompt_chosen,
    "leaked_prompt_rejected": leaked_prompt_rejected,
    "task_commentary": task_commentary,
    "equal_sides": equal_sides,
    "near_equal_sides": near_equal_sides,
    "empty_side": empty_side,
    "untrimmed_text": untrimmed_text,
}
