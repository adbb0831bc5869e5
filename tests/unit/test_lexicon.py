"""The radiology lexicon: what answers say, and where two of them conflict."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.phantom.findings import KINDS, Finding
from mmedpo_ray.phantom.text import NAMES, report_findings
from mmedpo_ray.phantom.world import generate
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon import Fact
from mmedpo_ray.radiology.lexicon.meta_text import COMMENTARY, LEAKED_PROMPT
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, mentions

REPORT = (
    "The heart size is normal. There is a large left pleural effusion. There is a nodule in the right middle "
    "zone. No pneumothorax."
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        (" no, it is clear", "no"),
        ("Normal", None),
        ("nodule", None),
        ("None", "no"),
        ("Yesterday", None),
        ("", None),
    ],
)
def test_polarity_is_a_whole_first_word(answer: str, expected: str | None) -> None:
    assert lexicon.polarity(answer) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (
            "Is there evidence of inflammation?",
            "The CT scan does not show any evidence of inflammation.",
            "no",
        ),
        ("Is there a pneumothorax?", "There is a small pneumothorax.", "yes"),
        ("Is the heart size normal?", "The heart is enlarged.", "no"),
        ("Is the heart enlarged?", "The heart is enlarged.", "yes"),
        ("Is there a pneumothorax?", "Yes, there is no doubt.", "yes"),
        ("Is there a pneumothorax?", "Pleural effusion", None),
        # What is denied is what was asked.
        ("Is this a CT scan?", "This is a CT, not an MRI.", "yes"),
        ("Is this a CT scan?", "This is an MRI, not a CT.", "no"),
        ("Is this a CT scan?", "This is an MRI rather than a CT.", "no"),
        ("Is this a CT scan?", "This is not an MRI, it is a CT.", "yes"),
        ("Is this a CT scan?", "No, this is an MRI.", "no"),
        ("Is this a CT scan?", "No this is an MRI.", "no"),
        ("Is this a CT scan?", "It is not.", "no"),
        ("Is the trachea midline?", "The trachea is midline, not deviated.", "yes"),
        ("Is the trachea midline?", "The trachea is not midline.", "no"),
        ("Is the trachea midline?", "The trachea is not deviated.", None),
        ("Is the trachea midline?", "No deviation of the trachea.", None),
        (
            "Are the costophrenic angles sharp?",
            "The costophrenic angles are sharp with no blunting.",
            "yes",
        ),
        ("Are the costophrenic angles sharp?", "The costophrenic angles are blunted, not sharp.", "no"),
        ("Is the heart normal?", "No cardiomegaly", "yes"),
        ("Is the heart enlarged?", "No cardiomegaly", "no"),
        ("Are the lungs free of effusion?", "There is no effusion.", "yes"),
        ("Is there a nodule?", "No abnormality is seen.", "no"),
        ("Is there a nodule?", "No.", "no"),
        (
            "Is this image abnormal?",
            "The X-ray appears to be normal, with no significant abnormalities.",
            "no",
        ),
        ("Is this image abnormal?", "The heart is normal.", None),
        ("Is the lung abnormal?", "The liver is normal.", None),
        ("Is the lung abnormal?", "The lung is normal.", "no"),
        ("Can an effusion be seen?", "It seems that an effusion was not observed.", "no"),
        ("Does the lesion involve the vessels?", "The lesion does not involve the vessels.", "no"),
        ("Is the spleen normal?", "The spleen is not enlarged.", None),
        ("Is there an effusion?", "The heart is enlarged and an effusion is not seen.", "no"),
        ("Is there an effusion?", "There is an effusion and a pneumothorax is not seen.", "yes"),
        ("Is there a nodule?", "None seen", "no"),
        # Something else is denied, or it is left open.
        ("Is there a nodule in the left lung?", "There is no nodule in the right lung.", None),
        ("Is there a nodule in the left lung?", "There is a nodule in the right lung.", None),
        ("Is there an effusion?", "There is no large effusion.", None),
        ("Is there a large effusion?", "There is a small effusion.", None),
        ("Is there a pneumothorax?", "A pneumothorax cannot be excluded.", None),
        ("Is there a pneumothorax?", "It cannot be determined whether there is a pneumothorax.", None),
        ("Is the heart larger than the liver?", "The liver is larger than the heart.", None),
    ],
)
def test_a_statement_answers_a_closed_question(question: str, answer: str, expected: str | None) -> None:
    assert lexicon.implied_polarity(question, answer) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is this a CT or an MRI?", ("ct", "mri")),
        ("Is the hila normal or enlarged?", ("normal", "enlarged")),
        ("Is the lesion big or tiny?", ("big", "tiny")),
        ("Is there an effusion or not?", None),
        ("Is there an effusion?", None),
        ("How many organs are seen?", None),
    ],
)
def test_options_of_a_choice_question(question: str, expected: tuple[str, str] | None) -> None:
    assert lexicon.choices(question) == expected


def test_facts_keep_their_own_side_zone_and_size() -> None:
    assert lexicon.facts(REPORT) == (
        Fact("cardiomegaly", False),
        Fact("pleural effusion", True, "left", None, "large"),
        Fact("nodule", True, "right", "middle", None),
        Fact("pneumothorax", False),
    )
    assert lexicon.facts("A nodule in the right lung and an effusion on the left.") == (
        Fact("nodule", True, "right"),
        Fact("pleural effusion", True, "left"),
    )


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("No pleural effusion or pneumothorax.", {"pleural effusion", "pneumothorax"}),
        ("Pleural effusion is absent.", {"pleural effusion"}),
        ("The lungs are clear.", {"lung abnormality"}),
        ("Normal chest radiograph.", {"abnormality"}),
        ("There is no pneumothorax but an effusion is seen.", {"pneumothorax"}),
        ("The pneumothorax is no longer seen.", {"pneumothorax"}),
        ("The effusion has resolved.", {"pleural effusion"}),
        ("No new nodule; stable consolidation.", {"nodule"}),
        ("Cannot exclude pneumonia.", set()),
    ],
)
def test_negation_has_its_scope(text: str, denied: set[str]) -> None:
    assert {fact.finding for fact in lexicon.facts(text) if not fact.present} == denied


def test_reads_every_phantom_report_as_it_was_written() -> None:
    names = {NAMES[kind]: kind for kind in KINDS}
    for phantom in generate("test", 60, seed=3):
        report = phantom.questions[-1].answer
        read = {
            Finding(names[fact.finding], fact.side, fact.zone)
            for fact in lexicon.facts(report)
            if fact.present
        }
        assert read == set(report_findings(report))


@pytest.mark.parametrize(
    ("reference", "answer", "question", "axis", "severity"),
    [
        ("Left", "Right", "On which side?", "side", 0.9),
        ("Right middle zone", "The nodule is in the right lower zone.", "Where is the nodule?", "zone", 0.6),
        ("Yes", "No", "Is there a pneumothorax?", "polarity", 1.0),
        ("Nodule", "No abnormality", "What is seen?", "finding", 0.8),
        ("one", "There are three masses.", "How many masses are there?", "number", 0.5),
        ("T2", "This is T1-weighted.", "What is the weighting?", "sequence", 0.5),
        ("Enlarged", "Normal", "What is the size of the heart?", "state", 0.7),
    ],
)
def test_one_conflict_of_one_kind(
    reference: str, answer: str, question: str, axis: str, severity: float
) -> None:
    found = lexicon.conflicts(reference, answer, question)
    assert [conflict.axis for conflict in found] == [axis]
    assert lexicon.severity(found) == pytest.approx(severity)


def test_reports_conflict_fact_by_fact() -> None:
    assert lexicon.conflicts(REPORT, REPORT) == ()
    swapped = lexicon.conflicts(REPORT, REPORT.replace("left", "right"))
    assert [(c.axis, c.expected, c.stated) for c in swapped] == [("side", "left", "right")]
    invented = lexicon.conflicts(REPORT, REPORT.replace("No pneumothorax", "There is a pneumothorax"))
    assert [(c.subject, c.kind) for c in invented] == [("pneumothorax", "contradicted")]
    cleared = "The heart size is normal. The lungs are clear. No pleural effusion or pneumothorax."
    assert lexicon.severity(lexicon.conflicts(REPORT, cleared)) > lexicon.severity(swapped)


def test_equivalent_answers() -> None:
    assert lexicon.equivalent("The liver", "liver.")
    assert lexicon.equivalent("CT", "This is a CT scan")
    assert lexicon.equivalent("pleural effusions", "Pleural effusion")
    assert not lexicon.equivalent("Left lung", "Right lung")
    assert not lexicon.equivalent("left effusion and right nodule", "right effusion and left nodule")
    assert not lexicon.equivalent("Yes", "No")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Normal", "No abnormality is seen.", True),
        ("Healthy", "Normal", True),
        ("Unremarkable", "The image shows no abnormalities.", True),
        ("Normal", "Cardiomegaly", False),
        ("Normal", "Abnormal", False),
        ("Both", "Left and right", True),
        ("Bilateral", "The left and the right side", True),
        ("Both lungs", "Left lung and right lung", True),
        ("Both", "Left", False),
        ("Left and right", "Right", False),
        ("0", "None", True),
        ("Zero", "No", True),
        ("0", "Two", False),
        ("3", "Three", True),
        ("RUL", "Right upper lobe", True),
        ("LLL", "The left lower lobe.", True),
        ("rml", "Right middle lobe", True),
        ("RUL", "Left upper lobe", False),
        ("RUL", "RLL", False),
        # Abbreviations: the known ones, and initials.
        ("ICH", "Intracranial hemorrhage", True),
        ("CVA", "Cerebrovascular accident", True),
        ("COPD", "Chronic obstructive pulmonary disease", True),
        ("TB", "Tuberculosis", True),
        ("ETT", "Endotracheal tube", True),
        ("GI", "Gastrointestinal", True),
        ("US", "Ultrasound", True),
        ("XR", "X-ray", True),
        ("PA", "Posterior-Anterior", True),
        ("B/L", "Bilateral", True),
        ("R", "Right", True),
        ("L", "Left side", True),
        ("F", "Female", True),
        ("M", "Male.", True),
        ("R", "L", False),
        ("F", "Male", False),
        ("F", "Fracture", False),
        ("CNS", "The central nervous system", True),
        ("PRES", "Posterior reversible encephalopathy syndrome", True),
        ("PE", "Pulmonary embolism", True),
        ("IVC", "inferior vena cava", True),
        ("SVC", "Inferior vena cava", False),
        ("Chf", "Congestive heart failure", False),
        ("CT", "Chest tube", False),
        ("No", "Nodular opacity", False),
        ("NO", "Nodular opacity", False),
        ("NE", "No effusion", False),
        ("PA", "Anterior-posterior", False),
        ("Cardiomegaly", "The cardiac silhouette is enlarged", True),
        ("Cardiomegaly", "Enlargement of the heart", True),
        ("No cardiomegaly", "The heart size is normal.", True),
        ("Cardiomegaly", "The heart size is normal.", False),
        ("Clear lungs", "No lung abnormality", True),
        ("Pleural effusion", "There is evidence of hydrothorax.", True),
        ("Left psoas abscess", "Left iliac abscess", False),
        ("CT", "CT, not MRI", False),
        # Comparisons and signs.
        ("<5 mm", ">5 mm", False),
        ("<5 mm", "5 mm", False),
        ("<5 mm", "< 5 mm", True),
        ("<5 mm", "Less than 5 mm", True),
        ("≥ 3", ">= 3", True),
        ("+", "-", False),
        ("+", "+.", True),
        ("HER2+", "HER2-", False),
        ("-5 HU", "5 HU", False),
        ("−5 HU", "-5 HU", True),
        ("- Left lung", "Left lung", True),
        ("Left lung -", "Left lung", True),
        ("left-sided effusion", "left sided effusion", True),
        ("3-5 mm", "3-5 mm.", True),
        # Words of one meaning beyond the vocabulary.
        ("The lungs are well inflated.", "The lungs are well expanded.", True),
        ("Bony thymoma", "An osseous thymoma", True),
        ("Raised pressure", "Elevated pressure", True),
        ("Within the normal range", "Within normal limits", True),
        ("Raised pressure", "Reduced pressure", False),
    ],
)
def test_equivalent_in_other_words(first: str, second: str, same: bool) -> None:
    assert lexicon.equivalent(first, second) is same
    assert lexicon.equivalent(second, first) is same


def test_of_findings_that_matter_alike_the_first_by_name_is_contradicted() -> None:
    answer = "Stroke, pneumothorax, glioma, pneumoperitoneum and aneurysm"
    (conflict,) = lexicon.contradictions(answer, "Normal")
    assert conflict.subject == "aneurysm"


@pytest.mark.parametrize(
    ("reference", "answer", "question"),
    [
        ("Axial", "Axial, not coronal", "In which plane?"),
        ("CT", "A CT rather than an MRI", "Which modality?"),
        ("Atelectasis", "Atelectasis rather than pneumonia", "What is seen?"),
        ("Atelectasis", "This is not pneumonia, it is atelectasis.", "What is seen?"),
        ("Left", "Left instead of right", "Which side?"),
        ("Yes", "This is a CT, not an MRI.", "Is this a CT scan?"),
        ("0", "None", "How many nodules?"),
        ("None", "0", "How many nodules?"),
        ("3", "Multiple", "How many nodules?"),
        ("3", "At least two", "How many nodules?"),
    ],
)
def test_what_is_ruled_out_is_not_stated(reference: str, answer: str, question: str) -> None:
    assert lexicon.conflicts(reference, answer, question) == ()
    assert lexicon.contradictions(reference, answer, question) == ()
    assert not lexicon.names_another(reference, answer, question)


@pytest.mark.parametrize(
    ("reference", "answer", "question"),
    [
        ("Axial", "Coronal, not axial", "In which plane?"),
        ("CT", "An MRI rather than a CT", "Which modality?"),
        ("Left", "Right instead of left", "Which side?"),
        ("Both", "Left", "Which side?"),
        ("0", "Two", "How many nodules?"),
        ("Two", "None", "How many nodules?"),
        ("1", "Multiple", "How many nodules?"),
        ("0", "Several nodules", "How many nodules?"),
        ("<5 mm", ">5 mm", "How large?"),
        ("5 cm", "< 10 mm", "How large?"),
        ("<10%", "More than 50%", "What is the stenosis?"),
        ("RUL", "Left upper lobe", "Where is the lesion?"),
        ("Normal", "Cardiomegaly", "What is seen?"),
        # A wider word, in another place.
        ("Cancer of the left lung", "Mass of the right lung", "What is seen?"),
        ("There is a left pneumonia.", "There is a right opacity.", "What is seen?"),
        ("Upper lobe pneumonia", "Lower lobe opacity", "What is seen?"),
    ],
)
def test_what_is_stated_still_conflicts(reference: str, answer: str, question: str) -> None:
    assert lexicon.contradictions(reference, answer, question)


@pytest.mark.parametrize(
    "text",
    [
        # Leaked prompts and roles.
        "Question: What is it?\n cecum",
        "Question: What is it? cecum",
        "**Question:** Is this CT?\n\n- Yes",
        "Question: Where is the mass?",
        "Question: fracture?\nAnswer: no",
        "Here is the list:\n-Original Answer: left",
        "-Candidate Answer1: left",
        "<image> yes",
        "[INST] left",
        "USER: where? ASSISTANT: left",
        "<|im_end|> left",
        "Human: which side?\nGPT: left",
        "ASSISTANT: The left lung.",
        "### Response: the left lung",
        # Refusals, with either apostrophe.
        "As an AI, I see a nodule",
        "As a large language model I have no eyes",
        "I'm just an AI assistant.",
        "I can't see the image.",
        "I’m sorry, I can’t help with that.",
        "Sorry, but the image is not visible.",
        "I apologize, the scan is unclear.",
        "I cannot see a side",
        "I am unable to view attachments",
        "I don't have access to images.",
        "It is hard to tell, as the picture was not provided",
        "No image was provided.",
        "The image isn't available",
        "Please upload the image again.",
        "Unable to view the image",
        "I cannot see the image.",
        "I'm unable to view images",
        "I am not able to open the attached file, so I cannot say more.",
        "I cannot provide a diagnosis.",
        "Unfortunately, I can't give medical advice.",
        "I am not able to answer this question.",
        "Left lung. However, I cannot actually see the image, and a physician should look at it.",
        "I do not have the ability to interpret scans",
        "Without access to the image, no side can be named.",
        "The X-ray image you mentioned was not attached.",
        "The images are not provided.",
        "Please share the scan so that I can assist.",
        # Talk about the answers and their making.
        "The provided answer is wrong.",
        "The original answer says left",
        "The dispreferred answer: right",
        "This answer is incorrect because the lung is clear",
        "Note: I changed left to right.",
        "Right lung (I swapped the side)",
        "Right lung\n\nExplanation: the answer now names the other side",
        "Here is the rewritten answer: right",
        "Here's a modified version: right",
        "Note: The side was changed.",
        "(Note: left replaced with right)",
        'I replaced "liver" with "spleen".',
        "Note: The question pertains to an MRI scan.",
        "The question asks for the modality: CT.",
        "The task is to write a wrong sentence: right lung",
        "(Note: swapped sides)",
        "I have changed the diagnosis.",
        "I can't provide an interpretation of this X-ray.",
        "I cannot determine the answer from the scan.",
        "The CT image is not visible.",
    ],
)
def test_meta_text_is_recognised(text: str) -> None:
    assert lexicon.is_meta_text(text)
    assert lexicon.is_meta_text(text.upper())
    assert _is_meta_text_in_a_column(text)


@pytest.mark.parametrize(
    "text",
    [
        "The question is whether the nodule is calcified.",
        "The lesion in the image is not visible on T1.",
        "The appendix is not visible.",
        "The kidney cannot be seen in this image.",
        "A small pneumothorax cannot be excluded.",
        "We cannot exclude pneumonia.",
        "Type I diabetes. Grade I changes of the endplates.",
        "Note is made of a calcified granuloma.",
        "Interval change: the effusion has decreased.",
        "The catheter has been replaced and changed in position.",
        "Please correlate clinically.",
        "The answer is no.",
        "The answer is right",
        "Here is a nodule.",
        "No images of the pelvis were obtained.",
        "The user of the device",
        "左肺",
        # Images that were not there to compare with, or show too little.
        "The prior images are not available for comparison.",
        "The previous image was not provided.",
        "No images are available for comparison.",
        "No prior images were available.",
        "No comparison images were provided.",
        "The lateral image is not provided.",
        "The images are not available for comparison.",
        "The images from the outside hospital could not be opened.",
        "Unable to access the prior images.",
        "I cannot see the prior images.",
        "I do not have access to the prior images.",
        "The image is not readable due to motion.",
        "Please provide clinical information.",
        "Please send the prior images for comparison.",
        "The original images are not available.",
        "The CT images were not available.",
        "The ultrasound images were not provided.",
        "Comparison cannot be made without the original images.",
        "The images could not be opened.",
        "Please send the prior images so that I can compare.",
        # What an eye cannot decide.
        "I cannot provide an assessment of the bowel without contrast.",
        "I cannot tell which side is larger.",
        "I cannot identify a fracture.",
        "I am not able to exclude PE.",
        "I'm unable to confirm an endoleak on this phase.",
        "I cannot see a fracture line in this image.",
        "I could not identify the appendix.",
        "I cannot determine whether the nodule is calcified.",
        "The tip cannot be seen; I can't say if it crosses the midline.",
        # Devices that were changed, and notes.
        "Note: The endotracheal tube has been replaced.",
        "Note: The image is inverted.",
        "NOTE: The left chest tube has been replaced with a larger one.",
        "Note: question of a small fracture of the left rib.",
        "Change: the right drain was replaced.",
        "Explanation: the cortex has been altered by the lesion.",
        "I replaced the left nephrostomy tube over a wire.",
        "I have changed the catheter.",
        "Note: modified barium swallow was performed.",
        "Note: The diagnosis has been changed after biopsy.",
        "Note: the drain was replaced right side.",
        "Type I modified Graf hip. Grade I inverted papilloma.",
        # Headings and abbreviations.
        "QUESTION: pneumonia? FINDINGS: No pneumonia.",
        "QUESTION: Is there pneumonia?\nFINDINGS: No pneumonia.",
        "Question: pneumonia?\nNo pneumonia.",
        "GPT: 45",
        "GOT: 38, GPT: 45 U/l, gamma-GT: 30",
        "Surgeon: the first. Assistant: the second.",
        "Recorded as mild AI on echocardiography.",
        "He acted as an assistant surgeon.",
        # What is polite, or right.
        "We apologize for the delay of this report.",
        "I apologize for the delay in reporting.",
        "Tube position as expected. Answer: no pneumothorax.",
        "In answer to the clinical question, there is no abscess.",
        "The question asked by the referring physician is pneumonia.",
    ],
)
def test_ordinary_answers_are_no_meta_text(text: str) -> None:
    assert not lexicon.is_meta_text(text)
    assert not lexicon.is_meta_text(text.upper())
    assert not _is_meta_text_in_a_column(text)


@pytest.mark.parametrize(
    "piece",
    ["\n", " ", ".", "please provide ", "I cannot provide the ", "note: the ", "contradicts the original "],
)
@pytest.mark.timeout(120)
def test_a_long_text_is_searched_in_reasonable_time(piece: str) -> None:
    lexicon.is_meta_text(piece * (20_000 // len(piece)) + "Question")


def _is_meta_text_in_a_column(text: str) -> bool:
    """As the audit asks it, in RE2."""
    return pc.match_substring_regex(pa.array([text]), f"(?im){LEAKED_PROMPT}|{COMMENTARY}")[0].as_py()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A T2-weighted MRI, 1.5 T", ("a", "t2-weighted", "mri", "1.5", "t")),
        ("左肺有病变", ("左", "肺", "有", "病", "变")),
        ("MRI显示左肺", ("mri", "显", "示", "左", "肺")),
        ("Слева выпот, β-блокатор", ("слева", "выпот", "β-блокатор")),
        ("naïve cœur Größe", ("naïve", "cœur", "größe")),
        ("हड्डी टूटी", ("हड्डी", "टूटी")),
        ("ปอด", ("ป", "อ", "ด")),
        ("snake_case …", ("snake", "case")),
    ],
)
def test_words_of_any_script(text: str, expected: tuple[str, ...]) -> None:
    assert lexicon.words(text) == expected


def test_spellings_are_unique_and_found() -> None:
    forms = [form for concept in CONCEPTS.values() for form in concept.forms]
    assert len(forms) == len(set(forms))
    for concept in CONCEPTS.values():
        for form in concept.forms:
            assert [m.concept for m in mentions(f"the {form} here")] == [concept], form


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_read(first: str, second: str) -> None:
    assert 0 <= lexicon.severity(lexicon.conflicts(first, second, first)) <= 1
    assert lexicon.equivalent(first, first)


def test_letters_that_change_length_or_fold_oddly_keep_their_places() -> None:
    text = "İİ maſs, a Large MASS in the L lung"
    found = mentions(text)
    assert [(text[m.start : m.end], m.concept.name) for m in found] == [
        ("Large", "large"),
        ("MASS", "mass"),
        ("L", "left"),
        ("lung", "lung"),
    ]
