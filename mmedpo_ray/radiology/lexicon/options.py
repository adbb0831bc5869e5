"""The options that a question names, and which of them an answer decides for.

"A) MRI B) CT", "CT, MRI or X-ray?", "左肺还是右肺？"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from mmedpo_ray.radiology.lexicon import chinese_negation
from mmedpo_ray.radiology.lexicon.answers import implied_polarity
from mmedpo_ray.radiology.lexicon.facts import is_negated, sentence_spans, stated
from mmedpo_ray.radiology.lexicon.normalisation import final_answer, has_han, same_characters
from mmedpo_ray.radiology.lexicon.polarity import stated_polarity
from mmedpo_ray.radiology.lexicon.synonyms import canonical
from mmedpo_ray.radiology.lexicon.tokens import contains, same_text, tokens
from mmedpo_ray.radiology.lexicon.vocabulary import mentions
from mmedpo_ray.radiology.lexicon.words import content_words

_LABEL = re.compile(
    r"(?:(?<=[\s(,;:?.])|\A)\(?([A-Ha-h]|[1-8])\s*(?:\)|[.:](?=\s|$)|[.,:](?=[^\x00-\x7f]))\s*"
)
# A word, or a measure with its sign and unit.
_ITEM = r"(?:(?:[<>]=?\s?)?\d+(?:\.\d+)?\s?(?:mm|cm|ml|%|hu|years?|months?)(?!\w)|non[ -][\w-]+|[\w-]+)"
_LIST = re.compile(
    rf"(?P<before>(?:[\w-]+(?: [\w-]+)?, )*)(?P<left>{_ITEM}),? or (?:an? |the |is it |in the "
    rf")*(?P<right>{_ITEM})",
    re.IGNORECASE,
)
_ZH_LIST = re.compile(r"([^\s,.;:?!]{1,12}?)(?:还是|還是|或者|或是|或)(?:是|在)?([^\s,.;:?!]{1,12})")
_ZH_BEFORE = re.compile(r".*(?:是|在|为|為|属于|屬於)(?=.)")
_ZH_PARTICLE = re.compile(r"(?:吗|嗎|呢|的)+$")

_NAMED_ANSWER = re.compile(
    r"\b(?:answer|option|choice|conclusion)(?: to (?:the|this|your) question)?\"?\s*(?:is|would "
    r"be|:)\s*\"?(?:option |choice )?(?=\S)"
    r"|\bi (?:choose|pick|select|would choose)\s+(?:option |choice )?(?=\S)"
    r"|(?:答案|选项|選項)(?:应该|应|應該|應)?(?:是|为|為|选|選|:)?\s*(?=\S)|(?:应|應)?(?:选择|選擇|选|選)(?:项|項)?\s*(?=\S)",
    re.IGNORECASE,
)
_LEADING_LABEL = re.compile(
    r"\W*(?:(?i:option|choice|answer)\W+)?(?P<label>[A-Ha-h1-8])(?P<end>\W*$|\s*[).:,;*\]\n-]|(?=\s)|(?=是|为|為|正确|正確))"
)
_LETTER = re.compile(r"\b[a-h1-8]\b")
_NEXT_SENTENCE = re.compile(r"(?<=\w)[.?!]\s+(?=[A-Z\u3400-\u9fff])|[.?!;](?=[\u3400-\u9fff])")
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|correction|i mean|i meant|on second thought)\b[^\w]*", re.IGNORECASE
)
_NON = re.compile(r"\bnon-?(?=[a-z]{4})", re.IGNORECASE)


class Option(NamedTuple):
    """An option of a question.

    Attributes:
        label: its letter or number in small letters; empty where it has none.
        text: what it says, as the question spells it, but for characters of one meaning.
    """

    label: str
    text: str


@lru_cache(maxsize=2048)
def options(question: str) -> tuple[Option, ...]:
    """The options of a question in order, at least two; empty where it names none."""
    text = same_characters(question)
    return _labelled(text) or (_chinese(text) if has_han(text) else _listed(text))


def _labelled(text: str) -> tuple[Option, ...]:
    found = list(_LABEL.finditer(text))
    for first, label in enumerate(found):
        if label.group(1).casefold() not in ("a", "1"):
            continue
        run = [label]
        for other in found[first + 1 :]:
            if ord(other.group(1)) == ord(run[-1].group(1)) + 1:
                run.append(other)
        if len(run) > 1:
            ends = [other.start() for other in run[1:]] + [len(text)]
            return tuple(
                Option(each.group(1).casefold(), _first_line(text[each.end() : end]))
                for each, end in zip(run, ends, strict=True)
            )
    return ()


def _first_line(text: str) -> str:
    """An option's words without what a prompt says after it: the rest of the lines, another sentence."""
    line = text.strip().split("\n")[0]
    return _NEXT_SENTENCE.split(line)[0].strip(" \t,;.()?")


def _listed(text: str) -> tuple[Option, ...]:
    match = _LIST.search(text)
    if match is None or match["right"].lower() in ("not", "no"):
        return ()
    by_group: dict[str, list[str]] = {}
    for mention in mentions(text):
        names = by_group.setdefault(mention.concept.group, [])
        if mention.concept.name not in names:
            names.append(mention.concept.name)
    for names in by_group.values():
        if len(names) > 1:
            return tuple(Option("", name) for name in (*names, *_further_items(match, names)))
    before = [item.split()[-1] for item in match["before"].split(", ") if item.strip()]
    return tuple(Option("", name.lower()) for name in (*before, match["left"], match["right"]))


