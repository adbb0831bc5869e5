#!/usr/bin/env bash
# nltk's METEOR asks WordNet for the stems of words, so that most synonyms are never found.
#
# Guess:   meteor_score matches words that are equal, then words of one stem, then synonyms: "opacity" and "opaqueness", one synset of WordNet,
#          match.
# Seen:    what the stage of stems leaves over goes on as stems: WordNet is asked for "opac", which it does not know. Only words that
#          are their own stem (lung, fluid) can have synonyms; the score of "opaqueness" for "opacity" is 0.
# Matters: METEOR is printed by Med-VLM papers as the metric that knows synonyms ("enlargement"/"expansion"). In nltk, and in
#          Hugging Face's `evaluate` that wraps it, it is mostly exact words and stems; with or without WordNet hardly differs.
# Versions: nltk 3.10.4, Python 3.11; a WordNet of four synsets in the real one's format is built here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nltk==3.10.4
NLTK_DATA="$folder/nltk_data" "$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import version
from pathlib import Path

folder = Path(os.environ["NLTK_DATA"]) / "corpora" / "wordnet"
folder.mkdir(parents=True)
synsets = [("lung", "pulmo"), ("fluid", "liquor"), ("opacity", "opaqueness"), ("enlargement", "expansion")]
(folder / "lexnames").write_text("00\tadj.all\t3\n01\tnoun.Tops\t1\n")
senses = []
for kind in ("noun", "verb", "adj", "adv"):
    data, index = "  1 WordNet 3.0 Copyright of a test  \n", ""
    for words in synsets if kind == "noun" else ():
        offset = f"{len(data):08d}"
        data += f"{offset} 01 n 02 {words[0]} 0 {words[1]} 0 000 | gloss  \n"
        index += "".join(f"{word} n 1 0 1 0 {offset}  \n" for word in words)
        senses += [f"{word}%1:01:00:: {offset} 1 0" for word in words]
    (folder / f"data.{kind}").write_text(data)
    (folder / f"index.{kind}").write_text(index)
    (folder / f"{kind}.exc").write_text("")
(folder / "index.sense").write_text("\n".join(sorted(senses)) + "\n")

from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

print("nltk", version("nltk"))
stem = PorterStemmer().stem
for word, synonym in synsets:
    assert synonym in wordnet.synsets(word)[0].lemma_names()
    score = meteor_score([[word]], [synonym])
    own_stem = stem(word) == word and stem(synonym) == synonym
    print(f"{synonym} for {word} (stems {stem(synonym)}, {stem(word)}): expected 0.5, as for any one matched word; seen {score}")
    assert score == (0.5 if own_stem else 0.0)
PYTHON
