"""Text pairs: which answers are wrong, which of them conflicts most, and who writes a wrong answer if none is.

The paper lets a strong model pick the candidate that conflicts most with the reference, and write a wrong answer if no
candidate is wrong. Here ``curate.text.judge`` picks (the lexicon, or a model behind an endpoint) and
``curate.text.fallback`` writes (a rule edit, or such a model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmedpo_ray.clients.chat import TRANSIENT
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.settings import TextCurationConfig
from mmedpo_ray.curate.text.filters import most_frequent, problem
from mmedpo_ray.curate.text.rejections import TurnedDown
from mmedpo_ray.curate.text.rewrites import GENERATOR as REWRITE
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.rule_edit import GENERATOR as RULE_EDIT
from mmedpo_ray.radiology.edits.rule_edit import rule_edit
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON

NO_WRONG_ANSWER = "no_wrong_answer"


@dataclass(frozen=True)
class Candidate:
    """An answer of the target model; a row of `candidates`."""

    candidate_id: str
    text: str
    generator: str
    prompt_sha256: str
    seed: int


@dataclass(frozen=True)
class Material:
    """What other tables hold about a sample.

    Attributes:
        candidates: answers of the target model, in order.
        choice: its row of `choices`, kept or dropped; None if the judge was not asked.
        rewrite: its row of `rewrites`, kept or dropped; None if no rewrite was asked for.
    """

    candidates: Sequence[Candidate] = ()
    choice: dict[str, Any] | None = None
    rewrite: dict[str, Any] | None = None


class Pick(NamedTuple):
    """The candidate to reject, or why there is none.

    Attributes:
        found: the candidate; None: see the reason.
        reason: why there is none.
        filtered: reasons of the candidates that failed a filter, in their order.
    """

    found: Candidate | None
    reason: str
    filtered: list[str]


class TextPair(NamedTuple):
    """A row of `pairs`, kept or dropped, and the answers that were turned down for it."""

    row: dict[str, Any]
    turned_down: tuple[TurnedDown, ...]


def is_wrong(reference: str, answer: str, question: str, answer_type: str) -> bool:
    """Whether an answer conflicts with the reference; False if it cannot be judged or only says less.

    Closed: the polarity differs, or the other option is chosen, on word boundaries. Open: it contradicts the reference by
    the lexicon, or has another word in the place of one of its words. Report: a fact differs by the lexicon; a report is
    taken to be complete, so it denies a finding that it leaves out.
    """
    if answer_type == "closed":
        expected = lexicon.implied_polarity(question, reference) if lexicon.polarity(reference) else None
        if expected is not None:
            stated = lexicon.implied_polarity(question, answer)
            return stated is not None and stated != expected
        if lexicon.choices(question) is not None:
            return _chooses_another(reference, answer, question)
    if answer_type == "report":
        return bool(_contradictions(reference, answer, question, answer_type))
    if lexicon.equivalent(reference, answer):
        return False
    return (
        _chooses_another(reference, answer, question)
        or bool(_contradictions(reference, answer, question, answer_type))
        or lexicon.names_another(reference, answer, question)
    )


def _chooses_another(reference: str, answer: str, question: str) -> bool:
    """Whether the answer states the other option of an "A or B" question, and no further option."""
    options = lexicon.choices(question) or ()
    expected, stated = (
        [option for option in options if _names(text, option)]
        for text in map(lexicon.stated, map(lexicon.canonical, (reference, answer)))
    )
    return len(expected) == 1 and len(stated) == 1 and expected != stated


def _contradictions(
    reference: str, answer: str, question: str, answer_type: str
) -> tuple[lexicon.Conflict, ...]:
    return lexicon.contradictions(reference, answer, question, is_complete=answer_type == "report")


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


def most_conflicting(
    reference: str, question: str, answer_type: str, candidates: Sequence[Candidate]
) -> Candidate | None:
    """The wrong candidate that conflicts most with the reference by the lexicon; None if none is wrong.

    Of equal ones the nearest to the reference in length, then the first.
    """
    wrong = [
        candidate for candidate in candidates if is_wrong(reference, candidate.text, question, answer_type)
    ]
    length = len(lexicon.words(reference))

    def rank(candidate: Candidate) -> tuple[float, int]:
        found = _contradictions(reference, candidate.text, question, answer_type)
        return -lexicon.severity(found), abs(len(lexicon.words(candidate.text)) - length)

    return min(wrong, key=rank, default=None)


def pick(sample: dict[str, Any], material: Material, settings: TextCurationConfig) -> Pick:
    """The candidate to reject, by the judge that the settings name.

    The reason for none is ``no_wrong_answer``, the most frequent filter if every candidate failed one, or the judge's own.
    """
    reference, question = sample["answer"], sample["question"]
    fit, filtered = usable(reference, question, material.candidates, settings.max_length_ratio)
    if not fit:
        return Pick(None, most_frequent(filtered) or NO_WRONG_ANSWER, filtered)
    if settings.judge == "rules":
        return Pick(
            most_conflicting(reference, question, sample["answer_type"], fit), NO_WRONG_ANSWER, filtered
        )
    choice = material.choice
    if choice is None:
        return Pick(None, NO_WRONG_ANSWER, filtered)
    chosen = [candidate for candidate in fit if candidate.candidate_id == choice["candidate_id"]]
    reason = choice.get(DROP_REASON) or NO_WRONG_ANSWER
    return Pick(chosen[0] if chosen else None, reason, filtered)


def needs_rewrite(sample: dict[str, Any], material: Material, settings: TextCurationConfig) -> bool:
    """Whether no candidate can be rejected, so that the endpoint has to write an answer."""
    picked = pick(sample, material, settings)
    return picked.found is None and picked.reason != TRANSIENT


def text_pair(
    sample: dict[str, Any],
    material: Material,
    settings: TextCurationConfig,
    vocabulary: frozenset[str],
    seed: int,
) -> TextPair:
    """The text pair of a sample, dropped if there is no wrong answer to it.

    If the endpoint may still answer on another run (``endpoint_failed``) the pair is dropped and made in that run.

    Args:
        sample: row of `samples`.
        material: candidates, choice and rewrite of the sample, as far as the method has them.
        settings: method and filters.
        vocabulary: concepts of the data set, for edits.
        seed: of the run; the edit is drawn from it and the sample's id.
    """
    reason = NO_WRONG_ANSWER
    turned_down: list[TurnedDown] = []

    def pair(**provenance: Any) -> TextPair:
        row = _row(sample) | common(sample)
        row |= {"rejected_image_uri": sample["image_uri"], "chosen": sample["answer"], **provenance}
        return TextPair(row, tuple(turned_down))

    if settings.method == "on_policy":
        found, reason, filtered = pick(sample, material, settings)
        turned_down += [TurnedDown("candidates", each) for each in filtered]
        if found is not None:
            return pair(
                rejected=found.text,
                generator=found.generator,
                prompt_sha256=found.prompt_sha256,
                seed=found.seed,
            )
    rewrite = material.rewrite
    if reason != TRANSIENT and rewrite is not None:
        if (refused := rewrite.get(DROP_REASON)) is None:
            return pair(
                rejected=rewrite["rewritten"], generator=REWRITE, prompt_sha256=rewrite["prompt_sha256"]
            )
        if refused != TRANSIENT:
            turned_down.append(TurnedDown("rewrites", refused))
        reason = refused
    if reason != TRANSIENT and "rule_edit" in (settings.method, settings.fallback):
        edit_seed = stable_seed(seed, _pair_id(sample))
        edit = rule_edit(sample["answer"], sample["question"], np.random.default_rng(edit_seed), vocabulary)
        if edit is not None:
            unfit = problem(sample["answer"], edit.text, settings.max_length_ratio, sample["question"])
            if unfit is None:
                return pair(rejected=edit.text, generator=RULE_EDIT, seed=edit_seed)
            turned_down.append(TurnedDown("rule_edits", unfit))
            reason = unfit if settings.method == "rule_edit" else reason
    return TextPair(_dropped(_row(sample), reason), tuple(turned_down))


def released_pair(row: dict[str, Any], max_length_ratio: float) -> dict[str, Any]:
    """A pair that came with the data, dropped if it is unfit."""
    reason = problem(row["chosen"], row["rejected"], max_length_ratio, row["question"])
    return row if reason is None else _dropped(row, reason)


def common(sample: dict[str, Any]) -> dict[str, Any]:
    """The columns that a pair copies from its sample."""
    names = ("sample_id", "image_id", "dataset", "task", "answer_type", "image_uri", "question")
    return {name: sample[name] for name in names}


def _names(text: str, option: str) -> bool:
    wanted = lexicon.content_words(option)
    return bool(wanted) and wanted <= lexicon.content_words(text)


def _pair_id(sample: dict[str, Any]) -> str:
    return f"{sample['sample_id']}:text"


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """The columns that a text pair has even if it is dropped."""
    return {
        "pair_id": _pair_id(sample),
        "sample_id": sample["sample_id"],
        "image_id": sample["image_id"],
        "kind": "text",
    }


def _dropped(pair: dict[str, Any], reason: str) -> dict[str, Any]:
    named = {name: pair[name] for name in ("pair_id", "sample_id", "image_id", "kind")}
    return {**named, DROP_REASON: reason, DROP_DETAIL: pair["sample_id"]}
