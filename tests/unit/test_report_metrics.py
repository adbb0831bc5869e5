"""Report metrics: equal to the packages that papers use, on 300 random pairs, and sound where those are not
defined."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mmedpo_ray.metrics import METRICS, Answer, UnavailableError

WORDS = [
    "the",
    "heart",
    "is",
    "enlarged",
    "normal",
    "no",
    "pleural",
    "effusion",
    "in",
    "left",
    "right",
    "lower",
    "upper",
    "lung",
    "zone",
    ".",
    ",",
    "mild",
    "opacity",
    "opacities",
    "nodule",
    "nodules",
    "seen",
    "at",
    "base",
    "5",
    "mm",
    "<",
    ">",
    "T2-weighted",
    "X-ray",
    "Cardiomegaly;",
    "(new)",
    "pneumothorax?",
]


def random_pairs(count: int = 300, seed: int = 0) -> list[Answer]:
    """Copies, shortened and shuffled copies, unrelated texts and empty predictions."""
    chance = random.Random(seed)

    def text() -> list[str]:
        return chance.choices(WORDS, k=chance.randint(1, 40))

    pairs = []
    for _ in range(count):
        reference = text()
        kept = [word for word in reference if chance.random() < 0.8]
        prediction = chance.choice([reference, kept, sorted(kept), text(), text(), []])
        # Texts of punctuation alone are empty here, and matches to the packages.
        if not any(word.isalnum() for word in prediction):
            prediction = []
        pairs.append(Answer(" ".join(reference), " ".join(prediction)))
    return pairs


PAIRS = random_pairs()


def scores(name: str, answers: list[Answer] = PAIRS) -> np.ndarray:
    """The score of each answer, of a metric that is a mean."""
    return METRICS[name].of(answers)[:, 0]


def value(name: str, answers: list[Answer] = PAIRS) -> float:
    return float(METRICS[name].value(METRICS[name].of(answers).sum(axis=0)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sentence_bleu_equals_nltk(order: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [
            sentence_bleu(
                [pair.reference.lower().split()], pair.prediction.lower().split(), weights=[1 / order] * order
            )
            for pair in PAIRS
        ]
    assert scores(f"report_bleu{order}") == pytest.approx(expected, abs=1e-12)
    assert value(f"report_bleu{order}") == pytest.approx(np.mean(expected))


def test_bleu_by_answer_is_the_mean_of_the_four() -> None:
    four = [scores(f"report_bleu{order}") for order in (1, 2, 3, 4)]
    assert scores("report_bleu_sentence") == pytest.approx(np.mean(four, axis=0))


def test_corpus_bleu_equals_sacrebleu() -> None:
    predictions, references = [pair.prediction for pair in PAIRS], [pair.reference for pair in PAIRS]
    expected = [
        BLEU(lowercase=True, smooth_method="none", max_ngram_order=order)
        .corpus_score(predictions, [references])
        .score
        for order in (1, 2, 3, 4)
    ]
    assert value("report_bleu") == pytest.approx(np.mean(expected) / 100)


def test_rouge_l_equals_rouge_score() -> None:
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(pair.reference, pair.prediction)["rougeL"].fmeasure for pair in PAIRS]
    assert scores("report_rouge_l") == pytest.approx(expected)


def test_cider_equals_pycocoevalcap() -> None:
    references = {number: [pair.reference.lower()] for number, pair in enumerate(PAIRS)}
    predictions = {number: [pair.prediction.lower()] for number, pair in enumerate(PAIRS)}
    mean, each = Cider().compute_score(references, predictions)
    assert scores("report_cider") == pytest.approx(each, abs=1e-9)
    assert value("report_cider") == pytest.approx(mean)


@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)] * 2), min_size=1, max_size=8
    )
)
def test_cider_equals_pycocoevalcap_on_any_texts(pairs: list[tuple[str, str]]) -> None:
    answers = [Answer(reference, prediction) for reference, prediction in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, each = Cider().compute_score(
                {number: [reference] for number, (reference, _) in enumerate(pairs)},
                {number: [prediction] for number, (_, prediction) in enumerate(pairs)},
            )
        except ValueError:
            # It takes the largest of no frequencies.
            assert not any(reference for reference, _ in pairs)
            return
    assert scores("report_cider", answers) == pytest.approx(each, abs=1e-9)


def test_cider_counts_words_in_the_references_of_the_whole_set() -> None:
    metric = METRICS["report_cider"]
    references = [pair.reference for pair in PAIRS]
    whole = metric.of(PAIRS, references)
    assert metric.of(PAIRS[:5], references) == pytest.approx(whole[:5])
    assert metric.of(PAIRS[:5]) != pytest.approx(whole[:5])
    # Two models' answers to the same questions change nothing.
    assert metric.of(PAIRS + PAIRS, references) == pytest.approx(np.concatenate([whole, whole]))


def test_exact_copies_have_no_cider_where_all_references_agree() -> None:
    assert value("report_cider", [Answer("clear lungs", "clear lungs")] * 3) == 0.0
    assert value(
        "report_cider", [Answer(text, text) for text in ("a b c d e", "f g h i j")]
    ) == pytest.approx(10)


# ---------------------------------------------------------------------- METEOR

# Words that are their own stems: nltk looks synonyms up by stem.
_SYNONYMS = {"n": (("lung", "pulmo"), ("fluid", "liquor")), "a": (("cardiac", "heart"),)}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet of three synsets, in the format of the real one."""
    root = tmp_path_factory.mktemp("nltk_data")
    folder = root / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "lexnames").write_text("00\tadj.all\t3\n01\tnoun.Tops\t1\n")
    senses = []
    for kind, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        data, index = "  1 WordNet 3.0 Copyright of a test  \n", ""
        for words in _SYNONYMS.get(letter, ()):
            offset = f"{len(data):08d}"
            lexical = "01" if letter == "n" else "00"
            data += f"{offset} {lexical} {letter} 02 {words[0]} 0 {words[1]} 0 000 | gloss  \n"
            index += "".join(f"{word} {letter} 1 0 1 0 {offset}  \n" for word in words)
            senses += [f"{word}%{1 if letter == 'n' else 3}:{lexical}:00:: {offset} 1 0" for word in words]
        (folder / f"data.{kind}").write_text(data)
        (folder / f"index.{kind}").write_text(index)
        (folder / f"{kind}.exc").write_text("")
    (folder / "index.sense").write_text("\n".join(sorted(senses)) + "\n")
    return root


