"""Text pairs: which sampled answer is wrong, which wrong one conflicts most, and what makes a pair unfit.

The paper lets a strong model pick the candidate most in conflict with the reference and write one where none is wrong. Here
the lexicon picks, and a rule edit of the reference fills in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedpo_ray.config import TextCurationConfig
from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.rule_edit import GENERATOR as RULE_EDIT
from mmedpo_ray.curate.rule_edit import rule_edit
from mmedpo_ray.tables import DROP_DETAIL, DROP_REASON

# What ranks first among equally severe candidates is the one closest to the reference in length.
_EXTRA_WORDS = 8


@dataclass(frozen=True)
class Candidate:
    """An answer of the target model."""

    text: str
    generator: str
    prompt_sha256: str
    seed: int


def is_wrong(reference: str, answer: str, question: str, answer_type: str) -> bool:
    """Whether an answer is wrong against the reference. An answer that cannot be judged is not called wrong.

    Closed: the polarity differs, or the other option is chosen, on word boundaries. Open: it lacks words of the
    reference, or contradicts it. Report: a fact differs by the lexicon.
    """
    if answer_type == "closed":
        expected = lexicon.polarity(reference)
        if expected is not None:
            stated = lexicon.implied_polarity(question, answer)
            return stated is not None and stated != expected
        options = lexicon.choices(question)
        if options is not None:
            chosen = [option for option in options if _names(reference, option)]
            stated_options = [option for option in options if _names(answer, option)]
            return len(chosen) == 1 and len(stated_options) == 1 and chosen != stated_options
    if answer_type == "report":
        return bool(lexicon.conflicts(reference, answer, question))
    if lexicon.equivalent(reference, answer):
        return False
    return not lexicon.content_words(reference) <= lexicon.content_words(answer) or bool(
        lexicon.conflicts(reference, answer, question)
    )


def problem(chosen: str, rejected: str, max_length_ratio: float) -> str | None:
    """Why two answers make no pair: the drop reason, or None."""
    if not rejected.strip():
        return "empty_rejected"
    if lexicon.is_meta_text(rejected) or lexicon.is_meta_text(chosen):
        return "meta_text"
    if lexicon.equivalent(chosen, rejected):
        return "same_answer"
    wanted, got = len(lexicon.words(chosen)), len(lexicon.words(rejected))
    if got > max_length_ratio * wanted and got >= wanted + _EXTRA_WORDS:
        return "rejected_too_long"
    return None


def choose(
    reference: str,
    question: str,
    answer_type: str,
    candidates: list[Candidate],
    max_length_ratio: float,
) -> Candidate | None:
    """The usable wrong candidate that conflicts most with the reference; None where none is wrong.

    Ties go to the one nearest to the reference in length, then to the first.
    """
    usable = [
        candidate
        for candidate in candidates
        if problem(reference, candidate.text, max_length_ratio) is None
        and is_wrong(reference, candidate.text, question, answer_type)
    ]
    length = len(lexicon.words(reference))

    def rank(candidate: Candidate) -> tuple[float, int]:
        found = lexicon.conflicts(reference, candidate.text, question)
        return -lexicon.severity(found), abs(len(lexicon.words(candidate.text)) - length)

    return min(usable, key=rank, default=None)


def text_pair(
    sample: dict[str, Any],
    candidates: list[Candidate],
    settings: TextCurationConfig,
    vocabulary: frozenset[str],
    seed: int,
) -> dict[str, Any]:
    """The text pair of a sample, dropped where there is no wrong answer to it.

    Args:
        sample: row of `samples`.
        candidates: answers of the target model; empty for ``rule_edit``.
        settings: method and filters.
        vocabulary: concepts of the data set, for edits.
        seed: of the run; the edit is drawn from it and the sample's id.
    """
    pair_id = f"{sample['sample_id']}:text"
    question, reference = sample["question"], sample["answer"]
    found = choose(reference, question, sample["answer_type"], candidates, settings.max_length_ratio)
    if found is not None:
        provenance = {
            "rejected": found.text,
            "generator": found.generator,
            "prompt_sha256": found.prompt_sha256,
            "seed": found.seed,
        }
        return _pair(sample, pair_id, **provenance)
    if settings.method == "rule_edit" or settings.fallback == "rule_edit":
        edit_seed = stable_seed(seed, pair_id)
        edit = rule_edit(reference, question, np.random.default_rng(edit_seed), vocabulary)
        if edit is not None and problem(reference, edit.text, settings.max_length_ratio) is None:
            return _pair(sample, pair_id, rejected=edit.text, generator=RULE_EDIT, seed=edit_seed)
    return _dropped(sample, pair_id, "no_wrong_answer")


def released_pair(row: dict[str, Any], max_length_ratio: float) -> dict[str, Any]:
    """A pair that came with the data, dropped where it is unfit."""
    reason = problem(row["chosen"], row["rejected"], max_length_ratio)
    return row if reason is None else _dropped(row, row["pair_id"], reason)


def stable_seed(*parts: Any) -> int:
    """A seed of 31 bits that depends on the parts alone, on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _names(text: str, option: str) -> bool:
    wanted = lexicon.content_words(option)
    return bool(wanted) and wanted <= lexicon.content_words(text)


def _pair(sample: dict[str, Any], pair_id: str, **provenance: Any) -> dict[str, Any]:
    return {
        "pair_id": pair_id,
        "kind": "text",
        "rejected_image_uri": sample["image_uri"],
        "chosen": sample["answer"],
        **common(sample),
        **provenance,
    }


def common(sample: dict[str, Any]) -> dict[str, Any]:
    """The columns that a pair takes over from its sample."""
    names = ("sample_id", "image_id", "dataset", "task", "answer_type", "image_uri", "question")
    return {name: sample[name] for name in names}


def _dropped(sample: dict[str, Any], pair_id: str, reason: str) -> dict[str, Any]:
    return {
        "pair_id": pair_id,
        "sample_id": sample["sample_id"],
        "image_id": sample["image_id"],
        "kind": "text",
        DROP_REASON: reason,
        DROP_DETAIL: sample["sample_id"],
    }
