"""Writes a dispreferred answer by changing one fact of the reference: a side, a finding, a negation, a zone, a number.

What is left is word for word the reference, so that length and style give nothing away and the preference is about
the fact alone. Every edit is checked with the lexicon to conflict with the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache

import numpy as np

from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.edits import (
    Edit,
    article_of,
    capitalise,
    is_bare,
    is_plural,
    is_uncounted,
    like,
    plural,
)
from mmedpo_ray.curate.negation import clear_lung_edits, negation_edits, polarity_edits, statement_edits
from mmedpo_ray.curate.terms import CONCEPTS, Concept, Mention, group_of, mentions

GENERATOR = "rule_edit"

# Findings that have no side or zone; they do not stand in where one is stated.
_MIDLINE = frozenset(
    {"cardiomegaly", "pneumoperitoneum", "mediastinal widening", "interstitial lung disease"}
)
_EXCLUSIVE_OPPOSITE = {"normal": ("abnormal", "enlarged"), "enlarged": ("normal",), "abnormal": ("normal",)}
_NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT = re.compile(
    r"(?<![\w./])(\d{1,3}|"
    + "|".join(_NUMBER_NAMES)
    + r")(st|nd|rd|th)?(?![\w/]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%|[\s-]*(?:second|minute|hour|day|week|month|year)s?\b)",
    re.IGNORECASE,
)
# "1. Effusion. 2. Nodule.": the number of a list's item is no count.
_LISTED = re.compile(r"(?:^|[.;:\n]\s*)\d{1,3}[.)]\s")
_WHOLE_NORMAL_WORDS = 4
# Groups whose concepts list this many spellings in the same order ("left-sided", "right-sided").
_ALIGNED_FORMS = {
    "side": 5,
    "modality": 3,
    "sequence": 3,
    "contrast": 2,
    "depth": 2,
    "axiality": 2,
    "intensity": 5,
    "density": 4,
    "margin": 3,
    "symmetry": 2,
    "spread": 2,
}
# Spellings whose counterpart is another than the concept's first: (spelling, concept) → spelling; None: there is none.
_COUNTERPARTS: dict[tuple[str, str], str | None] = {
    ("left-sided", "bilateral"): "bilateral",
    ("right-sided", "bilateral"): "bilateral",
    ("leftward", "bilateral"): None,
    ("rightward", "bilateral"): None,
    ("left-hand", "bilateral"): None,
    ("right-hand", "bilateral"): None,
    ("bilaterally", "left"): "on the left",
    ("bilaterally", "right"): "on the right",
    ("both sides", "left"): "the left side",
    ("both sides", "right"): "the right side",
    ("both lungs", "left"): "the left lung",
    ("both lungs", "right"): "the right lung",
    ("hyperintensity", "isointense"): None,
    ("hypointensity", "isointense"): None,
    ("hyper intense", "isointense"): "iso intense",
    ("gray", "hyperintense"): "white",
    ("gray", "hypointense"): "black",
    ("grey", "hyperintense"): "white",
    ("grey", "hypointense"): "black",
    ("apical", "lower"): "basal",
    ("apical", "middle"): "perihilar",
    ("apex", "lower"): "base",
    ("top", "lower"): "bottom",
    ("superior", "lower"): "inferior",
    ("inferior", "upper"): "superior",
    ("bottom", "upper"): "top",
    ("base", "upper"): "apex",
    ("basal", "upper"): "apical",
    ("basilar", "upper"): "apical",
    ("basilar", "middle"): "perihilar",
    ("bibasilar", "upper"): "biapical",
    ("bibasilar", "middle"): "bilateral perihilar",
    ("mild", "large"): "severe",
    ("mildly", "moderate"): "moderately",
    ("mildly", "large"): "severely",
    ("slight", "large"): "marked",
    ("minimal", "large"): "extensive",
    ("moderately", "small"): "mildly",
    ("moderately", "large"): "severely",
    ("severe", "small"): "mild",
    ("severely", "small"): "mildly",
    ("severely", "moderate"): "moderately",
    ("marked", "small"): "slight",
    ("extensive", "small"): "minimal",
}
# What has a degree rather than a size: "moderate edema" is mild or severe, "a moderate effusion" small or large.
_GRADED = frozenset(
    {
        "cardiomegaly",
        "atelectasis",
        "pulmonary edema",
        "emphysema",
        "interstitial lung disease",
        "hydrocephalus",
    }
    | {
        "midline shift",
        "mass effect",
        "edema",
        "atrophy",
        "hydronephrosis",
        "cirrhosis",
        "inflammation",
        "obstruction",
    }
    | {"hepatomegaly", "pancreatitis", "lymphadenopathy"}
)
# Findings that look alike or sit alike, so that one can stand in a sentence made for another: "calcified granuloma" and "5 mm
# nodule", never "5 mm pneumothorax". One that is in no family stands in for none, but where it is all of an answer.
_FAMILIES: tuple[frozenset[str], ...] = tuple(
    frozenset(family.split("|"))
    for family in (
        "pleural effusion|pneumothorax",
        "consolidation|pneumonia|atelectasis|opacity|pulmonary edema",
        "nodule|granuloma",
        "emphysema|interstitial lung disease",
        "hemorrhage|infarct|edema",
        "hydrocephalus|atrophy",
        "midline shift|mass effect",
        "subdural hematoma|epidural hematoma|subarachnoid hemorrhage",
        "appendicitis|diverticulitis|pancreatitis",
        "gallstone|kidney stone",
        "inflammation|obstruction",
        "mass|lesion|cancer|cyst|abscess|metastasis|calcification",
        "endotracheal tube|nasogastric tube",
        "central line|chest tube",
    )
)
# Findings that stand in only for a whole answer: "two cancers" is no radiologist's phrase.
_ONLY_ALONE = frozenset({"cancer"})
_FAMILY = {name: family for family in _FAMILIES for name in family}
# Words around a finding that fit its whole family only by chance: a measure, a lobe, a stage of healing.
_FITTED = re.compile(
    r"\b(?:\d|lobe|lobar|segment\w*|calcified|compression|healed|displaced|simple|multiple|several|spiculated|cavitary|patchy|confluent|"
    r"loculated|layering|one|two|three|four|small|large|tiny|trace|mild|minimal|moderate|severe|consistent|compatible|"
    r"suggest\w*|tip|terminat\w*|leads?|amount)",
    re.IGNORECASE,
)
# "The lungs are clear", "the lungs show …": what is said of one organ makes no sense of another.
_SUBJECT_OF = re.compile(
    r"\s+(?:fields?\s+)?(?:is|are|was|were|has|have|appears?|remains?|shows?|demonstrates?|reveals?)\b",
    re.IGNORECASE,
)
# An anatomy can change only where it stands alone: neither has it a modifier of its own ("thoracic spine") nor is it one
# ("lung base", "head of the pancreas", "heart size").
_STANDS_ALONE_BEFORE = re.compile(
    r"(?:^|[.,;:(/\n*]\s*|(?:^|\s)-\s*|\b(?:the|a|an|this|of|in|on|at|to|from|for|within|into|near|through|over|and|or|is|are|both|left|right|"
    r"bilateral|ct|mri|mr|pet|enlarged|normal|abnormal|entire|whole|scan|see|shows?)[\s:]+)$",
    re.IGNORECASE,
)
_STANDS_ALONE_AFTER = re.compile(
    r"\s*(?:$|[.,;:)/?!]|(?:and|or|is|are|was|in|on|at|to|with|without|from|by|due|ct|mri|mr|x-ray|xray|x ray|radiograph|scan|"
    r"image|imaging|film|ultrasound)\b)",
    re.IGNORECASE,
)
_PART_OF = re.compile(
    r"\b(?:lobes?|head|tail|neck|body|base|apex|dome|segments?|poles?|wall|horn|margin|border|aspect|half|tip|surface|uncinate|"
    r"side|part|portions?|cortex|hilum|arch|root)\s+of\s+(?:the\s+)?(?:left\s+|right\s+)?$",
    re.IGNORECASE,
)
_PAIRED = frozenset(
    {
        "lung",
        "kidney",
        "adrenal gland",
        "cerebellum",
        "thalamus",
        "basal ganglia",
        "frontal lobe",
        "parietal lobe",
    }
    | {"temporal lobe", "occipital lobe"}
)
# Adjectives stand before what they name; their counterparts in the other spellings of the group are adjectives as well.
_ADJECTIVES = frozenset(
    {"hepatic", "splenic", "renal", "pancreatic", "gastric", "adrenal", "pulmonary", "cardiac"}
)
# Groups of findings that belong to one part of the body, so that no other part can have them.
_PLACED_GROUPS = frozenset({"chest", "brain", "bleeding", "abdomen", "device"})
_MOVABLE_ANATOMY = frozenset({"lobe", "brain part", "matter"})
_NOT_OF_THE_CHEST = re.compile(
    r"\b(?:joint|pericardial|knee|hip|elbow|ankle|shoulder|mastoid|subdural|ear) $", re.IGNORECASE
)
# Names of views, vessels and chambers, in which a side or level is no fact of its own.
_PART_OF_A_NAME = re.compile(
    r"(?:\s+and\s+\w+)?\s+(?:views?|projections?|radiographs?|films?|vena cava|limits?|ventric\w*|atri\w+|main\w*|"
    r"circumflex|mediastinum|internal jugular|jugular|subclavian|decubitus)\b",
    re.IGNORECASE,
)
_LEVEL_OF_A_NAME = re.compile(
    r"[\s-]+(?:normal|cerebral|cerebellar|communicating|mesenteric|meningeal|cisterns?|cranial|fossa|horns?|sagittal|venous|line|catheter|"
    r"canal|pontine|sulcus|descending|thyroid|pulmonary arter\w+|ear|to)\b",
    re.IGNORECASE,
)
_SIZE_OF_A_NAME = re.compile(
    r"[\s-]+(?:bowel|intestine|vessels?|airways?|joints|cell|field|degree)\b", re.IGNORECASE
)
# "normal limits", "normal variant": no state. "mildly enlarged": nothing is mildly normal. "limits of normal" neither.
_STATE_OF_A_NAME = re.compile(
    r"[\s-]+(?:limits?|variants?|variation|pressure|saline|range|for)\b", re.IGNORECASE
)
_STATE_IN_A_PHRASE = re.compile(
    r"\b(?:limits? of |top[- ]|high |low |borderline |near |otherwise )$|\w[^\W\d_]*ly $", re.IGNORECASE
)
_GROSSLY = re.compile(r"\b(?:grossly|completely|entirely|overall) $", re.IGNORECASE)
# What has a size that can be enlarged.
_SIZABLE = re.compile(
    r"\b(?:heart|silhouettes?|size|liver|spleen|kidneys?|pancreas|gallbladder|glands?|ventricles?|sulci|bladder|uterus|ovar\w+|"
    r"prostate|aorta|hila|hilum|thyroid|ducts?|nodes?|cisterns)\b[^.;:]*(?: (?:is|are|appears?|remains?|of)|:) (?:grossly )?$",
    re.IGNORECASE,
)
_IN_SIZE = re.compile(r" in size\b(?! and\b)", re.IGNORECASE)
# Sides: "both lungs are" cannot become "the left lung are"; "left middle lobe" does not exist.
_PLURAL_VERB = re.compile(r"\s+(?:are|were|have|show|demonstrate|appear|remain)\b", re.IGNORECASE)
_PLURAL_LUNGS = re.compile(
    r"^(\s+(?:lung|kidney|hemisphere|breast|ventricle))s\b(?! (?:are|were|have|show))", re.IGNORECASE
)
_MIDDLE_LOBE = re.compile(r"\s+mid(?:dle)? lobe", re.IGNORECASE)
_BEFORE_A_NAMED_SIDE = re.compile(r"\b(?:the|on|to|from|towards?|both|an?)\s+(?:\w+ )?$", re.IGNORECASE)
_MANY = re.compile(
    r"\b(?:multiple|several|many|numerous|scattered|innumerable|two|three|few|some|these|all)\b",
    re.IGNORECASE,
)
# How far back words before a mention are looked at.
_NEAR = 64
# In running text other words hold sentences together ("the heart is …"), so only these are exchanged.
_SWAPPED_IN_REPORTS = frozenset({"finding", "side", "zone", "size"})
_SHORT_WORDS = 12
_SHORT_LETTERS = 64
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
# "The effusion is no longer seen" denies what stands before it.
_NO_LONGER = re.compile(r"[^.;:]* no longer\b", re.IGNORECASE)
_COMPOUND = re.compile(r"-\w|/\w")
_NO_COUNT_OF = re.compile(r"\s+(?:views?|images?|projections?|films?|y/?o|yrs?)\b|-\d", re.IGNORECASE)
_NUMBERED = re.compile(
    r"(?:\b(?:image|series|slice|page|phase|number|figure|no)s?\.? #?|-|#)$", re.IGNORECASE
)
_ONE_THING = re.compile(r"\s+[a-z]", re.IGNORECASE)


_EVERYTHING = frozenset(CONCEPTS)
# Words in capitals ("L" and "R" are sides by being capitals), and where a sentence begins.
_SIDE_CAPITAL = re.compile(r"[^\W_]+")
_SENTENCE_BEGIN = re.compile(r"(?:^|[.;:!?\n]\s+)[^\W\d_]")


def vocabulary_of(texts: Iterable[str]) -> frozenset[str]:
    """Names of the concepts that occur in the texts: what is plausible in this data set."""
    return frozenset(mention.concept.name for text in texts for mention in mentions(text))


def rule_edit(
    answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str] | None = None
) -> Edit | None:
    """Changes one fact of an answer, drawn evenly over the kinds of fact it states; None where it states none we know.

    Args:
        answer: reference answer.
        question: what was asked; the other option of an "A or B" question is the edit there.
        rng: source of randomness; the same state gives the same edit.
        vocabulary: concepts to prefer as replacements, see :func:`vocabulary_of`.
    """
    known = vocabulary or _EVERYTHING
    if answer.isupper() and " " in answer:
        return _shouted(answer, question, rng, known)
    return _drawn_edit(answer, question, rng, known)


def _drawn_edit(
    answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str]
) -> Edit | None:
    find = _edits_of_short if len(answer) <= _SHORT_LETTERS else _edits
    by_axis = find(answer, question, vocabulary)
    return _first_fitting(answer, question, _drawn(by_axis, rng)) or _first_fitting(
        answer, question, clear_lung_edits(answer, _lung_findings(vocabulary))
    )


def _shouted(answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str]) -> Edit | None:
    """The edit of an answer in capitals, in capitals: by the grammar of the same answer in ordinary letters."""
    small = _SENTENCE_BEGIN.sub(lambda begin: begin.group().upper(), _SIDE_CAPITAL.sub(_lower, answer))
    if small.upper() != answer:
        return None
    found = _drawn_edit(small, question, rng, vocabulary)
    if found is None:
        return None
    # "R ct" has a side, "R CT" may be anything.
    return _first_fitting(answer, question, [Edit(found.text.upper(), found.axis)])


def _lower(match: re.Match[str]) -> str:
    return match.group() if match.group() in ("L", "R") else match.group().lower()


def _drawn(by_axis: dict[str, list[Edit]], rng: np.random.Generator) -> Iterator[Edit]:
    axes = sorted(by_axis)
    for axis_index in rng.permutation(len(axes)):
        edits = by_axis[axes[axis_index]]
        for index in rng.permutation(len(edits)):
            yield edits[index]


def _first_fitting(answer: str, question: str, edits: Iterable[Edit]) -> Edit | None:
    """The first edit that contradicts the answer in one fact; where there is none, the first that contradicts it."""
    second_best = None
    for edit in edits:
        if lexicon.equivalent(answer, edit.text):
            continue
        found = lexicon.conflicts(answer, edit.text, question)
        if _is_one_fact(found):
            return edit
        if found and second_best is None:
            second_best = edit
    return second_best


def _is_one_fact(found: tuple[lexicon.Conflict, ...]) -> bool:
    # Another finding in its place is one edit but two conflicts: one missed, one invented.
    return len(found) == 1 or sorted(conflict.kind for conflict in found) == ["invented", "missed"]


def _edits(answer: str, question: str, vocabulary: frozenset[str]) -> dict[str, list[Edit]]:
    """All edits by the kind of fact that they change."""
    # A closed answer has one fact; everything behind it is comment.
    found = list(polarity_edits(answer)) or [
        *_swaps(answer, question, vocabulary),
        *negation_edits(answer),
        *statement_edits(answer),
        *_counts(answer),
        *_abnormal(answer, question, vocabulary),
    ]
    by_axis: dict[str, list[Edit]] = {}
    for edit in found:
        by_axis.setdefault(edit.axis, []).append(edit)
    return by_axis


# Short answers repeat in a data set; the edits of one take a few kilobytes.
_edits_of_short = lru_cache(maxsize=1024)(_edits)


def _lung_findings(vocabulary: frozenset[str]) -> list[tuple[str, bool]]:
    return [
        (name, CONCEPTS[name].mass_noun)
        for name in sorted(lexicon.LUNG_FINDINGS & vocabulary or lexicon.LUNG_FINDINGS)
        if name not in _MIDLINE
    ]


# ---------------------------------------------------------------------- swaps


def _swaps(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    found = mentions(answer)
    named = {mention.concept.name for mention in found}
    options = lexicon.choices(question)
    placed = any(mention.concept.axis in ("side", "zone") for mention in found)
    is_short = len(lexicon.words(answer)) <= _SHORT_WORDS
    denied = lexicon.negated_spans(answer)
    ends = "no longer" in answer.lower()
    is_normal_study = {"state", "modality"} <= {mention.concept.axis for mention in found}
    for index, mention in enumerate(found):
        axis = mention.concept.axis
        if not is_short and axis not in _SWAPPED_IN_REPORTS:
            continue
        if any(start <= mention.start < end for start, end in denied):
            continue
        if is_normal_study and axis in ("modality", "anatomy"):
            continue
        if not _is_fact_of_its_own(answer, mention, found):
            continue
        if ends and _NO_LONGER.match(answer, mention.end, mention.end + _NEAR):
            continue
        slot = _Slot(answer, found, index)
        for target in _targets(mention.concept, vocabulary, options, named, slot):
            if target.name in named or (placed and target.name in _MIDLINE):
                continue
            changed = slot.filled(target)
            if changed is not None:
                yield Edit(changed, axis)


def _is_fact_of_its_own(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    """Whether a mention can change alone; the names of views, vessels and parts have words that cannot."""
    concept, end = mention.concept, mention.end
    axis = concept.axis
    if _COMPOUND.match(answer, end) and axis != "modality":
        return False
    if axis == "side":
        return not _PART_OF_A_NAME.match(answer, end)
    if axis == "zone":
        return not (_PART_OF_A_NAME.match(answer, end) or _LEVEL_OF_A_NAME.match(answer, end))
    if axis == "size":
        return not _SIZE_OF_A_NAME.match(answer, end)
    if axis == "state":
        return not _STATE_OF_A_NAME.match(answer, end) and (
            not _STATE_IN_A_PHRASE.search(answer, max(0, mention.start - _NEAR), mention.start)
            or _GROSSLY.search(answer, max(0, mention.start - _NEAR), mention.start) is not None
        )
    if axis == "finding":
        return not _NOT_OF_THE_CHEST.search(answer, max(0, mention.start - _NEAR), mention.start)
    if axis == "anatomy":
        return _stands_alone(answer, mention, found)
    return True


def _stands_alone(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    if answer[mention.start : mention.end].lower() in _ADJECTIVES or _SUBJECT_OF.match(answer, mention.end):
        return False
    if mention.concept.group not in _MOVABLE_ANATOMY and any(
        other.concept.axis == "finding" and other.concept.group in _PLACED_GROUPS for other in found
    ):
        return False
    return bool(
        _STANDS_ALONE_AFTER.match(answer, mention.end)
        and _STANDS_ALONE_BEFORE.search(answer, max(0, mention.start - _NEAR), mention.start)
        and not _PART_OF.search(answer, max(0, mention.start - _NEAR), mention.start)
    )


def _targets(
    concept: Concept,
    vocabulary: frozenset[str],
    options: tuple[str, str] | None,
    named: set[str],
    slot: _Slot,
) -> tuple[Concept, ...]:
    """What may stand in for a concept: the question's other option, else what the data set talks about, else anything."""
    if options and concept.name in options:
        other = options[1 - options.index(concept.name)]
        return (CONCEPTS[other],) if other in CONCEPTS else ()
    usual = _usual(concept.name, vocabulary)
    if concept.axis != "finding" or slot.is_whole:
        return usual
    if concept.name == "cyst" and slot.is_fitted:
        return ()
    kin = _FAMILY.get(concept.name, frozenset()) - _ONLY_ALONE - named
    alike = tuple(target for target in usual if target.name in kin)
    if not alike and concept.group == "device":
        alike = tuple(target for target in group_of(concept) if target.name in kin)
    if alike or slot.is_fitted or concept.group in ("device", "general") or vocabulary >= _EVERYTHING:
        return alike
    return tuple(target for target in usual if target.name in vocabulary)


