"""The real DICOM files bundled with pydicom and pydicom-data: all are shown or refused for a known reason,
and shown right."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import SAMPLES
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

from mmedpo_ray.io import images
from mmedpo_ray.io.image_error import MADE_BY, ImageError

# What no decoder reads: a codestream cut short by a delimiter inside it, fewer pixels than declared, no size
# of the image.
DAMAGED = {
    "JPEG2000-embedded-sequence-delimiter.dcm",
    "MR_truncated.dcm",
    "meta_missing_tsyntax.dcm",
    "nested_priv_SQ.dcm",
}
# Its number of frames is none, which pydicom refuses.
NOT_BY_PYDICOM = "badVR.dcm"


def folder_of_pydicom_data() -> Path:
    return Path(pytest.importorskip("data_store").__file__).parent / "data"


def real_files() -> list[Path]:
    folders = (SAMPLES.parent, folder_of_pydicom_data())
    found = (path for folder in folders for path in sorted(folder.rglob("*")))
    return [path for path in found if path.is_file() and images.is_dicom(path.read_bytes())]


def test_every_file_is_shown_or_refused_for_a_known_reason() -> None:
    shown, refused = 0, set()
    for path in real_files():
        try:
            image = images.decode(path.read_bytes(), "x", frame=1)
        except ImageError as error:
            assert error.reason == "image_undecodable"
            if "no pixel data" not in error.detail:
                refused.add(path.name)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert "PixelData" not in pydicom.dcmread(path, force=True), path.name
            continue
        assert image.mode in ("L", "I;16", "RGB")
        assert image.info[MADE_BY]
        shown += 1
    assert refused == DAMAGED
    assert shown == 170


def by_pydicom(dataset: pydicom.Dataset) -> np.ndarray:
    """A grey picture of one frame by pydicom's own steps, 0 to 255."""
    stored = dataset.pixel_array
    values = apply_modality_lut(stored, dataset).astype(np.float64)
    if dataset.get("VOILUTSequence"):
        grey = apply_voi(stored if values.min() == stored.min() else values.astype(int), dataset).astype(
            np.float64
        )
        grey *= 255 / max(int(entry) for entry in dataset.VOILUTSequence[0].LUTData)
    else:
        low, high = 0.0, 255.0
        grey = apply_windowing(values, dataset) if "WindowWidth" in dataset else values
        if "WindowWidth" in dataset:
            slope, intercept = (
                float(dataset.get("RescaleSlope", 1)),
                float(dataset.get("RescaleIntercept", 0)),
            )
            first = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
            low, high = (slope * (first + each) + intercept for each in (0, 2**dataset.BitsStored - 1))
        elif dataset.BitsStored > 8:
            low, high = values.min(), values.max()
        grey = (grey - low) * 255 / max(high - low, 1e-9)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


@pytest.mark.filterwarnings("ignore")
def test_grey_files_equal_pydicom_step_by_step() -> None:
    count = 0
    for path in real_files():
        dataset = pydicom.dcmread(path, force=True)
        if (
            "PixelData" not in dataset
            or path.name in DAMAGED | {NOT_BY_PYDICOM}
            or not str(dataset.get("PhotometricInterpretation")).startswith("MONOCHROME")
            or "PixelPaddingValue" in dataset
            or "SharedFunctionalGroupsSequence" in dataset
            or images.count_frames(path.read_bytes(), "x") > 1
        ):
            continue
        expected = by_pydicom(dataset)
        found = np.asarray(images.to_rgb(images.decode(path.read_bytes(), "x")))[..., 0].astype(int)
        if np.ptp(expected.round().clip(0, 255)) == 0:
            # A window that shows nothing is left out by us.
            continue
        assert found.shape == expected.shape, path.name
        assert np.abs(found - expected.clip(0, 255)).max() <= 1.01, path.name
        count += 1
    assert count >= 70


@pytest.mark.parametrize("pair", [("RG1_UNCR", "RG1_J2KR"), ("RG1_UNCI", "RG1_J2KI")])
def test_a_chest_film_is_the_same_in_every_encoding(pair):
    folder = folder_of_pydicom_data()
    plain, packed = (np.asarray(images.decode((folder / f"{name}.dcm").read_bytes(), "x")) for name in pair)
    assert plain.shape == (1955, 1841)
    assert (plain == packed).all()
