"""Preference rows as other projects write them: a question, two answers and their images.

| format | row |
| --- | --- |
| ``trl`` | ``prompt`` (may start both sides), ``chosen``, ``rejected`` as strings or messages; ``images`` |
| ``llama_factory`` | ``conversations`` or ``messages`` with ``chosen`` and ``rejected`` messages |
| | or ``instruction``, ``input`` and two strings |
| ``swift`` | ``messages`` (or ``query`` and ``response``) with ``rejected_response`` |
| | or ``rejected_messages`` and ``rejected_images`` |

An image may also be a part of a message, where the row has no ``images``. Texts come back as they are, so
that an audit sees white space around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmedpo_ray.datasets.cleaning import clean
from mmedpo_ray.datasets.unusable import UnusableError

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
    preferred, other = row.get("chosen"), row.get("rejected")
    prompt = row.get("prompt")
    if prompt is None and isinstance(preferred, str) and isinstance(other, str):
        prompt, preferred, other = _common_beginning(preferred, other)
    chosen, rejected = _messages(preferred, _ASSISTANT), _rejected(other)
    if prompt is not None:
        asked = _messages(prompt, _USER)
    else:
        asked = chosen[:-1]
        if _questions(asked) != _questions(rejected[:-1]):
            raise UnusableError("malformed_conversation", "chosen and rejected do not begin alike")
        chosen, rejected = chosen[-1:], rejected[-1:]
    return _preference(row, asked, chosen, rejected)


def from_llama_factory(row: dict[str, Any]) -> Preference:
    """A row of LLaMA-Factory's ranking data, in its ShareGPT, OpenAI or Alpaca layout.

    Raises:
        UnusableError: it is none, or has several turns.
    """
    talk = _first(row, "conversations", "messages")
    if talk is None:
        if row.get("history"):
            raise UnusableError("several_turns")
        parts = (_first(row, "instruction", "prompt"), _first(row, "input", "query"))
        talk = "\n".join(part for part in parts if isinstance(part, str) and part)
        if not talk:
            raise UnusableError("empty_question")
    chosen, rejected = _messages(row.get("chosen"), _ASSISTANT), _rejected(row.get("rejected"))
    return _preference(row, _messages(talk, _USER), chosen, rejected)


def from_swift(row: dict[str, Any]) -> Preference:
    """A row of ms-swift's RLHF data.

    Raises:
        UnusableError: it is none, or has several turns.
    """
    talk = _first(row, "messages", "conversations")
    if talk is None:
        asked, chosen = _messages(row.get("query"), _USER), _messages(row.get("response"), _ASSISTANT)
    else:
        messages = _messages(talk, _USER)
        asked, chosen = messages[:-1], messages[-1:]
    if row.get("rejected_response") is not None:
        rejected = _rejected(row["rejected_response"])
    elif row.get("rejected_messages") is not None:
        other = _messages(row["rejected_messages"], _USER)
        if other[:-1] and _questions(other[:-1]) != _questions(asked):
            raise UnusableError("malformed_conversation", "chosen and rejected do not begin alike")
        rejected = other[-1:]
    else:
        # The same answer beside another image.
        rejected = chosen if row.get("rejected_images") else _rejected(None)
    return _preference(row, asked, chosen, rejected)


PREFERENCE_FORMATS: dict[str, Callable[[dict[str, Any]], Preference]] = {
    "trl": from_trl,
    "llama_factory": from_llama_factory,
    "swift": from_swift,
}


def format_of(row: Any) -> str | None:
    """The format that a row looks like; None for another one."""
    if not isinstance(row, dict):
        return None
    if row.keys() & {"rejected_response", "rejected_messages", "rejected_images"}:
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
    keys: dict[str, tuple[str, ...]] = {"chosen": ("chosen",), "rejected": ("rejected",)}
    if name == "swift":
        keys = {
            "chosen": ("messages", "conversations", "response"),
            "rejected": ("rejected_response", "rejected_messages"),
        }
    found, sides = dict(row), []
    for side, names in keys.items():
        key = next((each for each in names if row.get(each) is not None), None)
        if key is not None and (value := _stripped(row[key])) != row[key]:
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


def _first(row: dict[str, Any], *keys: str) -> Any:
    """The first of these members that is not null; rows of a Parquet file have them all."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    images: tuple[Any, ...] = ()


def _messages(value: Any, role: Sequence[str]) -> list[_Message]:
    """The messages of a conversation without system prompts; a text is one message of the given role."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        if len(set(value)) > 1:
            raise UnusableError("several_answers", f"{len(value)} strings where one is expected")
        value = value[0]
    if isinstance(value, str | bool | int | float):
        return [_Message(role[0], _text(value))]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UnusableError("malformed_conversation", "no list of messages")
    found = []
    for each in value:
        content = each.get("content", each.get("value"))
        found.append(_Message(str(each.get("role", each.get("from"))), _text(content), _parts(content)))
    return [message for message in found if message.role not in _SYSTEM]


def _questions(talk: Sequence[_Message]) -> list[tuple[str, str]]:
    """Roles and contents of messages, without image placeholders."""
    return [(message.role, clean(message.text)) for message in talk]


def _rejected(value: Any) -> list[_Message]:
    if value is None:
        raise UnusableError("no_rejected_answer")
    return _messages(value, _ASSISTANT)


def _common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two strings into their common prompt and two answers, where TRL splits them.

    That is before the first letter that differs, or the space before it.
    """
    letters = enumerate(zip(chosen, rejected, strict=False))
    length = next((at for at, (one, other) in letters if one != other), min(len(chosen), len(rejected)))
    if chosen[length - 1 : length] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _text(content: Any) -> str:
    """The text of a message, which may be a list of parts; images among them stand for themselves."""
    if isinstance(content, str):
        return content
    if isinstance(content, bool | int | float):
        return clean(content)
    if not isinstance(content, list):
        raise UnusableError("malformed_conversation", "a message without text")
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(part for part in parts if isinstance(part, str))


def _parts(content: Any) -> tuple[Any, ...]:
    """What names or holds the images among the parts of a message."""
    if not isinstance(content, list):
        return ()
    parts = [part for part in content if isinstance(part, dict)]
    found = (part.get(key) for part in parts for key in ("image", "image_url", "url", "path"))
    return tuple(image for image in found if image is not None)


def _preference(
    row: dict[str, Any], asked: Sequence[_Message], chosen: Sequence[_Message], rejected: Sequence[_Message]
) -> Preference:
    """The pair of one question with two answers; image and score are the row's."""
    if len(asked) != 1:
        raise UnusableError(
            "several_turns" if asked else "empty_question", f"{len(asked)} messages before the answer"
        )
    if asked[0].role not in _USER:
        raise UnusableError("malformed_conversation", "the first message is no user's")
    return Preference(
        asked[0].text,
        _answer(chosen),
        _answer(rejected),
        _first(row, "images", "image") or list(asked[0].images),
        row.get("rejected_images") or None,
        _first(row, "score", "weighted_score"),
    )


def _answer(talk: Sequence[_Message]) -> str:
    if len(talk) != 1:
        raise UnusableError(
            "several_turns" if talk else "empty_answer", f"{len(talk)} messages as the answer"
        )
    if talk[0].role not in _ASSISTANT:
        raise UnusableError("malformed_conversation", "the answer is no assistant's")
    return talk[0].text
