"""Questions, answers and reports about a phantom, in ordinary radiology English.

Every text follows from the findings alone. Each image has two closed questions with the answer "Yes" and two
with "No", whatever the findings, so that no constant answer scores above one half. The wording of questions
varies; answers and reports have one canonical form, so exact match is meaningful.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from mmedpo_ray.phantom.findings import KINDS, SIDES, ZONES, Finding, Kind, Side, Zone

Word = TypeVar("Word", bound=str)

NAMES: dict[Kind, str] = {
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "nodule": "nodule",
    "cardiomegaly": "cardiomegaly",
}
REPORT_QUESTIONS = (
    "Write a short report for this chest radiograph.",
    "Describe the findings of this chest radiograph.",
)
NUM_CLOSED_EACH = 2
NUM_OPEN = 3


@dataclass(frozen=True)
class Question:
    """One question about an image with its reference answer.

    Attributes:
        task: "vqa", or "report" for the free-text report.
        answer_type: "closed" (answer Yes or No), "open" (a few words) or "report".
        topic: What is asked: presence, side, zone, location, size, heart, lungs, abnormality or report.
        question: As put to the model, without image token or template.
        answer: Reference answer.
    """

    task: Literal["vqa", "report"]
    answer_type: Literal["closed", "open", "report"]
    topic: str
    question: str
    answer: str


def write_questions(rng: np.random.Generator, findings: tuple[Finding, ...]) -> tuple[Question, ...]:
    """All questions of one image: four closed (two Yes, two No), two or three open, one report."""
    report = Question("report", "report", "report", _pick(rng, REPORT_QUESTIONS), write_report(findings))
    return (*_closed(rng, findings), *_open(rng, findings), report)


def write_report(findings: tuple[Finding, ...]) -> str:
    """The report: heart, then each lung finding, then the relevant negatives."""
    kinds = {f.kind for f in findings}
    sentences = ["The heart is enlarged." if "cardiomegaly" in kinds else "The heart size is normal."]
    sentences += [_sentence(f) for f in findings if f.kind != "cardiomegaly"]
    if not kinds - {"cardiomegaly"}:
        sentences.append("The lungs are clear.")
    absent = [NAMES[kind] for kind in ("effusion", "pneumothorax") if kind not in kinds]
    if absent:
        sentences.append(f"No {' or '.join(absent)}.")
    return " ".join(sentences)


def report_findings(report: str) -> frozenset[Finding]:
    """Read the asserted findings back from a report, sizes left out; negated sentences assert nothing.

    The inverse of `write_report` up to sizes, and tolerant of other wordings of the same words: a model's
    report is scored by comparing these sets. A side, zone or kind that is not stated is None or missing.
    """
    found: set[Finding] = set()
    for sentence in re.split(r"[.;\n]+", report.lower()):
        if re.search(r"\b(no|not|without|absent|clear)\b", sentence):
            continue
        side = _first_word(sentence, SIDES)
        zone = _first_word(sentence, ZONES)
        if re.search(r"\bcardiomegaly\b|\benlarged\b", sentence):
            found.add(Finding("cardiomegaly"))
        for kind in ("effusion", "pneumothorax", "consolidation", "nodule"):
            if re.search(rf"\b{kind}s?\b", sentence):
                found.add(Finding(kind, side, zone if kind in ("consolidation", "nodule") else None))
    return frozenset(found)


def _first_word(sentence: str, words: tuple[Word, ...]) -> Word | None:
    """The word that comes first in the sentence, None if there is none of them."""
    places = {word: match.start() for word in words if (match := re.search(rf"\b{word}\b", sentence))}
    return min(places, key=places.__getitem__, default=None)


def _sentence(finding: Finding) -> str:
    if finding.kind in ("effusion", "pneumothorax"):
        return f"There is a {finding.size} {finding.side} {NAMES[finding.kind]}."
    article = "" if finding.kind == "consolidation" else "a "
    return f"There is {article}{finding.kind} in the {finding.side} {finding.zone} zone."


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _choose(
    rng: np.random.Generator, options: list[Question], count: int, weights: list[float] | None = None
) -> list[Question]:
    """Up to `count` different questions in a random order, drawn with the given relative weights."""
    share = np.ones(len(options)) if weights is None else np.array(weights)
    order = rng.choice(len(options), size=min(count, len(options)), replace=False, p=share / share.sum())
    return [options[i] for i in order]


def _closed(rng: np.random.Generator, findings: tuple[Finding, ...]) -> list[Question]:
    """Two questions with the answer Yes and two with No, in a random order.

    A question about a side or zone names the right or a wrong one with equal probability, and each of the
    many absent kinds is asked about less often than each of the few present ones. So in the uniform world the
    wording of a question hardly predicts its answer.
    """
    present = {f.kind for f in findings}
    pool: dict[bool, list[tuple[Question, float]]] = {True: [], False: []}

    def add(truth: bool, topic: str, question: str, weight: float) -> None:
        pool[truth].append((Question("vqa", "closed", topic, question, "Yes" if truth else "No"), weight))

    for kind in KINDS:
        add(kind in present, "presence", _presence_question(rng, kind), 1.5 if kind in present else 0.4)
    for finding in findings:
        name, truth = NAMES[finding.kind], bool(rng.integers(2))
        if finding.side is not None:
            side = finding.side if truth else _other_side(finding.side)
            wording = (f"Is the {name} on the {side} side?", f"Is the {name} located in the {side} lung?")
            add(truth, "side", _pick(rng, wording), 1.5)
        if finding.zone is not None:
            truth = bool(rng.integers(2))
            zone = finding.zone if truth else _other_zone(rng, finding.zone)
            add(truth, "zone", f"Is the {name} in the {zone} zone?", 1.5)
    normal_heart = "cardiomegaly" not in present
    wording = ("Is the heart size normal?", "Is the heart of normal size?")
    add(normal_heart, "heart", _pick(rng, wording), 0.3 if normal_heart else 0.8)
    clear = not present - {"cardiomegaly"}
    add(clear, "lungs", _pick(rng, ("Are the lungs clear?", "Are both lungs clear?")), 0.8 if clear else 0.3)
    wording = ("Is this a normal chest radiograph?", "Is the chest radiograph normal?")
    add(not present, "lungs", _pick(rng, wording), 0.3 if present else 0.8)
    asked = []
    for options in pool.values():
        questions, weights = [q for q, _ in options], [w for _, w in options]
        asked += _choose(rng, questions, NUM_CLOSED_EACH, weights)
    return [asked[i] for i in rng.permutation(len(asked))]


def _presence_question(rng: np.random.Generator, kind: Kind) -> str:
    if kind == "cardiomegaly":
        return _pick(rng, ("Is the heart enlarged?", "Is there cardiomegaly?"))
    noun = NAMES[kind] if kind == "consolidation" else f"a {NAMES[kind]}"
    return _pick(
        rng,
        (f"Is there {noun}?", f"Does the image show {noun}?", f"Is there evidence of {noun}?"),
    )


def _open(rng: np.random.Generator, findings: tuple[Finding, ...]) -> list[Question]:
    asked: list[Question] = []

    def add(topic: str, question: str, answer: str) -> None:
        asked.append(Question("vqa", "open", topic, question, answer))

    names = " and ".join(NAMES[f.kind] for f in findings) or "no abnormality"
    wording = ("Which abnormality is seen in this image?", "What does the image show?")
    add("abnormality", _pick(rng, wording), names.capitalize())
    heart = "Enlarged" if any(f.kind == "cardiomegaly" for f in findings) else "Normal"
    add("heart", "What is the size of the heart?", heart)
    for finding in findings:
        if finding.side is None:
            continue
        name = NAMES[finding.kind]
        wording = (f"On which side is the {name}?", f"Which lung is affected by the {name}?")
        add("side", _pick(rng, wording), finding.side.capitalize())
        if finding.zone is not None:
            add("zone", f"In which zone is the {name}?", f"{finding.zone} zone".capitalize())
            location = f"{finding.side} {finding.zone} zone".capitalize()
            add("location", _pick(rng, (f"Where is the {name}?", f"Where is the {name} located?")), location)
        if finding.size is not None:
            add("size", f"How large is the {name}?", finding.size.capitalize())
    return _choose(rng, asked, NUM_OPEN)


def _other_side(side: Side) -> Side:
    return SIDES[1 - SIDES.index(side)]


def _other_zone(rng: np.random.Generator, zone: Zone) -> Zone:
    others = [name for name in ZONES if name != zone]
    return others[rng.integers(2)]
