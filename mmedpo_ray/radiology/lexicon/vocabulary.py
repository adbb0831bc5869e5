"""The vocabulary of the radiology lexicon: concepts, their spellings and how much they matter.

A concept belongs to an axis (what kind of fact it is) and to a group (what may stand in its place: "left" for "right",
one chest finding for another, never a chest finding for a brain finding). Relevance is a judgement of ours on a scale of
0 to 1, meant to rank: missing a pneumothorax matters more than missing a scar. To teach the lexicon a word, add it here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from mmedpo_ray.radiology.lexicon.senses import is_other_sense

Axis = Literal[
    "finding",
    "side",
    "zone",
    "size",
    "state",
    "anatomy",
    "modality",
    "sequence",
    "plane",
    "contrast",
    "appearance",
    "acuity",
    "sex",
]


@dataclass(frozen=True)
class Concept:
    """One thing that a radiological text can state.

    Attributes:
        name: Canonical name, unique.
        axis: Kind of fact.
        group: Concepts that can stand in for one another; those of one group exclude each other, except findings and anatomy.
        forms: Spellings in lower case. Concepts of one group list their forms in the same order where they
            correspond, so that "left-sided" becomes "right-sided".
        relevance: Clinical relevance of getting it wrong, 0 to 1.
        mass_noun: Takes no article ("consolidation", not "a consolidation").
    """

    name: str
    axis: Axis
    group: str
    forms: tuple[str, ...]
    relevance: float
    mass_noun: bool = False


class Mention(NamedTuple):
    """A concept at a place of a text: ``text[start:end]`` spells form number ``form``."""

    concept: Concept
    start: int
    end: int
    form: int


# (name, forms, relevance); a trailing "~" marks a mass noun. Regular plurals need no form of their own.
_FINDINGS: dict[str, list[tuple[str, str, float]]] = {
    "chest": [
        ("pleural effusion", "pleural effusion|effusion|pleural fluid|hydrothorax", 0.8),
        ("pneumothorax", "pneumothorax|pneumothoraces|hydropneumothorax", 1.0),
        (
            "consolidation",
            "consolidation|consolidated lung|airspace disease|air space disease|airspace consolidation~",
            0.8,
        ),
        ("nodule", "nodule|pulmonary nodule|lung nodule|nodularity", 0.8),
        ("cardiomegaly", "cardiomegaly|enlarged heart|enlarged cardiac silhouette~", 0.7),
        ("pneumonia", "pneumonia|bronchopneumonia~", 0.9),
        ("atelectasis", "atelectasis|atelectases|collapse|volume loss~", 0.6),
        (
            "pulmonary edema",
            "pulmonary edema|pulmonary oedema|vascular congestion|pulmonary vascular congestion~",
            0.8,
        ),
        ("opacity", "opacity|opacities|infiltrate|infiltration|opacification", 0.7),
        ("emphysema", "emphysema|copd|hyperinflation~", 0.6),
        ("pneumoperitoneum", "pneumoperitoneum|free air|free intraperitoneal air~", 1.0),
        ("rib fracture", "rib fracture|fractured rib", 0.7),
        ("interstitial lung disease", "interstitial lung disease|pulmonary fibrosis~", 0.7),
        ("tuberculosis", "tuberculosis~", 0.9),
        ("hernia", "hiatal hernia|hernia", 0.5),
        ("granuloma", "granuloma", 0.4),
        ("mediastinal widening", "mediastinal widening|widened mediastinum~", 0.9),
    ],
    "brain": [
        (
            "hemorrhage",
            "hemorrhage|haemorrhage|hemmorhage|bleeding|bleed|acute blood|intracranial hemorrhage~",
            1.0,
        ),
        ("infarct", "infarct|infarction|ischemic stroke|stroke|ischemia", 1.0),
        ("hydrocephalus", "hydrocephalus|ventriculomegaly~", 0.9),
        ("midline shift", "midline shift|shift of midline structures|shift of the midline", 1.0),
        ("mass effect", "mass effect~", 0.9),
        ("edema", "brain edema|cerebral edema|edema|oedema~", 0.8),
        ("atrophy", "atrophy~", 0.5),
        ("aneurysm", "aneurysm", 1.0),
        ("skull fracture", "skull fracture", 0.9),
        ("glioma", "glioma|glioblastoma|non-enhancing tumor|enhancing tumor", 1.0),
    ],
    "bleeding": [
        ("subdural hematoma", "subdural hematoma|subdural haematoma|subdural", 1.0),
        ("epidural hematoma", "epidural hematoma|epidural haematoma|epidural", 1.0),
        ("subarachnoid hemorrhage", "subarachnoid hemorrhage|subarachnoid haemorrhage|subarachnoid~", 1.0),
    ],
    "abdomen": [
        ("bowel obstruction", "bowel obstruction|small bowel obstruction|ileus", 1.0),
        ("appendicitis", "appendicitis~", 1.0),
        ("ascites", "ascites|free fluid~", 0.7),
        ("gallstone", "gallstone|cholelithiasis", 0.5),
        ("kidney stone", "kidney stone|renal calculus|nephrolithiasis", 0.6),
        ("diverticulitis", "diverticulitis~", 0.8),
        ("hepatomegaly", "hepatomegaly|enlarged liver~", 0.6),
        ("cirrhosis", "cirrhosis~", 0.7),
        ("hydronephrosis", "hydronephrosis~", 0.7),
        ("pancreatitis", "pancreatitis~", 0.9),
    ],
    "general": [
        ("mass", "mass|masses|tumor|tumour|neoplasm", 0.9),
        ("lesion", "lesion", 0.8),
        ("cancer", "cancer|carcinoma|malignancy|lymphoma", 1.0),
        ("cyst", "cyst|pseudocyst", 0.5),
        ("abscess", "abscess|abscesses", 0.9),
        ("metastasis", "metastasis|metastases|metastatic disease", 1.0),
        ("calcification", "calcification|calcifications", 0.4),
        ("fracture", "fracture|fractured", 0.9),
        ("lymphadenopathy", "lymphadenopathy|enlarged lymph node~", 0.7),
        ("inflammation", "inflammation~", 0.6),
        ("obstruction", "obstruction", 0.8),
    ],
    "device": [
        ("endotracheal tube", "endotracheal tube|et tube", 0.7),
        ("pacemaker", "pacemaker", 0.4),
        ("central line", "central venous catheter|central line|picc line", 0.6),
        ("nasogastric tube", "nasogastric tube|ng tube|feeding tube", 0.7),
        ("chest tube", "chest tube", 0.7),
        ("sternal wires", "sternal wire|sternotomy wire", 0.3),
    ],
}
# Groups of other axes: axis, relevance, then the concepts; the first form is the name.
_OTHERS: dict[str, tuple[Axis, float, list[str]]] = {
    "side": (
        "side",
        0.9,
        [
            "left|left-sided|left sided|leftward|left-hand",
            "right|right-sided|right sided|rightward|right-hand",
            "bilateral|both sides|bilaterally|both lungs",
        ],
    ),
    "vertical": (
        "zone",
        0.6,
        [
            "upper|superior|apical|top|apex|suprahilar|biapical",
            "middle|mid|perihilar|central|center|centre",
            "lower|inferior|basal|bottom|base|basilar|bibasilar",
        ],
    ),
    "depth": ("zone", 0.5, ["anterior|anteriorly|frontal aspect", "posterior|posteriorly|dorsal"]),
    "axiality": ("zone", 0.5, ["medial|medially", "lateral|laterally"]),
    "lobe": ("anatomy", 0.7, ["frontal lobe", "parietal lobe", "temporal lobe", "occipital lobe"]),
    "brain part": (
        "anatomy",
        0.7,
        ["cerebellum", "brainstem|brain stem", "basal ganglia", "thalamus", "pons", "corpus callosum"],
    ),
    "organ": (
        "anatomy",
        0.7,
        [
            "liver|hepatic",
            "spleen|splenic",
            "kidney|renal",
            "pancreas|pancreatic",
            "stomach|gastric",
            "bladder",
            "gallbladder|gall bladder",
            "colon|large bowel|cecum",
            "small bowel|small intestine",
            "rectum",
            "esophagus",
            "aorta",
            "adrenal gland|adrenal",
        ],
    ),
    "matter": ("anatomy", 0.4, ["white matter", "grey matter|gray matter"]),
    "thoracic organ": (
        "anatomy",
        0.6,
        ["lung|pulmonary", "heart|cardiac", "trachea", "mediastinum", "diaphragm"],
    ),
    "body region": (
        "anatomy",
        0.8,
        ["chest|thorax", "abdomen", "brain|head", "pelvis|pelvic cavity", "neck", "spine|spinal cord"],
    ),
    "extent": (
        "size",
        0.5,
        [
            "small|mild|minimal|slight|tiny|trace|mildly",
            "moderate|moderately",
            "large|severe|massive|marked|extensive|severely",
        ],
    ),
    "state": ("state", 0.7, ["normal|unremarkable", "enlarged|dilated", "abnormal", "absent", "clear"]),
    "modality": (
        "modality",
        0.6,
        [
            "ct|ct scan|computed tomography|cat scan",
            "mri|mri scan|magnetic resonance imaging|mr",
            "x-ray|xray|x ray|radiograph|plain film",
            "ultrasound|ultrasonography|sonography",
            "pet|pet scan",
        ],
    ),
    "sequence": (
        "sequence",
        0.5,
        ["t1|t1-weighted|t1 weighted", "t2|t2-weighted|t2 weighted", "flair", "dwi|diffusion weighted"],
    ),
    "plane": ("plane", 0.5, ["axial|transverse", "coronal", "sagittal"]),
    "view": ("plane", 0.4, ["pa|posteroanterior|postero-anterior", "ap|anteroposterior|antero-posterior"]),
    "contrast": (
        "contrast",
        0.5,
        [
            "with contrast|contrast-enhanced|contrast enhanced",
            "without contrast|non-contrast|noncontrast|non contrast",
        ],
    ),
    "intensity": (
        "appearance",
        0.5,
        [
            "hyperintense|hyper intense|bright|white|hyperintensity",
            "hypointense|hypo intense|dark|black|hypointensity",
            "isointense|iso intense|intermediate|gray|grey",
        ],
    ),
    "density": (
        "appearance",
        0.5,
        [
            "hyperdense|hyperdensity|hyper dense|hyper-dense",
            "hypodense|hypodensity|hypo dense|hypo-dense",
            "isodense|isodensity|iso dense|iso-dense",
        ],
    ),
    "margin": (
        "appearance",
        0.5,
        ["irregular|ill-defined|poorly defined", "regular|well-defined|well defined"],
    ),
    "shape": ("appearance", 0.3, ["round|circular", "oval", "linear"]),
    "texture": ("appearance", 0.5, ["solid", "cystic|fluid-filled"]),
    "symmetry": ("appearance", 0.4, ["symmetric|symmetrical", "asymmetric|asymmetrical"]),
    "spread": ("appearance", 0.5, ["diffuse|widespread", "focal|localized|localised"]),
    "acuity": ("acuity", 0.6, ["acute", "chronic", "subacute"]),
    "sex": ("sex", 0.3, ["male|man", "female|woman"]),
}


def _build() -> dict[str, Concept]:
    concepts: dict[str, Concept] = {}
    for group, entries in _FINDINGS.items():
        for name, spelled, relevance in entries:
            forms = tuple(spelled.removesuffix("~").split("|"))
            concepts[name] = Concept(name, "finding", group, forms, relevance, spelled.endswith("~"))
    for group, (axis, relevance, members) in _OTHERS.items():
        for spelled in members:
            forms = tuple(spelled.split("|"))
            concepts[forms[0]] = Concept(forms[0], axis, group, forms, relevance)
    return concepts


CONCEPTS: dict[str, Concept] = _build()
_FORMS: dict[str, tuple[Concept, int]] = {
    form: (concept, index) for concept in CONCEPTS.values() for index, form in enumerate(concept.forms)
}
# "R kidney", "L lung": only as single capitals.
_CAPITALS = {"L": ("left", 0), "R": ("right", 0)}
_CAPITAL = re.compile(r"[LR](?=\s+[a-z])")


def _pattern(forms: Iterable[str]) -> str:
    """A regular expression that matches the longest of some words, letter by letter: alternatives one after the other would
    cost ten times as much."""
    tree: dict[str, Any] = {}
    for form in forms:
        node = tree
        for letter in form:
            node = node.setdefault(letter, {})
        node[""] = {}

    def spelled(node: dict[str, Any]) -> str:
        options = [re.escape(letter) + spelled(rest) for letter, rest in sorted(node.items()) if letter]
        if not options:
            return ""
        return f"(?:{'|'.join(options)})" + ("?" if "" in node else "")

    return spelled(tree)


# Regular plurals need no form of their own. Sides have none ("the patient's rights"), and pets are animals.
_PLURALS = [
    form + "s"
    for form, (concept, _) in _FORMS.items()
    if form[-1] not in "s0123456789" and concept.axis != "side" and form != "pet"
]
_PATTERN = re.compile(rf"(?<![\w-])(?:{_pattern([*_FORMS, *_PLURALS])}|[lr](?=\s))(?!\w)")


@lru_cache(maxsize=4096)
def mentions(text: str) -> tuple[Mention, ...]:
    """Every concept named in ``text``, in order; the longest spelling wins, mentions never overlap.

    A word in another sense ("was left in the ward") names none.
    """
    found = []
    low = lowered(text)
    for match in _PATTERN.finditer(low):
        start, end = match.span()
        spelled = match.group()
        if end - start == 1:
            if not _CAPITAL.match(text, start):
                continue
            name, form = _CAPITALS[text[start]]
            concept = CONCEPTS[name]
        elif is_other_sense(text, low, start, end):
            continue
        else:
            concept, form = _FORMS[spelled] if spelled in _FORMS else _FORMS[spelled[:-1]]
        found.append(Mention(concept, start, end, form))
    return tuple(found)


def lowered(text: str) -> str:
    """The text in small letters, each in its place: a capital whose small form has two letters stays."""
    small = text.lower()
    if len(small) == len(text):
        return small
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


@cache
def group_of(concept: Concept) -> tuple[Concept, ...]:
    """The other concepts that can stand in for this one."""
    return tuple(
        other for other in CONCEPTS.values() if other.group == concept.group and other is not concept
    )
