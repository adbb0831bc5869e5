#!/usr/bin/env bash
# nibabel: a label map that is read, edited and saved with its own header has no voxel equal to its labels any more.
#
# Guess:   `data = image.get_fdata()`, change some voxels, save `Nifti1Image(data, image.affine, image.header)`: the header says uint8, the
#          values are 0, 1, 2, so 0, 1, 2 are stored and come back.
# Seen:    get_fdata() gives floats; saving floats under an integer header stretches them over the whole range of the integer and writes a
#          slope: a mask of 0 and 1 comes back as 0 and 1.00000006, labels 0-4 as 0, 1.0039, 1.9922, 2.9961, 4. `data == label` selects
#          nothing; `astype(uint8)` turns 2 into 1 and 3 into 2. The same values as integers are stored as they are. No warning.
# Matters: lesion masks (NIfTI is what segmentation sets ship) are edited so: the lesion to be noised or to be asked about is then empty, or
#          another organ's. Rounding before the comparison is the cure.
# Versions: nibabel 5.4.2, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nibabel==5.4.2 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import nibabel as nib
import numpy as np

print("nibabel", nib.__version__, "numpy", np.__version__)


def edited(labels, as_integers):
    """Voxels of each label before and after: equal, and equal after astype(uint8)."""
    mask = np.zeros((8, 6, 4), np.uint8)
    for label in range(1, labels + 1):
        mask[label] = label
    nib.save(nib.Nifti1Image(mask, np.eye(4)), "mask.nii.gz")
    image = nib.load("mask.nii.gz")
    data = image.get_fdata()
    data[7, 0, 0] = 1  # one voxel added to label 1
    saved = np.asarray(data, np.uint8) if as_integers else data
    nib.save(nib.Nifti1Image(saved, image.affine, image.header), "edited.nii.gz")
    back = nib.load("edited.nii.gz").get_fdata()
    print(f"\nlabels 0-{labels}, saved as {saved.dtype}: seen {np.unique(back)}")
    counts = [
        (int((data == k).sum()), int((back == k).sum()), int((back.astype(np.uint8) == k).sum()))
        for k in range(1, labels + 1)
    ]
    for label, (before, equal, cast) in enumerate(counts, 1):
        print(f"label {label}: expected {before} voxels; seen {equal} that are equal, {cast} after astype(uint8)")
    return counts


assert edited(4, as_integers=True) == [(25, 25, 25), (24, 24, 24), (24, 24, 24), (24, 24, 24)]
assert edited(1, as_integers=False) == [(25, 0, 25)]
assert edited(4, as_integers=False) == [(25, 0, 49), (24, 0, 24), (24, 0, 0), (24, 0, 24)]
PYTHON
