#!/usr/bin/env bash
# pydicom: a VOI table with 8-bit entries over a 12-bit image is looked up modulo 256.
#
# Guess:   `apply_voi` maps stored value v to entry v of a table with 4,096 entries of 8 bits (PS3.3 C.11.2.1.1 allows it: the entries
#          are display values, 8 bits are plenty). The ramp 0, 64, …, 4032 comes out as 0, 4, …, 251.
# Seen:    the index is computed in the type of the entries, so it wraps at 256: every value of the ramp is a multiple of 64 and lands on
#          one of four entries. No warning, no error. With the same entries declared as 16 bits the picture is right.
# Matters: computed radiography ships such tables. A vision-language model is then trained on a picture of a few grey levels, and whoever
#          renders by pydicom alone never sees why.
# Versions: pydicom 3.0.2, numpy 2.3.4, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.3.4 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi
from pydicom.sequence import Sequence

ramp = np.tile(np.arange(64, dtype=np.uint16) * 64, (4, 1))
entries = np.round(np.arange(4096) * 255 / 4095).astype(int)


def shown(bits):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    table.add_new("LUTData", "US", entries.tolist())
    image = Dataset()
    image.PixelRepresentation, image.BitsStored, image.BitsAllocated = 0, 12, 16
    image.VOILUTSequence = Sequence([table])
    return apply_voi(ramp, image)[0]


expected = entries[ramp[0]]
eight, sixteen = shown(8), shown(16)
print("pydicom", pydicom.__version__, "numpy", np.__version__)
print("expected            ", expected[:4], "…", expected[-1])
print("declared as 16 bits ", sixteen[:4], "…", sixteen[-1])
print("declared as 8 bits  ", eight[:4], "…", eight[-1], "distinct values:", len(set(eight.tolist())))
assert (sixteen == expected).all()
assert len(set(eight.tolist())) < 8 and eight.max() < 20, "pydicom looks such tables up otherwise now"
PYTHON
