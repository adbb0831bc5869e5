#!/usr/bin/env bash
# Pillow: 16-bit colours stored plane by plane (TIFF) come out as the left half of the picture, stretched, with stripes.
#
# Guess:   Pillow takes the high byte of 16-bit colours, as it does where the samples of a pixel lie together; or it refuses the file.
# Seen:    the file opens as RGB of the right size. Each row holds the bytes of the row's first half taken for pixels: the picture is twice as
#          wide as it should be, cut in the middle. No warning. 32-bit unsigned grey is read as signed (the bright half turns negative),
#          signed bytes as unsigned. 8-bit planes and 16-bit colours pixel by pixel are right.
# Matters: channels of microscopy are often kept plane by plane. The lesion of a question is outside of what the model is shown,
#          box and mask no longer fit, and the size, which is all that checks look at, is right.
# Versions: Pillow 13.0.0, tifffile 2026.3.3 (to write the files), numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 numpy==2.3.5 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import PIL
import tifffile
from PIL import Image

ramp = np.tile(np.linspace(0, 1, 64), (16, 1))
colours = np.stack([(ramp * 65535).astype("uint16")] * 3)


def row(name):
    return np.asarray(Image.open(name).convert("RGB"))[0, :, 0].astype(int)


tifffile.imwrite("planes.tif", colours, photometric="rgb", planarconfig="separate")
tifffile.imwrite("pixels.tif", np.moveaxis(colours, 0, -1), photometric="rgb")
right, planes = row("pixels.tif"), row("planes.tif")
print("Pillow", PIL.__version__)
print("pixel by pixel ", right[::9])
print("plane by plane ", planes[::9])
halves = (colours[0, 0, :32].view(np.uint8)).astype(int)
assert np.abs(right - np.linspace(0, 255, 64)).max() <= 1
assert (planes == halves).all(), "Pillow reads 16-bit planes otherwise now"

for dtype, pixels in (("uint32", ramp * (2**32 - 1)), ("int8", (ramp * 2 - 1) * 127)):
    tifffile.imwrite("grey.tif", pixels.astype(dtype), photometric="minisblack", byteorder="<")
    found = np.asarray(Image.open("grey.tif")).astype(float)[0]
    print(f"{dtype}: wrong at {(np.abs(found - pixels[0]) > 1).mean():.0%} of the pixels")
    assert (np.diff(found) < 0).any(), f"Pillow reads {dtype} otherwise now"
PYTHON
