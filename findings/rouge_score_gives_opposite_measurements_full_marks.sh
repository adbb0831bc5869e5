#!/usr/bin/env bash
# rouge-score, and with it Hugging Face's ROUGE, keeps a-z and 0-9 alone: opposite measurements are equal, equal Chinese reports have nothing in common.
#
# Guess:   ROUGE-L drops full stops and commas. "ER+" and "ER-", "<5 mm" and ">5 mm" differ in a word; a copied Chinese report has 1, or a warning.
# Seen:    every other character separates words, so signs and comparisons vanish: the score of the opposite is 1.0. A Chinese report has no
#          word, and its exact copy scores 0.0; one measurement in it ("5 mm") decides the whole score: 1.0 for unrelated reports.
# Matters: ROUGE-L is the commonest score of generated reports; on Chinese ones (and the Chinese half of SLAKE) it is either 0 or about digits.
# Versions: rouge-score 0.1.2, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rouge-score==0.1.2 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

print("rouge-score", version("rouge-score"))
scorer = RougeScorer(["rougeL"])
cases = [
    ("The tumour is ER+.", "The tumour is ER-.", "below 1", 1.0),
    ("Nodule <5 mm.", "Nodule >5 mm.", "below 1", 1.0),
    ("Attenuation of -5 HU.", "Attenuation of 5 HU.", "below 1", 1.0),
    ("右肺上叶可见结节，心影增大。", "右肺上叶可见结节，心影增大。", "1", 0.0),
    ("右肺上叶结节 5 mm。", "左侧胸腔积液 5 mm。", "below 1", 1.0),
]
for reference, answer, expected, known in cases:
    seen = scorer.score(reference, answer)["rougeL"].fmeasure
    print(f"expected {expected:8} seen {seen:.1f}   {reference} / {answer}")
    assert seen == known
PYTHON
