"""The yes or no of an answer by its own words; one reader for ingest, curation, audit and scoring.

    polarity("No nodule is seen.")             -> "no"
    stated_polarity("No nodule is seen.")      -> None: a statement, whose meaning depends on the question
    stated_polarity("There is no doubt: yes")  -> "yes"
    stated_polarity("I cannot say yes or no")  -> None

The leading word decides, else the last one that stands on its own. English and Chinese.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from mmedpo_ray.radiology.lexicon.normalisation import final_answer, has_han, same_characters
from mmedpo_ray.radiology.word_lists import IMAGE, SEEN, load

Polarity = Literal["yes", "no"]

_KEPT = 4096

# A word stands on its own before punctuation or at the end.
_END = r"(?=\s*(?:[.,;:!?)\]}\"'*\n]|-|$))"
_IN_THE_IMAGE = rf"(?: (?:in|on) (?:the|this|that) (?:\w+ )?{IMAGE})?"
# What may come before the word that decides.
_LEAD = (
    r"\W*(?:(?:(?:the |my |your )?(?:(?:final|correct|short) )?answer(?: to (?:the|this|your) question)?(?: "
    r"is| would be|(?=\W))"
    r"|well|oh|ok(?:ay)?|so|then|therefore|hence|thus|i (?:think|believe|guess|suppose|would say)(?: "
    r"that)?|in my opinion"
    r"|based on (?:the|this) image|(?:most|very|quite) "
    r"likely|probably|likely|definitely|certainly|clearly|absolutely|surely"
    r"|of course|(?:it|this|that|they|there|the statement) (?:is|are|was|were|seems|appears)(?: that| to "
    r"be)?)\b\W*){0,3}"
)
_YES_WORDS = r"(?:yes|yeah|yea|yep|yup|yah|aye|affirmative)"
_NO_WORDS = r"(?:no|nope|nah|nay)"
_YES_ALONE = (
    rf"(?:true|correct|positive|(?:{SEEN}|there){_IN_THE_IMAGE}|certainly|definitely|absolutely|surely|"
    r"sure|indeed|of course|exactly|"
    r"agreed|probably|(?:most |very )?likely)"
)
_NO_ALONE = (
    r"(?:false|incorrect|untrue|wrong|absent|negative|none|nil|nothing|never|neither|unlikely|"
    r"not(?: (?:at all|really|true|correct|right|so|likely|any))?|"
    rf"(?:not|none|nothing|never)(?: (?:\w+ly|been|is|are|was|were))*(?: (?:{SEEN}|there)){_IN_THE_IMAGE})"
)
_LEADING = re.compile(
    rf"{_LEAD}(?:(?P<yes>{_YES_WORDS}\b|(?:{_YES_ALONE}){_END})"
    rf"|(?P<no>(?P<word>{_NO_WORDS})\b(?!-)|(?:{_NO_ALONE}){_END}))",
    re.IGNORECASE,
)
# What takes back the word before: "Yes. Wait, no."
_RETRACTION = re.compile(
    r"\b(?:wait|actually|correction|i mean|i meant|on second thought|scratch that)\b[^\w]*", re.IGNORECASE
)
_BELIEF = re.compile(
    r"\W*i (?P<no>(?:do not|don['’]?t) )?(?:think|believe|guess|suppose|hope) (?:so|(?P<not>not))\W*",
    re.IGNORECASE,
)
# A line of a form: "Pneumothorax: absent".
_FIELD = re.compile(rf"[\w\s,/()-]{{1,80}}[:=]\s*(?:(?P<yes>{_YES_ALONE})|{_NO_ALONE})\W*", re.IGNORECASE)
_LETTER = re.compile(r"\W*(?:(?P<yes>y)|n)\W*", re.IGNORECASE)
# Without any of these there is nothing to search a long text for.
_WORD = re.compile(rf"\b(?:{_YES_WORDS}|{_NO_WORDS}|true|false|correct|incorrect)\b", re.IGNORECASE)
# "It does.", "There isn't any."
_ELLIPSIS = re.compile(
    r"\W*(?:it|there|this|that|they|he|she) (?:is|are|was|were|does|do|did|has|have|can)"
    r"(?P<no>(?: not|n['’]?t)(?: any)?| none)?\W*",
    re.IGNORECASE,
)
# "No nodule", unlike "No, …" and "No it is …", is a statement.
_THING = re.compile(
    r"(?: one)?\s+(?!(?:it|this|that|there|these|those|they|the|not|because|since|he|she|we|i|you|as|but|"
    r"and|or)\b)\w",
    re.IGNORECASE,
)
_IDIOM = re.compile(r"\W+(?:doubt|question|wonder|problem|matter|reason)\b", re.IGNORECASE)
_PAIR = r"\W*\b(?:and/or|and|or|nor|versus|vs)?\b\W*"
_EITHER = re.compile(
    rf"\b(?:{_YES_WORDS}\b(?:\W*\b(?:and/or|and|or|nor|vs|versus)\b\W*|\s*/\s*){_NO_WORDS}"
    rf"|{_NO_WORDS}\b(?:\W*\b(?:and/or|and|or|nor|vs|versus)\b\W*|\s*/\s*){_YES_WORDS}"
    r"|(?:true (?:or|and) false|false (?:or|and) true|present or absent|absent or present|positive or "
    r"negative"
    r"|negative or positive))\b",
    re.IGNORECASE,
)
_BOTH = re.compile(
    rf"\W*(?:{_YES_WORDS}{_PAIR}{_NO_WORDS}|{_NO_WORDS}{_PAIR}{_YES_WORDS})\W*\Z", re.IGNORECASE
)
# The last word that stands on its own: ", no.", ": yes", "answer is no".
_STANDING = re.compile(
    r"(?:(?:^|[.,;:=!?\n(\[\"'*]|\s-)\s*(?:(?:so|then|therefore|hence|thus|and|but|i "
    r"say|ultimately|overall)[\s,]+)*"
    r"|\b(?:answer|conclusion|verdict|response) (?:is|was|would be|must be|should be)\W+(?:an? )?)"
    rf"(?:(?P<yes>{_YES_WORDS})|(?P<no>{_NO_WORDS})){_END}",
    re.IGNORECASE,
)
_NAMED_ANSWER = re.compile(
    rf"\b(?:final|correct|my|the) answer(?: to (?:the|this|your) question)?(?: is|\s*:)\W*(?:an? )?"
    rf"(?:(?P<yes>{_YES_WORDS}|true|correct)|(?P<no>{_NO_WORDS}|false|incorrect)){_END}",
    re.IGNORECASE,
)

_ZH = {name: "|".join(words) for name, words in load("chinese_answers").items()}
_ZH_YES_OR_NO = rf"(?:(?P<yes>{_ZH['yes']})|(?P<no>{_ZH['no']}))(?=\W|$)"
_ZH_ALONE = re.compile(rf"\W*(?:答案(?:应该|應該)?(?:是|为|為)?\W*)?{_ZH_YES_OR_NO}")
_ZH_STANDING = re.compile(rf"(?:^|[\s.,;:!?]|答案(?:是|为|為)){_ZH_YES_OR_NO}")
_ZH_OPEN, _ZH_UNDECIDED, _ZH_DENIES, _ZH_UNLIKELY, _ZH_ASSERTS, _ZH_CLAUSE, _ZH_FUNCTION = (
    re.compile(_ZH[name])
    for name in ("open", "undecided", "denies", "unlikely", "asserts", "clause_ends", "function_words")
)
_ZH_NO_ABNORMALITY = re.compile(r"(?:无|無|未见|未見|没有|沒有|未发现|未發現)(?:明显)?异常")


@lru_cache(maxsize=_KEPT)
def stated_polarity(answer: str) -> Polarity | None:
    """The yes or no that an answer commits itself to as a word of its own.

    Thought blocks do not count. The answer that is named as such decides ("The final answer is no"), else the
    leading word ("No. There is none."), else the last one that stands on its own ("There is no doubt: yes").
    "Yes or no", "yes and no" and the like commit to nothing, nor does a statement ("No nodule is seen"),
    which :func:`implied_polarity` reads beside its question.
    """
    text = same_characters(final_answer(answer))
    if has_han(text):
        return _chinese_stated(text)
    has_word = _WORD.search(text) is not None
    if has_word and (named := _last(_NAMED_ANSWER, text)) is not None:
        return named
    if has_word and _BOTH.match(text):
        return None
    for retraction in list(_RETRACTION.finditer(text))[-1:]:
        corrected = stated_polarity(text[retraction.end() :])
        if corrected is not None:
            return corrected
    if (belief := _BELIEF.fullmatch(text)) is not None:
        return "no" if belief["no"] or belief["not"] else "yes"
    if (field := _FIELD.fullmatch(text)) is not None:
        return "yes" if field["yes"] else "no"
    leading = _LEADING.match(text)
    if leading is not None and _is_own_word(text, leading):
        return "yes" if leading["yes"] else "no"
    if (letter := _LETTER.fullmatch(text)) is not None:
        return "yes" if letter["yes"] else "no"
    if (ellipsis := _ELLIPSIS.fullmatch(text)) is not None:
        return "no" if ellipsis["no"] else "yes"
    return _last(_STANDING, _EITHER.sub(" ", text)) if has_word else None


def polarity(answer: str) -> Polarity | None:
    """The yes or no that an answer states or begins with: "No nodule" is a no here, "Normal" is neither."""
    found = stated_polarity(answer)
    if found is not None:
        return found
    text = same_characters(final_answer(answer))
    if has_han(text):
        return "no" if _ZH_DENIES.match(text.lstrip()) else None
    leading = _LEADING.match(text)
    is_statement = (
        leading is not None
        and leading["word"] is not None
        and not _EITHER.match(text, leading.start("no"))
        and not _IDIOM.match(text, leading.end())
        and not _BOTH.match(text)
    )
    return "no" if is_statement else None


def is_open(answer: str) -> bool:
    """Whether an answer names yes and no and commits itself to neither."""
    text = same_characters(final_answer(answer))
    if has_han(text):
        return bool(_ZH_UNDECIDED.search(text) or _ZH_OPEN.search(text))
    return bool(_BOTH.match(text) or _EITHER.search(text)) and stated_polarity(answer) is None


def chinese_polarity(question: str, answer: str) -> Polarity | None:
    """The yes or no of a Chinese answer or statement; None if it is about something else."""
    text = same_characters(final_answer(answer))
    return _chinese_stated(text) or _chinese_statement(same_characters(question), text)


def _is_own_word(text: str, leading: re.Match[str]) -> bool:
    """Whether the leading yes or no is an answer, not half of "yes or no", nor the "no" of "no nodule"."""
    start = leading.start("yes") if leading["yes"] else leading.start("no")
    if _EITHER.match(text, start):
        return False
    return leading["word"] is None or _THING.match(text, leading.end()) is None


def _last(pattern: re.Pattern[str], text: str) -> Polarity | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    if found is None:
        return None
    return "yes" if found["yes"] else "no"


def _chinese_stated(text: str) -> Polarity | None:
    if _ZH_UNDECIDED.search(text):
        return None
    text = _ZH_OPEN.sub(" ", text)
    alone = _ZH_ALONE.match(text)
    if alone is not None:
        return "yes" if alone["yes"] else "no"
    return _last(_ZH_STANDING, text)


def _chinese_statement(question: str, text: str) -> Polarity | None:
    """What the clauses say that are about what was asked; of several the last counts."""
    if _ZH_UNDECIDED.search(text) or _ZH_OPEN.search(text):
        return None
    clauses = [clause for clause in _ZH_CLAUSE.split(text) if clause.strip()]
    if not has_han(question):
        # What was asked in another language cannot be compared.
        return _polarity_of_clause(clauses[-1], frozenset()) if clauses else None
    asked = _pieces(question)
    about = [clause for clause in clauses if any(piece in clause.casefold() for piece in asked)]
    if (
        not about
        and len(clauses) == 1
        and (not asked or not _ZH_FUNCTION.sub("", _ZH_DENIES.sub("", clauses[0])).strip())
    ):
        about = clauses
    return _polarity_of_clause(about[-1], asked) if about else None


def _polarity_of_clause(clause: str, asked: frozenset[str]) -> Polarity | None:
    if _ZH_UNLIKELY.search(clause):
        return "no"
    if "正常" in asked and _ZH_NO_ABNORMALITY.search(clause):
        return "yes"
    if _ZH_DENIES.search(clause):
        return "no"
    for piece in asked:
        before, found, _ = clause.casefold().partition(piece)
        if found and before.endswith(tuple("不没沒未无無非")):
            return "no"
    for wanted, other in (("正常", "异常"), ("异常", "正常")):
        if wanted in asked and other in clause and wanted not in clause:
            return "no"
    has_piece = any(piece in clause.casefold() for piece in asked)
    return "yes" if has_piece or _ZH_ASSERTS.search(clause) else None


@lru_cache(maxsize=_KEPT)
def _pieces(question: str) -> frozenset[str]:
    """The subject of a Chinese question: its Latin words, and pairs of its content characters."""
    rest = _ZH_FUNCTION.sub(" ", question)
    found = {word.casefold() for word in re.findall(r"[A-Za-z][A-Za-z0-9-]*", rest)}
    for run in re.findall(r"[\u3400-\u9fff]+", rest):
        found |= {run} if len(run) == 1 else {run[place : place + 2] for place in range(len(run) - 1)}
    return frozenset(found)