@lru_cache(maxsize=1024)
def _usual(name: str, vocabulary: frozenset[str]) -> tuple[Concept, ...]:
    concept = CONCEPTS[name]
    others = group_of(concept)
    if concept.axis == "state":
        others = tuple(other for other in others if other.name in _EXCLUSIVE_OPPOSITE.get(name, ()))
    return tuple(other for other in others if other.name in vocabulary) or others


class _Slot:
    """The place of a mention in an answer, which other concepts can take in its spelling, number, capitals and article."""

    def __init__(self, answer: str, found: tuple[Mention, ...], index: int) -> None:
        mention = self._mention = found[index]
        self._following = found[index + 1 :]
        self._surface = answer[mention.start : mention.end]
        self._before, self._after = answer[: mention.start], answer[mention.end :]
        self._near = max(0, mention.start - _NEAR)
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
            after = _PLURAL_LUNGS.sub(r"\1", after, count=1)
        if axis == "state" and target.name == "enlarged":
            after = _IN_SIZE.sub("", after, count=1) if _IN_SIZE.match(after) else after
        # "Lungs" becomes "Kidneys", but "Heart".
        many = self._many and (axis != "anatomy" or target.name in _PAIRED)
        spelled = like(surface, plural(target, spelled) if many else spelled)
        article = self._article
        if article and not article.group(2):
            word = like(article.group(1), article_of(spelled))
            return f"{before[: article.start()]}{word} {spelled}{after}"
        return before + spelled + after

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
        before, after, axis = self._before, self._after, self._mention.concept.axis
        if axis == "zone":
            return not (
                target.name == "middle" and after.startswith(" lobe") and before.lower().endswith("left ")
            )
        if axis == "side":
            return self._takes_side(target.name)
        if axis == "state":
            return target.name != "enlarged" or self.is_whole or self._is_sizable
        if axis == "anatomy":
            has_side = before.lower().endswith(("left ", "right ", "bilateral ", "both "))
            return not has_side or target.name in _PAIRED
        if axis == "finding":
            return self._takes_degree_of(target)
        return True

    def _takes_side(self, side: str) -> bool:
        after = self._after
        if _MIDDLE_LOBE.match(after):
            return False
        many = next(
            (is_plural(self._spelling(m), m) for m in self._following if m.concept.axis == "finding"), None
        )
        if self._mention.concept.name == "bilateral":
            if _PLURAL_VERB.match(after):
                return False
            return not many or _MANY.search(self._before, self._near) is not None
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
        return name in _FAMILY or name not in _GRADED or target.name in _GRADED

    def _counterpart(self, target: Concept) -> str | None:
        """How the target is spelled in the place of the mention; None where it has no such form."""
        low = self._surface.lower()
        if (low, target.name) in _COUNTERPARTS:
            return _COUNTERPARTS[low, target.name]
        if low == "moderate" and self._graded in _GRADED:
            return "mild" if target.name == "small" else "severe"
        aligned = min(_ALIGNED_FORMS.get(target.group, 0), len(target.forms))
        return target.forms[self._mention.form if self._mention.form < aligned else 0]

    @property
    def _graded(self) -> str | None:
        """The finding that a degree belongs to."""
        return next((m.concept.name for m in self._following if m.concept.axis == "finding"), None)


