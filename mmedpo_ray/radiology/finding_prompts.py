"""What a visual tool looks for: the finding that a question and its answer are about.

    prompt_for("Is there a pleural effusion?", "Yes", "disease")         -> "pleural effusion"
    prompt_for("What is wrong with this image?", "Pneumothorax", "disease")  -> "pneumothorax"
    prompt_for("Is this a CT?", "No", "disease")                         -> "disease"

Reads the text with the radiology lexicon, without a model: the same text always gives the same prompt.
"""

from __future__ import annotations

import re

from mmedpo_ray.radiology.lexicon import facts
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS
from mmedpo_ray.radiology.word_lists import load

_LISTS = load("observations")
# What MedKLIP was trained to answer, in the order of its official list.
OBSERVATIONS: tuple[str, ...] = tuple(_LISTS["observations"].split())
GENERIC_OBSERVATION = "disease"

# A yes or no that stands alone before the statement: no negation of what follows.
_POLARITY = re.compile(r"^\W*(?:yes|no)\s*[,.;:]", re.IGNORECASE)
_OBSERVATION_OF_WORD = [
    (re.compile(rf"\b(?:{pattern})", re.IGNORECASE), observation)
    for pattern, observation in _LISTS["of_word"]
]
_LIKE_A_FINDING = re.compile(
    rf"\b(?:{'|'.join([*_LISTS['like_a_finding'], *(pattern for pattern, _ in _LISTS['of_word'])])})",
    re.IGNORECASE,
)


def names_finding(question: str, answer: str) -> bool:
    """Whether question or answer name a finding, or ask for any: what noise on a lesion can hide.

    Wider than :func:`finding_asked`: also true for what has the form of a finding's name but is not in the
    lexicon.
    """
    return any(facts(text) or _LIKE_A_FINDING.search(text) for text in (question, answer))


def finding_asked(question: str, answer: str) -> str | None:
    """The finding that question and answer are about, by its name in the lexicon; None if they name none.

    A finding that the answer affirms comes first ("No. There is an effusion."), then one that the question
    names (the answer is yes, no or a place). Of several the clinically most relevant, then the first.
    """
    affirmed = [fact.finding for fact in facts(_POLARITY.sub("", answer)) if fact.present]
    for names in (affirmed, [fact.finding for fact in facts(question)]):
        # "Abnormality" and the like, which the lexicon counts as facts, name no finding.
        named = [name for name in names if name in CONCEPTS]
        if named:
            return max(named, key=lambda name: CONCEPTS[name].relevance)
    return None


def prompt_for(question: str, answer: str, generic: str, *, always_generic: bool = False) -> str:
    """The prompt for a tool that takes free text.

    Args:
        question: what was asked.
        answer: reference answer.
        generic: the word to look for if no finding is named, such as "disease".
        always_generic: look for that word in any case.
    """
    finding = None if always_generic else finding_asked(question, answer)
    return finding or generic.strip()


def observation_for(question: str, answer: str, generic: str, *, always_generic: bool = False) -> str:
    """The one of MedKLIP's 75 observations to ask for; "disease" if none fits.

    Takes the arguments of :func:`prompt_for`.
    """
    fallback = _known(generic.strip().lower()) or GENERIC_OBSERVATION
    if always_generic:
        return fallback
    finding = finding_asked(question, answer)
    if finding is not None and (observation := _known(finding)):
        return observation
    for text in (answer, question):
        for pattern, observation in _OBSERVATION_OF_WORD:
            if pattern.search(text):
                return observation
    return fallback


def _known(name: str) -> str | None:
    name = _LISTS["of_finding"].get(name, name)
    return name if name in OBSERVATIONS else None
