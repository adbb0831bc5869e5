"""Words of the vocabulary in another sense are no facts: no edit changes them.

In their own sense they stay facts.
"""

from __future__ import annotations

import numpy as np
import pytest

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.rule_edit import rule_edit
from mmedpo_ray.radiology.lexicon.vocabulary import mentions

# Text → words that every edit of it keeps.
OTHER_SENSES = {
    "This middle aged man attended the clinic with a nodule in the left lung.": "middle aged",
    "Middle-aged woman with a nodule in the left lung": "Middle-aged",
    "In the middle of the night a CT of the brain was done.": "middle of the night",
    "A fracture of the middle finger": "middle finger",
    "Fluid in the middle ear": "middle ear",
    "The patient was left in the ward.": "was left in the ward",
    "The patient has left the hospital; a nodule was found.": "left the hospital",
    "The wound was left open.": "left open",
    "The drain was left in place.": "left in place",
    "The mass was left untreated.": "left untreated",
    "What is left of the lung is clear.": "left of",
    "Contrast was left over in the colon.": "left over",
    "A left-handed woman": "left-handed",
    "A right handed woman": "right handed",
    "The patient is left hand dominant.": "left hand dominant",
    "The CT was done right after the injection.": "right after",
    "A nodule was seen right away.": "right away",
    "All right.": "right",
    "That is the right diagnosis.": "right diagnosis",
    "The vessels cross at right angles.": "right angles",
    "The tube is right at the carina.": "right at",
    "The density is lower than that of the liver.": "lower than",
    "The heart is at the upper limit of normal.": "upper limit of normal",
    "Upper GI series": "Upper GI",
    "On top of the patient": "On top",
    "large body mass index": "large body mass index",
    "A woman with a body mass index of 32": "body mass index",
    "Low muscle mass": "muscle mass",
    "Lean body mass": "Lean body mass",
    "Left ventricular mass index": "mass index",
    "A large number of cells": "large number",
    "Small vessel disease": "Small vessel",
    "Small cell lung cancer": "mall cell lung cancer",
    "Diffuse large B cell lymphoma": "large B cell lymphoma",
    "trace of fluid": "trace of",
    "The area marked by the arrow is the liver.": "marked by",
    "He was given normal saline.": "normal saline",
    "The costophrenic angle is acute.": "acute",
    "It is clear that the lung is collapsed.": "clear that",
    "Acute on chronic subdural hematoma": "cute on chronic",
    "Chronic obstructive pulmonary disease": "Chronic obstructive",
    "Acute myeloid leukemia": "Acute myeloid",
    "Subcutaneous emphysema": "ubcutaneous emphysema",
    "Pedal edema": "edal edema",
    "Epidural abscess": "pidural abscess",
    "Epidural anesthesia": "Epidural",
    "Subarachnoid space": "Subarachnoid",
    "Vertebral collapse": "collapse",
    "The patient was found after a collapse at home.": "collapse",
    "Cancer center": "Cancer center",
    "Tumor markers": "Tumor",
    "White blood cell count": "White blood",
    "A white woman": "white",
    "Transverse colon": "Transverse colon",
    "Superior sagittal sinus": "Superior sagittal sinus",
    "T1 vertebra": "T1",
    "Cystic fibrosis": "Cystic",
    "Round ligament": "Round",
    "Left anterior descending artery": "Left anterior descending",
    "Lateral view": "Lateral",
    "Femoral head": "head",
    "Base of the skull": "Base",
    "Regular rhythm": "Regular",
    "Mr Smith": "Mr",
    "The patient was left paralyzed after the stroke.": "left paralyzed",
    "The stent was left across the stricture.": "left across",
    "He left yesterday.": "left",
    "The mass has left its mark.": "left its mark",
    "The patient has the right to refuse.": "right to refuse",
    "The mass of the fetus is 2 kg.": "mass",
    "Central hospital": "Central",
    "Upper class patient": "Upper",
    "In mid 2019 a nodule was found.": "In mid 2019",
    "The patient is right in the middle of chemotherapy.": "right in the middle of",
    "The central nervous system is normal.": "central nervous",
    "Mildly lower lung volumes": "lower lung volumes",
    "The lower the dose, the better.": "The lower",
    "Extensive smoking history": "Extensive smoking",
    "Chronic smoker with cough": "Chronic",
    "Small for gestational age": "Small for",
    "At large": "large",
    "Minimal change disease": "Minimal change",
    "Normal pressure hydrocephalus": "ormal pressure hydrocephalus",
    "Bladder cancer patient": "cancer",
    "Male pattern baldness": "Male",
    "Moderate quality image": "Moderate quality",
    "No. 5 rib": "No. 5",
    "Rib no. 5 is fractured.": "no. 5",
    "Rh negative": "negative",
    "Negative pressure wound therapy": "Negative",
    "Breathing room air": "air",
    "IV fluids were given.": "fluids",
    "The patient is hemodynamically stable.": "stable",
    "The woman hurt her leg.": "woman",
    "PA and lateral chest radiographs.": " and lateral chest radiographs.",
    "PA and lateral": "lateral",
    "Frontal and lateral views of the chest show a nodule.": "lateral views",
    "Chest X-ray, lateral": "X-ray, lateral",
    "Lateral and AP knee films": "Lateral and ",
    "Lateral cervical spine radiograph": "Lateral cervical spine radiograph",
    "AP chest radiograph": "radiograph",
    "Two-view chest radiographs": "radiographs",
    "Lateral chest": "Lateral",
    "He was right about the fracture.": "right about",
    "They were right.": "right.",
    "The clinician is right that there is a fracture.": "right that",
    "She was right to order a CT.": "right to order",
    "There is a mass, right?": "right?",
    "Is that right?": "right?",
    "The patient has rights.": "rights",
    "All rights reserved.": "rights",
    "The right treatment was given.": "right treatment",
    "Superior image quality.": "Superior",
    "Inferior results were seen.": "Inferior",
    "Lower diagnostic accuracy": "Lower",
    "The image quality is inferior.": "inferior",
    "MRI is superior to CT.": "superior",
}
# Text → the facts that its words state after all.
OWN_SENSES = {
    "The mass is left of the midline.": ["mass", "left"],
    "Pleural effusion on the left unchanged": ["pleural effusion", "left"],
    "On the left with a small nodule": ["left", "small", "nodule"],
    "There has left pleural effusion.": ["left", "pleural effusion"],
    "The patient has left-sided weakness.": ["left"],
    "Shift was left to right.": ["left", "right"],
    "Left hand": ["left"],
    "The trachea was left deviated.": ["trachea", "left"],
    "There was left sided effusion.": ["left", "pleural effusion"],
    "The finding was left upper lobe pneumonia.": ["left", "upper", "pneumonia"],
    "Left lung": ["left", "lung"],
    "On the right above the diaphragm": ["right", "diaphragm"],
    "All right upper lobe nodules": ["right", "upper", "nodule"],
    "Right angle of the mandible": ["right"],
    "Right below knee amputation": ["right"],
    "Vertebral body mass": ["mass"],
    "Breast mass": ["mass"],
    "Large mass": ["large", "mass"],
    "Middle lobe": ["middle"],
    "Lower lobe": ["lower"],
    "On top of the image": ["upper"],
    "Marked cardiomegaly": ["large", "cardiomegaly"],
    "Collapse of the left lung": ["atelectasis", "left", "lung"],
    "Acute infarct": ["acute", "infarct"],
    "Subdural blood": ["subdural hematoma"],
    "MR of the head": ["mri", "brain"],
    "White matter": ["white matter"],
    "The ventricle is black.": ["hypointense"],
    "The mass is right.": ["mass", "right"],
    "It is right.": ["right"],
    "Is the mass on the left or right?": ["mass", "left", "right"],
    "Left, right?": ["left", "right"],
    "Shunt is right to left.": ["right", "left"],
    "Nodule on the right about 2 cm": ["nodule", "right"],
    "A mass on the right that is large": ["mass", "right", "large"],
    "That was right lower lobe pneumonia.": ["right", "lower", "pneumonia"],
    "The nodule is superior to the hilum.": ["nodule", "upper"],
    "Inferior to the liver": ["lower", "liver"],
    "Superior segment": ["upper"],
    "PET scans": ["pet"],
    "Radiographs": ["x-ray"],
}


