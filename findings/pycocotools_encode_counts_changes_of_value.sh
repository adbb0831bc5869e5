#!/usr/bin/env bash
# pycocotools: encode() starts a new run at every change of value, so masks of several labels or with soft edges come out as stripes.
#
# Guess:   what is not zero is foreground: a mask of 0 and 255, a label map of 0, 1, 2 or a resized mask with grey edges encode to what covers them.
# Seen:    runs alternate between background and foreground wherever the value changes. 0 and 255 are fine. A lesion (2) inside an organ (1)
#          becomes a hole in it; a mask with a grey rim becomes its rim, the lesion itself is background. area() and iou() agree with the
#          broken mask. No error, no warning.
# Matters: lesion masks are kept as COCO RLE. SLAKE-like masks hold several labels, masks resized with smoothing have grey edges: the lesion is
#          then left out of the region that is noised, which is the whole point of a visual preference pair.
# Versions: pycocotools 2.0.11, numpy 2.3.5, pillow 12.0.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pycocotools==2.0.11 numpy==2.3.5 pillow==12.0.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from PIL import Image
from pycocotools import mask as coco

print("pycocotools", version("pycocotools"))


def seen(name, mask):
    """Pixels that are not zero, pixels after the round trip, and pixels of the lesion's core (the brightest) that are left."""
    rle = coco.encode(np.asfortranarray(mask))
    back = coco.decode(rle).astype(bool)
    assert coco.area(rle) == back.sum()
    core = mask == mask.max()
    figures = int((mask > 0).sum()), int(back.sum()), int(core.sum()), int((core & back).sum())
    print(f"{name}: expected {figures[0]} pixels, seen {figures[1]}; of the {figures[2]} of the lesion {figures[3]} are left")
    return figures


plain = np.zeros((32, 32), np.uint8)
plain[8:24, 8:24] = 255
labels = np.zeros((32, 32), np.uint8)
labels[4:28, 4:28] = 1
labels[12:20, 12:20] = 2
rim = np.zeros((32, 32), np.uint8)
rim[8:24, 8:24] = 128
rim[9:23, 9:23] = 255
smooth = np.asarray(Image.fromarray(plain).resize((64, 64), Image.Resampling.BILINEAR))

assert seen("0 and 255", plain) == (256, 256, 256, 256)
assert seen("organ 1, lesion 2", labels) == (576, 512, 64, 0)
foreground, kept, core, core_kept = seen("lesion with a grey rim of one pixel", rim)
assert foreground == core + 60 and core_kept == 0
foreground, kept, core, core_kept = seen("0 and 255, resized with smoothing", smooth)
assert kept != foreground
PYTHON
