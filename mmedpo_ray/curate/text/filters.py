"""Filters: what makes a rejected answer unfit for a pair; every filter has its own drop reason.

| reason | the rejected answer |
| --- | --- |
| ``empty_rejected`` | has no text |
| ``meta_text`` | (or the chosen one) talks about the task: leaked prompts, role tags, refusals |
| ``same_answer`` | says the same in other words |
| ``contains_truth`` | says the chosen answer in more words: to prefer against it would punish the truth |
| ``rejected_too_long`` | is so much longer that length alone tells the two apart |
| ``wrong_script``, ``wrong_language`` | is in another script or language, which also tells them apart |
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS

# A short answer may be longer than the ratio allows by this many words.
_EXTRA_WORDS = 8
# A Greek letter or a name in its own spelling is no other script.
_FOREIGN_LETTERS = 0.2
_BARE_WORDS = 2
# "5 mm", "< 5", "5 x 4", "5 - 10" beside "5mm", "<5", "5x4", "5-10".
_BESIDE_A_NUMBER = re.compile(
    r"(?<=\d) +(?=(?:mm|cm|ml|%|[x~-] *\d))|(?<=\d[x~-]) +(?=\d)|(?<=\d [x~-]) +(?=\d)|(?<=[<>=~]) +(?=\d)"
)
_MODALITIES = frozenset(concept.name for concept in CONCEPTS.values() if concept.axis == "modality")
# "No", "not", "without", "denies", "excluded" before it in the same clause.
_DENIED_IN_CHINESE = re.compile(r"(?:[无無没沒未不非]|否认|否認|排除)[^，。；：！？、,.;:!?]*$")

_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in yaml.safe_load(
        (Path(__file__).parent / "function_words.yaml").read_text("utf-8")
    ).items()
}
_FEWEST_LANGUAGE_WORDS = 6
_FEWEST_HITS = 3


def problem(chosen: str, rejected: str, max_length_ratio: float, question: str = "") -> str | None:
    """Why two answers make no pair: the drop reason, or None.

    Args:
        chosen: preferred answer.
        rejected: dispreferred answer.
        max_length_ratio: in words; a rejected answer over it, and over by 8 words, is too long.
        question: what was asked; gives a bare "Yes" its meaning and short answers their language.
    """
    if not rejected.strip():
        return "empty_rejected"
    if lexicon.is_meta_text(rejected) or lexicon.is_meta_text(chosen):
        return "meta_text"
    chosen, rejected, question = map(lexicon.same_characters, (chosen, rejected, question))
    if lexicon.equivalent(chosen, rejected) or _evenly_spaced(chosen) == _evenly_spaced(rejected):
        return "same_answer"
    if contains_truth(chosen, rejected, question):
        return "contains_truth"
    wanted, got = len(lexicon.words(chosen)), len(lexicon.words(rejected))
    if got > max_length_ratio * wanted and got >= wanted + _EXTRA_WORDS:
        return "rejected_too_long"
    return _foreign(chosen, rejected, question)


def _evenly_spaced(text: str) -> str:
    """The text in lower case, without final period and without spaces between a number and its unit."""
    return _BESIDE_A_NUMBER.sub("", text.casefold()).strip(" .")


def most_frequent(reasons: Iterable[str]) -> str | None:
    """The most frequent reason, of several the one that came first; None if there is none."""
    counted = Counter(reasons).most_common(1)
    return counted[0][0] if counted else None


# ---------------------------------------------------------------------- the truth inside a longer answer


def contains_truth(chosen: str, rejected: str, question: str = "") -> bool:
    """Whether the rejected answer states the chosen one and nothing that conflicts with it.

    An answer that states the truth and invents a finding beside it is wrong, and stays. What counts as
    stated:

    - A bare yes or no is stated by an answer of the same polarity, never by the word alone ("No, …" may
      contain a "yes").
    - One option of an "A or B" question is stated if it is named and the other is not: "The liver is
      larger than the kidney" names both.
    - Any other answer is stated if its words occur one after the other, whole and in any spelling that the
      lexicon knows, and are not denied there: "MRI" is stated by "This is an MRI of the brain", not by "This
      is a CT,
          not an MRI". Words of the question prove nothing, since every answer may repeat them.
    """
    chosen, rejected, question = map(lexicon.canonical, (chosen, rejected, question))
    if not set(lexicon.numbers_and_signs(chosen)) <= set(lexicon.numbers_and_signs(rejected)):
        return False
    return _states(chosen, rejected, question) and not lexicon.conflicts(chosen, rejected, question)


def _states(chosen: str, rejected: str, question: str) -> bool:
    wanted, said = lexicon.terms(chosen), lexicon.terms(rejected)
    expected = lexicon.polarity(chosen)
    if expected is not None and len(lexicon.words(chosen)) <= _BARE_WORDS and len(wanted) == 1:
        return lexicon.implied_polarity(question, rejected) == expected
    if not wanted or len(wanted) > len(said):
        return False
    if _places(wanted, lexicon.terms(question)):
        options = [
            named[0].name for option in lexicon.choices(question) or () if (named := lexicon.terms(option))
        ]
        names = {term.name for term in said if not _is_denied(rejected, term.start)}
        named_options = [option for option in options if option in names]
        return named_options == [term.name for term in wanted]
    denies = lexicon.is_negated(chosen)
    return any(denies or not _is_denied(rejected, place) for place in _places(wanted, said))


def _places(wanted: tuple[lexicon.Term, ...], said: tuple[lexicon.Term, ...]) -> list[int]:
    """Where in the text the words follow one another; not "chest" in "chest X-ray", which names a study."""
    looked_for = [term.name for term in wanted]
    words = [term.name for term in said]
    size = len(looked_for)
    return [
        said[first].start
        for first in range(len(words) - size + 1)
        if words[first : first + size] == looked_for
        and not (words[first + size : first + size + 1] and words[first + size] in _MODALITIES)
    ]


def _is_denied(text: str, position: int) -> bool:
    if _DENIED_IN_CHINESE.search(text, 0, position):
        return True
    return any(start <= position < end for start, end in lexicon.negated_spans(text))


# ---------------------------------------------------------------------- script and language


def _foreign(chosen: str, rejected: str, question: str) -> str | None:
    if not (rejected.isascii() and chosen.isascii()):
        home = _scripts(chosen) or _scripts(question)
        written = _scripts(rejected)
        foreign = sum(count for script, count in written.items() if script not in home)
        if home and foreign > _FOREIGN_LETTERS * written.total():
            return "wrong_script"
    written_in = language(rejected)
    if written_in is None:
        return None
    expected = language(chosen) or language(f"{question} {chosen}")
    return "wrong_language" if expected is not None and written_in != expected else None


def _scripts(text: str) -> Counter[str]:
    """Letters by script; the scripts that Chinese and Japanese mix count as one."""
    found: Counter[str] = Counter()
    for letter in text:
        if letter.isascii():
            found["LATIN"] += letter.isalpha()
        elif letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split(" ")[0]
            found["CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script] += 1
    return +found


def language(text: str) -> str | None:
    """The language of a text by its function words; None if it is too short or no language dominates.

    Knows seven languages in Latin script. A sentence of jargon ("Stable cardiomegaly.") has none, and is no
    problem.
    """
    spelled = re.findall(r"\w+", text.lower())
    if len(spelled) < _FEWEST_LANGUAGE_WORDS:
        return None
    words = set(spelled)
    hits = sorted(((len(known & words), name) for name, known in _FUNCTION_WORDS.items()), reverse=True)
    (best, name), (second, _) = hits[:2]
    return name if best >= _FEWEST_HITS and best >= 2 * second else None
