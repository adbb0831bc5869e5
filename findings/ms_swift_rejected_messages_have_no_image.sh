#!/usr/bin/env bash
# ms-swift: a rejected side given as `rejected_messages` has no image, unless `rejected_images` repeats it.
#
# Guess:   `images` belongs to the row, so both sides of a preference pair see it; `rejected_images` is for pairs whose rejected image
#          is another one. With `rejected_response` it is so: the image, like every other member, is copied to the rejected side.
# Seen:    with `rejected_messages` nothing is copied. The chosen side has one image, the rejected side none. Where questions have no
#          `<image>` tag (ms-swift puts it in front by itself, for each image that a side has), nothing is said: the loader keeps the
#          row and the rejected answer is scored on text alone.
# Matters: DPO then compares an answer with the radiograph to an answer without one. The margin measures whether there is an image, not
#          which answer is right, which is the opposite of what preference data against hallucination is for.
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
from swift.template.template_inputs import TemplateInputs

Image.new("L", (8, 8)).save("a.png")
asked = {"role": "user", "content": "Is there a nodule?"}
yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
pair = {"messages": [asked, yes], "images": ["a.png"]}
rows = {
    "rejected_response": pair | {"rejected_response": "No."},
    "rejected_messages": pair | {"rejected_messages": [asked, no]},
    "rejected_messages, rejected_images": pair | {"rejected_messages": [asked, no], "rejected_images": ["a.png"]},
}
print("ms-swift", swift.__version__)
found = {}
for name, row in rows.items():
    file = f"{len(found)}.jsonl"
    Path(file).write_text(json.dumps(row) + "\n")
    [loaded] = load_dataset([file], num_proc=1)[0]
    sides = TemplateInputs.from_dict(loaded)
    assert sides.chosen.messages[0]["content"] == sides.rejected.messages[0]["content"]
    found[name] = (len(sides.chosen.images), len(sides.rejected.images))
    print(f"{name}: images of the chosen and of the rejected side {found[name]}, expected (1, 1)")
assert list(found.values()) == [(1, 1), (1, 0), (1, 1)], "ms-swift gives the sides other images now"
PYTHON