@pytest.mark.parametrize(("text", "kept"), OTHER_SENSES.items())
def test_no_edit_changes_a_word_in_another_sense(text: str, kept: str) -> None:
    edits = {edit.text for seed in range(40) if (edit := rule_edit(text, "", np.random.default_rng(seed)))}
    assert [edit for edit in edits if kept not in edit] == []


@pytest.mark.parametrize(("text", "named"), OWN_SENSES.items())
def test_a_word_in_its_own_sense_is_a_fact(text: str, named: list[str]) -> None:
    assert [mention.concept.name for mention in mentions(text)][: len(named)] == named


@pytest.mark.parametrize(
    "text", ["Body mass index 32", "Vertebral collapse", "Epidural anesthesia", "Tumor markers"]
)
def test_a_word_in_another_sense_is_no_finding(text: str) -> None:
    assert lexicon.facts(text) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bilateral ground glass opacities", {"left ground glass opacities", "right ground glass opacities"}),
        ("Bilateral opacities", {"Left opacities", "Right opacities"}),
        ("Multiple bilateral infiltrates.", {"Multiple left infiltrates.", "Multiple right infiltrates."}),
        (
            "Bilateral pleural effusions",
            {"Left pleural effusion", "Right pleural effusion", "Bilateral pneumothoraces"},
        ),
        (
            "with bilateral pleural effusions",
            {
                "with a left pleural effusion",
                "with a right pleural effusion",
                "with bilateral pneumothoraces",
            },
        ),
        (
            "Bilateral subdural hematomas",
            {f"{side} subdural hematoma" for side in ("Left", "Right")} | {"Bilateral epidural hematomas"},
        ),
        ("Opacities in both lungs", {"Opacities in the left lung", "Opacities in the right lung"}),
        ("The opacities are bilateral.", {"The opacities are left-sided.", "The opacities are right-sided."}),
        ("Bilateral lung bases", {"Left lung base", "Right lung base"}),
        ("Atelectasis at both lung bases, stable", {"Atelectasis at both lung apices, stable"}),
        ("multiple nodules", {"multiple granulomas"}),
        ("Fractures of the ribs", {"No fractures of the ribs"}),
        ("Multiple rib fractures", {"No rib fractures"}),
        ("Old infarcts and lesions", {"No old infarcts or lesions"}),
        ("The nodules are no longer seen.", {"The nodules are still seen."}),
        ("Ring-enhancing lesions", {"No ring-enhancing lesions"}),
    ],
)
def test_plurals_have_edits_in_good_grammar(text: str, expected: set[str]) -> None:
    edits = {edit.text for seed in range(60) if (edit := rule_edit(text, "", np.random.default_rng(seed)))}
    assert edits <= expected | {
        text.replace("Atelectasis", other) for other in ("Consolidation", "Pneumonia", "Pulmonary edema")
    }
    assert edits & expected


def test_a_plane_named_twice_is_changed_twice() -> None:
    edits = {
        edit.text
        for seed in range(9)
        if (edit := rule_edit("Transverse Plane (axial)", "", np.random.default_rng(seed)))
    }
    assert edits == {"Coronal Plane (coronal)", "Sagittal Plane (sagittal)"}


@pytest.mark.parametrize("text", ["In the ward", "A man with his arm fractured", "Because of the effusion"])
def test_what_names_no_finding_is_not_denied(text: str) -> None:
    found = rule_edit(text, "", np.random.default_rng(0))
    assert found is None or not found.text.startswith("No ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A nodule in the lateral chest wall", "A nodule in the medial chest wall"),
        ("Lateral aspect of the hilum", "Medial aspect of the hilum"),
        ("Chest radiograph", "Chest CT"),
        ("Chest radiographs", "Chest CTs"),
        ("The mass is right.", "The mass is left."),
        ("Superior segment", "Inferior segment"),
    ],
)
def test_words_in_their_own_sense_are_edited(text: str, expected: str) -> None:
    edits = {edit.text for seed in range(60) if (edit := rule_edit(text, "", np.random.default_rng(seed)))}
    assert expected in edits, edits
    assert not [edit for edit in edits if "pets" in edit.lower()]
