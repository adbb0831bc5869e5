"""Turns present into absent and absent into present, one fact at a time.

In a list of negatives ("no effusion, consolidation or pneumothorax") one item becomes a positive statement and the others stay
denied. What the grammar here does not know is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.edits import Edit, capitalise, is_bare, is_plural, like, uncapitalise, with_article
from mmedpo_ray.curate.terms import mentions

_POLARITY = re.compile(r"^(\W*)(yes|no)\b(.*)$", re.IGNORECASE | re.DOTALL)
_THERE_IS = re.compile(r"\b(there (?:is|are)) (?!no\b|not\b)(?:an? )?", re.IGNORECASE)
_THERE_IS_NO = re.compile(r"\b(there (?:is|are)) no ", re.IGNORECASE)
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|does|do|has|have|appears?|shows?)\b(?! not\b)(?: no\b)?", re.IGNORECASE
)
# A denial as it stands at the beginning of a sentence, with its list, up to the sentence's end.
_DENIAL = re.compile(r"(^|[.;:]\s+)No ([^.;:]+?)(?=[.;]|$)")
_THERE_IS_NO_LIST = re.compile(r"\b(There (?:is|are)) no ([^.;:]+?)(?=[.;]|$)", re.IGNORECASE)
_EVIDENCE = re.compile(r"^(?:\w+ )?(?:evidence|signs?|suggestion|findings? suggestive) of ", re.IGNORECASE)
_SEEN = (
    r"(?:seen|identified|present|noted|visuali[sz]ed|demonstrated|evident|visible|appreciated|detected|found)"
)
_PREDICATE = re.compile(rf" (?:is|are|was|were) (?:\w+ )?{_SEEN}\b.*$", re.IGNORECASE)
_IS_SEEN = re.compile(rf"\b(is|are|was|were) (?!not\b)(?=(?:again |also )?{_SEEN}\b)", re.IGNORECASE)
_IS_NOT_SEEN = re.compile(rf"\b(is|are|was|were) not (?={_SEEN}\b)", re.IGNORECASE)
_WITHOUT = re.compile(r"\bwithout (?!contrast\b)(?=[^,.;:]+)", re.IGNORECASE)
_NEGATIVE_FOR = re.compile(r"\b(negative)(?= for )", re.IGNORECASE)
_ITEMS = re.compile(r",? or |, (?:and )?| nor ", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|shows?|demonstrates?|appears?|remains?|may|can|could|should|reflects?|"
    r"suggests?|represents?|likely|noted|seen|identified|removed|terminates?|measures?|consistent|compatible|due|"
    r"removal|placement|change|resolution|history|concern|evaluate)\b",
    re.IGNORECASE,
)
_OVERALL = re.compile(
    r"\b(?:abnormality|process|disease|finding)(?:s|ies)?\b|\babnormalities\b", re.IGNORECASE
)
_WHOLE_NORMAL_WORDS = 4

_HEART = (
    r"\b((?:the )?(?:heart(?: size)?|cardiac (?:size|silhouette|shadow)|cardio-?mediastinal (?:silhouette|contours?))"
    r"(?: and (?:the )?mediastin\w+(?: contours?| silhouette)?)? (?:is|are|appears?|remains?)) "
)
_STATEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(the )(?:heart|cardiac) size is normal\b", re.IGNORECASE), r"\1heart is enlarged"),
    (
        re.compile(r"\b(the )heart is (?:normal|of normal size|normal in size)\b", re.IGNORECASE),
        r"\1heart is enlarged",
    ),
    (re.compile(r"\b(the )heart is enlarged\b", re.IGNORECASE), r"\1heart size is normal"),
)
# Wordings beyond these, each keeping its subject.
_HEART_STATEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            _HEART
            + r"(?:normal(?: in (?:size|contour|configuration))?(?: and (?:contour|configuration))?|of normal size|"
            r"within normal limits(?: in size)?|unremarkable|not enlarged|top[- ]normal(?: in size)?)\b",
            re.IGNORECASE,
        ),
        r"\1 enlarged",
    ),
    (
        re.compile(_HEART + r"(?:(?:mildly|moderately|severely|markedly) )?enlarged\b", re.IGNORECASE),
        r"\1 normal in size",
    ),
)
_CLEAR_LUNGS = re.compile(
    r"\b(lungs(?: fields)?) (?:are|appear|remain) (?:\w+ )?clear(?: bilaterally)?\b", re.IGNORECASE
)


# ---------------------------------------------------------------------- yes and no


def polarity_edits(answer: str) -> Iterator[Edit]:
    """ "Yes, there is …" → "No, there is no …", and back."""
    if lexicon.polarity(answer) is None:
        return
    match = _POLARITY.match(answer)
    if match is None:
        return
    lead, word, rest = match.groups()
    if not rest.strip(" .") or rest.lstrip().startswith((",", ".", ";", ":", "-", "–")):
        other = like(word, "no" if word.lower() == "yes" else "yes")
        yield Edit(lead + other + _negate(rest, deny=word.lower() == "yes"), "polarity")


def _negate(statement: str, *, deny: bool) -> str:
    """Turns the statement after "Yes," or "No," round; the bare polarity where its grammar is not known."""
    if not statement.strip(" ."):
        return statement
    if deny:
        changed, count = _THERE_IS.subn(r"\1 no ", statement, count=1)
        if not count:
            changed, count = _AUXILIARY.subn(r"\1 not", statement, count=1)
            if count and re.match(r".*\b(?:do|does|has|have|appears?|shows?) not\b", changed, re.I | re.S):
                count = 0
    else:
        changed, count = _THERE_IS_NO.subn(r"\1 ", statement, count=1)
        if not count:
            changed, count = re.subn(
                r"\b(is|are|was|were) not\b", r"\1", statement, count=1, flags=re.IGNORECASE
            )
    if count:
        return changed
    return "." if statement.rstrip().endswith(".") else ""


# ---------------------------------------------------------------------- present and absent


def negation_edits(answer: str) -> Iterator[Edit]:
    """ "There is a nodule" → "There is no nodule"; "No effusion or nodule" → "There is an effusion. No nodule"."""
    for match in _THERE_IS.finditer(answer):
        yield Edit(answer[: match.start()] + match.group(1) + " no " + answer[match.end() :], "negation")
    for match in _THERE_IS_NO_LIST.finditer(answer):
        for claim, rest in _claims(match.group(2)):
            said = f"{_there_is(match.group(1), claim)}{' but no ' + rest if rest else ''}"
            yield Edit(answer[: match.start()] + said + answer[match.end() :], "negation")
    if len(lexicon.words(answer)) <= _WHOLE_NORMAL_WORDS:
        return
    for match in _DENIAL.finditer(answer):
        lead, listed = match.groups()
        predicate = _PREDICATE.search(listed)
        tail = predicate.group(0) if predicate else ""
        for claim, rest in _claims(listed.removesuffix(tail)):
            said = capitalise(claim) + tail if tail else _there_is("There is", claim)
            more = f". No {rest}{tail}" if rest else ""
            yield Edit(answer[: match.start()] + lead + said + more + answer[match.end() :], "negation")
    yield from _sentence_edits(answer)


def _claims(listed: str) -> Iterator[tuple[str, str]]:
    """Each item of a denied list as a claim with its article, and what stays denied."""
    evidence = _EVIDENCE.match(listed)
    prefix = evidence.group(0) if evidence else ""
    items = [item.strip() for item in _ITEMS.split(listed.removeprefix(prefix))]
    if not all(items):
        return
    for index, item in enumerate(items):
        others = items[:index] + items[index + 1 :]
        rest = prefix + (
            ", ".join(others[:-1]) + ("," if len(others) > 2 else "") + " or " if others[1:] else ""
        )
        named = [mention for mention in mentions(item) if mention.concept.axis == "finding"]
        if len(named) == 1:
            bare = is_bare(item[named[0].start : named[0].end], named[0])
        elif not named and _OVERALL.search(item):
            bare = item.endswith(("s", "disease"))
        else:
            continue
        claim = prefix + item if prefix else with_article(item, bare=bare)
        yield claim, rest + others[-1] if others else ""


def _there_is(start: str, claim: str) -> str:
    """ "There is" or "There are", by the claim."""
    named = mentions(claim)
    many = bool(named) and is_plural(claim[named[-1].start : named[-1].end], named[-1])
    verb = "are" if many and not _EVIDENCE.match(claim) else "is"
    return f"{start.rsplit(' ', 1)[0]} {verb} {claim}"


def _sentence_edits(answer: str) -> Iterator[Edit]:
    """Sentences with a single finding that neither begin with "No" nor with "There is"."""
    spans = [(start, end) for start, end in lexicon.sentence_spans(answer) if answer[start:end].strip()]
    for start, end in spans:
        sentence = answer[start:end]
        found = sum(mention.concept.axis == "finding" for mention in mentions(sentence))
        if found > 1 or (not found and not _OVERALL.search(sentence)):
            continue
        for changed in _turned(sentence, alone=len(spans) == 1):
            yield Edit(answer[:start] + changed + answer[end:], "negation")


def _turned(sentence: str, *, alone: bool) -> Iterator[str]:
    if not lexicon.is_negated(sentence):
        if _IS_SEEN.search(sentence):
            yield _IS_SEEN.sub(r"\1 not ", sentence, count=1)
        elif not alone and not _VERB.search(sentence):
            lead = sentence[: len(sentence) - len(sentence.lstrip(" \n\t0123456789.)-"))]
            yield f"{lead}No {uncapitalise(sentence[len(lead) :])}"
        return
    for pattern, replacement in ((_IS_NOT_SEEN, r"\1 "), (_WITHOUT, "with ")):
        if len(pattern.findall(sentence)) == 1:
            yield pattern.sub(replacement, sentence)
    match = _NEGATIVE_FOR.search(sentence)
    if match:
        yield sentence[: match.start()] + like(match.group(1), "positive") + sentence[match.end() :]


# ---------------------------------------------------------------------- overall statements


def statement_edits(answer: str) -> Iterator[Edit]:
    """ "The heart size is normal" → "The heart is enlarged", and back."""
    known = False
    for pattern, replacement in _STATEMENTS:
        changed, count = pattern.subn(replacement, answer, count=1)
        if count:
            known = True
            yield Edit(changed, "finding")
    if known:
        return
    for pattern, replacement in _HEART_STATEMENTS:
        changed, count = pattern.subn(replacement, answer, count=1)
        if count:
            yield Edit(changed, "finding")


def clear_lung_edits(answer: str, findings: list[tuple[str, bool]]) -> Iterator[Edit]:
    """ "The lungs are clear" → "The lungs show a nodule"; for reports that say little else.

    Args:
        answer: reference answer.
        findings: names of lung findings to choose from, and whether each is a mass noun.
    """
    match = _CLEAR_LUNGS.search(answer)
    if match is None:
        return
    for name, bare in findings:
        said = f"{match.group(1)} show {with_article(name, bare=bare)}"
        yield Edit(answer[: match.start()] + said + answer[match.end() :], "finding")
