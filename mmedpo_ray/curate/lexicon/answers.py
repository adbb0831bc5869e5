"""Answers beside their question or another answer: what a yes or no means, which option was chosen, whether two say the same."""

from __future__ import annotations

import re
from functools import lru_cache

from mmedpo_ray.curate.lexicon.facts import NEGATION, facts, is_negated
from mmedpo_ray.curate.lexicon.words import Polarity, content_words, polarity, words
from mmedpo_ray.curate.terms import mentions

_CHOICE = re.compile(r"([\w-]+),? or (?:an? |the )?([\w-]+)", re.IGNORECASE)


def equivalent(first: str, second: str) -> bool:
    """Whether two answers say the same in other words: equal polarity, numbers, content words and facts."""
    if polarity(first) != polarity(second) or _other_letters(first) != _other_letters(second):
        return False
    left, right = content_words(first), content_words(second)
    if not left and not right:
        return words(first) == words(second)
    return (
        left == right and set(facts(first)) == set(facts(second)) and _opposites(first) == _opposites(second)
    )


@lru_cache(maxsize=2048)
def _opposites(text: str) -> tuple[tuple[str, ...], ...]:
    """Concepts that exclude each other and are named together, in order: "dark centre, bright rim" is not its reverse."""
    groups: dict[str, list[str]] = {}
    for mention in mentions(text):
        if mention.concept.axis not in ("finding", "anatomy"):
            groups.setdefault(mention.concept.group, []).append(mention.concept.name)
    return tuple(tuple(names) for _, names in sorted(groups.items()) if len(set(names)) > 1)


def _other_letters(text: str) -> str:
    """Letters and digits beyond ASCII, of which :func:`words` knows nothing."""
    if text.isascii():
        return ""
    return "".join(letter for letter in text.casefold() if letter.isalnum() and not letter.isascii())


def implied_polarity(question: str, answer: str) -> Polarity | None:
    """The answer to a yes/no question, also where it is a statement ("There is no effusion")."""
    direct = polarity(answer)
    if direct is not None:
        return direct
    agreed = _agreement(question, answer)
    if agreed is not None:
        return "yes" if agreed else "no"
    return "no" if NEGATION.search(answer) else None


def stated_polarity(question: str, answer: str) -> Polarity | None:
    """As :func:`implied_polarity`, only where the text leaves no doubt: a negation about something else is no "no"."""
    direct = polarity(answer)
    if direct is not None:
        return direct
    agreed = _agreement(question, answer)
    if agreed is None or (agreed and is_negated(answer)):
        return None
    return "yes" if agreed else "no"


def _agreement(question: str, answer: str) -> bool | None:
    """Whether question and answer say the same of the findings that both name; None where they disagree among each other."""
    asked = _presence(question.rstrip("?"))
    said = _presence(answer)
    agreements = {asked[name] == said[name] for name in asked if name in said}
    return agreements.pop() if len(agreements) == 1 else None


def choices(question: str) -> tuple[str, str] | None:
    """The options of an "A or B" question, lower case ("Is this a CT or an MRI?" -> ("ct", "mri")); else None."""
    match = _CHOICE.search(question)
    if match is None or match.group(2).lower() in ("not", "no"):
        return None
    by_group: dict[str, list[str]] = {}
    for mention in mentions(question):
        names = by_group.setdefault(mention.concept.group, [])
        if mention.concept.name not in names:
            names.append(mention.concept.name)
    for names in by_group.values():
        if len(names) == 2:
            return names[0], names[1]
    return match.group(1).lower(), match.group(2).lower()


def _presence(text: str) -> dict[str, bool]:
    return {fact.finding: fact.present for fact in facts(text)}
