"""Turns present into absent and absent into present, one fact at a time.

In a list of negatives ("no effusion, consolidation or pneumothorax") one item becomes a positive statement and the others stay
denied. What the grammar here does not know is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.edit import (
    NEAR,
    Edit,
    capitalise,
    is_bare,
    is_plural,
    like,
    uncapitalise,
    with_article,
)
from mmedpo_ray.radiology.edits.normality import CLEAR_LUNGS, WHOLE_NORMAL_WORDS
from mmedpo_ray.radiology.lexicon.vocabulary import Mention, mentions
from mmedpo_ray.radiology.word_lists import SEEN

_DEGREE = r"(?:mild|mildly|moderate|moderately|severe|severely|minimal|slight|trace|marked|massive|extensive)"
# What a denial leaves out: how sure, how many, how large, since when. "There is no likely a small effusion" says nothing.
_UNDENIED = (
    r"(?:(?:likely|probably|probable|possibly|possible|presumably|suspected|several|multiple|many|numerous|innumerable|scattered|"
    r"some|a few|one|two|three|four|five|an?|stable|unchanged|persistent|" + _DEGREE + r"|"
    r"\d+(?:\.\d+)?(?: ?[x×] ?\d+(?:\.\d+)?)*[ -]?[mc]m)(?:,? |(?<=,)))*"
)
THERE_IS = re.compile(
    r"\b(there (?:is|are)) (?!(?:no|not|neither|only|at|about|more|less)\b)(?:((?:now|again|also|currently) )|(still ))?"
    + _UNDENIED,
    re.IGNORECASE,
)
_ASSERTED = re.compile(_UNDENIED, re.IGNORECASE)
# "There is an opacity, suggestive of pneumonia" is not turned round by a word at its beginning.
_EXPLAINED = re.compile(
    r"\b(?:suggest\w*|consistent|compatible|represent\w*|reflect\w*|concerning|worrisome|may|could|which|without|but)\b",
    re.IGNORECASE,
)
_NO_LONGER_A = re.compile(r"\b(there (?:is|are)) no longer (?=an? )", re.IGNORECASE)
THERE_IS_NO = re.compile(r"\b(there (?:is|are)) no ", re.IGNORECASE)
# Words up to the end of a sentence; a decimal point is none.
_LISTED = r"((?:[^.;:]|\.(?=\d))+?)(?=\.(?!\d)|[;:]|$)"
# A denial as it stands at the beginning of a sentence, with its list, up to the sentence's end.
_DENIAL = re.compile(rf"(^|[.;:]\s+)(No|Neither) (?!longer\b){_LISTED}", re.IGNORECASE)
_THERE_IS_NO_LIST = re.compile(
    rf"\b(there (?:is|are)(?: again| also| now| still| currently)?) (?:no|neither) (?!longer\b){_LISTED}",
    re.IGNORECASE,
)
_WITHOUT_LIST = re.compile(rf"\b(without|with no) (?!contrast\b){_LISTED}", re.IGNORECASE)
_SHOWS_NO_LIST = re.compile(rf"\b((?:shows?|demonstrates?|reveals?|has|have)) no {_LISTED}", re.IGNORECASE)
_FREE_OF_LIST = re.compile(rf"\b(is|are) (?:\w+ )?free of {_LISTED}", re.IGNORECASE)
_NEGATIVE_FOR_LIST = re.compile(rf"\b(negative) for {_LISTED}", re.IGNORECASE)
_EVIDENCE = re.compile(
    r"^(?:\w+ )?(?:evidence|signs?|suggestion|findings? suggestive|indication) (?:of|for|to suggest) (?:an? )?",
    re.IGNORECASE,
)
_PREDICATE = re.compile(rf" (?:is|are|was|were) (?:\w+ )?{SEEN}\b.*$", re.IGNORECASE)
_IS_SEEN = re.compile(rf"\b(is|are|was|were) (?!not\b)(?=(?:again |also )?{SEEN}\b)", re.IGNORECASE)
_IS_NOT_SEEN = re.compile(rf"\b(is|are|was|were) not (?={SEEN}\b)", re.IGNORECASE)
_NO_LONGER_SEEN = re.compile(rf"\b(is|are|was|were) no longer (?={SEEN}\b)", re.IGNORECASE)
_IS_ABSENT = re.compile(r"\b(is|are|was|were) absent\b", re.IGNORECASE)
_RESOLVED = re.compile(r"\b(has|have) (?:\w+ )?resolved\b", re.IGNORECASE)
_ABSENCE_OF = re.compile(r"\b(absence)(?= of )", re.IGNORECASE)
# What separates the items of a denied list; an item may repeat the denial.
_SEPARATOR = re.compile(r"(?:,? (?:or|nor|and) (?=\S)|, ?)(?:(?:no|without) )?", re.IGNORECASE)
_PLAIN_AND = re.compile(r" and ", re.IGNORECASE)
# Where a list of negatives gives way to another statement.
_OTHER_STATEMENT = re.compile(
    r"(?:,? but\b|,? nor (?=(?:is|are|does|do)\b)|,? (?:and|while|although|though|however) "
    r"(?=(?:[\w-]+ ){1,6}?(?:is|are|was|were|has|have|remains?|appears?|shows?|demonstrates?)\b))",
    re.IGNORECASE,
)
# "No A, but there is a B": without its denial the sentence has nothing for "but" to oppose.
_BUT = re.compile(r",? but\b", re.IGNORECASE)
_AFTER_BUT = re.compile(r"\b(?:but|however|although|though),? $", re.IGNORECASE)
# An item with one of these is no name of a thing, or denies once more.
_STATEMENT = re.compile(
    r"\b(?:is|are|was|were|has|have|had|can|could|may|be|been|there|no|not|nor|neither|but|which|that|if|when|while|"
    r"although|though|however|without|than|as|other|longer|further|more|such|any|either)\b",
    re.IGNORECASE,
)
_PLACED = re.compile(
    r"\b(?:in|within|of|at|involving|throughout|on|along|about|to|from|near|under)\b", re.IGNORECASE
)
# "mediastinal or hilar lymphadenopathy": the first item is but an adjective.
_ADJECTIVE = re.compile(
    r"(?:\w{2,}al|\w{3,}ar|\w{2,}ic|\w{2,}ary|\w{2,}ous|left|right|upper|lower|acute|chronic|large|small)$",
    re.IGNORECASE,
)
# What is no description of a finding: "in the mass", "causing obstruction".
_NO_DESCRIPTION = re.compile(
    r"\b(?:in|on|at|of|with|by|for|from|to|as|because|the|this|that|these|those|its?|both|some|other|than)\b|^\W*\w{3,}ing\b",
    re.IGNORECASE,
)
_SOMEONE = re.compile(
    r"\b(?:m[ae]n|wom[ae]n|patients?|females?|males?|child|infant|boy|girl|his|her|he|she)\b", re.IGNORECASE
)
_CAPITAL_WORD = re.compile(r"\b[A-Z]\w*")
# "The lungs are clear" leaves room for what lies outside of them.
_OUTSIDE_THE_LUNGS = frozenset({"pleural effusion", "pneumothorax", "pneumoperitoneum", "rib fracture"})
_CLEAR = re.compile(r"\b(?:clear|normal|unremarkable)\b", re.IGNORECASE)
_ENDS_IN_BE = re.compile(r"\b(is|are|was|were|remains?|appears?) $", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|shows?|demonstrates?|appears?|remains?|may|can|could|should|reflects?|"
    r"suggests?|represents?|likely|noted|seen|identified|removed|terminates?|measures?|consistent|compatible|due|"
    r"removal|placement|change|resolution|history|concern|evaluate)\b",
    re.IGNORECASE,
)
_OVERALL = re.compile(
    r"\b(?:abnormality|process|disease|finding)(?:s|ies)?\b|\babnormalities\b", re.IGNORECASE
)
_OVERALL_IN_PLURAL = re.compile(r"(?:abnormalities|processes|findings|diseases)\b", re.IGNORECASE)
_OVERALL_UNCOUNTED = re.compile(r"disease\b", re.IGNORECASE)


def negation_edits(answer: str) -> Iterator[Edit]:
    """ "There is a nodule" → "There is no nodule"; "No effusion or nodule" → "There is an effusion. No nodule"."""
    low = answer.lower()
    spans = lexicon.sentence_spans(answer)
    if "there " in low:
        for changed in _there_is_edits(answer, spans):
            yield Edit(changed, "negation")
    if "no " in low or "neither " in low:
        is_short = len(lexicon.words(answer)) <= WHOLE_NORMAL_WORDS
        for match in _DENIAL.finditer(answer):
            for changed in _denial_turned(match, findings_only=is_short):
                yield Edit(answer[: match.start()] + changed + answer[match.end() :], "negation")
    yield from _sentence_edits(answer, spans)


def _there_is_edits(answer: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
    for match in THERE_IS.finditer(answer):
        end = next((end for _, end in spans if end >= match.end()), len(answer))
        # "but" ends a span and still belongs to the sentence.
        if _EXPLAINED.search(answer, match.end(), end + len("but ")) or not answer[match.end() : end].strip():
            continue
        if _AFTER_BUT.search(answer, max(0, match.start() - NEAR), match.start()):
            continue
        start, adverb, still = match.group(1), match.group(2) or "", match.group(3)
        denial = "no longer any " if still else adverb + "no "
        yield f"{answer[: match.start()]}{start} {denial}{answer[match.end() :]}"
    for match in _NO_LONGER_A.finditer(answer):
        yield f"{answer[: match.start()]}{match.group(1)} still {answer[match.end() :]}"
    for match in _THERE_IS_NO_LIST.finditer(answer):
        listed, other = _without_other_statement(match.group(2))
        if _BUT.match(other):
            continue
        for claim, rest in _claims(listed):
            said = f"{_there_is(match.group(1), claim)}{' but no ' + rest if rest else ''}"
            yield answer[: match.start()] + said + other + answer[match.end() :]


def _denial_turned(match: re.Match[str], *, findings_only: bool) -> Iterator[str]:
    """ "No A or B is seen" → "An A is seen. No B is seen"."""
    lead, word, listed = match.groups()
    listed, other = _without_other_statement(listed)
    predicate = _PREDICATE.search(listed)
    tail = predicate.group(0) if predicate else ""
    is_capital = word[0].isupper()
    for claim, rest in _claims(listed.removesuffix(tail)):
        if (findings_only and not _findings(claim)) or (_BUT.match(other) and not rest):
            continue
        said = claim + _agreeing(tail, claim) if tail else _there_is("there is", claim)
        more = f"{'. No' if is_capital else ', no'} {rest}{_agreeing(tail, rest)}" if rest else ""
        said = capitalise(said) if is_capital else said
        yield lead + said + more + other


def _without_other_statement(listed: str) -> tuple[str, str]:
    """A list of negatives, and what its sentence states behind it."""
    other = _OTHER_STATEMENT.search(listed)
    return (listed[: other.start()], listed[other.start() :]) if other else (listed, "")


def _claims(listed: str) -> Iterator[tuple[str, str]]:
    """Each item of a denied list as a claim with its article, and what stays denied."""
    evidence = _EVIDENCE.match(listed)
    prefix = evidence.group(0) if evidence else ""
    items = _items(listed.removeprefix(prefix))
    for index, item in enumerate(items):
        others = items[:index] + items[index + 1 :]
        named = _findings(item)
        if len(named) == 1:
            bare = is_bare(item[named[0].start : named[0].end], named[0])
        elif not named and _OVERALL.search(item):
            bare = bool(_OVERALL_IN_PLURAL.search(item) or _OVERALL_UNCOUNTED.search(item))
        else:
            continue
        if _PLAIN_AND.search(item) and not named:
            continue
        if not _PLACED.search(item):
            # "mediastinal or hilar lymphadenopathy": both are denied, so both are claimed.
            item = item.replace(" or ", " and ")
        claim = prefix + item if prefix else with_article(item, bare=bare)
        yield claim, prefix + _listed(others) if others else ""


def _listed(items: list[str]) -> str:
    comma = "," if len(items) > 2 else ""
    return f"{', '.join(items[:-1])}{comma} or {items[-1]}" if items[1:] else items[0]


def _items(listed: str) -> list[str]:
    """The things that a denied list names; empty where its grammar is not known."""
    items: list[str] = []
    start = 0
    ends = [match.span() for match in _SEPARATOR.finditer(listed)] + [(len(listed), len(listed))]
    joint = ""
    for end, following in ends:
        item = _EVIDENCE.sub("", listed[start:end]) if items else listed[start:end]
        if joint and _belongs_to_the_last(items[-1], item, joint):
            items[-1] += joint + item
        else:
            items.append(item)
        joint, start = listed[end:following], following
    if any(not item.strip() or item != item.strip() or _STATEMENT.search(item) for item in items):
        return []
    placed = any(_PLACED.search(item) for item in items[:-1])
    if placed and not all(_findings(item) for item in items):
        return []
    return items


def _belongs_to_the_last(last: str, item: str, joint: str) -> bool:
    """Whether an item goes on with the one before it instead of naming another thing."""
    named = bool(_findings(item))
    if not _findings(last) and _ADJECTIVE.search(last) and named:
        return True
    if named or _OVERALL.search(item):
        return False
    return bool(_PLAIN_AND.fullmatch(joint)) or bool(_PLACED.search(last) and mentions(item))


def _findings(text: str) -> list[Mention]:
    return [mention for mention in mentions(text) if mention.concept.axis == "finding"]


def _is_many(claim: str) -> bool:
    """Whether a claim stands in the plural."""
    if _EVIDENCE.match(claim):
        return False
    named = _findings(claim)
    if named:
        return is_plural(claim[named[-1].start : named[-1].end], named[-1])
    return _OVERALL_IN_PLURAL.search(claim) is not None


def _there_is(start: str, claim: str) -> str:
    """ "There is" or "There are", by the claim."""
    there, _, adverb = start.split(" ", 2) if start.count(" ") > 1 else (*start.split(" "), "")
    return f"{there} {'are' if _is_many(claim) else 'is'} {adverb + ' ' if adverb else ''}{claim}"


def _agreeing(tail: str, claim: str) -> str:
    """ " is seen" or " are seen", by the claim."""
    many = _is_many(claim)
    numbers = {"is": "are", "was": "were"} if many else {"are": "is", "were": "was"}
    return re.sub(r"^ (\w+)", lambda verb: f" {numbers.get(verb.group(1), verb.group(1))}", tail)


def _sentence_edits(answer: str, spans: Sequence[tuple[int, int]]) -> Iterator[Edit]:
    """Sentences that neither begin with "No" nor with "There is"."""
    spans = [(start, end) for start, end in spans if answer[start:end].strip()]
    named = [mention.start for mention in _findings(answer)]
    for start, end in spans:
        sentence = answer[start:end]
        found = sum(start <= place < end for place in named)
        if not found and not _OVERALL.search(sentence):
            continue
        for changed in _turned(sentence, alone=len(spans) == 1, found=found):
            yield Edit(answer[:start] + changed + answer[end:], "negation")


def _turned(sentence: str, *, alone: bool, found: int) -> Iterator[str]:
    if not lexicon.is_negated(sentence):
        seen = _IS_SEEN.search(sentence)
        if found > 1:
            return
        if seen:
            if not _EXPLAINED.search(sentence) and " with " not in sentence[seen.end() :]:
                yield _IS_SEEN.sub(r"\1 not ", sentence, count=1)
        elif not alone and not _VERB.search(sentence):
            lead = sentence[: len(sentence) - len(sentence.lstrip(" \n\t0123456789.)-"))]
            said = uncapitalise(sentence[len(lead) :])
            yield f"{lead}No {said[_asserted_end(said) :]}"
        return
    yield from _lists_turned(sentence)
    if found > 1:
        return
    for pattern, replacement in (
        (_IS_NOT_SEEN, r"\1 "),
        (_NO_LONGER_SEEN, r"\1 still "),
        (_IS_ABSENT, r"\1 present"),
    ):
        if len(pattern.findall(sentence)) == 1:
            yield pattern.sub(replacement, sentence)
    resolved = _RESOLVED.search(sentence)
    if resolved:
        persists = "persists" if resolved.group(1).lower() == "has" else "persist"
        yield sentence[: resolved.start()] + persists + sentence[resolved.end() :]
    absence = _ABSENCE_OF.search(sentence)
    if absence:
        yield sentence[: absence.start()] + like(absence.group(1), "presence") + sentence[absence.end() :]


def bare_denial_edits(answer: str) -> Iterator[Edit]:
    """ "Multiple rib fractures" → "No rib fractures": an answer that names findings and says nothing else."""
    spans = [span for span in lexicon.sentence_spans(answer) if answer[slice(*span)].strip()]
    named = _findings(answer)
    if len(spans) != 1 or lexicon.is_negated(answer) or not named or _VERB.search(answer):
        return
    if _NO_DESCRIPTION.search(answer, 0, named[0].start) or _SOMEONE.search(answer):
        return
    said = answer.strip()
    said = said if _CAPITAL_WORD.search(said, 1) else uncapitalise(said)
    denied = said[_asserted_end(said) :].replace(" and ", " or ")
    yield Edit(like(answer.strip()[0], "no") + " " + denied, "negation")


def _asserted_end(said: str) -> int:
    match = _ASSERTED.match(said)
    return match.end() if match else 0


def _lists_turned(sentence: str) -> Iterator[str]:
    """Lists of negatives inside a sentence: "without A or B", "show no A", "free of A", "negative for A"."""
    low = sentence.lower()
    for words, pattern, turned in (
        (("without ", "with no "), _WITHOUT_LIST, _with),
        ((" no ",), _SHOWS_NO_LIST, _shows),
        ((" free of ",), _FREE_OF_LIST, _shows_instead),
        (("negative for ",), _NEGATIVE_FOR_LIST, _positive_for),
    ):
        match = pattern.search(sentence) if any(word in low for word in words) else None
        if match is None:
            continue
        before, after = sentence[: match.start()], sentence[match.end() :]
        listed, other = _without_other_statement(match.group(2))
        if _BUT.match(other):
            continue
        predicate = _PREDICATE.search(listed)
        tail = predicate.group(0) if predicate else ""
        for claim, rest in _claims(listed.removesuffix(tail)):
            changed = turned(before, match.group(1), claim, rest)
            if changed is not None:
                yield changed + tail + other + after


def _with(before: str, word: str, claim: str, rest: str) -> str | None:
    be = _ENDS_IN_BE.search(before)
    if be:
        shows = "show" if be.group(1).lower() in ("are", "were", "remain", "appear") else "shows"
        return f"{before[: be.start()]}{shows} {claim}{' but no ' + rest if rest else ''}"
    if not lexicon.is_negated(before) and not _CLEAR.search(before):
        return f"{before}{like(word, 'with')} {claim}{f' but {word.lower()} {rest}' if rest else ''}"
    named = {mention.concept.name for mention in _findings(claim)}
    lungs = CLEAR_LUNGS.search(before)
    if lungs and not named & _OUTSIDE_THE_LUNGS:
        if before[lungs.end() :].strip(" ,"):
            return None
        said = f"{before[: lungs.start()]}{lungs.group(1)} show {claim}"
        return f"{said} {word} {rest}" if rest else said
    return f"{before}{word} {rest} but with {claim}" if rest else f"{before}but with {claim}"


def _shows(before: str, verb: str, claim: str, rest: str) -> str:
    return f"{before}{verb} {claim}{' but no ' + rest if rest else ''}"


def _shows_instead(before: str, be: str, claim: str, rest: str) -> str:
    return _shows(before, "shows" if be.lower() == "is" else "show", claim, rest)


def _positive_for(before: str, word: str, claim: str, rest: str) -> str:
    """No article: "positive for nodule", as "negative for nodule" had none."""
    bare = claim.removeprefix("an ").removeprefix("a ")
    return f"{before}{like(word, 'positive')} for {bare}{' but negative for ' + rest if rest else ''}"
