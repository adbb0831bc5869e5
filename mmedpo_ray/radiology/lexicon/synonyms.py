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

_KEPT = 4096
_SIDES = {"R": "right", "L": "left"}
_LEVELS = {"U": "upper", "M": "middle", "L": "lower"}
_ABBREVIATIONS = {
    **{f"{side}{level}L": f"{_SIDES[side]} {_LEVELS[level]} lobe" for side in "RL" for level in "UML"},
    **{f"{side}{level}Q": f"{_SIDES[side]} {_LEVELS[level]} quadrant" for side in "RL" for level in "UL"},
    "CXR": "chest x-ray",
    "PTX": "pneumothorax",
    "SDH": "subdural hematoma",
    "EDH": "epidural hematoma",
    "SAH": "subarachnoid hemorrhage",
    "WNL": "normal",
    "ICH": "intracranial hemorrhage",
    "CVA": "stroke",
    "TB": "tuberculosis",
    "ETT": "endotracheal tube",
    "GI": "gastrointestinal",
    "US": "ultrasound",
    "XR": "x-ray",
    "B/L": "bilateral",
}
# Only where they are all that an answer says.
_LETTERS = {**_SIDES, "F": "female", "M": "male"}
_ABBREVIATED = re.compile(rf"(?<![\w-])(?:{'|'.join(_ABBREVIATIONS)})(?![\w-])")
# Many times as fast to look for.
_MAY_ABBREVIATE = re.compile(r"[A-Z][A-Z/]")
_WHOLE = {**_ABBREVIATIONS, **_LETTERS}
_WHOLE_ABBREVIATION = re.compile(rf"\W*(?P<short>{'|'.join(_WHOLE)})\W*", re.IGNORECASE)
_AMOUNT = (
    r"(?=\d+\b(?!(?:st|nd|rd|th))|\d+ ?(?:mm|cm|%)|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)"
)
_TWO_SIDES = (" and right", " and left", " and the right", " and the left", " as well as ", " & ")


class Spelling(NamedTuple):
    """What is said, and what is put in its place.

    Attributes:
        needed: pieces in small letters of which one must be there, since to look for those is quick.
        pattern: what is said.
        replacement: its one spelling, as for :func:`re.sub`.
    """

    needed: tuple[str, ...]
    pattern: re.Pattern[str]
    replacement: str


def spellings(*rules: tuple[tuple[str, ...], str, str]) -> tuple[Spelling, ...]:
    """The rules (needed, pattern, replacement), made ready; capitals do not count."""
    return tuple(
        Spelling(needed, re.compile(pattern, re.IGNORECASE), replacement)
        for needed, pattern, replacement in rules
    )


def respelled(text: str, rules: tuple[Spelling, ...]) -> str:
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


_SPELLINGS = spellings(
    (("healthy",), r"\bhealthy\b", "normal"),
    (("normal limits", "normal range"), r"\bwithin (?:the )?normal (?:limits|range)\b", "normal"),
    (("nothing",), r"\bnothing (?:is )?abnormal\b", "no abnormality"),
    (("cerebrovascular accident",), r"\bcerebrovascular accident\b", "stroke"),
    (("chronic obstructive",), r"\bchronic obstructive (?:pulmonary|lung|airways?) disease\b", "COPD"),
    (("posterior-anterior", "posterior anterior"), r"\bposterior[- ]anterior\b", "posteroanterior"),
    (("anterior-posterior", "anterior posterior"), r"\banterior[- ]posterior\b", "anteroposterior"),
    (("not abnormal",), r"\bnot abnormal\b", "normal"),
    (
        _TWO_SIDES,
        r"\b(?:both )?(?:the )?(?:left (lung|side)s? and (?:the )?right \1s?|right (lung|side)s? and (?:the )?left \2s?)\b",
        r"both \1\2s",
    ),
    (
        _TWO_SIDES,
        r"\b(?:both )?(?:the )?(?:left(?:-sided)?(?: and|,? as well as| &) (?:the )?right|"
        r"right(?:-sided)?(?: and|,? as well as| &) (?:the )?left)(?: (?:lung|side)s?)?\b",
        "bilateral",
    ),
    (("both lung",), r"\bboth lung\b", "both lungs"),
    (("both the ",), r"\bboth the (?=(?:lung|side)s\b)", "both "),
    (
        ("both",),
        r"\bboth (?:the )?(?=(?:kidneys|hemispheres|breasts|hips|knees|hila|ventricles|orbits|eyes|adrenals?|"
        r"apices|bases|hemithoraces|hemidiaphragms)\b)",
        "bilateral ",
    ),
    (
        ("both",),
        r"\A\W*(?:(?:it is|they are|on|in|at|the answer is) )*both(?: of them)?\W*\Z",
        "bilateral",
    ),
    (
        (" than ", "under ", "below "),
        rf"\b(?:(?:less|smaller|lower|fewer|shorter) than|under|below) {_AMOUNT}",
        "<",
    ),
    (
        (" than ", "over ", "above ", "exceeding "),
        rf"\b(?:(?:more|greater|larger|bigger|higher|longer) than|over|above|exceeding) {_AMOUNT}",
        ">",
    ),
    (("at least ",), rf"\bat least {_AMOUNT}", ">="),
    (("at most ", "up to "), rf"\b(?:at most|up to) {_AMOUNT}", "<="),
    (("≥",), "≥", ">="),
    (("≤",), "≤", "<="),
    (("< ", "> ", "= "), r"([<>]=?) +(?=\d)", r"\1"),
    (("\u2212", "\u2013"), r"(?<![\w.])[\u2212\u2013](?=\d)", "-"),
    (("+",), r"\A[\s(\[]*\+[\s)\].]*\Z", "positive"),
    (("-", "\u2212", "\u2013"), r"\A[\s(\[]*[-\u2212\u2013][\s)\].]*\Z", "negative"),
)

