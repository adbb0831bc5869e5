"""A mention in an answer, and the concepts that can replace it in its spelling, number and article."""

from __future__ import annotations

import re
from functools import cached_property

from mmedpo_ray.radiology.edits.edit import (
    NEAR,
    article_of,
    capitalise,
    is_bare,
    is_plural,
    is_uncounted,
    like,
    plural,
)
from mmedpo_ray.radiology.lexicon.vocabulary import Concept, Mention
from mmedpo_ray.radiology.word_lists import load

_LISTS = load("edits")
_GRADED = frozenset(_LISTS["graded"])
FAMILY = {name: frozenset(family) for family in _LISTS["families"] for name in family}
_PAIRED = frozenset(_LISTS["paired"])
_ONE_PER_SIDE = frozenset(_LISTS["one_per_side"])
_COUNTERPARTS = load("counterparts")
# Words around a finding that fit its whole family only by chance: a measure, a lobe, a stage of healing.
_FITTED = re.compile(
    r"\b(?:\d|lobe|lobar|segment\w*|calcified|compression|healed|displaced|simple|multiple|several|spiculated|cavitary|patchy|confluent|"
    r"loculated|layering|one|two|three|four|small|large|tiny|trace|mild|minimal|moderate|severe|consistent|compatible|"
    r"suggest\w*|tip|terminat\w*|leads?|amount)",
    re.IGNORECASE,
)
# What has a size that can be enlarged.
_SIZABLE = re.compile(
    r"\b(?:heart|silhouettes?|size|liver|spleen|kidneys?|pancreas|gallbladder|glands?|ventricles?|sulci|bladder|uterus|ovar\w+|"
    r"prostate|aorta|hila|hilum|thyroid|ducts?|nodes?|cisterns)\b[^.;:]*(?: "
    r"(?:is|are|appears?|remains?|of)|:) (?:grossly )?$",
    re.IGNORECASE,
)
_IN_SIZE = re.compile(r" in size\b(?! and\b)", re.IGNORECASE)
# Sides: "both lungs are" cannot become "the left lung are"; "left middle lobe" does not exist.
_PLURAL_VERB = re.compile(r"\s+(?:are|were|have|show|demonstrate|appear|remain)\b", re.IGNORECASE)
_PAIRED_NOUNS = re.compile(
    r"^(\s+(?:[\w-]+ "
    r"){0,2}?(?:lung|kidney|hemisphere|breast|ventricle|lobe|base|zone|field|hip|knee|shoulder|ankle|wrist|leg|arm|"
    r"hand|eye|orbit|adrenal gland|adrenal|ureter))s\b(?! (?:are|were|have|show|bases|fields|zones))",
    re.IGNORECASE,
)
_VERB_FOR_MANY = re.compile(r"\b(?:are|were|have|show|demonstrate|appear|remain)\b", re.IGNORECASE)
_DESCRIBING = re.compile(r"\s+(?:(?!(?:and|or|with|in|of|at)\b)[\w-]+ ){0,3}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;:\n](?:\s|$)")
# "The opacities are bilateral": a side alone is no predicate.
_PREDICATE = re.compile(r"\b(?:is|are|was|were|be|appears?|remains?) $", re.IGNORECASE)
_HAS_A_SIZE = re.compile(
    r"\s*(?:$|[.,;:]|in size|to |and |or "
    r"|size|amount|volume|quantity|number|collection|hematoma|area|amounts)",
    re.IGNORECASE,
)
# What has a middle beside an upper and a lower part.
_HAS_A_MIDDLE = re.compile(
    r"\s+(?:lobes?|lobar|zones?|lungs?|thirds?|fields?|parts?|portions?|regions?|segments?|aspects?|mediastin\w+|abdom\w+|esophag\w+|"
    r"oesophag\w+|thora\w+|rectum|ureter|pole|trachea)\b",
    re.IGNORECASE,
)
_MIDDLE_LOBE = re.compile(r"\s+mid(?:dle)? lobe", re.IGNORECASE)
_BEFORE_A_NAMED_SIDE = re.compile(r"\b(?:the|on|to|from|towards?|both|an?)\s+(?:\w+ )?$", re.IGNORECASE)
# What stands before a mention: an article, perhaps with words between; a verb that wants one.
_ARTICLE = re.compile(r"\b(an?) ((?:\w+ )*)$", re.IGNORECASE)
_ARTICLE_WANTED = re.compile(
    r"\b(?:is|was|shows?|with|demonstrates?|reveals?|has|have|represents?|reflects?) "
    r"(?:(?:likely|probably|possibly|now|again|also|still) )?((?:(?!(?:the|no|any)\b)[\w-]+ ){0,4})$",
    re.IGNORECASE,
)
# Between the verb and the finding only what describes it.
_CONNECTIVE = re.compile(
    r"\b(?:in|of|at|on|by|for|to|from|and|or|with|the|an?|no|not|likely|due|is|are|within)\b", re.IGNORECASE
)
_OF = re.compile(r"\b(?:of|amount of|area of|mm of|cm of) (?:[\w-]+ )?$", re.IGNORECASE)
_DEGREE = re.compile(
    r"\b(mild|minimal|slight|small|large|moderate|severe|trace|tiny)\s(?:\w+ ){0,2}$", re.IGNORECASE
)
_AT_AN_END = re.compile(r"\s*(?:$|[.,;:])")