# ---------------------------------------------------------------------- counts and overall statements


def _counts(answer: str) -> Iterator[Edit]:
    listed = [match.span() for match in _LISTED.finditer(answer)]
    for match in _COUNT.finditer(answer):
        if any(start <= match.start() < end for start, end in listed):
            continue
        if _NO_COUNT_OF.match(answer, match.end()) or _NUMBERED.search(
            answer, max(0, match.start() - _NEAR), match.start()
        ):
            continue
        spelled, ordinal = match.group(1), match.group(2)
        counts_things = not ordinal and _ONE_THING.match(answer, match.end()) is not None
        is_word = spelled.lower() in _NUMBER_NAMES
        value = _NUMBER_NAMES.index(spelled.lower()) if is_word else int(spelled)
        for other in (value + 1, value - 1):
            if other < 1 or (is_word and other >= len(_NUMBER_NAMES)):
                continue
            if counts_things and 1 in (value, other):
                # One thing has another noun and verb than two.
                continue
            text = like(spelled, _NUMBER_NAMES[other]) if is_word else str(other)
            if ordinal:
                text += _ordinal(other)
            yield Edit(answer[: match.start()] + text + answer[match.end() :], "number")


def _ordinal(value: int) -> str:
    if 10 <= value % 100 <= 20:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")


