#!/usr/bin/env bash
# scipy's zoom() moves what stands near the border of a heat map by up to half a patch; torch, Pillow, OpenCV and scikit-image do not.
#
# Guess:   zoom(map, 14, order=1) of a 24 x 24 attention map lays patch (r, c) over rows 14 r to 14 r + 13 of the 336 x 336 picture, as
#          torch's interpolate() does.
# Seen:    zoom() joins the centres of the corner patches to the corners of the picture. The centre of a patch's blob moves outwards: by nothing in
#          the middle, by 7 pixels, half a patch, in the corner. The five others agree to a hundredth of a pixel; zoom() does
#          with grid_mode=True, mode="nearest".
# Matters: attention or Grad-CAM maps of a vision tower are laid over radiographs with zoom() in many scripts. Lesions in the lung
#          periphery are missed by the noise, and pointing scores fall, the more so the farther from the centre.
# Versions: scipy 1.17.1, torch 2.13.0, pillow 12.0.0, opencv-python-headless 4.12.0.88, scikit-image 0.26.0, numpy 2.2.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 scipy==1.17.1 pillow==12.0.0 opencv-python-headless==4.12.0.88 \
    scikit-image==0.26.0 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import zoom
from skimage.transform import resize

names = ("scipy", "torch", "pillow", "opencv-python-headless", "scikit-image", "numpy")
print(*(f"{name} {version(name)}" for name in names))
PATCHES, PIXELS = 24, 336
UPSAMPLERS = {
    "torch": lambda h: torch.nn.functional.interpolate(
        torch.tensor(h)[None, None], size=(PIXELS, PIXELS), mode="bilinear"
    )[0, 0].numpy(),
    "pillow": lambda h: np.asarray(
        Image.fromarray(h.astype(np.float32)).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    ),
    "opencv": lambda h: cv2.resize(h, (PIXELS, PIXELS), interpolation=cv2.INTER_LINEAR),
    "scikit-image": lambda h: resize(h, (PIXELS, PIXELS), order=1),
    "scipy, grid_mode": lambda h: zoom(h, PIXELS // PATCHES, order=1, grid_mode=True, mode="nearest"),
    "scipy": lambda h: zoom(h, PIXELS // PATCHES, order=1),
}


def middle(heat):
    """Row and column where the brightest pixels stand, on average."""
    return np.argwhere(heat >= heat.max() - 1e-6).mean(0)


moved = {}
for patch in (12, 4, 1):
    heat = np.zeros((PATCHES, PATCHES))
    heat[patch, patch] = 1
    expected = (patch + 0.5) * PIXELS / PATCHES - 0.5
    for name, upsample in UPSAMPLERS.items():
        row, column = middle(upsample(heat))
        moved[name, patch] = expected - row
        print(f"patch ({patch}, {patch}), {name}: expected row {expected:.1f}, seen {row:.1f}")
        assert abs(row - column) < 1e-6
assert all(abs(shift) < 0.6 for (name, _), shift in moved.items() if name != "scipy")
assert abs(moved["scipy", 12]) < 0.6 and moved["scipy", 4] > 3 and moved["scipy", 1] > 5
PYTHON
