#!/usr/bin/env bash
# DICOM: pixels that lie in the upper bits of their words (HighBit 15, BitsStored 12) come out as noise in the common readers.
#
# Guess:   PS3.5 8.1.1 places a pixel by Bits Allocated, Bits Stored and High Bit, so readers shift by High Bit; where one does not, another
#          does, and a comparison of two shows it. The ramp 0, 64, …, 4032 at the top of 16-bit words comes out as 0, 64, …, 4032.
# Seen:    pydicom, GDCM and SimpleITK take the lower 12 bits whatever High Bit says: 0, 1024, 2048, 3072, 0, … — four values,
#          again and again. They agree with each other and are all wrong; no warning, and GDCM reports a High Bit of 11.
# Matters: a file whose pixels are left-aligned in their words becomes a texture of edges. A data set that was converted by any of these readers
#          trains a model on it, and a check with a second reader passes. The current PS3.3 wants High Bit to be Bits Stored − 1; archives are older.
# Versions: pydicom 3.0.2, python-gdcm 3.2.6, SimpleITK 2.5.3, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 python-gdcm==3.2.6 SimpleITK==2.5.3 numpy==2.3.5 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import gdcm
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

warnings.simplefilter("ignore")
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
steps = np.arange(64, dtype=np.uint16) * 64
image = Dataset()
image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
image.Rows, image.Columns = 16, 64
image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 15, 0
image.PixelData = np.tile(steps << 4, (16, 1)).tobytes()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
pydicom.dcmwrite("upper.dcm", image, enforce_file_format=True)

reader = gdcm.ImageReader()
reader.SetFileName("upper.dcm")
reader.Read()
by_gdcm = np.frombuffer(reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape"), np.uint16)
seen = {
    f"pydicom {pydicom.__version__}": pydicom.dcmread("upper.dcm").pixel_array[0],
    f"GDCM {gdcm.Version.GetVersion()}": by_gdcm[:64],
    f"SimpleITK {SimpleITK.Version_VersionString()}": SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("upper.dcm"))[0, 0],
}
print("expected".ljust(20), steps[:6], "…")
for name, row in seen.items():
    row = np.asarray(row).astype(int)
    print(name.ljust(20), row[:6], "… distinct values:", len(set(row.tolist())))
    assert (row == (steps.astype(int) << 4) % 4096).all(), f"{name} looks at HighBit now"
print("High Bit as GDCM reports it:", reader.GetImage().GetPixelFormat().GetHighBit())
PYTHON