METEOR = """
import json, random, sys
from nltk.translate.meteor_score import meteor_score
from mmedpo_ray.metrics import METRICS, Answer, UnavailableError
pairs = json.load(sys.stdin)
answers = [Answer(reference, prediction) for reference, prediction in pairs]
expected = [meteor_score([reference.split()], prediction.split()) for reference, prediction in pairs]
try:
    METRICS["report_meteor_exact"].of(answers)
    exact = "computed"
except UnavailableError as error:
    exact = str(error)
print(json.dumps([METRICS["report_meteor"].of(answers)[:, 0].tolist(), expected, exact]))
"""


def test_meteor_equals_nltk_where_wordnet_is_found(wordnet: Path) -> None:
    pairs = [[pair.reference, pair.prediction] for pair in PAIRS]
    pairs += [["cardiac lung fluid", "heart pulmo liquor"]]
    done = subprocess.run(
        [sys.executable, "-c", METEOR],
        input=json.dumps(pairs),
        env=os.environ | {"NLTK_DATA": str(wordnet)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, expected, exact = json.loads(done.stdout)
    assert ours == pytest.approx(expected, abs=1e-12)
    # Three synonyms in order: one chunk of three words.
    assert ours[-1] == pytest.approx(1 - 0.5 / 27)
    assert exact == "", "beside METEOR it is not computed, and nothing is said of it"


EXACT = """
import json
from mmedpo_ray.metrics import METRICS, Answer, UnavailableError
answers = [Answer("cardiac lung fluid", "heart pulmo liquor"),
           Answer("two opacities seen", "two opacity seen"),
           Answer("cardiomegaly", "Cardiomegaly"), Answer("clear lungs", "")]
try:
    METRICS["report_meteor"].of(answers)
except UnavailableError as error:
    print(json.dumps([METRICS["report_meteor_exact"].of(answers)[:, 0].tolist(), str(error)]))
"""


def test_without_wordnet_another_score_goes_by_another_name(tmp_path: Path) -> None:
    # nltk also looks in the home folder and beside the interpreter.
    environment = os.environ | {"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True, check=True
    )
    if not done.stdout:
        pytest.skip("WordNet is installed for all users of this machine")
    (synonyms, stems, single, empty), said = json.loads(done.stdout)
    assert synonyms == 0.0 and empty == 0.0
    assert stems == pytest.approx(1 - 0.5 / 27)
    assert single == pytest.approx(0.5), "an exact copy of one word, as nltk has it"
    assert "WordNet" in said and "NLTK_DATA" in said


# ---------------------------------------------------------------------- Chinese, thought blocks, empty
# answers


def at_hand(prefix: str) -> list[str]:
    found = []
    for name, metric in METRICS.items():
        if name.startswith(prefix):
            try:
                metric.of([Answer("a", "a")])
            except UnavailableError:
                continue
            found.append(name)
    return found


REPORT_METRICS = at_hand("report_")
ENGLISH = ("report_finding_f1", "report_findings_supported", "report_findings_recalled")


@pytest.mark.parametrize("name", [name for name in REPORT_METRICS if name not in ENGLISH])
def test_chinese_reports_are_compared_by_character(name: str) -> None:
    reference, other = "右肺上叶可见结节，心影增大。", "左侧胸腔积液，双肺纹理增多。"
    references = [reference, other, "未见异常。"]
    metric = METRICS[name]
    same, near, far = metric.value(
        metric.of(
            [Answer(reference, reference), Answer(reference, "右肺上叶可见结节。"), Answer(reference, "无")],
            references,
        )
    )
    assert same > 0.9 and same > near > far


@pytest.mark.parametrize("name", REPORT_METRICS)
def test_a_thought_block_is_no_part_of_the_report(name: str) -> None:
    metric, references = METRICS[name], ["Left pleural effusion is seen.", "The heart is large."]
    plain, thought = metric.of(
        [
            Answer(references[0], "Left pleural effusion is seen."),
            Answer(references[0], "<think>The heart is large.</think> Left pleural effusion is seen."),
        ],
        references,
    )
    assert plain == pytest.approx(thought)


@pytest.mark.parametrize("name", REPORT_METRICS)
@pytest.mark.parametrize("said", ["", ".", "…", "<think>No effusion.</think>"])
@pytest.mark.parametrize("reference", ["Left pleural effusion.", "The lungs are clear."])
def test_an_empty_report_is_wrong(name: str, said: str, reference: str) -> None:
    metric = METRICS[name]
    value = metric.value(metric.of([Answer(reference, said)], [reference, "Another one."]).sum(axis=0))
    nothing_to_recall = name == "report_findings_recalled" and "clear" in reference
    if name == "report_findings_supported" or nothing_to_recall:
        assert np.isnan(value), "no finding is asserted, or none is there"
    else:
        assert value == 0.0


def test_findings_of_chinese_reports_do_not_count():
    """The lexicon is English: none found on both sides would be full marks."""
    metric = METRICS["report_finding_f1"]
    answers = [
        Answer("左肺有结节。", "右肺有结节。"),
        Answer("There is a left nodule.", "There is a right nodule."),
    ]
    found = metric.of(answers, [answer.reference for answer in answers])
    assert np.isnan(metric.value(found[0]))
    assert metric.value(found.sum(axis=0)) == 0.0
