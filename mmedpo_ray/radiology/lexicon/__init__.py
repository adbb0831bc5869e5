"""Reads radiological answers: polarity, choices, findings with side, zone and size, and conflicts.

    polarity("No, the lungs are clear.")  ->  "no"
    facts("There is a large left pleural effusion.")
        ->  (Fact("pleural effusion", True, "left", None, "large"),)
    conflicts("Left lower zone", "In the right lower zone")
        ->  (Conflict("side", "swapped", "left", "left", "right", 0.9),)

Rules and a vocabulary (``data/``), no model: fast, explainable, English, and blind to what the vocabulary
lacks. Severities are ours and rank conflicts by what they would mean for a patient; they are no calibrated
probabilities.

The facts of the last few thousand answers are cached, since each answer is read several times: the reference
by each edit of it, a pair by each filter and each judge.
"""

from mmedpo_ray.radiology.lexicon.answers import choices, equivalent, implied_polarity, numbers_and_signs
from mmedpo_ray.radiology.lexicon.conflicts import Conflict, conflicts, severity
from mmedpo_ray.radiology.lexicon.contradictions import are_kin, contradictions, names_another, without_wider
from mmedpo_ray.radiology.lexicon.facts import (
    LUNG_FINDINGS,
    Fact,
    facts,
    is_negated,
    negated_spans,
    sentence_spans,
    stated,
)
from mmedpo_ray.radiology.lexicon.meta_text import is_meta_text
from mmedpo_ray.radiology.lexicon.normalisation import final_answer, has_han, same_characters
from mmedpo_ray.radiology.lexicon.options import chosen, options
from mmedpo_ray.radiology.lexicon.polarity import polarity, stated_polarity
from mmedpo_ray.radiology.lexicon.quantities import in_millimetres, lengths
from mmedpo_ray.radiology.lexicon.synonyms import abbreviates, canonical, synonym
from mmedpo_ray.radiology.lexicon.words import INTRODUCING, Term, content_words, numbers, terms, words

__all__ = [
    "INTRODUCING",
    "LUNG_FINDINGS",
    "Conflict",
    "Fact",
    "Term",
    "abbreviates",
    "are_kin",
    "canonical",
    "choices",
    "chosen",
    "conflicts",
    "content_words",
    "contradictions",
    "equivalent",
    "facts",
    "final_answer",
    "has_han",
    "implied_polarity",
    "in_millimetres",
    "is_meta_text",
    "is_negated",
    "lengths",
    "names_another",
    "negated_spans",
    "numbers",
    "numbers_and_signs",
    "options",
    "polarity",
    "same_characters",
    "sentence_spans",
    "severity",
    "stated",
    "stated_polarity",
    "synonym",
    "terms",
    "without_wider",
    "words",
]
