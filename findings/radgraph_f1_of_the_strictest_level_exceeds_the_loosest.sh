#!/usr/bin/env bash
# RadGraph F1 tells "Effusion" from "effusion", so the strictest level can score 1.0 where the loosest scores 0.0.
#
# Guess:   F1RadGraph compares findings; a capital letter at the start of a sentence is no clinical difference. Of the levels simple, partial and
#          complete each asks for more than the one before, so scores fall from left to right.
# Seen:    reports keep their case up to the entities, and simple and partial compare them as written; only complete, and only entities with
#          a relation, are put in lower case. "Left effusion." against "left effusion.": 0.5, 0.5 and 1.0; a lone "Cardiomegaly." against
#          "cardiomegaly.": 0 at all levels.
# Matters: "partial" is the RadGraph F1 that papers print and that rewards use. R2Gen's cleaned references are in lower case, models write sentences:
#          every finding that starts a sentence counts as missed and as invented. Tuning against it teaches lower case.
# Versions: radgraph 0.1.18, radeval 2.2.1 (its copy is the same), nltk 3.10.4, Python 3.11. The annotations are built here in
#          the model's format, on the words of its tokenizer; no weights are needed, the comparison comes after the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet setuptools==80.9.0 wheel==0.45.1 nltk==3.10.4
"$folder/venv/bin/pip" install --quiet --no-deps --no-build-isolation radgraph==0.1.18 radeval==2.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util
from importlib.metadata import distribution, version

from nltk.tokenize import wordpunct_tokenize


def rewards(package, path):
    """The module alone; its package would load a model's libraries."""
    spec = importlib.util.spec_from_file_location(package, distribution(package).locate_file(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def annotation(text):
    """RadGraph's annotation of "[Ll]eft effusion." or of a lone finding, on the words that its own tokenizer finds."""
    words = wordpunct_tokenize(text)
    entities = {}
    if words[0].lower() == "left":
        entities["1"] = entity(words[0], "Anatomy::definitely present", 0, [["modify", "2"]])
        entities["2"] = entity(words[1], "Observation::definitely present", 1, [])
    else:
        entities["1"] = entity(words[0], "Observation::definitely present", 0, [])
    return {"text": " ".join(words), "entities": entities, "data_source": None, "data_split": "inference"}


def entity(word, label, place, relations):
    return {"tokens": word, "label": label, "start_ix": place, "end_ix": place, "relations": relations}


print(*(f"{name} {version(name)}" for name in ("radgraph", "radeval", "nltk")))
for package, path in (("radgraph", "radgraph/rewards.py"), ("radeval", "radeval/metrics/radgraph/_vendor/rewards.py")):
    module = rewards(package, path)
    for answer, reference, known in (
        ("left effusion.", "left effusion.", (1.0, 1.0, 1.0)),
        ("Left effusion.", "left effusion.", (0.5, 0.5, 1.0)),
        ("Cardiomegaly.", "cardiomegaly.", (0.0, 0.0, 0.0)),
    ):
        seen = module.compute_reward(annotation(answer), annotation(reference), "all")
        print(f"{package:9} {answer:15} for {reference:15} expected (1, 1, 1), seen simple, partial, complete {seen}")
        assert seen == known
PYTHON
