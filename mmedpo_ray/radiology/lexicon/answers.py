"""Compares an answer with its question or another answer: its yes or no, the option it chose."""

from __future__ import annotations

import re
from functools import lru_cache

from mmedpo_ray.radiology.lexicon.facts import LUNG_FINDINGS, facts, is_negated, negated_spans, restated
from mmedpo_ray.radiology.lexicon.normalisation import final_answer, has_han, same_characters
from mmedpo_ray.radiology.lexicon.polarity import Polarity, chinese_polarity, is_open, stated_polarity
from mmedpo_ray.radiology.lexicon.properties import asks_property, property_polarity, quantity_polarity
from mmedpo_ray.radiology.lexicon.synonyms import abbreviates, canonical, sense, synonym
from mmedpo_ray.radiology.lexicon.tokens import tokens
from mmedpo_ray.radiology.lexicon.vocabulary import mentions
from mmedpo_ray.radiology.lexicon.words import INTRODUCING, Term, content_words, terms, words
from mmedpo_ray.radiology.word_lists import IMAGE, NUMBER_WORDS, word_set

_CHOICE = re.compile(r"([\w-]+),? or (?:an? |the )?([\w-]+)", re.IGNORECASE)

_NEGATIVE_QUESTION = re.compile(
    r"^(\W*(?:is|are|was|were|does|do|did|has|have|had|ca|could))n['’]?t\b", re.IGNORECASE
)
# The question repeated, or a condition.
_ASKS_BACK = re.compile(r"\?\W*\Z|\A\W*if\b", re.IGNORECASE)
# Few texts have any of these, and to look for them is quick.
_MAY_COUNT = re.compile(
    r"[\d<>+~±%°↑↓½¼¾]|(?:\A|[\s(])[-−–]|[-−–](?:\Z|[,;.)])|[^\x00-\x7f]|"
    rf"\b(?:{'|'.join(NUMBER_WORDS)})\b",
    re.IGNORECASE,
)
_HAS_SIGN = re.compile(r"\d|[<>+~±%°↑↓-]")
_ITEMS = re.compile(r",|/|\b(?:or|and|nor)\b", re.IGNORECASE)
# Words of questions and denials that name nothing.
_DENYING = word_set("denying")
# "No significant abnormality" is what is said of a normal image.
_FEW_WORDS = 4
_WEAK = frozenset({"significant", "other", "acute", "gross", "major", "noticeable"})
_ASKS_OVERALL = re.compile(
    r"\b(?:(?P<wrong>abnormal(?:ity|ities)?|anything (?:\w+ "
    r")?(?:wrong|irregular)|patholog(?:y|ies)|diseased?)|normal|"
    r"unremarkable)\b",
    re.IGNORECASE,
)
_LOOKS_NORMAL = re.compile(
    rf"\b(?:{IMAGE}|it)(?: (?:of|in) the \w+)?,? "
    r"(?:is|appears|looks|seems)(?: to be| described as)?(?: an?)?(?: "
    r"(?:completely|perfectly|entirely|essentially))?"
    r" (?:normal|unremarkable)\b",
    re.IGNORECASE,
)
UNDECIDED = re.compile(
    r"\b(?:not sure|unsure|unclear|uncertain|unknown|difficult to|hard to|impossible to|not "
    r"possible|depends on|"
    r"(?:cannot|can ?not|can['’]t|could not) (?:be )?(?:\w+ly )?"
    r"(?:tell|told|say|said|determined?|identif(?:y|ied)|assess(?:ed)?|excluded?|ruled? out|"
    r"see(?= (?:the |this |your |any )?(?:image|picture|scan|file)s?\b| clearly|\W*$))|not "
    r"(?:excluded|ruled out)|"
    r"whether|may or may not|to (?:rule out|exclude)|"
    r"(?:not enough|insufficient|no) information|not (?:provided|specified|mentioned|given))\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=2048)
def equivalent(first: str, second: str) -> bool:
    """Whether two answers say the same in other words.

    They do where both say that all is normal, or that there is none, or one is made of the other's initials;
    else where their yes or no, signs, numbers and facts are equal, and their content words too, but for words
    that only introduce a fact.
    """
    if first == second:
        return True
    first, second = canonical(first), canonical(second)
    if abbreviates(first, second):
        return True
    if set(facts(first)) != set(facts(second)):
        both = sense(first)
        return both is not None and both == sense(second)
    meaning = sense(first)
    if meaning is not None and meaning == sense(second):
        return True
    if numbers_and_signs(first) != numbers_and_signs(second) or _other_letters(first) != _other_letters(
        second
    ):
        return False
    if _sizes(first) != _sizes(second):
        return False
    first, second = restated(first), restated(second)
    if stated_polarity(first) != stated_polarity(second):
        return False
    left, right = (frozenset(map(synonym, content_words(text))) for text in (first, second))
    if not left and not right:
        return words(first) == words(second)
    is_same = left == right or (bool(facts(first)) and left ^ right <= INTRODUCING)
    return is_same and _opposites(first) == _opposites(second)


def numbers_and_signs(text: str) -> list[str]:
    """Numbers with their signs, and signs alone, in order; hyphens and slashes between words mean nothing."""
    if _MAY_COUNT.search(text) is None:
        return []
    return [token for token in tokens(text) if _HAS_SIGN.search(token)]


def _sizes(text: str) -> list[str]:
    """Sizes and degrees in their order; a heart that is restated as its finding would lose them."""
    return [mention.concept.name for mention in mentions(text) if mention.concept.axis == "size"]


@lru_cache(maxsize=2048)
def _opposites(text: str) -> tuple[tuple[str, ...], ...]:
    """Mutually exclusive concepts in their order: "dark centre, bright rim" is not its reverse."""
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


@lru_cache(maxsize=4096)
def implied_polarity(question: str, answer: str) -> Polarity | None:
    """The answer to a yes/no question, also where it is a statement ("There is no effusion").

    A negation is a "no" only where it denies what was asked: "This is a CT, not an MRI" answers "Is this a
    CT?" with yes, and "The trachea is not deviated" leaves open whether it is midline. So does a statement
    about another side, size or place.
    """
    direct = stated_polarity(answer)
    if direct is not None:
        return direct
    answer = same_characters(final_answer(answer))
    if is_open(answer) or UNDECIDED.search(answer) or _ASKS_BACK.search(answer):
        return None
    if has_han(answer):
        return chinese_polarity(question, answer)
    # "Isn't there a mass?" asks whether there is one.
    question = _NEGATIVE_QUESTION.sub(r"\1", same_characters(question))
    question, answer = canonical(question).rstrip("? "), canonical(answer)
    quantity = quantity_polarity(question, answer)
    if quantity is not None:
        return quantity
    if asks_property(question):
        found = property_polarity(question, answer)
        if found is not None or _is_elsewhere(question, answer):
            return found
        repeats = _repeats(question, answer)
        return None if repeats is None else "yes" if repeats else "no"
    if _is_elsewhere(question, answer):
        return None
    repeats = _repeats(question, answer)
    # "The lesion does not involve the vessels" names the lesion and denies what was asked of it.
    agreed = False if repeats is False else _agreement(question, answer)
    if agreed is None:
        agreed = repeats
    if agreed is None:
        return None
    return "yes" if agreed else "no"


def _is_elsewhere(question: str, answer: str) -> bool:
    """Whether the answer names another side, size, study or part than the question, and not that one."""
    asked, said = _named(question), _named(answer)
    return any(group in said and not names & said[group] for group, names in asked.items())


def _named(text: str) -> dict[str, set[str]]:
    """Everything a text names except findings, by groups that exclude each other."""
    named: dict[str, set[str]] = {}
    for mention in mentions(text):
        concept = mention.concept
        if concept.axis not in ("finding", "state"):
            both = ("left", "right") if concept.name == "bilateral" else ()
            group = concept.axis if concept.axis == "anatomy" else concept.group
            named.setdefault(group, set()).update((concept.name, *both))
    return named


def _agreement(question: str, answer: str) -> bool | None:
    """Whether question and answer agree on the findings that both name; None if they agree on some only."""
    asked, said = _presence(question) or _asked_overall(question), _presence(answer)
    if _LOOKS_NORMAL.search(answer):
        said.setdefault("abnormality", False)
    agreements = {asked[name] == said[name] for name in asked if name in said}
    if not agreements:
        # Who sees no abnormality sees none of them.
        agreements = {not asked[name] for name in asked if _is_denied_overall(name, said)}
    if len(agreements) != 1:
        return None
    return agreements.pop() if _denies_plainly(answer, set(asked)) else None


def _asked_overall(question: str) -> dict[str, bool]:
    """What a question asks for that names no finding: whether there is anything abnormal, or none."""
    asks = _ASKS_OVERALL.search(question)
    if asks is None:
        return {}
    anatomy = _named(question).get("anatomy", set()) - {"chest", "brain", "abdomen"}
    if anatomy - {"lung"}:
        return {}
    return {"lung abnormality" if anatomy else "abnormality": asks["wrong"] is not None}


def _is_denied_overall(finding: str, said: dict[str, bool]) -> bool:
    return said.get("abnormality") is False or (
        finding in LUNG_FINDINGS and said.get("lung abnormality") is False
    )


def _denies_plainly(answer: str, findings: set[str]) -> bool:
    """Whether what the answer denies of the findings is all of it: "no large effusion" leaves a small one."""
    for item in denied_items(answer):
        before: list[str] = []
        for term in item:
            is_weak = term.name == "abnormality" and _WEAK.issuperset(before)
            if before and term.name in findings and not is_weak:
                return False
            before.append(term.name)
    return True


def denied_items(text: str) -> list[list[Term]]:
    """The things that a text denies, each by its words: "no effusion or large nodule" has two."""
    found = []
    telling = None
    for start, end in negated_spans(text):
        telling = telling if telling is not None else _telling(text)
        while start < end:
            joint = _ITEMS.search(text, start, end)
            stop = joint.start() if joint else end
            found.append([term for term in telling if start <= term.start < stop])
            start = joint.end() if joint else end
    return [item for item in found if item]


def _telling(text: str) -> list[Term]:
    """The terms of a text, without words that only ask, deny or introduce."""
    found = []
    for term in terms(text):
        if term.name in ("with contrast", "without contrast"):
            found.append(Term("contrast", term.start + len("without"), is_concept=False))
        elif term.name not in INTRODUCING and term.name not in _DENYING:
            found.append(term)
    return found


def _repeats(question: str, answer: str) -> bool | None:
    """Whether the answer affirms or denies the question's own words; None if neither.

    It is so where all of them occur in their order; they are denied where a thing that the answer denies
    begins with one.
    """
    asked = _telling(question)
    if not asked:
        return None
    said = _telling(answer)
    heads = [item[0].name for item in denied_items(answer)]
    if not said and (is_negated(answer) or sense(answer) == "none"):
        return False
    spans = negated_spans(answer)
    stated = [term.name for term in said if not any(start <= term.start < end for start, end in spans)]
    denied_before = {item[0].name for item in denied_items(question)}
    names = {term.name for term in asked}
    turned = (names - denied_before) & (set(heads) - set(stated)) | denied_before & (set(stated) - set(heads))
    if turned or _is_opposite(names, stated, question, answer):
        return False
    is_so = not denied_before and _in_order([term.name for term in asked], stated)
    return True if is_so else None


def _is_opposite(asked: set[str], stated: list[str], question: str, answer: str) -> bool:
    """Whether one says "normal" and the other "abnormal", of the same part of the body."""
    for one, other in (("normal", "abnormal"), ("abnormal", "normal")):
        if one in asked and other in stated and one not in stated:
            asked_place, place = (_named(text).get("anatomy") for text in (question, answer))
            # "It is abnormal" is said of what was asked.
            return asked_place == place or (place is None and len(words(answer)) <= _FEW_WORDS)
    return False


def _in_order(wanted: list[str], said: list[str]) -> bool:
    rest = iter(said)
    return all(name in rest for name in wanted)


def choices(question: str) -> tuple[str, str] | None:
    """The options of an "A or B" question: "Is this a CT or an MRI?" → ("ct", "mri"); else None."""
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
