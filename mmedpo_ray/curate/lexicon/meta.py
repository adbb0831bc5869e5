"""Text that is about the task instead of the image: leaked prompts, role tags, refusals, notes about the making of a pair.

One definition for the filter of text pairs, for ingest and for the audit. The patterns are in small letters and keep to what
Python's `re` and RE2 (in which Arrow searches a whole column) have in common.
"""

from __future__ import annotations

import re

from mmedpo_ray.curate.terms import lowered

# Lines of the prompt that made the pair, or of a chat template, repeated in an answer.
LEAKED_PROMPT = (
    r"^\W*(question|original answer|candidate ?answer ?\d*)\W*:|<\s*image\s*>|\[/?inst\]|</?s>"
    r"|\b(user|assistant|human|gpt)\s*:|<\|[a-z_]+\|>"
)

_CANNOT = r"(cannot|can ?not|can['’]?t|could not|couldn['’]?t|am (currently )?unable to|am not able to|am not allowed to)"
_PICTURE = r"(image|picture|photo|photograph|file|attachment)s?"
_IS_NOT = r"(is|was|are|were|has|have|can|could|does|did)( not|n['’]?t)( been| be)?|cannot be"
_SHOWN = (
    r"(visible|available|provided|attached|shown|displayed|accessible|included|uploaded|supplied|given|loaded|load|seen|viewed|"
    r"opened|readable)"
)
_EDITED = r"(changed|replaced|modified|altered|swapped|rewrote|rewritten|edited|substituted|flipped|inverted|negated)"
_VERDICT = r"(wrong|incorrect|correct|inaccurate|accurate|invalid|implausible|not correct|not accurate)"

_I = ("i ", "i'", "i’", "im ", "ive ")
_PICTURES = ("image", "picture", "photo", "file", "attachment")
# Refusals, and talk about answers and their making. A report that "cannot exclude" something is none of these.
# Each: pieces of which one must be there, since to look for those is quick, and the pattern.
_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("sorry", "apolog"), r"\b(sorry|apologi[sz]e|apologies)\b"),
    (("as a",), r"\bas an? (\w+ ){0,2}(ai|language model|assistant|chatbot)\b"),
    (_I, r"\bi(['’]?m| am) (just |only )?an? (\w+ ){0,2}(ai|language model|assistant|chatbot)\b"),
    (
        _I,
        rf"\bi {_CANNOT} (\w+ly )?(see|view|open|access|answer|provide|assist|help|comply|respond|process|interpret|analy[sz]e|"
        r"determine|identify|tell|say|diagnose|give|offer|confirm|verify|do that|do this)\b",
    ),
    (_I, r"\bi(['’]?m| am) (currently )?(unable|not able|not allowed)\b"),
    (
        _I,
        r"\bi do( not|n['’]?t) (\w+ly )?(have (access|enough information|the ability)|see an? image)\b",
    ),
    (
        _PICTURES,
        rf"\b(cannot|can ?not|can['’]?t|unable to|not able to) (\w+ly )?(see|view|open|access|load|display|process) "
        rf"(the|this|that|your|any|an?) (\w+ )?{_PICTURE}\b",
    ),
    # At the start of a clause, so that a lesion in the image may well be not visible.
    (
        _PICTURES,
        rf"(^|[.,;:!?]\s*|\b(but|as|since|because|that|and) )(the|this|that|your) (\w+ )?{_PICTURE} (itself )?({_IS_NOT}) {_SHOWN}\b",
    ),
    (_PICTURES, rf"\bno {_PICTURE} (is |was |were |are |has been |have been )?{_SHOWN}\b"),
    (
        ("please",),
        rf"\bplease (provide|upload|attach|share|send) (\w+ ){{0,3}}({_PICTURE}|question|information|details|context)\b",
    ),
    (
        ("answer",),
        r"\b(original|provided|given|correct|incorrect|wrong|chosen|rejected|(dis)?preferred|reference|previous|candidate|"
        r"ground[- ]truth|expected|modified|rewritten|altered|edited|plausible|hallucinated)\W* ?answers?\b",
    ),
    (("answer",), r"\bcandidate ?answer ?\d*\b"),
    (("answer",), rf"\b(the|this|that|my|your) answer (is|was|seems|appears|would be) {_VERDICT}\b"),
    (_I, rf"\bi(['’]?ve| have)? (just |only |also |simply )?{_EDITED}\b"),
    (
        ("note", "nb", "n.b.", "explanation", "rationale", "change", "edit", "modification"),
        rf"^\W*(note|nb|n\.b\.|explanation|rationale|changes?|edit|modification)s?\s*:.*\b({_EDITED}|answer|question)\b",
    ),
    (
        ("here",),
        r"\bhere(['’]?s| is) (the|an?|my|your|one) (\w+ )?(answer|response|rewrite|edit|version|sentence|rewritten|edited|modified)\b",
    ),
)
COMMENTARY = "|".join(pattern for _, pattern in _RULES)

_LEAK = re.compile(LEAKED_PROMPT, re.MULTILINE)
_COMMENTS = tuple((pieces, re.compile(pattern, re.MULTILINE)) for pieces, pattern in _RULES)


def is_meta_text(text: str) -> bool:
    """Whether the text talks about the task instead of the image: leaked prompts, role tags, refusals, notes on an edit."""
    low = lowered(text)
    if _LEAK.search(low):
        return True
    return any(
        any(piece in low for piece in pieces) and pattern.search(low) is not None
        for pieces, pattern in _COMMENTS
    )
