"""One spelling for what is said in several ways, beyond the forms of single concepts in the vocabulary.

canonical("RUL")             -> "right upper lobe"
canonical("Left and right")  -> "bilateral"
canonical("less than 5 mm")  -> "<5 mm"
sense("No abnormality is seen.") == sense("Normal")
synonym("inflated")               -> "expanded"
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from mmedpo_ray.radiology.lexicon.normalisation import same_characters
from mmedpo_ray.radiology.lexicon.polarity import polarity
from mmedpo_ray.radiology.lexicon.vocabulary import lowered, mentions
from mmedpo_ray.radiology.lexicon.words import folded
from mmedpo_ray.radiology.word_lists import IMAGE, NUMBER_WORDS, SEEN, load, pattern_of

_KEPT = 4096
_LISTS = load("spellings")
_ABBREVIATIONS: dict[str, str] = _LISTS["abbreviations"]
_ABBREVIATED = re.compile(rf"(?<![\w-])(?:{'|'.join(_ABBREVIATIONS)})(?![\w-])")
# Many times as fast to look for.
_MAY_ABBREVIATE = re.compile(r"[A-Z][A-Z/]")
_WHOLE = {**_ABBREVIATIONS, **_LISTS["whole_answers"]}
_WHOLE_ABBREVIATION = re.compile(rf"\W*(?P<short>{'|'.join(_WHOLE)})\W*", re.IGNORECASE)


class Rule(NamedTuple):
    """What is said, and what is put in its place.

    Attributes:
        needed: pieces in small letters of which one must be there, since to look for those is quick.
        pattern: what is said.
        replacement: its one spelling, as for :func:`re.sub`.
    """

    needed: tuple[str, ...]
    pattern: re.Pattern[str]
    replacement: str


def rules(name: str) -> tuple[Rule, ...]:
    """The rules of a list of ``data/spellings.yaml``; capitals do not count."""
    pieces = {"NUMBER": list(NUMBER_WORDS), **_LISTS["pieces"]}
    return tuple(
        Rule(
            tuple(entry["needed"]),
            re.compile(pattern_of(entry["pattern"], pieces), re.IGNORECASE),
            entry["write"],
        )
        for entry in _LISTS[name]
    )


def respelled(text: str, rules: tuple[Rule, ...]) -> str:
    """The text after one rule after the other."""
    low = lowered(text)
    for needed, pattern, replacement in rules:
        for piece in needed:
            if piece in low:
                text, count = pattern.subn(replacement, text)
                if count:
                    low = lowered(text)
                break
    return text


_PHRASES = rules("phrases")
_SYNONYMS: dict[str, str] = {word: group.split()[0] for group in _LISTS["synonyms"] for word in group.split()}
_BRITISH_S = re.compile(r"is(?=ed?$|ation)")
_BRITISH_E = re.compile(r"(?:ae|oe)(?=[a-z]{2})")
_SUBJECT = (
    rf"(?:(?:it|this|that|everything|all|(?:the|this) (?:\w+ )?{IMAGE}) "
    r"(?:is|are|appears?|looks?|seems?|shows?|demonstrates?|reveals?|has|have)(?: to be)? |there (?:is|are) "
    r")?"
)
_SEEN_HERE = (
    rf"(?:,? (?:(?:is|are|was|were|can be) )?(?:{SEEN}|there))?(?: (?:in|on) (?:this|the) (?:\w+ )?{IMAGE})?"
)
_SENSES: dict[Literal["normal", "none"], re.Pattern[str]] = {
    "normal": re.compile(
        rf"\W*{_SUBJECT}(?:an? )?(?:completely |entirely |essentially |otherwise |grossly )?(?:"
        rf"(?:normal|unremarkable)(?: (?:\w+ )?(?:{IMAGE}|findings?|anatomy|appearance|limits))?|"
        r"(?:no|without|not any) (?:any |(?:evidence|signs?) of |an? |acute |significant |obvious |visible "
        r"|gross )*"
        r"(?:abnormalit(?:y|ies)|abnormal findings?|diseases?|patholog(?:y|ies)|pathological findings?))"
        rf"{_SEEN_HERE}\W*",
        re.IGNORECASE,
    ),
    "none": re.compile(
        rf"\W*(?:there (?:is|are) )?(?:no|none|nil|zero|0|not any){_SEEN_HERE}\W*", re.IGNORECASE
    ),
}
_LONGEST_SENSE = 100
_LONGEST_ABBREVIATION = 8
# With the words around it, as in "This is the CNS."
_LONGEST_INITIALS = 24


@lru_cache(maxsize=_KEPT)
def canonical(text: str) -> str:
    """The text in one spelling of characters, abbreviations, sides and normality; positions may move."""
    text = same_characters(text)
    if len(text) <= _LONGEST_ABBREVIATION:
        whole = _WHOLE_ABBREVIATION.fullmatch(text)
        if whole:
            return _WHOLE[whole["short"].upper()]
    if _MAY_ABBREVIATE.search(text):
        text = _ABBREVIATED.sub(lambda match: _ABBREVIATIONS[match.group()], text)
    return respelled(text, _PHRASES)


def sense(text: str) -> Literal["normal", "none"] | None:
    """ "normal" or "none" if the whole answer says no more than that; else None.

    Args:
        text: a canonical answer.
    """
    if len(text) > _LONGEST_SENSE:
        return None
    return next((name for name, pattern in _SENSES.items() if pattern.fullmatch(text)), None)


def synonym(word: str) -> str:
    """One name, in American spelling, for all words of a meaning.

    Args:
        word: in small letters and singular, or a concept's name.
    """
    american = _BRITISH_E.sub("e", _BRITISH_S.sub("iz", word))
    return _SYNONYMS.get(word) or _SYNONYMS.get(american, american)


def abbreviates(one: str, other: str) -> bool:
    """Whether one string is made of the initials of the other: "CNS", "The central nervous system".

    A word that the vocabulary knows stands for nothing else ("CT" is no chest tube), nor does a yes or no.
    """
    if min(len(one), len(other)) > _LONGEST_INITIALS:
        return False
    first, second = map(_telling_words, (one, other))
    return any(
        len(short) == 1 and _are_initials(short[0], long) and not mentions(short[0])
        for short, long in ((first, second), (second, first))
    )


def _telling_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+", text) if folded(word.lower())]


def _are_initials(short: str, long: list[str]) -> bool:
    return (
        len(short) == len(long) >= 2
        and short.isupper()
        and short == "".join(word[0] for word in long).upper()
        and polarity(short) is None
        and polarity(long[0]) is None
    )
