"""Questions and answers as annotation files write them: cleaned, checked, told apart by kind."""

from __future__ import annotations

import math
import re
from typing import Any

from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.io.text import storable
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.meta_text import is_leaked_prompt

# White space and what takes no room: control characters, byte order marks, soft hyphens, zero-width and
# direction marks.
_NOTHING = (
    "[\\s\\x00-\\x1f\\x7f-\\x9f\\xad\\u180e\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f"
    "\\ufeff\\ufff9-\\ufffb]+"
)
_EDGES = re.compile(f"^{_NOTHING}|{_NOTHING}$")
_REPORT_INSTRUCTION = re.compile(
    r"\b(?:write|generate|provide|give|create|draft|describe|summari[sz]e|compose)\b.*\b(?:report|findings|impression)\b",
    re.IGNORECASE,
)
# A whole image is described; "Describe the lesion in the image" asks for less.
_DESCRIPTION = re.compile(
    r"^\W*(?:please\s+)?(?:(?:can|could|would) you (?:please\s+)?)?"
    r"(?:describe|interpret|summari[sz]e|caption"
    r"|(?:write|give|provide)\s+(?:me\s+)?an?\s+(?:\w+\s+)?(?:description|summary|caption|interpretation)\s+of)\s+"
    r"(?:(?:the|this|these|given|following|provided|attached|above|medical|radiolog\w+|chest|abdominal|brain|frontal|lateral"
    r"|ap|pa|ct|mri?|x-?ray)\s+)*"
    r"(?:image|radiograph|x-?ray|scan|film|picture|photo|study|ct|mri)s?"
    r"(?:\s+(?:in (?:\w+\s+)?detail|briefly|concisely|for me|in (?:one|a few|your own) "
    r"(?:sentences?|words)))*\W*$",
    re.IGNORECASE,
)
_YES_NO_QUESTION = re.compile(
    r"^\W*(?:is|are|was|were|does|do|did|has|have|can|could|should|will|would|any)\b"
    r"|[吗嗎么麼][？?]?\s*$|是否|有没有|有沒有|是不是|能否",
    re.IGNORECASE,
)
# "Not seen" answers "Where is the liver?", but decides nothing.
_ASKS_FOR_WORDS = re.compile(
    r"^\W*(?:in |on |at )?(?:where|what|which|who|whose|how|why|when)\b", re.IGNORECASE
)
_REPORT_WORDS = 25
_WORDS_OF_A_BARE_CLOSED_ANSWER = 2
_ANSWER_TYPES = ("closed", "open", "report")


def clean(value: Any) -> str:
    """A question or answer without image placeholder, surrounding space and invisible marks such as U+FEFF.

    A number is written out, as VQA-RAD's counts are, true and false as yes and no; of a list the text that is
    all of it. Anything else that is no text is empty.

    Raises:
        UnusableError: a list holds several strings.
    """
    if isinstance(value, str):
        return _EDGES.sub("", storable(value).replace("<image>", " "))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else ""
    if isinstance(value, list):
        strings = dict.fromkeys(filter(None, map(clean, value)))
        if len(strings) > 1:
            raise UnusableError("several_answers", f"{len(strings)} different strings where one is expected")
        return next(iter(strings), "")
    return str(value) if isinstance(value, int) else ""


def text_problem(question: str, answer: str) -> str | None:
    """The reason to drop a question with its answer, or None.

    Of the text about the task only repeated prompts count: a reference answer that reads like a refusal may
    be a radiologist's, and curation, which can do without a pair, looks closer.
    """
    if not question:
        return "empty_question"
    if not answer:
        return "empty_answer"
    return "leaked_prompt" if is_leaked_prompt(answer) else None


def stated_answer_type(value: Any) -> str | None:
    """closed, open or report as a data set spells it ("CLOSED "); None where it does not say."""
    name = value.strip().lower() if isinstance(value, str) else None
    return name if name in _ANSWER_TYPES else None


def infer_answer_type(question: str, answer: str) -> str:
    """closed, open or report, for formats that do not say.

    Closed is a question answered by yes or no, or by one of the two options that it names; a report is what
    an instruction asks for (to write one, or to describe the image), or an answer of more than 25 words.
    """
    if _REPORT_INSTRUCTION.search(question) or _DESCRIPTION.match(question):
        return "report"
    count = len(lexicon.words(answer))
    if lexicon.polarity(answer) is not None and (
        _YES_NO_QUESTION.search(question)
        or (count <= _WORDS_OF_A_BARE_CLOSED_ANSWER and not _ASKS_FOR_WORDS.match(question))
    ):
        return "closed"
    if lexicon.chosen(answer, question) is not None:
        return "closed"
    return "report" if count > _REPORT_WORDS else "open"
