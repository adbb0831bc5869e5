#!/usr/bin/env bash
# MONAI's LoadImage gives PNG pictures with rows and columns exchanged, and a palette picture as the numbers of its colours.
#
# Guess:   LoadImage of a PNG is array[row, column], as of every other reader in Python, RGB for colours.
# Seen:    the array is [column, row], also with ensure_channel_first: a square radiograph lies on its side. A mask read by Pillow, OpenCV or
#          scikit-image covers the mirror image of its lesion along the diagonal. A palette picture comes as one channel of
#          indices, whatever the colours are: an inverted grey palette stays inverted. No warning.
# Matters: picture by MONAI, mask or boxes by something else (pycocotools, a CSV of boxes, SLAKE's detection.json): the noise of a visual
#          preference pair falls on healthy tissue. Where pictures are square, no shape gives it away.
# Versions: monai 1.6.1, torch 2.13.0, pillow 12.0.0, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 monai==1.6.1 pillow==12.0.0 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

import numpy as np
from PIL import Image
from monai.transforms import LoadImage

print(*(f"{name} {version(name)}" for name in ("monai", "torch", "pillow")))
film = np.zeros((64, 64), np.uint8)
film[8:16, 40:60] = 200  # a lesion near the top, right of the middle
Image.fromarray(film).save("film.png")
Image.fromarray(np.stack([film] * 3, -1)).save("colours.png")

grey = np.asarray(LoadImage(image_only=True)("film.png"))
first = np.asarray(LoadImage(image_only=True, ensure_channel_first=True)("colours.png"))[0]
mask = np.asarray(Image.open("film.png")) > 0
for name, picture in (("grey", grey), ("RGB, channel first", first)):
    print(
        f"{name}: expected the lesion in rows 8-15, columns 40-59; seen rows {np.flatnonzero(picture.any(1))[[0, -1]]}, "
        f"columns {np.flatnonzero(picture.any(0))[[0, -1]]}; mean under Pillow's mask {picture[mask].mean():.0f} (expected 200)"
    )
    assert (picture == film.T).all() and picture[mask].mean() == 0

inverted = Image.fromarray(255 - film).convert("L")
palette = Image.frombytes("P", inverted.size, inverted.tobytes())
palette.putpalette([255 - level for level in range(256) for _ in range(3)])
palette.save("palette.png")
assert (np.asarray(Image.open("palette.png").convert("L")) == film).all()
seen = np.asarray(LoadImage(image_only=True)("palette.png"))
print(f"palette: expected {film[10, 45]} in the lesion and {film[0, 0]} beside it; seen {seen[45, 10]:.0f} and {seen[0, 0]:.0f}")
assert (seen == 255 - film.T).all()
PYTHON
