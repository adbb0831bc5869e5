#!/usr/bin/env bash
# ROUGE-L of pycocoevalcap and of rouge-score choose different models as the better one.
#
# Guess:   ROUGE-L is the F1 of the longest common subsequence, whichever package computes it.
# Seen:    pycocoevalcap weighs recall with beta = 1.2 and does not say so; it splits at blanks and knows case. A long report that holds the whole
#          reference beats a short correct one in pycocoevalcap (0.73 : 0.68), and loses in rouge-score (0.69 : 0.71). "Effusion." is
#          "effusion" to rouge-score and another word to pycocoevalcap.
# Matters: R2Gen and its successors print the one, LLaVA-Med-like papers the other, in a column with the same name. Preference tuning changes the
#          length of reports, so the package decides who wins.
# Versions: pycocoevalcap 1.2, rouge-score 0.1.2, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rouge-score==0.1.2 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet --no-deps pycocoevalcap==1.2
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from pycocoevalcap.rouge.rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

print(*(f"{name} {version(name)}" for name in ("pycocoevalcap", "rouge-score")))
scorer = RougeScorer(["rougeL"])


def both(reference, answer):
    coco, _ = Rouge().compute_score({0: [reference]}, {0: [answer]})
    return float(coco), scorer.score(reference, answer)["rougeL"].fmeasure


reference = "there is a small left pleural effusion and cardiomegaly"
short = both(reference, "small left pleural effusion cardiomegaly")
long = both(reference, reference + " with no pneumothorax or focal consolidation seen today")
print(f"short, correct:      pycocoevalcap {short[0]:.3f}   rouge-score {short[1]:.3f}")
print(f"long, all of it:     pycocoevalcap {long[0]:.3f}   rouge-score {long[1]:.3f}")
assert long[0] > short[0] and long[1] < short[1], "the packages agree now"
case = both("no effusion", "No effusion.")
print(f"'No effusion.' for 'no effusion': pycocoevalcap {case[0]:.3f}   rouge-score {case[1]:.3f}")
assert case == (0.0, 1.0)
print("expected: one order; seen: pycocoevalcap prefers the long report, rouge-score the short one")
PYTHON
