"""Puts another concept in the place of one that an answer names: the other side, another zone, a finding that looks alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.edit import NEAR, Edit
from mmedpo_ray.radiology.edits.substitution import FAMILY, Slot
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, Axis, Concept, Mention, group_of, mentions

# Findings that have no side or zone; they do not stand in where one is stated.
MIDLINE = frozenset({"cardiomegaly", "pneumoperitoneum", "mediastinal widening", "interstitial lung disease"})
_EXCLUSIVE_OPPOSITE = {"normal": ("abnormal", "enlarged"), "enlarged": ("normal",), "abnormal": ("normal",)}
# Findings that stand in only for a whole answer: "two cancers" is no radiologist's phrase.
_ONLY_ALONE = frozenset({"cancer"})
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
# Adjectives stand before what they name; their counterparts in the other spellings of the group are adjectives as well.
_ADJECTIVES = frozenset(
    {"hepatic", "splenic", "renal", "pancreatic", "gastric", "adrenal", "pulmonary", "cardiac"}
)
_TOLD_OF_A_FINDING = re.compile(r"\s+(?:patients?|staging|therapy|treatment|risk|protocol)\b", re.IGNORECASE)
# Groups of findings that belong to one part of the body, so that no other part can have them.
_PLACED_GROUPS = frozenset({"chest", "brain", "bleeding", "abdomen", "device"})
_MOVABLE_ANATOMY = frozenset({"lobe", "brain part", "matter"})
# A finding's word in the name of another: "joint effusion", "subcutaneous emphysema", "small cell lung cancer".
_OTHER_FINDING = re.compile(
    r"\b(?:joint|pericardial|knee|hip|elbow|ankle|shoulder|mastoid|subdural|epidural|ear|subcutaneous|surgical|pedal|leg|foot|peripheral|"
    r"limb|macular|tissue|normal pressure|(?:cell|hepatocellular|hodgkin\S*|ductal|lobular|bronchogenic|papillary|medullary|follicular|squamous)"
    r"(?: lung| breast)?) $",
    re.IGNORECASE,
)
# Names of views, vessels and chambers, in which a side or level is no fact of its own.
_PART_OF_A_NAME = re.compile(
    r"(?:\s+and\s+\w+)?\s+(?:views?|projections?|radiographs?|films?|vena cava|limits?|ventric\w*|atri\w+|main\w*|"
    r"circumflex|anterior descending|mediastinum|internal jugular|jugular|subclavian|decubitus)\b",
    re.IGNORECASE,
)
_LEVEL_OF_A_NAME = re.compile(
    r"[\s-]+(?:normal|cerebral|cerebellar|communicating|mesenteric|meningeal|cisterns?|cranial|fossa|horns?|sagittal|venous|line|catheter|"
    r"canal|pontine|sulcus|descending|nervous|obesity|cyanosis|apnea|fovea|finger|toe|phalan\w+|turbinate|meatus|gi|endoscopy|thyroid|pulmonary arter\w+|ear|to)\b",
    re.IGNORECASE,
)
# "PA and lateral chest radiographs": "lateral" is a view, and only a radiograph has these views.
_FILM = r"(?:views?|projections?|radiographs?|films?|x-?rays?|x ray|cxr|exposures?)"
_OTHER_VIEW = r"(?:pa|ap|frontal|posteroanterior|anteroposterior|oblique|decubitus|lordotic)"
_LATERAL_VIEW_BEFORE = re.compile(
    rf"\b(?:{_OTHER_VIEW}(?: (?:view|chest))?(?:\s*[,&/+]\s*(?:and |or )?| and (?:the )?| or (?:the )?| plus )"
    rf"|(?:{_FILM}|chest)[:,(\s-]+(?:(?:is|are|was|were|of) )?(?:an? |the |left |right )?)$",
    re.IGNORECASE,
)
_LATERAL_VIEW_AFTER = re.compile(
    rf"\s*(?:/|,|&|\band\b|\bor\b)\s*{_OTHER_VIEW}\b(?! lobe)|(?:\s+[\w-]+){{0,2}}\s+{_FILM}\b|\s+chest\s*(?:$|[.,;:)])",
    re.IGNORECASE,
)
_VIEW_BEFORE = re.compile(
    rf"\b(?:{_OTHER_VIEW}|lateral|upright|(?:one|two|three|four|single|\d)[- ]views?)(?:(?: and |, |/| or | & )\w+)?(?: \w+){{0,2}} $",
    re.IGNORECASE,
)
_VIEW_AFTER = re.compile(
    rf"[\s,:(-]+(?:(?:in|with|of)\s+)?(?:the\s+)?(?:{_OTHER_VIEW}|lateral)\b(?! lobe)", re.IGNORECASE
)
_SIZE_OF_A_NAME = re.compile(
    r"[\s-]+(?:bowel|intestine|vessels?|airways?|joints|(?:[bt][ -])?cell|field|degree|of|for|group|change|quality)\b",
    re.IGNORECASE,
)
# Names in which a plane, a shape or an acuity is no fact of its own.
_NAMES: dict[Axis, re.Pattern[str]] = {
    "plane": re.compile(
        r"[\s-]+(?:process\w*|colon|mesocolon|myelitis|sinus\w*|foram\w+|arch|ligament|fractures?|incision|carpal|diameter|sutures?)\b",
        re.IGNORECASE,
    ),
    "sequence": re.compile(
        r"[\s-]+(?:vertebra\w*|nerve|level|spinous|dis[ck]|ribs?|body|transverse|compression|fractures?|dermatome|root)\b",
        re.IGNORECASE,
    ),
    "appearance": re.compile(
        r"[\s-]+(?:ligament|fibrosis|axonal|nodular hyperplasia|large|window|foramen|alveolar damage|cortical dysplasia|ducts?|artery|"
        r"hygroma|pseudopapillary|idiopathic)\b",
        re.IGNORECASE,
    ),
    "acuity": re.compile(
        r"[\s-]+(?:obstructive|kidney|renal failure|lymphocytic|lymphoblastic|myeloid|myelogenous|fatigue|granulomatous|respiratory distress|smokers?|users?|use|alcohol\w*|"
        r"chest syndrome|coronary|abdomen|on)\b",
        re.IGNORECASE,
    ),
}
# "The angle is acute", "acute on chronic".
_NO_ACUITY = re.compile(r"\b(?:angles? (?:\w+ )?|on )$", re.IGNORECASE)
_TOLD_OF_A_SEX = re.compile(r"\s+(?:pattern|genital\w*|catheter|connector)\b", re.IGNORECASE)
_PRONOUN = re.compile(r"\b(?:he|she|his|her|hers|him|himself|herself)\b", re.IGNORECASE)
# "normal limits", "normal variant": no state. "mildly enlarged": nothing is mildly normal. "limits of normal" neither.
_STATE_OF_A_NAME = re.compile(
    r"[\s-]+(?:limits?|variants?|variation|pressure|saline|range|for)\b", re.IGNORECASE
)
_STATE_IN_A_PHRASE = re.compile(
    r"\b(?:limits? of |top[- ]|high |low |borderline |near |otherwise )$|\w[^\W\d_]*ly $", re.IGNORECASE
)
_GROSSLY = re.compile(r"\b(?:grossly|completely|entirely|overall) $", re.IGNORECASE)
# In running text other words hold sentences together ("the heart is …"), so only these are exchanged.
_SWAPPED_IN_REPORTS = frozenset({"finding", "side", "zone", "size"})
_SHORT_WORDS = 12
# "The effusion is no longer seen" denies what stands before it.
_NO_LONGER = re.compile(r"[^.;:]* no longer\b", re.IGNORECASE)
_COMPOUND = re.compile(r"-\w|/\w")


def swap_edits(answer: str, question: str, vocabulary: frozenset[str]) -> dict[Axis, Iterator[Edit]]:
    """Edits that exchange one mention, by what the words around it allow; by the kind of fact, each made when it is asked for.

    Args:
        answer: reference answer.
        question: what was asked; of its two options, the other is the only edit of the one.
        vocabulary: concepts to prefer.
    """
    found = mentions(answer)
    is_short = len(lexicon.words(answer)) <= _SHORT_WORDS
    denied = lexicon.negated_spans(answer)
    is_normal_study = {"state", "modality"} <= {mention.concept.axis for mention in found}
    places: dict[Axis, list[int]] = {}
    for index, mention in enumerate(found):
        axis = mention.concept.axis
        if not is_short and axis not in _SWAPPED_IN_REPORTS:
            continue
        if any(start <= mention.start < end for start, end in denied):
            continue
        if is_normal_study and axis in ("modality", "anatomy"):
            continue
        places.setdefault(axis, []).append(index)
    options = lexicon.choices(question)
    return {axis: _exchanges(answer, found, indices, options, vocabulary) for axis, indices in places.items()}


def _exchanges(
    answer: str,
    found: tuple[Mention, ...],
    indices: list[int],
    options: tuple[str, str] | None,
    vocabulary: frozenset[str],
) -> Iterator[Edit]:
    named = {mention.concept.name for mention in found}
    placed = any(mention.concept.axis in ("side", "zone") for mention in found)
    ends = "no longer" in answer.lower()
    for index in indices:
        mention = found[index]
        if not _is_fact_of_its_own(answer, mention, found):
            continue
        if ends and _NO_LONGER.match(answer, mention.end, mention.end + NEAR):
            continue
        slot = Slot(answer, found, index)
        for target in _targets(mention.concept, vocabulary, options, named, slot):
            if target.name in named or (placed and target.name in MIDLINE):
                continue
            changed = slot.filled(target)
            if changed is not None and mention.concept.axis == "plane":
                changed = _filled_again(changed, mention.concept, target)
            if changed is not None:
                yield Edit(changed, mention.concept.axis)


def _filled_again(text: str, concept: Concept, target: Concept) -> str | None:
    """The text with the target also where the concept is named again: "Transverse plane (axial)" has one plane, not two."""
    found = mentions(text)
    index = next((index for index, mention in enumerate(found) if mention.concept is concept), None)
    return text if index is None else Slot(text, found, index).filled(target)


def _is_fact_of_its_own(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    """Whether a mention can change alone; the names of views, vessels and parts have words that cannot."""
    concept, end = mention.concept, mention.end
    axis = concept.axis
    if _COMPOUND.match(answer, end) and axis != "modality":
        return False
    if axis in _NAMES and _NAMES[axis].match(answer, end):
        return False
    if axis == "acuity":
        return not _NO_ACUITY.search(answer, max(0, mention.start - NEAR), mention.start)
    if axis == "sex":
        # "The woman hurt his leg": other words would have to follow.
        return not (_PRONOUN.search(answer) or _TOLD_OF_A_SEX.match(answer, end))
    if axis == "side":
        return not _PART_OF_A_NAME.match(answer, end)
    if axis == "zone":
        return not (
            _PART_OF_A_NAME.match(answer, end)
            or _LEVEL_OF_A_NAME.match(answer, end)
            or (
                concept.name == "lateral"
                and _is_by(answer, mention, _LATERAL_VIEW_BEFORE, _LATERAL_VIEW_AFTER)
            )
        )
    if axis == "modality":
        return concept.name != "x-ray" or not _is_by(answer, mention, _VIEW_BEFORE, _VIEW_AFTER)
    if axis == "size":
        return not _SIZE_OF_A_NAME.match(answer, end)
    if axis == "state":
        return not _STATE_OF_A_NAME.match(answer, end) and (
            not _STATE_IN_A_PHRASE.search(answer, max(0, mention.start - NEAR), mention.start)
            or _GROSSLY.search(answer, max(0, mention.start - NEAR), mention.start) is not None
        )
    if axis == "finding":
        return not (
            _OTHER_FINDING.search(answer, max(0, mention.start - NEAR), mention.start)
            or _TOLD_OF_A_FINDING.match(answer, end)
        )
    if axis == "anatomy":
        return _stands_alone(answer, mention, found)
    return True


def _is_by(answer: str, mention: Mention, before: re.Pattern[str], after: re.Pattern[str]) -> bool:
    return bool(
        before.search(answer, max(0, mention.start - NEAR), mention.start) or after.match(answer, mention.end)
    )


def _stands_alone(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    if answer[mention.start : mention.end].lower() in _ADJECTIVES or _SUBJECT_OF.match(answer, mention.end):
        return False
    if mention.concept.group not in _MOVABLE_ANATOMY and any(
        other.concept.axis == "finding" and other.concept.group in _PLACED_GROUPS for other in found
    ):
        return False
    return bool(
        _STANDS_ALONE_AFTER.match(answer, mention.end)
        and _STANDS_ALONE_BEFORE.search(answer, max(0, mention.start - NEAR), mention.start)
        and not _PART_OF.search(answer, max(0, mention.start - NEAR), mention.start)
    )


def _targets(
    concept: Concept,
    vocabulary: frozenset[str],
    options: tuple[str, str] | None,
    named: set[str],
    slot: Slot,
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
    kin = FAMILY.get(concept.name, frozenset()) - _ONLY_ALONE - named
    alike = tuple(target for target in usual if target.name in kin)
    if not alike and concept.group == "device":
        alike = tuple(target for target in group_of(concept) if target.name in kin)
    if alike or slot.is_fitted or concept.group in ("device", "general") or vocabulary >= CONCEPTS.keys():
        return alike
    return tuple(target for target in usual if target.name in vocabulary)


@lru_cache(maxsize=1024)
def _usual(name: str, vocabulary: frozenset[str]) -> tuple[Concept, ...]:
    concept = CONCEPTS[name]
    others = group_of(concept)
    if concept.axis == "state":
        others = tuple(other for other in others if other.name in _EXCLUSIVE_OPPOSITE.get(name, ()))
    return tuple(other for other in others if other.name in vocabulary) or others
