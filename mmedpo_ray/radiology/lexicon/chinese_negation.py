"""What Chinese answers deny: 不是左肺，是右肺 states the right lung, 不健康 is not 健康."""

from __future__ import annotations

import re

_DENIED = re.compile(r"(?:不是|而不是|而非|并非|並非|没有|沒有|排除|不在)[^,.;:!?，。；：！？]*")
_NOT = re.compile(r"[不没沒无無非未]$")
_OPPOSITES = (("左", "右"), ("上", "下"), ("前", "后"), ("前", "後"), ("内", "外"), ("內", "外"))


def without_denied(text: str) -> str:
    """The text with a blank in place of every clause from its denial on."""
    return _DENIED.sub(" ", text)


def states(text: str, wanted: str) -> bool:
    """Whether the characters stand in a text without a negation right before their first occurrence."""
    before, found, _ = text.partition(wanted)
    return bool(wanted and found) and _NOT.search(before) is None


def names_opposite(text: str, wanted: str) -> bool:
    """Whether a text names left for right, or up for down, beside what is wanted."""
    return any(
        one in wanted and other not in wanted and other in text
        for pair in _OPPOSITES
        for one, other in (pair, pair[::-1])
    )
