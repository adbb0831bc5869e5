#!/usr/bin/env bash
# MONAI: its two DICOM readers give opposite pictures of one MONOCHROME1 radiograph.
#
# Guess:   `LoadImage` reads stored values whichever reader it finds installed; inverting MONOCHROME1 is the user's affair, as with pydicom.
# Seen:    PydicomReader returns the stored values, ITKReader (and SimpleITK, and highdicom's get_frame) the inverted ones: a pixel stored as 0
#          is 0 in one and 4095 in the other. Neither warns. Code that inverts by the tag after ITK turns the film back into a negative.
# Matters: `LoadImage` takes the last reader that is installed and fits, so one training script sees lungs black on one machine and white on
#          the next. Radiographs of several vendors mix both kinds; pairs and rewards are then learnt on half the films inverted.
# Versions: monai 1.5.1, itk 5.4.4, SimpleITK 2.5.3, pydicom 3.0.2, highdicom 0.26.1, torch 2.13.0, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 monai==1.5.1 itk-io==5.4.4 itk-core==5.4.4 itk-numerics==5.4.4 itk-filtering==5.4.4 \
  SimpleITK==2.5.3 pydicom==3.0.2 highdicom==0.26.1 numpy==2.3.5 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import highdicom
import monai
import numpy as np
import pydicom
import SimpleITK
from monai.data import ITKReader, PydicomReader
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
steps = np.arange(64, dtype=np.uint16) * 64
film = Dataset()
film.SOPClassUID, film.SOPInstanceUID, film.SeriesInstanceUID = SecondaryCaptureImageStorage, "1.2.3", "1.2.4"
film.Rows, film.Columns = 16, 64
film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME1"
film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
film.PixelData = np.tile(steps, (16, 1)).tobytes()
film.file_meta = FileMetaDataset()
film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
pydicom.dcmwrite("film.dcm", film, enforce_file_format=True)


def by_monai(reader):
    pixels, _ = reader.get_data(reader.read("film.dcm"))
    return np.asarray(pixels).squeeze()[:, 0]


seen = {
    "MONAI PydicomReader": by_monai(PydicomReader()),
    "MONAI ITKReader": by_monai(ITKReader()),
    "SimpleITK": SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("film.dcm"))[0, 0],
    "highdicom": highdicom.imread("film.dcm").get_frame(1)[0],
    "pydicom": pydicom.dcmread("film.dcm").pixel_array[0],
}
print("monai", monai.__version__, "SimpleITK", SimpleITK.Version_VersionString(), "highdicom", highdicom.__version__)
print("stored".ljust(20), steps[::21])
for name, row in seen.items():
    print(name.ljust(20), np.asarray(row).astype(int)[::21])
stored = steps.astype(int)
for name in ("MONAI PydicomReader", "pydicom"):
    assert (np.asarray(seen[name]) == stored).all(), f"{name} inverts now"
for name in ("MONAI ITKReader", "SimpleITK", "highdicom"):
    assert (np.asarray(seen[name]).astype(int) == 4095 - stored).all(), f"{name} does not invert now"
PYTHON
