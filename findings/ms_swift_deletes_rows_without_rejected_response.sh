#!/usr/bin/env bash
# ms-swift: where some rows of a preference file have `rejected_response`, those with `rejected_messages` instead are deleted.
#
# Guess:   ms-swift documents two ways to say the dispreferred side, `rejected_response` (a text) and `rejected_messages` with
#          `rejected_images` (another image). A JSON Lines file may hold rows of both, each complete in itself.
# Seen:    the file becomes a table, so every row gets every column; `rejected_response` is null in the rows of the second kind, and a
#          null `rejected_response` is an error for the checker even beside valid `rejected_messages`. In the default, lenient mode the
#          rows are deleted with a warning. Written apart, both files load whole.
# Matters: all visual preference pairs (same answer, noised image) vanish from a mixed MMedPO-style file, and the run trains on text pairs.
#          The warning prints the row, so a patient's text ends in the log.
# Versions: ms-swift 4.6.0, datasets 4.8.4 or what pip resolves, torch 2.13.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install -q ms-swift==4.6.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 MODELSCOPE_CACHE="$folder/cache" HF_HOME="$folder/hf" venv/bin/python - <<'PYTHON' 2>log.txt
import json
from pathlib import Path

import swift
from PIL import Image
from swift.dataset import load_dataset

Image.new("L", (8, 8)).save("a.png")
Image.new("L", (8, 8), 99).save("b.png")
asked = {"role": "user", "content": "<image>Is there a nodule?"}
talk = [asked, {"role": "assistant", "content": "Yes."}]
text = {"messages": talk, "images": ["a.png"], "rejected_response": "No."}
visual = {"messages": talk, "images": ["a.png"], "rejected_messages": talk, "rejected_images": ["b.png"]}


def loaded(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(load_dataset([name], num_proc=1)[0])


counts = {
    "text": loaded("text.jsonl", [text] * 3),
    "visual": loaded("visual.jsonl", [visual] * 3),
    "both": loaded("both.jsonl", [text] * 3 + [visual] * 3),
}
print("ms-swift", swift.__version__)
print("rows kept of 3 text pairs, of 3 visual pairs, of the 6 in one file:", counts)
assert counts == {"text": 3, "visual": 3, "both": 3}, "ms-swift keeps other rows now"
PYTHON
