"""Edits of statements about the heart, the lungs or the whole image: "normal", "clear", "no abnormality"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.edit import NEAR, Edit, capitalise, with_article
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS
from mmedpo_ray.radiology.word_lists import load

# "Pathology", "normal": an answer this short is nothing else.
WHOLE_NORMAL_WORDS = 4

_HEART = (
    r"\b((?:the )?(?:heart(?: size)?|cardiac (?:size|silhouette|shadow)|cardio-?mediastinal "
    r"(?:silhouette|contours?)))"
    r"((?: and (?:the )?mediastin\w+(?: contours?| silhouettes?)?)?)( (?:is|are|appears?|remains?))? "
)
# The usual sentences of reports, turned into one another: unusual words would give the rejected side away.
_USUAL: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(the )(?:heart|cardiac) size is normal\b", re.IGNORECASE), r"\1heart is enlarged"),
    (
        re.compile(r"\b(the )heart is (?:of normal size|normal in size|normal)\b(?! in\b)", re.IGNORECASE),
        r"\1heart is enlarged",
    ),
    (re.compile(r"\b(the )heart is enlarged\b", re.IGNORECASE), r"\1heart size is normal"),
)
# Other wordings keep their subject.
_HEART_IS_NORMAL = re.compile(
    _HEART + r"(?:of normal size|within normal limits(?: in size)?|not enlarged|top[- ]normal(?: in size)?|"
    r"(?:normal|unremarkable)(?: in (?:size|contour|configuration))?(?: and (?:contour|configuration))?)\b",
    re.IGNORECASE,
)
_HEART_IS_ENLARGED = re.compile(
    _HEART + r"(?:(?:mildly|moderately|severely|markedly) )?enlarged\b", re.IGNORECASE
)
# "The lungs are within normal limits": the whole predicate is turned, its words make no other sense.
_WITHIN_NORMAL_LIMITS = re.compile(r"\bwithin normal limits\b", re.IGNORECASE)
_BE = re.compile(r"\b(?:is|are|was|were|appears?|remains?) (?:all |grossly |again )?$", re.IGNORECASE)
CLEAR_LUNGS = re.compile(
    r"\b(lungs(?: fields)?) (?:(?:are|appear|remain) )(?:\w+ )?clear(?: bilaterally)?\b", re.IGNORECASE
)
_EXPANDED_LUNGS = re.compile(
    r"\b(lungs are (?:\w+ )?(?:well[- ])?(?:expanded|aerated|inflated)) and clear\b", re.IGNORECASE
)
_NO_ABNORMALITY = re.compile(
    r"(\W*)no (?!other\b|further\b|new\b)(?:evidence of )?(.+)$", re.IGNORECASE | re.DOTALL
)
_REGIONS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (region, re.compile(words, re.IGNORECASE))
    for region, words in (
        ("chest", r"cardio|cardiac|pulmon|thorac|lung|chest|\bcxr\b"),
        ("brain", r"crani|brain|head|cerebr|neuro"),
        ("abdomen", r"abdom|pelvi|bowel|hepat|liver|renal|kidney"),
        ("bone", r"osse|bon[ye]|skelet|fractur|spine|vertebr"),
    )
)
_ACUTE = frozenset(load("edits")["acute"])


# ---------------------------------------------------------------------- heart and lungs


def statement_edits(answer: str) -> Iterator[Edit]:
    """ "The heart size is normal" → "The heart is enlarged", and back."""
    low = answer.lower()
    if "heart" not in low and "cardi" not in low and "within normal" not in low:
        return
    usual = [pattern.sub(said, answer, count=1) for pattern, said in _USUAL if pattern.search(answer)]
    if usual:
        yield from (Edit(changed, "finding") for changed in usual)
        return
    normal = _HEART_IS_NORMAL.search(answer)
    if normal:
        yield Edit(answer[: normal.start()] + _heart_enlarged(normal) + answer[normal.end() :], "finding")
    enlarged = _HEART_IS_ENLARGED.search(answer)
    if enlarged and not enlarged.group(2):
        subject, verb = enlarged.group(1), enlarged.group(3) or ""
        size = "normal" if subject.lower().endswith("size") else "normal in size"
        said = f"{subject}{verb} {size}"
        yield Edit(answer[: enlarged.start()] + said + answer[enlarged.end() :], "finding")
    for match in _WITHIN_NORMAL_LIMITS.finditer(answer):
        if _BE.search(answer, max(0, match.start() - NEAR), match.start()) and not (
            normal and normal.start() < match.start() < normal.end()
        ):
            yield Edit(f"{answer[: match.start()]}abnormal{answer[match.end() :]}", "state")


def _heart_enlarged(match: re.Match[str]) -> str:
    """The heart alone enlarged: "Heart size and … are normal" → "Heart size is enlarged and … are normal"."""
    subject, beside, verb = match.group(1), match.group(2), match.group(3)
    if not beside or not verb:
        return f"{subject}{beside}{verb or ''} enlarged"
    one = {"are": "is", "appear": "appears", "remain": "remains"}.get(verb.strip().lower(), verb.strip())
    many = beside.endswith("s")
    other = {"is": "are", "appears": "appear", "remains": "remain"}[one] if many else one
    words = match.group(0)[match.end(3) - match.start() :]
    return f"{subject} {one} enlarged{beside} {other}{words}"


def clear_lung_edits(answer: str, findings: list[tuple[str, bool]]) -> Iterator[Edit]:
    """ "The lungs are clear" → "The lungs show a nodule"; for reports that say little else.

    Args:
        answer: reference answer.
        findings: names of lung findings to choose from, and whether each is a mass noun.
    """
    match = CLEAR_LUNGS.search(answer) or _EXPANDED_LUNGS.search(answer)
    if match is None:
        return
    verb = "show" if match.re is CLEAR_LUNGS else "with"
    for name, bare in findings:
        said = f"{match.group(1)} {verb} {with_article(name, bare=bare)}"
        yield Edit(answer[: match.start()] + said + answer[match.end() :], "finding")


# ---------------------------------------------------------------------- the whole image


def abnormality_edits(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    """ "No abnormality" → a finding; "No acute intracranial abnormality" → "Acute infarct"."""
    said = lexicon.facts(answer)
    if len(said) != 1 or said[0].finding != "abnormality" or said[0].present:
        return
    count = len(lexicon.words(answer))
    if count > WHOLE_NORMAL_WORDS or lexicon.implied_polarity(question, "yes") is None:
        return
    denied = _NO_ABNORMALITY.match(answer)
    is_acute = denied is not None and "acute" in denied.group(2).lower().split()
    if denied and count > WHOLE_NORMAL_WORDS - 2:
        yield Edit(denied.group(1) + capitalise(denied.group(2)), "finding")
    if denied is None and count > WHOLE_NORMAL_WORDS - 2:
        # "Normal chest X-ray": its own words can be turned.
        return
    end = "." if answer.endswith(".") else ""
    for name in _findings_of(_region(answer) or _region(question), vocabulary, is_acute):
        yield Edit(capitalise(f"acute {name}" if is_acute else name) + end, "finding")


def _region(text: str) -> str | None:
    """The part of the body that a text is about."""
    return next((region for region, words in _REGIONS if words.search(text)), None)


def _findings_of(region: str | None, vocabulary: frozenset[str], is_acute: bool) -> list[str]:
    """Names of findings of a part of the body, of those that the data set talks about where there are any."""
    findings = [
        concept for concept in CONCEPTS.values() if concept.axis == "finding" and concept.group != "device"
    ]
    if region == "bone":
        fitting = [concept.name for concept in findings if concept.name == "fracture"]
    elif region is None:
        everything = vocabulary >= CONCEPTS.keys()
        fitting = [concept.name for concept in findings if not everything or concept.group == "general"]
    else:
        fitting = [concept.name for concept in findings if concept.group == region]
    if is_acute:
        fitting = [name for name in fitting if name in _ACUTE]
    return [name for name in fitting if name in vocabulary] or (fitting if region else [])
