"""The labeller of CheXpert's observations, against sentences labelled by hand, and what is made of it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from mmedpo_ray.metrics import METRICS, Answer
from mmedpo_ray.metrics.finding_labels import (
    NO_FINDING,
    OBSERVATIONS,
    Label,
    finding_figures,
    labels,
    outcomes,
)

STATUS = {"+": "positive", "-": "negative", "?": "uncertain"}
SIDES, ZONES = {"left", "right"}, {"upper", "middle", "lower"}


def sentences() -> list[tuple[str, dict[str, Label]]]:
    with (Path(__file__).parent / "finding_sentences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="|"))
    return [(row["sentence"], dict(map(_label, filter(None, row["labels"].split(";"))))) for row in rows]


def _label(text: str) -> tuple[str, Label]:
    name, status, where = re.fullmatch(r"([A-Za-z ]+)([-+?])(.*)", text).groups()
    assert name in OBSERVATIONS
    words = frozenset(where.split())
    assert words <= SIDES | ZONES
    return name, Label(STATUS[status], words & SIDES, words & ZONES)


def test_there_are_enough_sentences_of_every_observation() -> None:
    given = sentences()
    assert len({sentence for sentence, _ in given}) == len(given) >= 200
    for name in OBSERVATIONS[1:]:
        found = {label.status for _, labelled in given if (label := labelled.get(name))}
        assert {"positive", "negative"} <= found, name


@pytest.mark.parametrize(("sentence", "expected"), sentences())
def test_a_sentence_is_labelled_as_by_hand(sentence: str, expected: dict[str, Label]) -> None:
    found = labels(sentence)
    found.pop(NO_FINDING, None)
    assert found == expected


def test_a_report_without_a_finding_says_so() -> None:
    normal = "Heart size is normal. The lungs are clear. Endotracheal tube in place."
    assert labels(normal)[NO_FINDING].status == "positive"
    assert NO_FINDING not in labels(normal + " Possible small effusion.")
    assert labels("") == labels(" . ") == {}


def test_a_positive_mention_counts_before_a_negative_one() -> None:
    found = labels("No right effusion. Small left effusion. No effusion elsewhere.")
    assert found["Pleural Effusion"] == Label("positive", frozenset({"left"}))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Left effusion.", "Left pleural effusion.", {"Pleural Effusion": "supported"}),
        ("Effusion.", "Left pleural effusion.", {"Pleural Effusion": "supported"}),
        ("Right effusion.", "Left pleural effusion.", {"Pleural Effusion": "side_wrong"}),
        ("Upper nodule.", "Lower nodule.", {"Lung Lesion": "zone_wrong"}),
        ("There is a pneumothorax.", "No pneumothorax.", {"Pneumothorax": "contradicted"}),
        ("There is a pneumothorax.", "Normal chest.", {"Pneumothorax": "unmentioned"}),
        ("Normal chest.", "Rib fracture.", {"Fracture": "omitted"}),
        ("No fracture.", "Rib fracture.", {"Fracture": "denied"}),
        ("Possible fracture.", "Rib fracture.", {"Fracture": "uncertain"}),
        ("No fracture.", "The bones are intact.", {}),
    ],
)
def test_outcomes(prediction: str, reference: str, expected: dict[str, str]) -> None:
    assert outcomes(prediction, reference) == expected


def test_figures_count_what_is_asserted_and_what_is_expected() -> None:
    answers = [
        Answer("No effusion. Right pneumothorax.", "Left pneumothorax. No pleural effusion."),
        Answer("Possible edema. Left rib fracture.", "Cardiomegaly with edema."),
    ]
    assert finding_figures(answers) == {
        "Cardiomegaly": {"unmentioned": 1},
        "Edema": {"uncertain": 1},
        "Pneumothorax": {"side_wrong": 1},
        "Fracture": {"omitted": 1},
    }
    answers = [
        Answer("Left effusion. Cardiomegaly.", "Left pleural effusion. Rib fracture."),
        Answer("Normal chest.", "Normal chest."),
    ]
    for name, value in (("report_findings_supported", 1 / 2), ("report_findings_recalled", 1 / 2)):
        metric = METRICS[name]
        assert metric.value(metric.of(answers).sum(axis=0)) == pytest.approx(value)
        assert metric.role == "detail", "shown, not judged"
