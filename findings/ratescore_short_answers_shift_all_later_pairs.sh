#!/usr/bin/env bash
# RaTEScore, in RadEval and in its own package, pairs every report after a very short answer with the wrong reference.
#
# Guess:   compute_score(candidates, references) gives one score a pair, in order; an empty answer, "." or "No" costs its own pair only.
# Seen:    sentences below three characters are dropped, and with them the whole text if it has no other. The list of candidates is then
#          shorter than that of references, zip() pairs what is left, and N pairs give N - 1 scores: exact copies after the
#          short answer are scored against the report before them. No error, no warning.
# Matters: a model that answers "" or "No" to a single image of a test set gets a wrong mean, and per-report scores (rewards,
#          preference pairs) of all later images are those of other images.
# Versions: radeval 2.2.1, ratescore 0.6.0, medspacy 1.3.1, transformers 5.16.0, torch 2.13.0, Python 3.11. The weights are tiny and random; the
#          fault is before the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.16.0 medspacy==1.3.1 nltk==3.10.4 pandas==2.2.3 loguru==0.7.3 'numpy<2'
"$folder/venv/bin/pip" install --quiet --no-deps radeval==2.2.1 ratescore==0.6.0
cd "$folder"
HF_HUB_OFFLINE=1 NLTK_DATA="$folder" "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/errors" || { tail -5 "$folder/errors" >&2; exit 1; }
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import BertConfig, BertForTokenClassification, BertModel, BertTokenizerFast

root = Path("models")
root.mkdir()
words = "[PAD] [UNK] [CLS] [SEP] [MASK] small left right pleural effusion no nodule in upper zone the heart is enlarged . clear lungs"
(root / "vocab.txt").write_text("\n".join(words.split()))
tokenizer = BertTokenizerFast(str(root / "vocab.txt"))
kinds = ("ABNORMALITY", "ANATOMY", "DISEASE", "NON-ABNORMALITY", "NON-DISEASE")
labels = ["O"] + [f"{place}-{kind}" for kind in kinds for place in "BI"]
torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(words.split()), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
)
tagger = BertForTokenClassification(config)
torch.nn.init.normal_(tagger.bert.embeddings.word_embeddings.weight)
for model, name in ((tagger, "tagger"), (BertModel(config), "embedder")):
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)

from radeval.metrics.RaTEScore.scorer import RaTEScore as InRadEval
from RaTEScore import RaTEScore

print(*(f"{name} {version(name)}" for name in ("radeval", "ratescore", "medspacy", "transformers", "torch")))
reports = [
    "small left pleural effusion .",
    "nodule in the right upper zone .",
    "the heart is enlarged .",
    "no left nodule in the upper zone .",
]
for kind in (InRadEval, RaTEScore):
    scorer = kind(bert_model=str(root / "tagger"), eval_model=str(root / "embedder"), use_gpu=False)

    def scores(candidates):
        found = scorer.compute_score(candidates, reports)
        return [float(value) for value in (found[0] if isinstance(found, tuple) else found)]

    print(kind.__module__)
    copies = scores(reports)
    print("  four exact copies:                   ", [round(value, 3) for value in copies])
    for short in ("", ".", "No"):
        changed = scores([reports[0], short, *reports[2:]])
        print(f"  the second answer is {short!r}:".ljust(40), [round(value, 3) for value in changed])
        assert len(copies) == 4 and len(changed) == 3, "expected 4 scores"
        shifted = scores([reports[0], reports[2], reports[3], reports[3]])[:3]
        assert max(abs(a - b) for a, b in zip(changed, shifted)) < 1e-5, "those of the shifted pairs"
print("expected: four scores, the last two those of exact copies; seen: three scores, of shifted pairs")
PYTHON