def _further_items(match: re.Match[str], names: Sequence[str]) -> list[str]:
    """What a list with commas names beside concepts of one kind: "mixed" of "solid, cystic or mixed"."""
    if not match["before"]:
        return []
    items = [match["left"].lower(), match["right"].lower()]
    return [item for item in items if not {each.concept.name for each in mentions(item)} & set(names)]


def _chinese(text: str) -> tuple[Option, ...]:
    match = _ZH_LIST.search(text)
    if match is None:
        return ()
    left = _ZH_BEFORE.sub("", match.group(1))
    right = _ZH_PARTICLE.sub("", match.group(2))
    if len(right) > len(left) and right[len(left) - 1] == left[-1]:
        # 左肺还是右肺有问题: both options end alike.
        right = right[: len(left)]
    return (Option("", left), Option("", right)) if left and right and left != right else ()


# ---------------------------------------------------------------------- decisions


def chosen(text: str, question: str) -> int | None:
    """The option of the question that a text decides for, from 0; None if none or several.

    By its letter, or by its words in a sentence that names one alone and does not deny it: the first such
    sentence, else the last. Options that mean yes and no are decided as such.
    """
    offered = options(question)
    return _chosen(same_characters(final_answer(text)), offered, question) if offered else None


def _chosen(text: str, offered: Sequence[Option], question: str) -> int | None:
    exact = [index for index, option in enumerate(offered) if same_text(text, option.text)]
    if len(exact) == 1:
        return exact[0]
    for marks in (_TAKEN_BACK, _NAMED_ANSWER):
        for mark in list(marks.finditer(text))[-1:]:
            found = _chosen(text[mark.end() :], offered, question)
            if found is not None:
                return found
    label = _label(text, offered)
    if label is not None:
        return label
    polarities = [stated_polarity(option.text) for option in offered]
    if {"no", "yes"} <= set(polarities) and len(set(polarities)) == len(offered):
        answered = implied_polarity(question, text)
        return polarities.index(answered) if answered else None
    raw = [_NON.sub("non ", text[start:end]) for start, end in sentence_spans(text)]
    if any(is_negated(option.text) for option in offered) and not has_han(text):
        # "No mass" is an option of its own, and holds the other one.
        kept = raw
    else:
        kept = stated_sentences(_NON.sub("non ", text))
    decided = [named for sentence in kept if (named := _named_in(sentence, offered))]
    for options_named in (*decided[:1], *decided[-1:]):
        if len(options_named) == 1:
            return options_named[0]
    return None if decided else _other_than_denied(raw, offered)


def _other_than_denied(sentences: Sequence[str], offered: Sequence[Option]) -> int | None:
    """The other of two options where one alone is denied: "not malignant" of benign or malignant."""
    named = {index for sentence in sentences for index in _named_in(sentence, offered, denied=True)}
    if len(offered) != 2 or len(named) != 1 or not any(is_negated(s) or "non " in s for s in sentences):
        return None
    return 1 - named.pop()


def _label(text: str, offered: Sequence[Option]) -> int | None:
    """The option whose letter leads a text: "B", "(b) CT", "B.

    CT"; not the article of "A CT scan", nor half of "A or B".
    """
    labels = [option.label for option in offered]
    match = _LEADING_LABEL.match(text)
    if match is None or match["label"].casefold() not in labels:
        return None
    label = match["label"].casefold()
    if not match["end"] and match.end() < len(text):
        others = set(_LETTER.findall(text[match.end() :].casefold())) & set(labels) - {label}
        if others or match["label"] == "A" or match["label"].islower():
            return None
    return labels.index(label)


def stated_sentences(text: str) -> list[str]:
    """The sentences of a text without what they deny."""
    if has_han(text):
        return re.split(r"[.;!?\n]+", chinese_negation.without_denied(text))
    kept = stated(text)
    return [kept[start:end] for start, end in sentence_spans(text)]


def _named_in(sentence: str, offered: Sequence[Option], *, denied: bool = False) -> list[int]:
    """The options that a sentence names, without those that are part of a longer one it names."""
    spelled = [tokens(_NON.sub("non ", option.text)) for option in offered]
    named = [
        index
        for index, option in enumerate(offered)
        if _names(sentence, option.text, spelled[index], denied=denied)
    ]
    if not named and not denied and "non " not in sentence:
        said = content_words(canonical(sentence))
        contents = [content_words(option.text) for option in offered]
        named = [index for index, content in enumerate(contents) if content and content <= said]
    return [
        index
        for index in named
        if not any(
            len(spelled[other]) > len(spelled[index]) and contains(spelled[other], spelled[index])
            for other in named
        )
    ]


def _names(sentence: str, option: str, spelled: list[str], *, denied: bool) -> bool:
    if has_han(option):
        return option in sentence if denied else chinese_negation.states(sentence, option)
    said = tokens(sentence)
    if not denied and spelled[:1] != ["non"] and contains(said, ["non", *spelled]):
        return False
    return contains(said, spelled)