# Words of one meaning that the vocabulary lacks; the first of a group is the name, that of a concept where there is one.
_SYNONYMS: dict[str, str] = {
    word: group.split()[0]
    for group in (
        "yes yeah yep true correct",
        "expanded inflated aerated ventilated",
        "fracture broken break",
        "brain cerebral",
        "bone bony osseous skeletal",
        "vessel vascular",
        "stone calculus calculi",
        "hemorrhage hemorrhagic",
        "mass neoplastic",
        "edema swelling swollen",
        "disease disorder illness",
        "stable unchanged",
        "large big sizable sizeable",
        "small little",
        "bilateral both",
        "increased elevated raised",
        "decreased reduced diminished",
        "enlarged distended widened",
        "quickly rapidly",
        "image picture photograph",
        "middle midline",
        "unlikely improbable",
    )
    for word in group.split()
}
_BRITISH_S = re.compile(r"is(?=ed?$|ation)")
_BRITISH_E = re.compile(r"(?:ae|oe)(?=[a-z]{2})")
_PICTURE = r"(?:image|scan|study|film|radiograph|x-ray|picture|examination|exam|ct|mri)"
_SUBJECT = (
    rf"(?:(?:it|this|that|everything|all|(?:the|this) (?:\w+ )?{_PICTURE}) "
    r"(?:is|are|appears?|looks?|seems?|shows?|demonstrates?|reveals?|has|have)(?: to be)? |there (?:is|are) )?"
)
_SEEN = (
    r"(?:,? (?:(?:is|are|was|were|can be) )?"
    r"(?:seen|present|visible|identified|noted|detected|found|evident|observed|demonstrated|there))?"
)
_HERE = rf"(?: (?:in|on) (?:this|the) (?:\w+ )?{_PICTURE})?"
_SENSES: dict[Literal["normal", "none"], re.Pattern[str]] = {
    "normal": re.compile(
        rf"\W*{_SUBJECT}(?:an? )?(?:completely |entirely |essentially |otherwise |grossly )?(?:"
        rf"(?:normal|unremarkable)(?: (?:\w+ )?(?:{_PICTURE}|findings?|anatomy|appearance|limits))?|"
        r"(?:no|without|not any) (?:any |(?:evidence|signs?) of |an? |acute |significant |obvious |visible |gross )*"
        r"(?:abnormalit(?:y|ies)|abnormal findings?|diseases?|patholog(?:y|ies)|pathological findings?))"
        rf"{_SEEN}{_HERE}\W*",
        re.IGNORECASE,
    ),
    "none": re.compile(
        rf"\W*(?:there (?:is|are) )?(?:no|none|nil|zero|0|not any){_SEEN}{_HERE}\W*", re.IGNORECASE
    ),
}
_LONGEST_SENSE = 100
_LONGEST_ABBREVIATION = 8
# With the words around it, as in "This is the CNS."
_LONGEST_INITIALS = 24


@lru_cache(maxsize=_KEPT)
def canonical(text: str) -> str:
    """The text with characters, abbreviations, both sides, normality and comparisons in one spelling; places in it may move."""
    text = same_characters(text)
    if len(text) <= _LONGEST_ABBREVIATION:
        whole = _WHOLE_ABBREVIATION.fullmatch(text)
        if whole:
            return _WHOLE[whole["short"].upper()]
    if _MAY_ABBREVIATE.search(text):
        text = _ABBREVIATED.sub(lambda match: _ABBREVIATIONS[match.group()], text)
    return respelled(text, _SPELLINGS)


def sense(text: str) -> Literal["normal", "none"] | None:
    """What a whole answer amounts to, if it says no more than that all is normal ("normal") or that there is none ("none").

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
    """Whether one text is a word in capitals, made of the initials of the other: "CNS" and "The central nervous system".

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
