"""Closed questions: yes or no, or one of the options that the question names."""

from __future__ import annotations

from typing import Literal

from mmedpo_ray.metrics.base import Answer, Metric, mean_of
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon import chinese_negation, final_answer, has_han, same_characters
from mmedpo_ray.radiology.lexicon.options import chosen, stated_sentences
from mmedpo_ray.radiology.lexicon.tokens import contains, tokens

Verdict = Literal["right", "wrong", "undecided"]


def closed_correct(answer: Answer) -> bool:
    """Whether a closed question is answered correctly; an undecided answer is not. See :func:`verdict`."""
    return verdict(answer) == "right"


def verdict(answer: Answer) -> Verdict:
    """Judges the decision that an answer takes, on whole words; what a thought block says does not count.

    Where the reference is one of the options of the question ("CT or MRI?", "A) CT B) MRI"), the answer is
    right if it decides for the same one, by its letter or its words. Where the reference is a yes or no (also
    None, Not seen, Present, 没有), the answer's own yes or no decides, or what its statement means for the
    question. Otherwise the reference must be stated as whole words, and nothing that excludes it. Two options
    or both words without a decision are undecided, as is an answer that takes none.
    """
    question, reference = answer.question, answer.reference
    expected = chosen(reference, question)
    if expected is not None:
        return _compared(chosen(answer.prediction, question), expected)
    polarity = lexicon.polarity(reference)
    if polarity is not None:
        stated = lexicon.implied_polarity(question, answer.prediction)
        if stated is None and not {"yes", "no"} & set(tokens(reference)) and _states(answer):
            # It has the very word of the reference, such as "absent".
            return "right"
        return _compared(stated, polarity)
    return "right" if _states(answer) else "wrong"


def _compared(decision: object, expected: object) -> Verdict:
    if decision is None:
        return "undecided"
    return "right" if decision == expected else "wrong"


def _states(answer: Answer) -> bool:
    """Whether the answer states the reference as whole words, and nothing that excludes it."""
    prediction, reference = (
        same_characters(final_answer(answer.prediction)),
        same_characters(answer.reference),
    )
    wanted, whole = tokens(reference), tokens(prediction)
    if wanted and whole == wanted:
        return True
    if has_han(reference):
        kept = "".join(tokens(chinese_negation.without_denied(prediction)))
        return chinese_negation.states(kept, "".join(wanted)) and not chinese_negation.names_opposite(
            kept, reference
        )
    said = whole if lexicon.is_negated(reference) else tokens(" ".join(stated_sentences(prediction)))
    if not contains(said, wanted):
        # "The left" answers "Which lung?" as "left lung" does.
        wanted = [token for token in wanted if token not in tokens(answer.question)]
        if not contains(said, wanted):
            return False
    if len(wanted) == 1 and len(wanted[0]) == 1 and wanted[0].isalpha():
        return not {token for token in said if len(token) == 1 and token.isalpha()} - set(wanted)
    return not any(
        conflict.kind == "swapped" and conflict.axis != "size"
        for conflict in lexicon.conflicts(reference, prediction, answer.question)
    )


CLOSED_ACCURACY = Metric("closed_accuracy", "closed accuracy", "closed", mean_of(closed_correct))
