"""Multiple-choice questions: options by letter in the question, and the same question with them rotated."""

from __future__ import annotations

from collections.abc import Sequence

from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.annotations import Turn

LETTERS = "ABCDEFGH"


def choice_turns(question: str, options: Sequence[str], right: int, *, rotate: bool) -> list[Turn]:
    """A multiple-choice question as closed turns; an answer may name the option's letter or its words.

    Args:
        question: what is asked.
        options: two to eight.
        right: place of the right one.
        rotate: also with the options rotated by one, two, …, so that the right one stands once in every
            place: a model that prefers a letter gains nothing by it.

    Raises:
        UnusableError: ``malformed_options``: too few, too many, empty or equal ones.
    """
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        raise UnusableError("malformed_options", f"{len(options)} options, of which some may be empty")
    if len({option.lower() for option in options}) < len(options):
        raise UnusableError("malformed_options", "two options are equal")
    turns = []
    for shift in range(len(options) if rotate else 1):
        shown = [*options[shift:], *options[:shift]]
        listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, shown, strict=False))
        turns.append(Turn(f"{question}\n{listed}", options[right], "closed"))
    return turns
