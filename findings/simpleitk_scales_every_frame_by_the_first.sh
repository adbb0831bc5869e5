#!/usr/bin/env bash
# SimpleITK: in an enhanced image all frames are rescaled by the first frame's slope; pydicom and MONAI rescale none.
#
# Guess:   ITK knows functional groups (it applies a rescale that is shared by all frames), so it applies that of each frame, or none.
# Seen:    two frames with slopes 1 and 2: both come out with slope 1, so every value of the second is half of what it should be. Where a
#          shared rescale and one of the frame are both there, the shared one is taken. pydicom's apply_modality_lut and MONAI's PydicomReader
#          look at the top level alone and return stored values. highdicom has every frame right. Nobody warns.
# Matters: enhanced PET and MR may keep a slope of its own in each frame. Slices cut from such files for a vision-language model then differ in
#          brightness from slice to slice although the uptake is the same, and "more uptake" in a report teaches the wrong thing.
# Versions: SimpleITK 2.5.3, pydicom 3.0.2, highdicom 0.26.1, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q SimpleITK==2.5.3 pydicom==3.0.2 highdicom==0.26.1 numpy==2.3.5 2>/dev/null
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import highdicom
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)


def group(slope):
    rescale = Dataset()
    rescale.RescaleIntercept, rescale.RescaleSlope, rescale.RescaleType = 0, slope, "US"
    found = Dataset()
    found.PixelValueTransformationSequence = Sequence([rescale])
    return found


stored = np.tile(np.arange(64, dtype=np.uint16) * 16, (16, 1))
image = Dataset()
image.SOPClassUID, image.SOPInstanceUID = EnhancedCTImageStorage, "1.2.3"
image.Rows, image.Columns, image.NumberOfFrames = 16, 64, 2
image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
image.PerFrameFunctionalGroupsSequence = Sequence([group(1), group(2)])
image.PixelData = np.stack([stored, stored]).tobytes()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
pydicom.dcmwrite("frames.dcm", image, enforce_file_format=True)
image.SharedFunctionalGroupsSequence = Sequence([group(3)])
pydicom.dcmwrite("both.dcm", image, enforce_file_format=True)


def by_itk(name):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(name)).astype(int)


itk, both = by_itk("frames.dcm"), by_itk("both.dcm")
alone = pydicom.dcmread("frames.dcm")
plain = apply_modality_lut(alone.pixel_array, alone)
right = highdicom.imread("frames.dcm")
print("SimpleITK", SimpleITK.Version_VersionString(), "pydicom", pydicom.__version__, "highdicom", highdicom.__version__)
print("second frame, slope 2, expected ", stored[0, ::21] * 2)
print("SimpleITK                       ", itk[1, 0, ::21])
print("pydicom apply_modality_lut      ", plain[1, 0, ::21])
print("highdicom get_frame             ", right.get_frame(2)[0, ::21])
print("SimpleITK, a shared slope of 3 beside those of the frames:", both[0, 0, ::21])
assert (itk[0] == stored).all() and (itk[1] == stored).all(), "SimpleITK reads each frame's slope now"
assert (plain[1] == stored).all(), "pydicom reads functional groups now"
assert (right.get_frame(2) == stored * 2.0).all()
assert (both == stored * 3).all(), "SimpleITK prefers the frame's rescale now"
PYTHON
