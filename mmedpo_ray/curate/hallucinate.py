"""Text pairs: which answer is wrong, which wrong one conflicts most, who writes one where none is.

The paper lets a strong model pick the candidate most in conflict with the reference and write one where none is wrong. Who
picks here is ``curate.text.judge``, the lexicon or a model behind an endpoint; who writes is ``curate.text.fallback``, a rule edit
or such a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedpo_ray.config import TextCurationConfig
from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.filters import most_frequent, problem
from mmedpo_ray.curate.rewrite import GENERATOR as REWRITE
from mmedpo_ray.curate.rule_edit import GENERATOR as RULE_EDIT
from mmedpo_ray.curate.rule_edit import rule_edit
from mmedpo_ray.endpoint import TRANSIENT
from mmedpo_ray.tables import DROP_DETAIL, DROP_REASON

NO_WRONG_ANSWER = "no_wrong_answer"


@dataclass(frozen=True)
class Candidate:
    """An answer of the target model; a row of `candidates`."""

    text: str
    generator: str
    prompt_sha256: str
    seed: int
    candidate_id: str = ""


@dataclass(frozen=True)
class Material:
    """What other tables hold about a sample.

    Attributes:
        candidates: answers of the target model, in order.
        choice: its row of `choices`, kept or dropped; None where the judge was not asked.
        rewrite: its row of `rewrites`, kept or dropped; None where no rewrite was asked for.
    """

    candidates: Sequence[Candidate] = ()
    choice: dict[str, Any] | None = None
    rewrite: dict[str, Any] | None = None


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


def usable(
    reference: str, question: str, candidates: Sequence[Candidate], max_length_ratio: float
) -> tuple[list[Candidate], list[str]]:
    """The candidates that pass the filters, each text once, and the reasons of the others."""
    kept: dict[str, Candidate] = {}
    reasons = []
    for candidate in candidates:
        reason = problem(reference, candidate.text, max_length_ratio, question)
        if reason is None:
            kept.setdefault(candidate.text, candidate)
        else:
            reasons.append(reason)
    return list(kept.values()), reasons


def choose(
    reference: str, question: str, answer_type: str, candidates: Sequence[Candidate]
) -> Candidate | None:
    """The wrong candidate that conflicts most with the reference by the lexicon; None where none is wrong.

    Ties go to the one nearest to the reference in length, then to the first.
    """
    wrong = [
        candidate for candidate in candidates if is_wrong(reference, candidate.text, question, answer_type)
    ]
    length = len(lexicon.words(reference))

    def rank(candidate: Candidate) -> tuple[float, int]:
        found = lexicon.conflicts(reference, candidate.text, question)
        return -lexicon.severity(found), abs(len(lexicon.words(candidate.text)) - length)

    return min(wrong, key=rank, default=None)


def pick(
    sample: dict[str, Any], material: Material, settings: TextCurationConfig
) -> tuple[Candidate | None, str]:
    """The candidate to reject, by the judge that the settings name, or None and why there is none.

    The reason is ``no_wrong_answer``, the most frequent filter where every candidate failed one, or the judge's own.
    """
    reference, question = sample["answer"], sample["question"]
    fit, reasons = usable(reference, question, material.candidates, settings.max_length_ratio)
    if not fit:
        return None, most_frequent(reasons) or NO_WRONG_ANSWER
    if settings.judge == "rules":
        return choose(reference, question, sample["answer_type"], fit), NO_WRONG_ANSWER
    choice = material.choice
    if choice is None:
        return None, NO_WRONG_ANSWER
    chosen = [candidate for candidate in fit if candidate.candidate_id == choice["candidate_id"]]
    return (chosen[0] if chosen else None), choice.get(DROP_REASON) or NO_WRONG_ANSWER


def needs_rewrite(sample: dict[str, Any], material: Material, settings: TextCurationConfig) -> bool:
    """Whether no candidate can be rejected, so that the endpoint has to write an answer."""
    found, reason = pick(sample, material, settings)
    return found is None and reason != TRANSIENT


def text_pair(
    sample: dict[str, Any],
    material: Material,
    settings: TextCurationConfig,
    vocabulary: frozenset[str],
    seed: int,
) -> dict[str, Any]:
    """The text pair of a sample, dropped where there is no wrong answer to it.

    What the endpoint may still answer on another run (``endpoint_failed``) is dropped, not filled in otherwise: the pair
    comes with that run.

    Args:
        sample: row of `samples`.
        material: candidates, choice and rewrite of the sample, as far as the method has them.
        settings: method and filters.
        vocabulary: concepts of the data set, for edits.
        seed: of the run; the edit is drawn from it and the sample's id.
    """
    pair_id = f"{sample['sample_id']}:text"
    reason = NO_WRONG_ANSWER
    if settings.method == "on_policy":
        found, reason = pick(sample, material, settings)
        if found is not None:
            return _pair(
                sample,
                pair_id,
                rejected=found.text,
                generator=found.generator,
                prompt_sha256=found.prompt_sha256,
                seed=found.seed,
            )
    if reason != TRANSIENT and material.rewrite is not None:
        refused = material.rewrite.get(DROP_REASON)
        if refused is None:
            return _pair(
                sample,
                pair_id,
                rejected=material.rewrite["rewritten"],
                generator=REWRITE,
                prompt_sha256=material.rewrite["prompt_sha256"],
            )
        reason = refused
    if reason != TRANSIENT and "rule_edit" in (settings.method, settings.fallback):
        edit_seed = stable_seed(seed, pair_id)
        edit = rule_edit(sample["answer"], sample["question"], np.random.default_rng(edit_seed), vocabulary)
        if edit is not None:
            unfit = problem(sample["answer"], edit.text, settings.max_length_ratio, sample["question"])
            if unfit is None:
                return _pair(sample, pair_id, rejected=edit.text, generator=RULE_EDIT, seed=edit_seed)
            reason = unfit if settings.method == "rule_edit" else reason
    return _dropped(sample, pair_id, reason)


def released_pair(row: dict[str, Any], max_length_ratio: float) -> dict[str, Any]:
    """A pair that came with the data, dropped where it is unfit."""
    reason = problem(row["chosen"], row["rejected"], max_length_ratio, row["question"])
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
