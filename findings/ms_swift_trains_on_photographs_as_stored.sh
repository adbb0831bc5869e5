#!/usr/bin/env bash
# ms-swift reads a photograph as it is stored; `datasets`, transformers' load_image and vLLM turn it as its EXIF says.
#
# Guess:   all of them open the same JPEG with Pillow, so a model sees the same picture in training and behind an endpoint.
# Seen:    a picture taken with the camera held upright (orientation 6, as most telephones write it) is 60x40 in training with ms-swift
#          and 40x60 everywhere else; left is up. No message.
# Matters: photographs of skin, wounds and slides taken with a telephone are trained sideways and judged upright. Answers about place
#          ("the upper left border") are learnt for other pixels than those that the question is asked about. vLLM does the same as
#          transformers (`vllm/multimodal/image.py`, ImageOps.exif_transpose; read, not run here).
# Versions: ms-swift 4.6.0, with the transformers and datasets that pip resolves, torch 2.13.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install -q ms-swift==4.6.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 MODELSCOPE_CACHE="$folder/cache" HF_HOME="$folder/hf" venv/bin/python - <<'PYTHON' 2>log.txt
import datasets
import numpy as np
import swift
import transformers
from PIL import Image
from swift.template import vision_utils
from transformers.image_utils import load_image

pixels = np.zeros((40, 60), np.uint8)
pixels[:, :20] = 255  # white where the sensor's left was, which is the patient's top
exif = Image.Exif()
exif[0x0112] = 6
Image.fromarray(pixels).convert("RGB").save("photograph.jpg", exif=exif, quality=95)

rows = datasets.Dataset.from_dict({"image": ["photograph.jpg"]}).cast_column("image", datasets.Image())
read = {
    f"ms-swift {swift.__version__}": vision_utils.load_image("photograph.jpg"),
    f"datasets {datasets.__version__}": rows[0]["image"],
    f"transformers {transformers.__version__}": load_image("photograph.jpg"),
}
for name, image in read.items():
    values = np.asarray(image.convert("L"))
    print(f"{name}: {image.size}, mean of the upper third {values[: len(values) // 3].mean():.0f}")
sizes = [image.size for image in read.values()]
assert sizes == [(60, 40), (40, 60), (40, 60)], "photographs are read otherwise now"
PYTHON
