"""RadEval's scores: left out with one line where something is missing, equal to the package where it is
there.

The weights are tiny and random, in a cache of the hub's layout; RadGraph's archive is too much to rebuild
here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmedpo_ray.metrics import METRICS, Answer, UnavailableError
from mmedpo_ray.metrics.radeval import chexbert_value

NAMES = ("report_radgraph_f1", "report_chexbert_f1", "report_ratescore")
WITH_RADEVAL = importlib.util.find_spec("radeval") is not None
needs_radeval = pytest.mark.skipif(not WITH_RADEVAL, reason="RadEval is not installed")


def run(code: str, tmp_path: Path) -> str:
    """A process of its own, so that nothing is loaded or cached yet."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(WITH_RADEVAL, reason="RadEval is installed")
@pytest.mark.parametrize("name", NAMES)
def test_an_extra_that_nobody_installed_is_left_out_in_silence(name: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        METRICS[name].of([Answer("No effusion.", "No effusion.")])
    assert str(caught.value) == ""


def test_chexbert_f1_is_micro_averaged() -> None:
    sums = np.array([[3.0, 1.0, 2.0, 5.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert chexbert_value(sums) == pytest.approx([6 / 9, 0.0, np.nan], nan_ok=True)


@needs_radeval
@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    code = f"""
from mmedpo_ray.metrics import METRICS, Answer, UnavailableError
try:
    METRICS[{name!r}].of([Answer("No effusion.", "No effusion.")])
except UnavailableError as error:
    print(error)
"""
    said = run(code, tmp_path)
    assert said.count("\n") == 1 and "is left out: it needs the weights" in said and "HF_HUB_OFFLINE" in said


CHEXBERT = """
import json, sys
import numpy as np, torch
from pathlib import Path
from transformers import BertConfig, BertModel, BertTokenizerFast
from mmedpo_ray.metrics import METRICS, Answer

def snapshot(cache, repository):
    folder = Path(cache) / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("a" * 40)

import os
words = "[PAD] [UNK] [CLS] [SEP] [MASK] small left right pleural effusion no nodule in the"
words = (words + " heart is enlarged . clear lungs").split()
bert = snapshot(os.environ["HF_HOME"] + "/hub", "bert-base-uncased")
(bert / "vocab.txt").write_text("\\n".join(words))
BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=32)
config.save_pretrained(bert)
torch.manual_seed(0)
state = {"module.bert." + key: torch.randn_like(value) if value.is_floating_point() else value
         for key, value in BertModel(config).state_dict().items()}
for head in range(14):
    size = 4 if head < 13 else 2
    state[f"module.linear_heads.{head}.weight"] = torch.randn(size, 32)
    state[f"module.linear_heads.{head}.bias"] = torch.zeros(size)
weights = snapshot(os.environ["XDG_CACHE_HOME"] + "/chexbert", "StanfordAIMI/RRG_scorers")
torch.save({"model_state_dict": state}, weights / "chexbert.pth")

rng = np.random.default_rng(0)
texts = [" ".join(rng.choice(words[5:], 6)) for _ in range(40)]
pairs = list(zip(texts[:20], texts[20:]))
metric = METRICS["report_chexbert_f1"]
ours = metric.of([Answer(r, p) for r, p in pairs])
from radeval.metrics.f1chexbert.f1chexbert import F1CheXbert
_, _, report, *_ = F1CheXbert(device="cpu").forward([p for _, p in pairs], [r for r, _ in pairs])
empty = metric.of([Answer(texts[0], "."), Answer(texts[0], "")])
print(json.dumps([float(metric.value(ours.sum(axis=0))), report["micro avg"]["f1-score"], empty.tolist()]))
"""


@needs_radeval
def test_chexbert_f1_equals_radeval(tmp_path: Path) -> None:
    ours, theirs, empty = json.loads(run(CHEXBERT, tmp_path).splitlines()[-1])
    assert 0 < ours < 1 and ours == pytest.approx(theirs)
    assert all(shared == invented == 0 and missed > 0 for shared, invented, missed, _ in empty)


RATESCORE = """
import json, os
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
import torch
from transformers import BertConfig, BertForTokenClassification, BertModel, BertTokenizerFast
from mmedpo_ray.metrics import METRICS, Answer, radeval

words = "[PAD] [UNK] [CLS] [SEP] [MASK] small left right pleural effusion no nodule in upper"
words = (words + " zone the heart is enlarged . clear lungs").split()
root = Path(os.environ["HF_HOME"])
(root / "vocab").mkdir(parents=True)
(root / "vocab" / "vocab.txt").write_text("\\n".join(words))
tokenizer = BertTokenizerFast(str(root / "vocab" / "vocab.txt"))
kinds = ("ABNORMALITY", "ANATOMY", "DISEASE", "NON-ABNORMALITY", "NON-DISEASE")
labels = ["O"] + [f"{a}-{b}" for b in kinds for a in "BI"]
torch.manual_seed(0)
config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=32, num_labels=len(labels), id2label=dict(enumerate(labels)),
                    label2id={l: i for i, l in enumerate(labels)})
tagger = BertForTokenClassification(config)
torch.nn.init.normal_(tagger.bert.embeddings.word_embeddings.weight)
for model, name in ((tagger, "tagger"), (BertModel(config), "embedder")):
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
from radeval.metrics.RaTEScore.scorer import RaTEScore
scorer = RaTEScore(bert_model=str(root / "tagger"), eval_model=str(root / "embedder"), use_gpu=False)
radeval._ratescore = lambda module: scorer
texts = ["small left pleural effusion .", "nodule in the right upper zone .", "the heart is enlarged .",
         "clear lungs ."]
ours = METRICS["report_ratescore"].of([Answer(r, p) for r, p in zip(texts, [texts[1], "", texts[2], "No"])])
scored = ((texts[0], texts[1]), (texts[2], texts[2]))
theirs = [float(scorer.compute_score([p], [r])[0][0]) for r, p in scored]
print(json.dumps([ours[:, 0].tolist(), theirs]))
"""


@needs_radeval
@pytest.mark.skipif(importlib.util.find_spec("medspacy") is None, reason="medspacy is not installed")
def test_short_answers_do_not_shift_ratescore(tmp_path: Path) -> None:
    ours, theirs = json.loads(run(RATESCORE, tmp_path).splitlines()[-1])
    assert ours == pytest.approx([theirs[0], 0.0, theirs[1], 0.0])


RADGRAPH = """
import json, sys
import torch
from mmedpo_ray.metrics import METRICS, Answer, radeval

def annotate(reports):
    # As the model would: a finding and its side, related where both are there.
    found = {}
    for number, text in enumerate(reports):
        words, entities = text.split(), {}
        for place, word in enumerate(words):
            if word in ("effusion", "left", "right"):
                is_finding = word == "effusion"
                label = "Observation" if is_finding else "Anatomy"
                is_related = not is_finding and "effusion" in words
                related = [["modify", str(words.index("effusion"))]] if is_related else []
                entities[str(place)] = {"tokens": word, "label": label + "::definitely present",
                                        "start_ix": place, "end_ix": place, "relations": related}
        found[str(number)] = {"text": text, "entities": entities}
    return found

def build(module):
    scorer = module.F1RadGraph.__new__(module.F1RadGraph)
    torch.nn.Module.__init__(scorer)
    scorer.reward_level, scorer.radgraph = "all", annotate
    return scorer

radeval._radgraph = build
texts = ["Left effusion", "right effusion", "effusion", "", "."]
found = METRICS["report_radgraph_f1"].of([Answer("left effusion", text) for text in texts])
print(json.dumps(found.tolist()))
"""


@needs_radeval
def test_radgraph_f1_is_the_partial_one_of_each_report(tmp_path: Path) -> None:
    """Entities count with whether they stand in a relation; a left-out annotation model stands in for the
    archive."""
    scores, counts = zip(*json.loads(run(RADGRAPH, tmp_path).splitlines()[-1]), strict=True)
    assert counts == (1.0,) * 5
    assert scores[0] == 1.0 and scores[3] == scores[4] == 0.0
    assert scores[1] == pytest.approx(0.5) and 0 < scores[2] < 1
