#!/usr/bin/env bash
# Pillow: TIFF with WhiteIsZero is turned round at 8 bits and left inverted at 16 bits and as floats.
#
# Guess:   a TIFF says by PhotometricInterpretation 0 that low values are bright. Pillow shows 8-bit files so, hence deeper ones too.
# Seen:    8 bits: turned. 16 bits (I;16) and 32-bit floats (F): opened without a word, values as stored, so lungs are white and bones
#          black. Signed 16-bit, 32-bit integer and 64-bit float files with WhiteIsZero are refused.
# Matters: film scanners and exports of MONOCHROME1 radiographs write 16-bit WhiteIsZero. Half of a data set then shows inverted films,
#          which a model learns as another modality; the same pixels at 8 bits come out right, so spot checks miss it.
# Versions: Pillow 12.0.0, tifffile 2025.10.16 (to write the files), numpy 2.3.4, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==12.0.0 tifffile==2025.10.16 numpy==2.3.4 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import PIL
import tifffile
from PIL import Image

ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
seen = {}
for name, scale in (("uint8", 1), ("uint16", 257), ("float32", 1)):
    pixels = (ramp * scale).astype(name)
    tifffile.imwrite(f"{name}.tif", pixels, photometric="miniswhite")
    row = np.asarray(Image.open(f"{name}.tif"), dtype=np.float64)[0]
    # White is zero: the first column, which stores 0, is the bright one.
    seen[name] = bool(row[0] > row[-1])
print("Pillow", PIL.__version__)
print("the column that stores 0 is bright:", seen)
refused = []
for name in ("int16", "int32", "float64"):
    tifffile.imwrite(f"{name}.tif", ramp.astype(name), photometric="miniswhite")
    try:
        Image.open(f"{name}.tif").load()
    except Exception as error:
        refused.append((name, type(error).__name__))
print("refused:", refused)
assert seen == {"uint8": True, "uint16": False, "float32": False}, "Pillow treats WhiteIsZero otherwise now"
PYTHON
