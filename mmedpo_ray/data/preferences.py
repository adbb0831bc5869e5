"""Preference rows as other projects write them: one question with a chosen and a rejected answer, and their images.

| format | row |
| --- | --- |
| ``trl`` | ``prompt``, ``chosen``, ``rejected`` as texts or messages (``prompt`` may be the beginning of both), ``images`` |
| ``llama_factory`` | ``conversations`` or ``messages`` with ``chosen`` and ``rejected`` messages; or ``instruction``, ``input`` and two texts |
| ``swift`` | ``messages`` with ``rejected_response``, or ``rejected_messages`` and ``rejected_images`` |

Texts come back as they are, so that an audit sees white space around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmedpo_ray.data.unusable import UnusableError

_SYSTEM = ("system",)
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")
_IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Preference:
    """A preference pair as its file has it.

    Attributes:
        question: with its image placeholder, if any.
        chosen: preferred answer.
        rejected: dispreferred answer.
        image: what names or holds the image.
        rejected_image: the same for the rejected side; None: it is the same image.
        score: clinical relevance, of any type; None: there is none.
    """

    question: str
    chosen: str
    rejected: str
    image: Any
    rejected_image: Any = None
    score: Any = None


def from_trl(row: dict[str, Any]) -> Preference:
    """A row of TRL's preference format, with its prompt apart or in both conversations.

    Raises:
        UnusableError: it is none, or has several turns.
    """
    chosen, rejected = (_messages(row.get(side), _ASSISTANT) for side in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = _messages(row["prompt"], _USER)
    else:
        prompt, begins = chosen[:-1], rejected[:-1]
        if prompt != begins:
            raise UnusableError("malformed_conversation", "chosen and rejected do not begin alike")
        chosen, rejected = chosen[-1:], rejected[-1:]
    return Preference(_question(prompt), _answer(chosen), _answer(rejected), *_images(row))


def from_llama_factory(row: dict[str, Any]) -> Preference:
    """A row of LLaMA-Factory's ranking data, in its ShareGPT, OpenAI or Alpaca layout.

    Raises:
        UnusableError: it is none, or has several turns.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    talk = row.get("conversations", row.get("messages"))
    if talk is None:
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise UnusableError("malformed_conversation", "neither conversations nor two answers")
        if row.get("history"):
            raise UnusableError("several_turns")
        parts = (row.get(key) for key in ("instruction", "input"))
        question = "\n".join(part for part in parts if isinstance(part, str) and part)
        return Preference(question, chosen, rejected, *_images(row))
    preferred, other = (_answer(_messages([side], _ASSISTANT)) for side in (chosen, rejected))
    return Preference(_question(_messages(talk, _USER)), preferred, other, *_images(row))


def from_swift(row: dict[str, Any]) -> Preference:
    """A row of ms-swift's RLHF data.

    Raises:
        UnusableError: it is none, or has several turns.
    """
    talk = _messages(row.get("messages"), _USER)
    rejected = row.get("rejected_response")
    if rejected is not None:
        other = _messages([rejected] if isinstance(rejected, dict) else rejected, _ASSISTANT)
    elif row.get("rejected_messages") is not None:
        other = _messages(row["rejected_messages"], _USER)[-1:]
    elif row.get("rejected_images") is not None:
        # The same answer beside another image.
        other = talk[-1:]
    else:
        raise UnusableError("no_rejected_answer")
    return Preference(_question(talk[:-1]), _answer(talk[-1:]), _answer(other), *_images(row))


PREFERENCE_FORMATS: dict[str, Callable[[dict[str, Any]], Preference]] = {
    "trl": from_trl,
    "llama_factory": from_llama_factory,
    "swift": from_swift,
}


def format_of(row: Any) -> str | None:
    """The format that a row looks like; None for another one."""
    if not isinstance(row, dict):
        return None
    if "messages" in row and row.keys() & {"rejected_response", "rejected_messages", "rejected_images"}:
        return "swift"
    if "chosen" not in row or "rejected" not in row:
        return None
    return "llama_factory" if row.keys() & {"conversations", "messages", "instruction"} else "trl"


def trimmed(row: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The row with its answers trimmed, and which of chosen and rejected that changed.

    Args:
        row: one that can be read.
        name: its format.
    """
    rejected = "rejected"
    if name == "swift":
        rejected = "rejected_response" if "rejected_response" in row else "rejected_messages"
    found, sides = dict(row), []
    for side, key in (("chosen", "messages" if name == "swift" else "chosen"), ("rejected", rejected)):
        if key in row and (value := _stripped(row[key])) != row[key]:
            found[key] = value
            sides.append(side)
    return found, sides


def _stripped(value: Any) -> Any:
    """The text of an answer trimmed, in whatever holds it: its last message, its last part."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and value:
        return [*value[:-1], _stripped(value[-1])]
    if isinstance(value, dict):
        key = next((each for each in ("content", "value", "text") if each in value), None)
        return value if key is None else value | {key: _stripped(value[key])}
    return value


@dataclass(frozen=True)
class _Message:
    role: str
    text: str


def _messages(value: Any, role: Sequence[str]) -> list[_Message]:
    """The messages of a conversation without system prompts; a text is one message of the given role."""
    if isinstance(value, str):
        return [_Message(role[0], value)]
    if not isinstance(value, list | tuple) or not all(isinstance(each, dict) for each in value):
        raise UnusableError("malformed_conversation", "no list of messages")
    found = [
        _Message(str(each.get("role", each.get("from"))), _text(each.get("content", each.get("value"))))
        for each in value
    ]
    return [message for message in found if message.role not in _SYSTEM]


def _text(content: Any) -> str:
    """The text of a message, which may be a list of parts; images among them stand for themselves."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UnusableError("malformed_conversation", "a message without text")
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(part for part in parts if isinstance(part, str))


def _question(talk: Sequence[_Message]) -> str:
    if len(talk) != 1:
        raise UnusableError(
            "several_turns" if talk else "empty_question", f"{len(talk)} messages before the answer"
        )
    if talk[0].role not in _USER:
        raise UnusableError("malformed_conversation", "the first message is no user's")
    return talk[0].text


def _answer(talk: Sequence[_Message]) -> str:
    if len(talk) != 1:
        raise UnusableError(
            "several_turns" if talk else "empty_answer", f"{len(talk)} messages as the answer"
        )
    if talk[0].role not in _ASSISTANT:
        raise UnusableError("malformed_conversation", "the answer is no assistant's")
    return talk[0].text


def _images(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Image, rejected image and score of a row."""
    image = row.get("images") if row.get("images") is not None else row.get("image")
    score = row.get("score") if row.get("score") is not None else row.get("weighted_score")
    return image, row.get("rejected_images"), score
