"""What visual tools are asked to find."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.config.load import load
from mmedpo_ray.errors import UserError
from mmedpo_ray.radiology.finding_prompts import (
    OBSERVATIONS,
    finding_asked,
    names_finding,
    observation_for,
    prompt_for,
)
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS

GENERIC = "disease"

# Question, answer, prompt for a free-text tool, MedKLIP's observation.
EXAMPLES = [
    ("Is there evidence of a pleural effusion?", "Yes", "pleural effusion", "effusion"),
    ("Is there a pneumothorax?", "No", "pneumothorax", "pneumothorax"),
    ("Is a pneumothorax seen?", "No. There is a large effusion.", "pleural effusion", "effusion"),
    ("Is a pneumothorax seen?", "No, there is a large effusion.", "pleural effusion", "effusion"),
    ("Where is the nodule located?", "Left upper lobe", "nodule", "nodule"),
    ("What is the abnormality in this chest X-ray?", "Cardiomegaly", "cardiomegaly", "cardiomegaly"),
    ("Is the heart enlarged?", "Yes", "cardiomegaly", "cardiomegaly"),
    ("What diseases are included in the picture?", "Lung cancer", "cancer", "mass"),
    ("Is there a mass or an effusion?", "An effusion", "pleural effusion", "effusion"),
    ("What does the opacity suggest?", "Pneumonia", "pneumonia", "pneumonia"),
    ("Which lobe shows the infiltration?", "Left lower lobe", "opacity", "opacity"),
    ("Does the picture contain pulmonary edema?", "Yes", "pulmonary edema", "edema"),
    ("Is there free air under the diaphragm?", "No", "pneumoperitoneum", "air"),
    ("On which side is the chest tube?", "Left", "chest tube", "tube"),
    ("Are the ribs broken?", "Yes, a rib fracture on the right", "rib fracture", "fracture"),
    # The lexicon has no such finding, MedKLIP has a word for it.
    ("Are the costophrenic angles blunted?", "Yes, on the left", "disease", "blunt"),
    ("Are the lungs hyperinflated?", "Yes", "disease", "hyperinflate"),
    ("Where does the catheter end?", "In the superior vena cava", "disease", "catheter"),
    ("What is wrong with the spine?", "Scoliosis", "disease", "deformity"),
    ("Describe the image.", "No effusion. Scattered scarring at both apices.", "disease", "scar"),
    # Findings that no chest model knows.
    ("Is there a midline shift?", "Yes", "midline shift", "disease"),
    ("What is seen in the liver?", "A cyst", "cyst", "disease"),
    # No finding at all.
    ("What modality is this?", "MRI", "disease", "disease"),
    ("Is this a CT scan?", "No, it is an X-ray", "disease", "disease"),
    ("Which organ is abnormal?", "The lung", "disease", "disease"),
    ("Where is the abnormality?", "Right lower lobe", "disease", "disease"),
    ("Are the lungs clear?", "Yes", "disease", "disease"),
    ("", "", "disease", "disease"),
]


@pytest.mark.parametrize(("question", "answer", "prompt", "observation"), EXAMPLES)
def test_what_a_tool_looks_for_is_a_finding(
    question: str, answer: str, prompt: str, observation: str
) -> None:
    if (prompt, observation) != ("disease", "disease"):
        assert names_finding(question, answer)


@pytest.mark.parametrize(
    ("question", "answer", "named"),
    [
        ("What modality is used to take this image?", "MRI", False),
        ("Which part of the body does this image belong to?", "Chest", False),
        ("Does the picture contain liver?", "Yes", False),
        ("What is the scanning plane of this image?", "Transverse plane", False),
        ("How many kidneys in this image?", "2", False),
        ("Was contrast used?", "Yes", False),
        ("Is this a PA film?", "No", False),
        ("Does this image look normal?", "No", True),
        ("Which organ is abnormal?", "The lung", True),
        ("Is the trachea midline?", "Yes", True),
        ("Which lobe is infarcted?", "Right parietal", True),
        ("Is this patient intubated?", "Yes", True),
        ("What is the diagnosis?", "Appendicitis", True),
        ("What is seen?", "Glioblastoma", True),
        ("What is seen?", "MRI", False),
    ],
)
def test_questions_that_a_lesion_decides(question: str, answer: str, named: bool) -> None:
    assert names_finding(question, answer) == named


@pytest.mark.parametrize(("question", "answer", "prompt", "observation"), EXAMPLES)
def test_questions_of_the_public_sets_kind(question: str, answer: str, prompt: str, observation: str) -> None:
    assert prompt_for(question, answer, GENERIC) == prompt
    assert observation_for(question, answer, GENERIC) == observation
    assert prompt_for(question, answer, GENERIC, always_generic=True) == "disease"
    assert observation_for(question, answer, GENERIC, always_generic=True) == "disease"


def test_of_several_findings_the_most_relevant_is_asked_for() -> None:
    answer = "There is a calcification, a nodule and a pneumothorax on the left."
    assert finding_asked("What is seen?", answer) == "pneumothorax"


@given(st.text(), st.text())
def test_any_text_gives_a_prompt(question: str, answer: str) -> None:
    for always in (False, True):
        prompt = prompt_for(question, answer, GENERIC, always_generic=always)
        assert prompt.strip()
        assert prompt == prompt_for(question, answer, GENERIC, always_generic=always)
        assert observation_for(question, answer, GENERIC, always_generic=always) in OBSERVATIONS


@given(st.sampled_from(sorted(CONCEPTS)), st.sampled_from(sorted(CONCEPTS)))
def test_any_concept_gives_a_known_observation(first: str, second: str) -> None:
    question, answer = f"Is there a {first}?", f"Yes, a {second}."
    assert observation_for(question, answer, GENERIC) in OBSERVATIONS
    named = {name for name in (first, second) if CONCEPTS[name].axis == "finding"}
    if second in named:
        assert prompt_for(question, answer, GENERIC) in CONCEPTS


def test_every_finding_alone_is_its_own_prompt() -> None:
    for name, concept in CONCEPTS.items():
        if concept.axis == "finding":
            assert prompt_for(f"Is there {name}?", "Yes", GENERIC) == name


def test_the_observations_are_medklips() -> None:
    assert len(OBSERVATIONS) == len(set(OBSERVATIONS)) == 75
    # Places that the official scripts rely on.
    assert OBSERVATIONS[0] == "normal"
    assert OBSERVATIONS[20] == "pneumonia"
    assert OBSERVATIONS[29] == "disease"
    assert OBSERVATIONS[-1] == "excluded_obs"


def test_the_generic_word_is_the_users() -> None:
    generic = load(None, ("curate.visual.generic_prompt= Lesion ",)).curate.visual.generic_prompt
    assert prompt_for("Why?", "", generic) == prompt_for("Why?", "", " Lesion ") == "Lesion"
    assert observation_for("Why?", "", generic) == observation_for("Why?", "", " Lesion ") == "lesion"
    # A word that MedKLIP was not trained on.
    assert prompt_for("Why?", "", "tumour bed") == "tumour bed"
    assert observation_for("Why?", "", "tumour bed") == "disease"
    for empty in ("", " "):
        with pytest.raises(UserError, match=r"curate\.visual\.generic_prompt"):
            load(None, (f"curate.visual.generic_prompt={empty}",))
