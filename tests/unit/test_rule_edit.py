"""Rule edits change one fact of an answer or a report; which sampled answer is wrong, and which pair comes of
it."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.curate.settings import TextCurationConfig
from mmedpo_ray.curate.text import discarded
from mmedpo_ray.curate.text.discarded import Discarded
from mmedpo_ray.curate.text.filters import problem
from mmedpo_ray.curate.text.text_pairs import Candidate, Material, is_wrong, most_conflicting, pick, text_pair
from mmedpo_ray.datasets.cleaning import clean, infer_answer_type, text_problem
from mmedpo_ray.phantom.world import generate
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.changed_fact import changes_fact
from mmedpo_ray.radiology.edits.rule_edit import rule_edit, vocabulary_of
from mmedpo_ray.radiology.lexicon.vocabulary import mentions

PHANTOMS = list(generate("align", 40, seed=5))
ANSWERS = [question.answer for phantom in PHANTOMS for question in phantom.questions]
VOCABULARY = vocabulary_of(ANSWERS)


def edit(
    answer: str, question: str = "", seed: int = 0, vocabulary: frozenset[str] | None = None
) -> str | None:
    found = rule_edit(answer, question, np.random.default_rng(seed), vocabulary)
    return found.text if found else None


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is there a nodule?", "Yes", "No"),
        ("Is there a nodule?", "no.", "yes."),
        (
            "Is contrast present?",
            "Yes, there is contrast present in the bowel.",
            "No, there is no contrast present in the bowel.",
        ),
        ("Is the heart large?", "No, the heart is not enlarged.", "Yes, the heart is enlarged."),
        ("Is this a CT or an MRI?", "MRI", "CT"),
        ("Is the hila normal or enlarged?", "Enlarged", "Normal"),
        ("Which side?", "On the left.", "On the right."),
        ("Where?", "R vertebral artery", "L vertebral artery"),
        ("Which rib?", "one", "two"),
        ("Which rib?", "1st", "2nd"),
    ],
)
def test_the_only_edit_there_is(question: str, answer: str, expected: str) -> None:
    assert edit(answer, question, vocabulary=frozenset({"left", "right"})) == expected


@pytest.mark.parametrize("answer", ["Psoas major muscle", "", "...", "fat", "5.6 cm"])
def test_no_edit_where_no_fact_is_known(answer: str) -> None:
    assert edit(answer, "What is it?") is None


@pytest.mark.parametrize(
    ("answer", "wider"),
    [
        ("Liver Cancer", "mass|lesion"),
        ("Pneumonia", "opacity|consolidation"),
        ("Brain tumors", "lesions"),
        ("Findings consistent with pneumonia.", "opacity|consolidation"),
        ("A mass in the liver.", "lesion"),
        ("PATCHY CONSOLIDATION IN THE LEFT LOWER LOBE.", "opacity"),
        ("Cerebral abscess in the left frontal lobe.", "mass|lesion"),
    ],
)
def test_a_wider_word_is_no_edit(answer: str, wider: str) -> None:
    edits = {text for seed in range(60) if (text := edit(answer, "What is seen?", seed))}
    assert edits
    for text in edits:
        assert not re.search(rf"\b(?:{wider})\b", text, re.IGNORECASE), text
        assert changes_fact(answer, text, "What is seen?"), text


def test_phantom_answers_lose_exactly_one_fact() -> None:
    axes = set()
    for phantom in PHANTOMS:
        for question in phantom.questions:
            found = rule_edit(
                question.answer, question.question, np.random.default_rng(phantom.seed), VOCABULARY
            )
            assert found is not None
            axes.add(found.axis)
            before, after = question.answer, found.text
            conflicts = lexicon.conflicts(before, after, question.question)
            # Another finding in its place is one edit but two facts: one missed, one invented.
            kinds = sorted(conflict.kind for conflict in conflicts)
            assert len(conflicts) == 1 or kinds == ["invented", "missed"], (before, after, conflicts)
            assert abs(len(before.split()) - len(after.split())) <= 3
            assert is_wrong(before, after, question.question, question.answer_type)
            assert vocabulary_of([after]) <= VOCABULARY
    assert {"polarity", "side", "zone", "size", "finding", "negation"} <= axes


def test_reports_stay_word_for_word_but_for_one_place() -> None:
    for phantom in PHANTOMS:
        report = phantom.questions[-1].answer
        after = edit(report, phantom.questions[-1].question, phantom.seed, VOCABULARY)
        assert after is not None
        blocks = difflib.SequenceMatcher(None, report.split(), after.split(), autojunk=False).get_opcodes()
        changed = [block for block in blocks if block[0] != "equal"]
        assert sum(block[2] - block[1] for block in changed) <= 6


@given(
    st.lists(
        st.sampled_from(
            [
                "left",
                "right",
                "nodule",
                "no",
                "yes,",
                "the",
                "a",
                "is",
                "there",
                "two",
                "CT",
                "effusion.",
                "lungs",
                "R",
            ]
        ),
        max_size=10,
    ).map(" ".join)
    | st.text(max_size=60),
    st.integers(0, 99),
)
def test_an_edit_is_never_the_same_answer_and_is_reproducible(answer: str, seed: int) -> None:
    found = edit(answer, "What is seen?", seed)
    if found is not None:
        assert not lexicon.equivalent(answer, found)
        assert lexicon.conflicts(answer, found, "What is seen?")
        assert found == edit(answer, "What is seen?", seed)


@pytest.mark.parametrize(
    ("kind", "question", "reference", "answer", "wrong"),
    [
        ("closed", "Is there a nodule?", "No", "Normal", False),
        ("closed", "Is there a nodule?", "No", "Yes, a nodule.", True),
        ("closed", "Is there a nodule?", "Yes", "There is no nodule.", True),
        ("closed", "Is it CT or MRI?", "MRI", "CT", True),
        ("closed", "Is it CT or MRI?", "MRI", "An MRI scan", False),
        ("closed", "Is it on the left or right?", "R", "Right", False),
        ("closed", "Is it on the left or right?", "R", "Left", True),
        ("closed", "Is the patient male or female?", "Female", "M", True),
        ("open", "Which organ system?", "CNS", "Central nervous system", False),
        ("open", "Which organ system?", "Gastrointestinal", "GI tract", False),
        ("open", "Which organ system?", "CNS", "Gastrointestinal", True),
        ("open", "What?", "PE in the right lung", "Pulmonary embolism in the right lung", False),
        ("open", "What?", "PE in the right lung", "Thymoma in the right lung", True),
        ("open", "What?", "ICH", "Intracranial hemorrhage", False),
        ("open", "Which vessel?", "SVC", "Inferior vena cava", True),
        ("open", "Which side?", "R", "L", True),
        ("open", "Where?", "Left upper zone", "It is in the left upper zone.", False),
        ("open", "Where?", "Left upper zone", "Left lower zone", True),
        ("open", "What?", "Nodule", "Nodule and pneumothorax", True),
        ("report", "Describe.", "There is a left effusion.", "A left pleural effusion is seen.", False),
        ("report", "Describe.", "There is a left effusion.", "There is a right effusion.", True),
    ],
)
def test_what_counts_as_wrong(kind: str, question: str, reference: str, answer: str, wrong: bool) -> None:
    assert is_wrong(reference, answer, question, kind) is wrong


@pytest.mark.parametrize(
    ("question", "reference", "answer", "wrong"),
    [
        # Less than the reference, or the same in a wider word.
        ("Where is the lesion?", "Right lung", "Lung", False),
        ("Where is the lesion?", "Right lung", "The lesion is somewhere in the chest.", False),
        ("Where is the lesion?", "Right lung", "It is on the right.", False),
        ("Where is the lesion?", "Left lung, right upper lobe", "Left lung", False),
        ("Where is the lesion?", "Left and right lung", "Left lung", False),
        ("Where is the lesion?", "It is below the 7th rib", "Below 7th rib", False),
        ("What is seen?", "Left effusion and right nodule", "Right effusion and left nodule", True),
        ("Where is the nodule?", "Left lung", "There is no nodule.", True),
        ("Where is the nodule?", "Left lung", "Left lung. There is no nodule in the right lung.", False),
        ("What is seen?", "Pneumonia", "An opacity", False),
        ("What is seen?", "Metastasis", "A lesion of the liver", False),
        ("What is seen?", "Large left pleural effusion", "Pleural effusion", False),
        ("What is seen?", "Nodule and cardiomegaly", "Nodule", False),
        ("Which muscle?", "Psoas major muscle", "The psoas muscle", False),
        ("Which muscle?", "Psoas major muscle", "It is not possible to say which muscle it is.", False),
        ("What is it?", "Sternal wires", "Wires", False),
        ("How large is it?", "5 cm", "About 45 mm", False),
        ("哪里有病变?", "右肺", "肺", False),
        # Something else.
        ("Where is the lesion?", "Right lung", "Left lung", True),
        ("Where is the lesion?", "Lung", "The lesion is in the liver.", True),
        ("Which part of the body is it?", "Chest", "This is the abdominal area.", True),
        ("What is seen?", "Pneumonia", "A pneumothorax", True),
        ("What is seen?", "Pneumonia", "The image is normal.", True),
        ("What is seen?", "Pneumonia", "Normal", True),
        ("Which side is it on?", "Right sided pleural effusion", "It is on the left side.", True),
        ("Where is the liver?", "Right", "The liver is not visible.", True),
        ("Which muscle?", "Psoas major muscle", "Psoas minor muscle", True),
        ("Which vessel?", "Basilar artery", "This is the carotid.", True),
        ("What is the weighting?", "T2", "This is a CT scan.", True),
        ("How large is it?", "5 cm", "Less than 10 mm", True),
        ("Would you suspect abscess or cancer?", "Abscess", "Cancer", True),
        ("哪里有病变?", "右肺", "左肺", True),
    ],
)
def test_an_answer_that_only_says_less_is_not_wrong(
    question: str, reference: str, answer: str, wrong: bool
) -> None:
    assert is_wrong(reference, answer, question, "open") is wrong


def test_a_report_that_leaves_a_finding_out_denies_it() -> None:
    report = "There is a large left effusion. There is a nodule."
    assert is_wrong(report, "There is a large left effusion.", "Describe.", "report")
    assert not is_wrong(report, "There is a left effusion. There is a lesion.", "Describe.", "report")


def test_what_is_wrong_on_real_answers(shared_data: Path) -> None:
    """Answers that GPT-4o wrote to be wrong are found; references that lose a word never are, beyond a
    handful."""
    found, less = [], []
    for name in ("slake", "vqa-rad"):
        for row in json.loads((shared_data / "released" / f"{name}_dpo_weighted.json").read_text()):
            question, chosen = (clean(turn["value"]) for turn in row["conversations"])
            rejected = clean(row["rejected_conversations"][1]["value"])
            if text_problem(question, chosen) or infer_answer_type(question, chosen) != "open":
                continue
            if problem(chosen, rejected, 40, question) is None:
                found.append(is_wrong(chosen, rejected, question, "open"))
            words = chosen.split()
            less += [
                is_wrong(chosen, " ".join(words[:place] + words[place + 1 :]), question, "open")
                for place in range(len(words))
                if 2 <= len(words) <= 12 and not _SAYS_NO.match(words[place])
                # "A" alone is the answer of that letter.
                if [word.lower() for word in words[:place] + words[place + 1 :]] != ["a"]
            ]
    assert np.mean(found) > 0.95
    assert len(less) > 3000
    assert np.mean(less) < 0.002


# A word whose loss turns the statement round.
_SAYS_NO = re.compile(
    r"(?:no|not|non|without|absent|never|none|nothing|negative|normal|yes)\b", re.IGNORECASE
)


def candidate(text: str) -> Candidate:
    return Candidate(f"id of {text}", text, "model", "hash", 1)


def material(*texts: str, **tables: dict) -> Material:
    return Material([candidate(text) for text in texts], **tables)


def sample(answer: str, question: str = "Which side?") -> dict[str, str]:
    names = ("sample_id", "image_id", "dataset", "task", "image_uri")
    return dict.fromkeys(names, "x") | {"question": question, "answer": answer, "answer_type": "open"}


def test_the_most_conflicting_wrong_candidate_is_chosen() -> None:
    answers = [candidate(text) for text in ("Left upper zone", "Left lower zone", "Right upper zone")]
    found = most_conflicting("Left upper zone", "Where?", "open", answers)
    assert found is not None
    assert found.text == "Right upper zone"
    assert most_conflicting("Left upper zone", "Where?", "open", answers[:1]) is None


def test_a_right_answer_is_filled_in_or_dropped() -> None:
    fill = TextCurationConfig()
    row = text_pair(sample("Left"), material("Left"), fill, frozenset(), 0).row
    assert row["generator"] == "rule_edit"
    assert row["rejected"] in ("Right", "Bilateral")
    row = text_pair(sample("Left"), material("Right"), fill, frozenset(), 0).row
    assert (row["rejected"], row["generator"], row["seed"]) == ("Right", "model", 1)


@pytest.mark.parametrize(
    ("kind", "question", "right", "same", "wrong"),
    [
        ("closed", "Is this a CT scan?", "Yes", "This is a CT, not an MRI.", "No, this is an MRI."),
        ("closed", "Is this a CT scan?", "Yes", "It is a CT instead of an MRI", "This is not a CT."),
        (
            "closed",
            "Is the trachea midline?",
            "Yes",
            "The trachea is midline, not deviated.",
            "The trachea is deviated, not midline.",
        ),
        (
            "closed",
            "Are the costophrenic angles sharp?",
            "Yes",
            "The costophrenic angles are sharp with no blunting.",
            "The costophrenic angles are not sharp.",
        ),
        ("closed", "Is the heart normal?", "Yes", "No cardiomegaly", "The heart is enlarged."),
        ("closed", "Is it a CT or an MRI?", "MRI", "MRI, not CT", "CT, not MRI"),
        ("open", "What abnormality is seen?", "Cardiomegaly", "The cardiac silhouette is enlarged", "Nodule"),
        (
            "open",
            "What abnormality is seen?",
            "Cardiomegaly",
            "An increased heart size",
            "Normal heart size",
        ),
        ("open", "What is seen?", "Normal", "No abnormality is seen.", "Cardiomegaly"),
        ("open", "What is seen?", "No abnormality", "Normal", "A nodule"),
        ("open", "What is seen?", "Healthy", "Normal", "Pneumonia"),
        ("open", "How are the lungs?", "Healthy", "The lungs are unremarkable.", "Abnormal"),
        ("open", "Which side?", "Both", "Left and right", "Left"),
        ("open", "Which side?", "Bilateral", "Left and right", "Right"),
        ("open", "How many nodules?", "0", "None", "Two"),
        ("open", "How many nodules?", "0", "There are no nodules.", "There are two nodules."),
        ("open", "How many nodules?", "Two", "2", "None"),
        ("open", "How many nodules?", "3", "Several", "1"),
        ("open", "How large is it?", "<5 mm", "3 mm", ">5 mm"),
        ("open", "Is the test positive?", "+", "Positive", "-"),
        ("open", "Where is the lesion?", "RUL", "Right upper lobe", "Left upper lobe"),
        ("open", "Where is the lesion?", "Right upper lobe", "In the right upper lung zone", "RLL"),
        ("open", "In which plane?", "Axial", "Axial, not coronal", "Coronal, not axial"),
        ("open", "Which muscle?", "Psoas major", "Psoas major rather than psoas minor", "Psoas minor"),
        *(
            ("open", "Where is it?", short, f"In the {long} lobe.", f"In the {other} lobe.")
            for short, long, other in (
                ("RML", "right middle", "right lower"),
                ("RLL", "right lower", "right upper"),
                ("LUL", "left upper", "right upper"),
                ("LLL", "left lower", "left upper"),
            )
        ),
    ],
)
def test_only_what_contradicts_is_rejected(
    kind: str, question: str, right: str, same: str, wrong: str
) -> None:
    row = sample(right, question) | {"answer_type": kind}
    off = TextCurationConfig(fallback="none")
    assert text_pair(row, material(same), off, frozenset(), 0).row.get("rejected") is None
    assert text_pair(row, material(same, wrong), off, frozenset(), 0).row["rejected"] == wrong


@pytest.mark.parametrize(
    ("answer", "candidates", "reason"),
    [
        ("Left", ["Left"], "same_answer"),
        ("Left", ["<image> Right", "left.", "USER: Right"], "meta_text"),
        ("Left", ["", ""], "empty_rejected"),
        ("Left", [], "no_wrong_answer"),
        # One passes the filters, but is not wrong.
        ("Left lung", ["The left upper lung", "<image>"], "no_wrong_answer"),
    ],
)
def test_the_reason_says_which_filter_took_the_candidates(
    answer: str, candidates: list[str], reason: str
) -> None:
    row = text_pair(
        sample(answer), material(*candidates), TextCurationConfig(fallback="none"), frozenset(), 0
    ).row
    assert row["drop_reason"] == reason
    assert answer not in str(row["drop_detail"])


def test_every_discarded_answer_is_told_with_its_reason() -> None:
    """Also where a pair comes of it in the end."""
    row, found = text_pair(
        sample("Left"),
        material("left.", "<image> Right", "Right", "I'm sorry"),
        TextCurationConfig(),
        frozenset(),
        0,
    )
    assert row["rejected"] == "Right"
    assert found == (
        ("candidates", "same_answer"),
        ("candidates", "meta_text"),
        ("candidates", "meta_text"),
    )
    settings = TextCurationConfig(method="on_policy", fallback="rewrite")
    given = material("Left", rewrite={"drop_reason": "rewrite_inexact"})
    row, found = text_pair(sample("Left"), given, settings, frozenset(), 0)
    assert row["drop_reason"] == "rewrite_inexact"
    assert found == (("candidates", "same_answer"), ("rewrites", "rewrite_inexact"))
    given = material(rewrite={"drop_reason": "endpoint_failed"})
    assert text_pair(sample("Left"), given, settings, frozenset(), 0).discarded == (), "no answer came"


def test_discarded_answers_are_counted_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "counts")
    assert discarded.count(folder) == {}
    first = {
        "a:text": (Discarded("candidates", "meta_text"), Discarded("candidates", "meta_text")),
        "b:text": (Discarded("rewrites", "rewrite_inexact"),),
        "c:text": (),
    }
    discarded.write(folder, first)
    discarded.write(folder, first)
    # A stopped attempt, whose rows the next one cuts into other slices.
    discarded.write(folder, {"b:text": first["b:text"], "d:text": (Discarded("candidates", "same_answer"),)})
    discarded.write(folder, {"e:text": ()})
    counted = discarded.count(folder)
    assert counted == {
        "candidates": {"meta_text": 2, "same_answer": 1},
        "rewrites": {"rewrite_inexact": 1},
    }
    assert discarded.in_words(counted) == (
        "3 sampled answers discarded (meta_text 2, same_answer 1), 1 rewrite discarded (rewrite_inexact 1)"
    )
    assert discarded.in_words({}) == ""


def test_a_judge_chooses_only_among_what_the_filters_left() -> None:
    settings = TextCurationConfig(judge="endpoint", fallback="none")
    texts = ("Left", "Right", "Bilateral")

    def chosen(name: str | None, **dropped: str) -> tuple[str | None, str]:
        given = material(*texts, choice={"candidate_id": name} | dropped)
        found, reason, _ = pick(sample("Left"), given, settings)
        return found and found.text, reason

    assert chosen("id of Bilateral")[0] == "Bilateral"
    assert chosen(None) == (None, "no_wrong_answer")
    assert chosen("id of Left") == (None, "no_wrong_answer")
    assert chosen(None, drop_reason="choice_unreadable") == (None, "choice_unreadable")


def test_a_rewrite_is_taken_filled_in_or_awaited() -> None:
    settings = TextCurationConfig(method="rewrite")

    def pair(**rewrite: str | None) -> dict:
        return text_pair(sample("Left"), material(rewrite=rewrite), settings, frozenset({"right"}), 0).row

    taken = pair(rewritten="Both", prompt_sha256="hash", drop_reason=None)
    assert (taken["rejected"], taken["generator"], taken["prompt_sha256"]) == ("Both", "rewrite", "hash")
    assert pair(drop_reason="rewrite_inexact")["generator"] == "rule_edit"
    assert pair(drop_reason="endpoint_failed")["drop_reason"] == "endpoint_failed", "the next run asks again"


# ---------------------------------------------------------------------- real wording

# (report, one of the edits it must be able to get)
REPORTS = [
    (
        "Heart size and mediastinal contours are within normal limits. No focal consolidation, pneumothorax, "
        "or pleural effusion. No acute bony abnormality.",
        "There is a pneumothorax. No focal consolidation or pleural effusion.",
    ),
    (
        "Cardiomediastinal silhouette is within normal limits. There is no pleural effusion or pneumothorax. "
        "Degenerative changes of the thoracic spine.",
        "There is a pleural effusion but no pneumothorax.",
    ),
    (
        "Stable cardiomegaly with mild pulmonary vascular congestion. Small bilateral pleural effusions. "
        "Left basilar atelectasis.",
        "Left apical atelectasis.",
    ),
    (
        "PA and lateral views of the chest. There is a small right apical pneumothorax. Left-sided chest "
        "tube in place.",
        "small right basal pneumothorax",
    ),
    (
        "The cardiac silhouette is enlarged. The lungs are without focal consolidation. No large pleural "
        "effusions are seen.",
        "The lungs show focal consolidation.",
    ),
    (
        "Interval removal of the endotracheal tube. Right internal jugular central venous catheter "
        "terminates in the SVC. No pneumothorax is seen.",
        "A pneumothorax is seen.",
    ),
    (
        "1. Right lower lobe pneumonia. 2. Small parapneumonic effusion. 3. Follow-up radiograph in 6 weeks "
        "is recommended.",
        "2. No small parapneumonic effusion.",
    ),
    (
        "CT abdomen and pelvis with contrast: The liver, spleen, and pancreas are normal. There is moderate "
        "right hydronephrosis due to a 6 mm stone in the distal right ureter. No free air or free fluid.",
        "severe right hydronephrosis",
    ),
    (
        "Non-contrast CT of the head demonstrates an acute subdural hematoma along the left cerebral "
        "convexity measuring 8 mm, with 4 mm of rightward midline shift. No skull fracture.",
        "There is a skull fracture.",
    ),
    (
        "MRI brain: There is restricted diffusion in the left basal ganglia consistent with acute infarct. "
        "No hemorrhage. Ventricles are normal in size.",
        "in the right basal ganglia",
    ),
    (
        "There is no evidence of acute intracranial hemorrhage, mass, or midline shift. The ventricles are "
        "symmetric.",
        "There is evidence of mass but no evidence of acute intracranial hemorrhage or midline shift.",
    ),
    ("Lungs are clear bilaterally. No pleural effusions or pneumothoraces.", "There are pleural effusions."),
    ("The osseous structures are intact. The lungs are clear.", "The lungs show a"),
    ("The lungs are clear.", "The lungs show a"),
]
WORDING = vocabulary_of(report for report, _ in REPORTS)


# What no edit may say.
BROKEN = (
    *(
        "  ",
        " ,",
        ",.",
        " a a",
        " is is ",
        "pneumothoraxs",
        "a pleural effusions",
        "not not",
        "no no ",
        "of no ",
        "a longer",
    ),
    *(
        "but no but",
        "or no ",
        "No the ",
        "a consolidation",
        "a edema",
        "an consolidation",
        "no likely",
        "no now",
        "no two ",
    ),
    *(
        "enlarged limits",
        "abnormal limits",
        "mildly normal",
        "enlarged in size",
        "one lesions",
        "a cardiopulmonary process s",
    ),
    *(
        "thoracic brain",
        "thoracic chest",
        "pulmonary pleural",
        "heart base",
        "left liver",
        "Hearts",
        "bilateral lung.",
    ),
)


def changed_place(before: str, after: str) -> tuple[int, int]:
    """The smallest place of ``before`` outside which nothing differs."""
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return start, len(before) - end


@pytest.mark.parametrize(("report", "wanted"), REPORTS, ids=lambda text: text[:24].strip())
def test_real_reports_lose_one_fact_in_one_sentence(report: str, wanted: str) -> None:
    question = "Write a radiology report of this image."
    edits = {edit(report, question, seed, WORDING) for seed in range(60)}
    assert None not in edits
    assert any(wanted in text for text in edits if text), edits
    sentences = lexicon.sentence_spans(report)
    for text in edits:
        assert text is not None
        start, end = changed_place(report, text)
        assert any(first <= start and end <= last for first, last in sentences), (report, text)
        conflicts = lexicon.conflicts(report, text, question)
        assert len({conflict.subject for conflict in conflicts}) <= 2, (text, conflicts)
        # Views, list numbers and follow-up times are no findings.
        for kept in (
            "lateral views",
            "1. ",
            "2. ",
            "3. ",
            "6 weeks",
            "Right internal jugular",
            "with contrast",
        ):
            assert (kept in report) == (kept in text)
        for broken in BROKEN:
            assert broken not in text


QUESTION = "Write a radiology report of this image."
PLAUSIBLE = frozenset(
    {
        "pneumothorax",
        "pleural effusion",
        "consolidation",
        "cardiomegaly",
        "left",
        "right",
        "upper",
        "lower",
        "small",
        "moderate",
    }
    | {"large", "hemorrhage", "infarct", "liver", "kidney", "spleen"}
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # An item of a list may repeat the denial.
        (
            "There is no pneumothorax, and no pleural effusion.",
            {
                "There is a pneumothorax but no pleural effusion.",
                "There is a pleural effusion but no pneumothorax.",
            },
        ),
        (
            "There is no pneumothorax, no pleural effusion, and no consolidation.",
            {
                "There is a pneumothorax but no pleural effusion or consolidation.",
                "There is a pleural effusion but no pneumothorax or consolidation.",
                "There is consolidation but no pneumothorax or pleural effusion.",
            },
        ),
        (
            "No pneumothorax, no effusion, and no consolidation.",
            {
                "There is a pneumothorax. No effusion or consolidation.",
                "There is an effusion. No pneumothorax or consolidation.",
                "There is consolidation. No pneumothorax or effusion.",
            },
        ),
        (
            "No evidence of pneumothorax, and no evidence of pleural effusion.",
            {
                "There is evidence of pneumothorax. No evidence of pleural effusion.",
                "There is evidence of pleural effusion. No evidence of pneumothorax.",
            },
        ),
        (
            "There is no pneumothorax and no pleural effusion.",
            {
                "There is a pneumothorax but no pleural effusion.",
                "There is a pleural effusion but no pneumothorax.",
            },
        ),
        (
            "There is neither pneumothorax nor pleural effusion.",
            {
                "There is a pneumothorax but no pleural effusion.",
                "There is a pleural effusion but no pneumothorax.",
            },
        ),
        (
            "Neither pneumothorax nor pleural effusion is seen.",
            {
                "A pneumothorax is seen. No pleural effusion is seen.",
                "A pleural effusion is seen. No pneumothorax is seen.",
            },
        ),
        (
            "No pneumothorax, pleural effusion and consolidation.",
            {
                "There is a pneumothorax. No pleural effusion or consolidation.",
                "There is a pleural effusion. No pneumothorax or consolidation.",
                "There is consolidation. No pneumothorax or pleural effusion.",
            },
        ),
        (
            "No pneumothorax or pleural effusions are seen.",
            {
                "A pneumothorax is seen. No pleural effusions are seen.",
                "Pleural effusions are seen. No pneumothorax is seen.",
            },
        ),
        # Denied lists inside a sentence.
        (
            "The lungs are clear without focal consolidation, effusion or pneumothorax.",
            {
                "The lungs are clear without focal consolidation or pneumothorax but with an effusion.",
                "The lungs are clear without focal consolidation or effusion but with a pneumothorax.",
            },
        ),
        (
            "The lungs show no consolidation or pneumothorax.",
            {
                "The lungs show consolidation but no pneumothorax.",
                "The lungs show a pneumothorax but no consolidation.",
            },
        ),
        ("The lungs are free of consolidation.", {"The lungs show consolidation."}),
        ("Negative for pneumothorax or effusion.", {None}),
        ("Lungs are clear without effusion.", {"Lungs are clear but with an effusion."}),
        ("The previously seen pneumothorax has resolved.", {"The previously seen pneumothorax persists."}),
        ("There is no longer a pneumothorax in the right lung.", {None}),
        ("The pneumothorax is no longer seen.", {"The pneumothorax is still seen."}),
        # Adjectives and places that belong to one item.
        (
            "There is no mediastinal or hilar lymphadenopathy.",
            {"There is mediastinal and hilar lymphadenopathy."},
        ),
        (
            "No evidence of metastatic disease in the chest, abdomen, or pelvis.",
            {"There is evidence of metastatic disease in the chest, abdomen, or pelvis."},
        ),
        # What follows the list is not part of it.
        (
            "No pleural effusion, and the lungs are clear.",
            {"There is a pleural effusion, and the lungs are clear."},
        ),
        (
            "There is no consolidation or pneumothorax, nor is there a pleural effusion.",
            {
                "There is consolidation but no pneumothorax, nor is there a pleural effusion.",
                "There is a pneumothorax but no consolidation, nor is there a pleural effusion.",
            },
        ),
        ("There is no acute cardiopulmonary process.", {"There is an acute cardiopulmonary process."}),
        ("No pneumothorax.", {"There is a pneumothorax."}),
        (
            "no pneumothorax or effusion",
            {"there is a pneumothorax, no effusion", "there is an effusion, no pneumothorax"},
        ),
        # Normal limits.
        ("The lungs are within normal limits.", {"The lungs are abnormal."}),
        ("Heart size within normal limits.", {"Heart size enlarged."}),
        ("Pulmonary vasculature is within normal limits.", {"Pulmonary vasculature is abnormal."}),
        (
            "The heart size is mildly enlarged.",
            {
                "The heart size is normal.",
                "The heart size is moderately enlarged.",
                "The heart size is severely enlarged.",
            },
        ),
        ("The liver is normal in size.", {"The liver is enlarged.", "The liver is abnormal in size."}),
        ("The osseous structures are normal.", {"The osseous structures are abnormal."}),
        # A modifier and what it belongs to.
        ("Degenerative changes of the thoracic spine.", {None}),
        ("Tortuous thoracic aorta.", {None}),
        ("The gray-white matter differentiation is preserved.", {None}),
        ("Compression fracture of the lumbar spine.", {"No compression fracture of the lumbar spine."}),
        (
            "Stable 4 mm pulmonary nodule in the right middle lobe.",
            {f"Stable 4 mm pulmonary nodule in the right {zone} lobe." for zone in ("upper", "lower")},
        ),
        ("There is a 3 mm stone in the left kidney.", {"There is a 3 mm stone in the right kidney."}),
        ("The lungs demonstrate no focal consolidation.", {"The lungs demonstrate focal consolidation."}),
        (
            "The NG tube is in the stomach.",
            {"The endotracheal tube is in the stomach."},
        ),
        ("Normal chest x-ray.", {"Abnormal chest x-ray."}),
        (
            "Moderate joint effusion of the knee.",
            {"Small joint effusion of the knee.", "Large joint effusion of the knee."},
        ),
        (
            "Without evidence of pneumothorax or effusion.",
            {
                "With evidence of pneumothorax but without evidence of effusion.",
                "With evidence of effusion but without evidence of pneumothorax.",
            },
        ),
        ("Bilateral lungs", {"Left lung", "Right lung"}),
        # Hedges and numbers are not denied.
        (
            "There is likely cardiomegaly.",
            {"There is no cardiomegaly.", "There is likely consolidation."}
            | {f"There is likely a {other}." for other in ("pneumothorax", "pleural effusion")},
        ),
        ("There are two fractures.", {"There are no fractures.", "There are three fractures."}),
    ],
)
def test_every_edit_of_a_common_sentence(text: str, wanted: set[str | None]) -> None:
    assert {edit(text, QUESTION, seed, PLAUSIBLE) for seed in range(40)} == wanted


@pytest.mark.parametrize("vocabulary", [None, PLAUSIBLE], ids=["anything", "vocabulary"])
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("NO ACUTE CARDIOPULMONARY ABNORMALITY.", "chest"),
        ("No acute intracranial abnormality.", "brain"),
        ("No acute abdominal abnormality.", "abdomen"),
    ],
)
def test_an_abnormality_is_one_of_the_same_part_of_the_body(
    text: str, part: str, vocabulary: frozenset[str] | None
) -> None:
    edits = {edit(text, QUESTION, seed, vocabulary) for seed in range(40)}
    assert text.partition(" ")[2].capitalize() in {found and found.capitalize() for found in edits}
    for found in edits:
        assert found is not None
        assert found.isupper() == text.isupper()
        named = [mention.concept for mention in mentions(found) if mention.concept.axis == "finding"]
        assert all(concept.group == part for concept in named), found


@pytest.mark.parametrize("vocabulary", [None, PLAUSIBLE], ids=["anything", "vocabulary"])
def test_capitals_are_edited_like_small_letters(vocabulary: frozenset[str] | None) -> None:
    text = "Small left pleural effusion. No pneumothorax, and no consolidation."
    for seed in range(20):
        small = edit(text, QUESTION, seed, vocabulary)
        assert small is not None
        assert edit(text.upper(), QUESTION, seed, vocabulary) == small.upper()
        # A single capital is a side only before small letters.
        assert edit("R CT", "What is seen?", seed, vocabulary) != "L CT"


SENTENCES = """
Heart size within normal limits.
Cardiac and mediastinal silhouettes are within normal limits.
The heart size and mediastinal contours are normal.
The heart is mildly enlarged.
There is mild cardiomegaly with pulmonary vascular congestion.
Minimal bibasilar atelectasis without pleural effusion.
There is a small left pleural effusion with adjacent atelectasis.
There are small bilateral pleural effusions.
The endotracheal tube terminates 4 cm above the carina.
Right lower lobe consolidation is compatible with pneumonia.
There is a 5 mm nodule in the right upper lobe.
No free air under the diaphragm.
There are old healed right rib fractures.
Multiple bilateral pulmonary nodules are present.
No acute intracranial hemorrhage, mass effect, or midline shift.
There is a large left subdural hematoma with 8 mm of midline shift to the right.
There is hypodensity in the left frontal lobe.
Acute infarct in the right middle cerebral artery territory.
There is an acute infarct in the left cerebellum.
The ventricles and sulci are normal in size.
The liver, gallbladder, spleen, pancreas, and adrenal glands are unremarkable.
There is a simple cyst in the left kidney.
There is no hydronephrosis or nephrolithiasis.
Small amount of free fluid in the pelvis.
There is an ill-defined mass in the head of the pancreas.
There has been interval removal of the right chest tube without pneumothorax.
No pleural effusion is seen and there is no pneumothorax.
There is no pleural effusion, but there is a small right pneumothorax.
No focal infiltrate, no effusion, no pneumothorax seen.
Patchy opacities in the left lung base may reflect atelectasis or pneumonia.
There is probable left lower lobe pneumonia.
There is now a moderate pneumothorax.
There are two lesions in the right lobe of the liver.
There is opacification of the left lung base.
""".strip().splitlines()


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda text: text[:32].strip())
def test_no_edit_of_a_typical_sentence_is_broken(sentence: str) -> None:
    for vocabulary in (None, PLAUSIBLE, WORDING):
        edits = {edit(sentence, QUESTION, seed, vocabulary) for seed in range(40)}
        assert None not in edits
        for text in edits:
            assert text is not None
            assert not [broken for broken in BROKEN if broken in text], text
            named = {mention.concept.name for mention in mentions(sentence)}
            added = {mention.concept.name for mention in mentions(text)} - named - {"bilateral"}
            assert len(added) <= 1, text


_PIECES = (
    "No|no|There is|There are|a|the|left|Right|bilateral|effusion|pneumothorax or|nodule,|pleural "
    "effusions|without|"
    "is seen|is not seen|heart is enlarged|lungs are clear|mild|moderate edema|1.|2 cm|two|.|;|but|CT|L "
    "lung|Yes,|"
    "evidence of|negative for|consolidation, and|apical|middle lobe|both lungs"
)
FRAGMENTS = st.sampled_from(_PIECES.split("|"))


@given(st.lists(FRAGMENTS, max_size=14).map(" ".join) | st.text(max_size=80), st.integers(0, 9))
def test_any_text_is_edited_in_one_place_or_not_at_all(answer: str, seed: int) -> None:
    for vocabulary in (None, WORDING):
        found = edit(answer, "What is seen?", seed, vocabulary)
        if found is None:
            continue
        assert found == edit(answer, "What is seen?", seed, vocabulary)
        assert found != answer
        assert lexicon.conflicts(answer, found, "What is seen?")
        start, end = changed_place(answer, found)
        if lexicon.polarity(answer) is None:
            assert any(first <= start and end <= last for first, last in lexicon.sentence_spans(answer))
