"""Turns present into absent and absent into present, one fact at a time.

In a list of negatives ("no effusion, consolidation or pneumothorax") one item becomes a positive statement
and the others stay denied. A sentence whose grammar is not known here stays as it is.
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
from mmedpo_ray.radiology.word_lists import SEEN, load

# What a denial leaves out: how sure, how many, how large, since when. "There is no likely a small effusion"
# says nothing.
_UNDENIED = (
    r"(?:(?:likely|probably|probable|possibly|possible|presumably|suspected|several|multiple|many|numerous|"
    r"innumerable|scattered|some|a "
    r"few|one|two|three|four|five|an?|stable|unchanged|persistent|mild|mildly|moderate|"
    r"moderately|severe|severely|minimal|slight|trace|marked|massive|extensive|"
    r"\d+(?:\.\d+)?(?: ?[x×] ?\d+(?:\.\d+)?)*[ -]?[mc]m)(?:,? |(?<=,)))*"
)
THERE_IS = re.compile(
    r"\b(there (?:is|are)) (?!(?:no|not|neither|only|at|about|more|less)\b)(?:((?:now|again|also|currently) "
    r")|(still ))?" + _UNDENIED,
    re.IGNORECASE,
)
_ASSERTED = re.compile(_UNDENIED, re.IGNORECASE)
# "There is an opacity, suggestive of pneumonia" is not turned round by a word at its beginning.
_EXPLAINED = re.compile(
    r"\b(?:suggest\w*|consistent|compatible|represent\w*|reflect\w*|concerning|worrisome|may|could|which|without|but)\b",
    re.IGNORECASE,
)
THERE_IS_NO = re.compile(r"\b(there (?:is|are)) no ", re.IGNORECASE)
# Words up to the end of a sentence; a decimal point is none.
_LISTED = r"((?:[^.;:!?\n]|\.(?=\d))+?)(?=\.(?!\d)|[;:!?\n]|$)"
# A denial with its list: at the beginning of a sentence, behind "there is", behind another verb, behind
# "with".
_DENIAL = re.compile(rf"(^|[.;:]\s+)(No|Neither) (?!longer\b){_LISTED}", re.IGNORECASE)
_THERE_IS_NO_LIST = re.compile(
    rf"\b(there (?:is|are)(?: again| also| now| still| currently)?) (?:no|neither) (?!longer\b){_LISTED}",
    re.IGNORECASE,
)
_SHOWS_NO_LIST = re.compile(
    r"\b((?:shows?|demonstrates?|reveals?|has|have)(?= no )|(?:is|are)(?! no )) "
    rf"(?:no|(?:\w+ly )?(?:free of|without)) {_LISTED}",
    re.IGNORECASE,
)
_WITHOUT_LIST = re.compile(
    rf"(?<!\bis )(?<!\bare )\b(without|with no) (?!contrast\b){_LISTED}", re.IGNORECASE
)
# "The lungs are free of nodules" → "The lungs show nodules".
_SHOWING = {"is": "shows", "are": "show"}
_EVIDENCE = re.compile(
    r"^(?:\w+ )?(?:evidence|signs?|suggestion|findings? suggestive|indication) (?:of|for|to suggest) (?:an? "
    r")?",
    re.IGNORECASE,
)
_PREDICATE = re.compile(rf" (?:is|are|was|were) (?:\w+ )?{SEEN}\b.*$", re.IGNORECASE)
_IS_SEEN = re.compile(rf"\b(is|are|was|were) (?!not\b)(?=(?:again |also )?{SEEN}\b)", re.IGNORECASE)
# Predicates that deny what stands before them, and their opposites.
_OPPOSITES = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"\b(is|are|was|were) not (?={SEEN}\b)", r"\1 "),
        (rf"\b(is|are|was|were) no longer (?={SEEN}\b)", r"\1 still "),
        (r"\b(is|are|was|were) absent\b", r"\1 present"),
        (r"\bhas (?:\w+ )?resolved\b", "persists"),
        (r"\bhave (?:\w+ )?resolved\b", "persist"),
    )
)
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
# What does not describe a finding: "in the mass", "causing obstruction".
_NO_DESCRIPTION = re.compile(
    r"\b(?:in|on|at|of|with|by|for|from|to|as|because|the|this|that|these|those|its?|both|some|other|than)\b|"
    r"^\W*\w{3,}ing\b",
    re.IGNORECASE,
)
_SOMEONE = re.compile(
    r"\b(?:m[ae]n|wom[ae]n|patients?|females?|males?|child|infant|boy|girl|his|her|he|she)\b", re.IGNORECASE
)
_CAPITAL_WORD = re.compile(r"\b[A-Z]\w*")
# "The lungs are clear" leaves room for what lies outside of them.
_OUTSIDE_LUNGS = frozenset(load("edits")["outside_lungs"])
_CLEAR = re.compile(r"\b(?:clear|normal|unremarkable)\b", re.IGNORECASE)
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
    """ "There is a nodule" → "There is no nodule"; "No effusion or nodule" → "There is an effusion.

    No nodule".
    """
    spans = [span for span in lexicon.sentence_spans(answer) if answer[slice(*span)].strip()]
    if "there " in answer.lower():
        for changed in _denied_there_is(answer, spans):
            yield Edit(changed, "negation")
    for changed in _claimed(answer):
        yield Edit(changed, "negation")
    named = [mention.start for mention in _findings(answer)]
    for start, end in spans:
        found = sum(start <= place < end for place in named)
        if found <= 1 and (found or _OVERALL.search(answer[start:end])):
            for changed in _turned(answer[start:end], is_whole=len(spans) == 1):
                yield Edit(answer[:start] + changed + answer[end:], "negation")


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
    yield Edit(like(answer.strip()[0], "no") + " " + _undescribed(said).replace(" and ", " or "), "negation")


# ---------------------------------------------------------------------- present to absent


def _denied_there_is(answer: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
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


def _turned(sentence: str, *, is_whole: bool) -> Iterator[str]:
    """A sentence of one finding with its predicate turned round; without a predicate, with "No" before it."""
    if lexicon.is_negated(sentence):
        for pattern, replacement in _OPPOSITES:
            if len(pattern.findall(sentence)) == 1:
                yield pattern.sub(replacement, sentence)
    elif seen := _IS_SEEN.search(sentence):
        if not _EXPLAINED.search(sentence) and " with " not in sentence[seen.end() :]:
            yield _IS_SEEN.sub(r"\1 not ", sentence, count=1)
    elif not is_whole and not _VERB.search(sentence):
        lead = sentence[: len(sentence) - len(sentence.lstrip(" \n\t0123456789.)-"))]
        yield f"{lead}No {_undescribed(uncapitalise(sentence[len(lead) :]))}"


def _undescribed(said: str) -> str:
    """A statement without the words at its beginning that a denial leaves out."""
    match = _ASSERTED.match(said)
    return said[match.end() :] if match else said


# ---------------------------------------------------------------------- absent to present


def _claimed(answer: str) -> Iterator[str]:
    """The answer with one item of a denied list claimed, and the others still denied."""
    low = answer.lower()
    if not any(word in low for word in ("no ", "neither ", "without ", "free of ")):
        return
    is_short = len(lexicon.words(answer)) <= WHOLE_NORMAL_WORDS
    for pattern in (_DENIAL, _THERE_IS_NO_LIST, _SHOWS_NO_LIST, _WITHOUT_LIST):
        for match in pattern.finditer(answer):
            listed, other = _without_other_statement(match.group(match.re.groups))
            predicate = _PREDICATE.search(listed)
            tail = predicate.group(0) if predicate else ""
            for claim, rest in _claims(listed.removesuffix(tail)):
                if _BUT.match(other) and not (rest and pattern is _DENIAL):
                    continue
                if pattern is _DENIAL and is_short and not _findings(claim):
                    continue
                said = _claim(match, claim, rest, tail, answer[: match.start()])
                if said is not None:
                    yield answer[: match.start()] + said + other + answer[match.end() :]


def _claim(match: re.Match[str], claim: str, rest: str, tail: str, before: str) -> str | None:
    """The replacement of a denied list of one of the four patterns; None if it would make no sense there.

    Args:
        match: of the pattern; its last group is the list.
        claim: the item to claim, with its article.
        rest: what stays denied; may be empty.
        tail: " is seen" and the like behind the list; may be empty.
        before: the answer up to the match.
    """
    if match.re is _DENIAL:
        # "No A or B is seen" → "An A is seen. No B is seen"
        is_capital = match.group(2)[0].isupper()
        said = claim + _agreeing(tail, claim) if tail else _there_is("there is", claim)
        more = f"{'. No' if is_capital else ', no'} {rest}{_agreeing(tail, rest)}" if rest else ""
        return match.group(1) + (capitalise(said) if is_capital else said) + more
    word = match.group(1)
    if match.re is not _WITHOUT_LIST:
        said = (
            _there_is(word, claim) if match.re is _THERE_IS_NO_LIST else f"{_SHOWING.get(word, word)} {claim}"
        )
        return said + (f" but no {rest}" if rest else "") + tail
    before = before[lexicon.sentence_spans(before)[-1][0] :]
    if not lexicon.is_negated(before) and not _CLEAR.search(before):
        return like(word, "with") + f" {claim}" + (f" but {word.lower()} {rest}" if rest else "") + tail
    if CLEAR_LUNGS.search(before) and not _OUTSIDE_LUNGS & {found.concept.name for found in _findings(claim)}:
        return None
    return (f"{word} {rest} " if rest else "") + f"but with {claim}{tail}"


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
        elif not named and _OVERALL.search(item) and not _PLAIN_AND.search(item):
            bare = bool(_OVERALL_IN_PLURAL.search(item) or _OVERALL_UNCOUNTED.search(item))
        else:
            continue
        if not _PLACED.search(item):
            # "mediastinal or hilar lymphadenopathy": both are denied, so both are claimed.
            item = item.replace(" or ", " and ")
        claim = prefix + item if prefix else with_article(item, bare=bare)
        yield claim, prefix + _joined(others) if others else ""


def _joined(items: list[str]) -> str:
    comma = "," if len(items) > 2 else ""
    return f"{', '.join(items[:-1])}{comma} or {items[-1]}" if items[1:] else items[0]


def _items(listed: str) -> list[str]:
    """The things that a denied list names; empty if its grammar is not known."""
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
    return [] if placed and not all(_findings(item) for item in items) else items


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
    there, _, *adverb = start.split(" ")
    return " ".join([there, "are" if _is_many(claim) else "is", *adverb, claim])


def _agreeing(tail: str, claim: str) -> str:
    """ " is seen" or " are seen", by the claim."""
    many = _is_many(claim)
    numbers = {"is": "are", "was": "were"} if many else {"are": "is", "were": "was"}
    return re.sub(r"^ (\w+)", lambda verb: f" {numbers.get(verb.group(1), verb.group(1))}", tail)