def _abnormal(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    """ "No abnormality" → the name of a finding; "No acute intracranial abnormality" → "Acute infarct" or without its "No"."""
    said = lexicon.facts(answer)
    if len(said) != 1 or said[0].finding != "abnormality" or said[0].present:
        return
    count = len(lexicon.words(answer))
    if count > _WHOLE_NORMAL_WORDS or lexicon.implied_polarity(question, "yes") is None:
        return
    denied = _NO_ABNORMALITY.match(answer)
    is_acute = denied is not None and "acute" in denied.group(2).lower().split()
    if denied and count > _WHOLE_NORMAL_WORDS - 2:
        yield Edit(denied.group(1) + capitalise(denied.group(2)), "finding")
    if denied is None and count > _WHOLE_NORMAL_WORDS - 2:
        # "Normal chest X-ray": its own words can be turned.
        return
    end = "." if answer.endswith(".") else ""
    for name in _findings_of(_region(answer) or _region(question), vocabulary, is_acute):
        yield Edit(capitalise(f"acute {name}" if is_acute else name) + end, "finding")


_NO_ABNORMALITY = re.compile(
    r"(\W*)no (?!other\b|further\b|new\b)(?:evidence of )?(.+)$", re.IGNORECASE | re.DOTALL
)
_REGIONS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (region, re.compile(words, re.IGNORECASE))
    for region, words in (
        ("chest", r"cardio|cardiac|pulmon|thorac|lung|chest|\bcxr\b"),
        ("brain", r"crani|brain|head|cerebr|neuro"),
        ("abdomen", r"abdom|pelvi|bowel|hepat|liver|renal|kidney"),
        ("bone", r"osse|bon[ye]|skelet|fractur|spine|vertebr"),
    )
)
# What comes on suddenly, by region.
_ACUTE = frozenset(
    {
        "pneumonia",
        "pulmonary edema",
        "pneumothorax",
        "hemorrhage",
        "infarct",
        "appendicitis",
        "diverticulitis",
    }
) | {
    "pancreatitis",
    "bowel obstruction",
    "fracture",
    "rib fracture",
}


def _region(text: str) -> str | None:
    """The part of the body that a text is about."""
    return next((region for region, words in _REGIONS if words.search(text)), None)


def _findings_of(region: str | None, vocabulary: frozenset[str], is_acute: bool) -> list[str]:
    """Names of findings of a part of the body, of those that the data set talks about where there are any."""
    findings = [
        concept for concept in CONCEPTS.values() if concept.axis == "finding" and concept.group != "device"
    ]
    if region == "bone":
        fitting = [concept.name for concept in findings if concept.name == "fracture"]
    elif region is None:
        everything = vocabulary >= CONCEPTS.keys()
        fitting = [concept.name for concept in findings if not everything or concept.group == "general"]
    else:
        fitting = [concept.name for concept in findings if concept.group == region]
    if is_acute:
        fitting = [name for name in fitting if name in _ACUTE]
    return [name for name in fitting if name in vocabulary] or (fitting if region else [])