class Slot:
    """A mention in an answer, which other concepts can replace in its spelling, number and article.

    Args:
        answer: the answer.
        found: its mentions, in order.
        index: which of them can be exchanged.
    """

    def __init__(self, answer: str, found: tuple[Mention, ...], index: int) -> None:
        mention = self._mention = found[index]
        self._following = found[index + 1 :]
        self._surface = answer[mention.start : mention.end]
        self._before, self._after = answer[: mention.start], answer[mention.end :]
        self._near = max(0, mention.start - NEAR)
        self._many = is_plural(self._surface, mention)

    @cached_property
    def _article(self) -> re.Match[str] | None:
        return _ARTICLE.search(self._before, self._near)

    @cached_property
    def is_whole(self) -> bool:
        """Whether the mention is the whole answer."""
        return not f"{self._before}{self._after}".strip(" .,;:!?\n")

    @cached_property
    def is_fitted(self) -> bool:
        """Whether words around a finding describe its kind, so that another kind would not fit."""
        before = self._before[max(self._before.rfind("."), self._before.rfind(";")) + 1 :]
        return (
            _FITTED.search(before) is not None or _FITTED.search(self._after.partition(". ")[0]) is not None
        )

    def filled(self, target: Concept) -> str | None:
        """The answer with the mention exchanged; None where the target would not fit."""
        surface, before, after = self._surface, self._before, self._after
        if surface in ("L", "R"):
            return before + ("R" if surface == "L" else "L") + after
        if not self._takes(target):
            return None
        spelled = self._counterpart(target)
        if spelled is None:
            return None
        axis = self._mention.concept.axis
        if axis == "finding":
            return self._with_finding(target, spelled)
        if axis == "side" and self._mention.concept.name == "bilateral":
            return self._on_one_side(like(surface, spelled))
        if axis == "state" and target.name == "enlarged":
            after = _IN_SIZE.sub("", after, count=1) if _IN_SIZE.match(after) else after
        # "Lungs" becomes "Kidneys", but "Heart".
        many = self._many and (axis != "anatomy" or target.name in _PAIRED)
        spelled = like(surface, plural(target, spelled) if many else spelled)
        if surface[:1].isupper() and (
            not before.strip() or before.rstrip().endswith((".", ";", ":", "!", "?"))
        ):
            spelled = capitalise(spelled)
        article = self._article
        if article and not article.group(2):
            word = like(article.group(1), article_of(spelled))
            return f"{before[: article.start()]}{word} {spelled}{after}"
        return before + spelled + after

    def _on_one_side(self, side: str) -> str | None:
        """The answer with one side in the place of both, and what is there once a side in the singular."""
        before, after = self._before, self._after
        finding = next((m for m in self._following if m.concept.name in _ONE_PER_SIDE), None)
        if finding is None or not self._describes(finding) or not self._is_plural(finding):
            return before + side + _PAIRED_NOUNS.sub(r"\1", after, count=1)
        sentence = before[max((end.end() for end in _SENTENCE_END.finditer(before)), default=0) :]
        if _VERB_FOR_MANY.search(sentence + _SENTENCE_END.split(after)[0]):
            return None
        start, end = finding.start - self._mention.end, finding.end - self._mention.end
        one = like(after[start:end], finding.concept.forms[finding.form].replace("thoraces", "thorax"))
        wanted = _ARTICLE_WANTED.search(before, self._near)
        if wanted:
            described = wanted.group(1) + side
            side = f"{article_of(described)} {described}"
            before = before[: wanted.start(1)]
        return before + side + after[:start] + one + after[end:]

    def _describes(self, finding: Mention) -> bool:
        """Whether only a few other words that describe it stand before the finding."""
        return _DESCRIBING.fullmatch(self._after[: finding.start - self._mention.end]) is not None

    def _is_plural(self, mention: Mention) -> bool:
        return is_plural(self._spelling(mention), mention)

    def _with_finding(self, target: Concept, spelled: str) -> str | None:
        """The answer with another finding, and the article that its kind of noun wants."""
        before, after, surface = self._before, self._after, self._surface
        uncounted = is_uncounted(target, spelled)
        if self._many:
            if uncounted:
                # "Gallstones" as a whole answer becomes "Pancreatitis"; a sentence has a verb for many.
                return before + like(surface, spelled) + after if self.is_whole else None
            return before + like(surface, plural(target, spelled)) + after
        begins = not before.strip() or before.rstrip().endswith((".", ";", ":", "!", "?"))
        if begins and surface[:1].isupper():
            spelled = capitalise(like(surface, spelled))
        else:
            spelled = like(
                surface if surface.isupper() or not surface[1:2].isupper() else surface.lower(), spelled
            )
        article = self._article
        if article and not _CONNECTIVE.search(article.group(2)):
            described = article.group(2)
            start = before[: article.start()]
            said = described + spelled
            if uncounted:
                return start + (capitalise(said) if article.group(1)[0].isupper() else said) + after
            return f"{start}{like(article.group(1), article_of(said))} {said}{after}"
        if uncounted or not is_bare(surface.lower(), self._mention):
            return before + spelled + after
        if _OF.search(self._before, self._near):
            return None
        wanted = _ARTICLE_WANTED.search(self._before, self._near)
        if wanted and not _CONNECTIVE.search(wanted.group(1)):
            said = wanted.group(1) + spelled
            return f"{before[: wanted.start(1)]}{article_of(said)} {said}{after}"
        return before + spelled + after

    def _takes(self, target: Concept) -> bool:
        """Whether the target makes sense between the words around it."""
        before, axis = self._before, self._mention.concept.axis
        if axis == "zone":
            return target.name != "middle" or self._takes_the_middle()
        if axis == "side":
            return self._takes_side(target.name)
        if axis == "state":
            return target.name != "enlarged" or self.is_whole or self._is_sizable
        if axis == "anatomy":
            has_side = before.lower().endswith(("left ", "right ", "bilateral ", "both "))
            return not has_side or target.name in _PAIRED
        if axis == "finding":
            return self._takes_degree_of(target)
        # "Chest radiographs" are no "chest pets".
        return not (self._many and target.name == "pet")

    def _takes_the_middle(self) -> bool:
        """Whether there is a middle one: of lobes on the right only, of a finger or a quadrant never."""
        if self._after.startswith(" lobe"):
            return not self._before.lower().endswith("left ")
        is_part = self._surface.lower() in ("upper", "lower")
        return not is_part or self.is_whole or _HAS_A_MIDDLE.match(self._after) is not None

    def _takes_side(self, side: str) -> bool:
        after = self._after
        if _MIDDLE_LOBE.match(after):
            return False
        if self._mention.concept.name == "bilateral":
            return not _PLURAL_VERB.match(after)
        if side != "bilateral" or self.is_whole:
            return True
        finding = next((m for m in self._following if m.concept.axis == "finding"), None)
        return (
            finding is not None
            and is_bare(self._spelling(finding), finding)
            and not _BEFORE_A_NAMED_SIDE.search(self._before, self._near)
        )

    def _spelling(self, mention: Mention) -> str:
        shift = self._mention.end
        return self._after[mention.start - shift : mention.end - shift].lower()

    @cached_property
    def _is_sizable(self) -> bool:
        if _SIZABLE.search(self._before):
            return _IN_SIZE.match(self._after) is not None or _AT_AN_END.match(self._after) is not None
        following = self._following[:1]
        return bool(
            following
            and following[0].concept.group in ("organ", "thoracic organ")
            and following[0].concept.name not in ("lung", "trachea", "diaphragm")
            and not self._after[: following[0].start - self._mention.end].strip()
            and not self._before.strip()
        )

    def _takes_degree_of(self, target: Concept) -> bool:
        """ "a small effusion" is no "small edema", "mild cardiomegaly" no "mild pneumothorax"."""
        degree = _DEGREE.search(self._before, self._near)
        if degree is None:
            return True
        if degree.group(1).lower() in ("small", "large", "tiny"):
            return target.name not in _GRADED
        name = self._mention.concept.name
        return name in FAMILY or name not in _GRADED or target.name in _GRADED

    def _counterpart(self, target: Concept) -> str | None:
        """How the target is spelled in the place of the mention; None where it has no such form."""
        low = self._surface.lower()
        if (
            low == "bilateral"
            and _PREDICATE.search(self._before, self._near)
            and _AT_AN_END.match(self._after)
        ):
            return f"{target.name}-sided"
        counterparts = _COUNTERPARTS.get(target.name, {})
        if low in counterparts:
            return counterparts[low]
        if self._many and target.axis == "zone":
            return None
        if low == "middle" and self._after.startswith(" of"):
            return "top" if target.name == "upper" else "bottom"
        if low == "moderate" and self._is_a_degree:
            return "mild" if target.name == "small" else "severe"
        aligned = min(target.aligned, len(target.forms))
        return target.forms[self._mention.form if self._mention.form < aligned else 0]

    @property
    def _is_a_degree(self) -> bool:
        """Whether a "moderate" tells how severe something is, not how large."""
        if self._graded is not None or self.is_whole:
            return self._graded in _GRADED
        return _HAS_A_SIZE.match(self._after) is None

    @property
    def _graded(self) -> str | None:
        """The finding that a degree belongs to."""
        return next((m.concept.name for m in self._following if m.concept.axis == "finding"), None)
