"""The texts of answers as metrics read them, and the scripts that can be scored."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

from mmedpo_ray.metrics.base import is_empty
from mmedpo_ray.radiology.lexicon import final_answer, same_characters
from mmedpo_ray.radiology.lexicon.normalisation import HAN

_KEPT = 8192


@lru_cache(maxsize=_KEPT)
def reference_text(text: str) -> str:
    """The final answer with blanks around each Chinese character, as BLEU and ROUGE expect words."""
    return " ".join(HAN.sub(r" \g<0> ", same_characters(final_answer(text))).split())


def prediction_text(prediction: str) -> str:
    """The same for a prediction; "" if it has no word, so that "." matches no full stop."""
    return "" if is_empty(prediction) else reference_text(prediction)


def words(text: str) -> list[str]:
    """The words between blanks, in lower case, punctuation kept, as nltk and pycocoevalcap take them."""
    return text.lower().split()


# Of the letters of a text, this share may be of another script: a name, a symbol.
_FOREIGN_SHARE = 0.2
_SCRIPTS = frozenset({"LATIN", "GREEK", "CJK", "IDEOGRAPHIC", "MODIFIER"})


def unsupported_script(text: str) -> str | None:
    """The script of a text that the metrics cannot read, such as "Arabic"; None if they can.

    Latin, Greek letters and Chinese are supported.
    """
    if text.isascii():
        return None
    letters = [letter for letter in same_characters(text) if letter.isalpha()]
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split(" ")[0] for letter in letters)
    foreign = Counter({script: count for script, count in scripts.items() if script not in _SCRIPTS})
    if foreign.total() <= _FOREIGN_SHARE * len(letters):
        return None
    return foreign.most_common(1)[0][0].title()
