#!/usr/bin/env bash
# negspaCy with its default clinical terms reads two of the commonest report wordings the wrong way round.
#
# Guess:   the NegEx implementation for spaCy, whose default term set is "en_clinical", takes "Pneumothorax is not seen" for a
#          denial and "Cannot exclude pneumonia" for none: both are stock phrases of radiology reports.
# Seen:    "<finding> is not seen", "is no longer seen", "is not visualized", "has resolved" and "neither A nor B" are affirmed;
#          "Cannot exclude <finding>" is denied, although "Pneumonia cannot be excluded" is not; what follows a semicolon is
#          denied with what stands before it.
# Matters: findings of generated reports are checked against the reference by such a tool (hallucination rates, preference
#          labels): a denied finding counts as hallucinated, and a hedge as agreement with a normal report.
# Versions: negspacy 1.1.0, spacy 3.8.18, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet negspacy==1.1.0 spacy==3.8.18
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import spacy
from negspacy.negation import Negex  # noqa: F401 - registers the component

print("negspacy", version("negspacy"), "spacy", version("spacy"))
nlp = spacy.blank("en")
nlp.add_pipe("sentencizer")
findings = ("pleural effusion", "effusion", "pneumothorax", "pneumonia", "nodule", "consolidation")
nlp.add_pipe("entity_ruler").add_patterns(
    [{"label": "F", "pattern": [{"LOWER": word} for word in name.split()]} for name in findings]
)
nlp.add_pipe("negex", config={"ent_types": ["F"]})

# Text -> whether each finding is denied, as a radiologist reads it and as negspaCy does.
cases = {
    "No pleural effusion or pneumothorax.": ([True, True], [True, True]),
    "No pneumothorax but large effusion.": ([True, False], [True, False]),
    "Pneumothorax is not seen.": ([True], [False]),
    "The pneumothorax is no longer seen.": ([True], [False]),
    "The nodule is not visualized.": ([True], [False]),
    "The effusion has resolved.": ([True], [False]),
    "Neither effusion nor nodule.": ([True, True], [False, False]),
    "Cannot exclude pneumonia.": ([False], [True]),
    "Pneumonia cannot be excluded.": ([False], [False]),
    "No new nodule; stable consolidation.": ([True, False], [True, True]),
}
for text, (right, known) in cases.items():
    seen = [entity._.negex for entity in nlp(text).ents]
    print(f"{'as read' if seen == right else 'WRONG':8} expected {right} seen {seen}  {text}")
    assert seen == known, f"changed behaviour: {text} {seen}"
wrong = sum(right != known for right, known in cases.values())
print(f"{wrong} of {len(cases)} stock phrases are read the wrong way round")
PYTHON
