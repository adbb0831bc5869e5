"""SLAKE's labelled boxes: which labels a question is about, what of the mask is left, and what a broken file
does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.visual.tools.dataset_mask import DatasetMask
from mmedpo_ray.io import images, storage
from mmedpo_ray.radiology.labelled_boxes import asked_region, named_labels, parse

CHEST = ["Left Lung", "Right Lung", "Heart", "Cardiomegaly", "Effusion"]
ABDOMEN = ["Liver", "Spleen", "Left Kidney", "Right Kidney", "Liver Cancer", "Small Bowel"]
BRAIN = ["Brain", "Brain Edema", "Brain Non-enhancing Tumor"]
HEAD = ["Left Mandible", "Right Mandible", "Brain Stem", "Left Eye"]


@pytest.mark.parametrize(
    ("labels", "question", "answer", "expected"),
    [
        (CHEST, "Is the left lung healthy?", "Yes", ["Left Lung"]),
        (CHEST, "Where is the abnormality?", "Left lung", ["Cardiomegaly", "Effusion"]),
        (CHEST, "Does the picture contain the left lung?", "Yes", ["Left Lung"]),
        (CHEST, "How many lungs are seen?", "2", ["Left Lung", "Right Lung"]),
        (CHEST, "Which organ lies in the middle?", "The heart", ["Heart"]),
        (CHEST, "Is there cardiomegaly?", "Yes", ["Cardiomegaly"]),
        (CHEST, "What is wrong?", "Enlarged heart", ["Cardiomegaly"]),
        (CHEST, "Where is the pleural effusion?", "Right lung", ["Effusion"]),
        (CHEST, "Where is the lesion?", "Right", ["Cardiomegaly", "Effusion"]),
        (CHEST, "Which plane is it?", "Coronal", []),
        (CHEST, "", "", []),
        (["Left Lung", "Heart"], "Is the image normal?", "Yes", []),
        (ABDOMEN, "Which organ is the largest?", "Liver", ["Liver"]),
        (ABDOMEN, "Where is the cancer?", "Liver, right lobe", ["Liver Cancer"]),
        (ABDOMEN, "Is there a tumor in the liver?", "Yes", ["Liver Cancer"]),
        (ABDOMEN, "Is there a tumor in the spleen?", "No", ["Spleen"]),
        (ABDOMEN, "Where is the right kidney?", "On the left of the image", ["Right Kidney"]),
        (ABDOMEN, "Is the small intestine seen?", "Yes", ["Small Bowel"]),
        (BRAIN, "What diseases are there?", "Brain edema, brain non-enhancing tumor", BRAIN[1:]),
        (BRAIN, "Where is the tumor?", "Left", ["Brain Non-enhancing Tumor"]),
        (BRAIN, "Which organ is it?", "Brain", ["Brain"]),
        (HEAD, "Where is the left mandible?", "Bottom", ["Left Mandible"]),
        (HEAD, "How many mandibles?", "2", ["Left Mandible", "Right Mandible"]),
    ],
)
def test_labels_that_a_question_is_about(
    labels: list[str], question: str, answer: str, expected: list[str]
) -> None:
    assert named_labels(labels, question, answer) == expected


def slake_image(folder: Path, boxes: Any) -> str:
    """A mask of two lungs and a heart, and its boxes."""
    mask = np.zeros((60, 100), np.uint8)
    mask[10:50, 5:40], mask[10:50, 60:95], mask[30:55, 45:55] = 30, 60, 90
    Image.fromarray(mask).save(folder / "mask.png")
    if boxes is not None:
        (folder / "detection.json").write_text(boxes if isinstance(boxes, str) else json.dumps(boxes))
    return str(folder / "mask.png")


LUNGS = [{"Right Lung": [5, 10, 35, 40]}, {"Left Lung": [59.5, 10, 35.2, 40.0]}, {"Heart": [45, 30, 10, 25]}]


@pytest.mark.parametrize(
    ("boxes", "question", "part", "choice"),
    [
        (LUNGS, "Is the left lung seen?", (slice(10, 50), slice(60, 95)), {"region": ["Left Lung"]}),
        (LUNGS, "Is the heart seen?", (slice(30, 55), slice(45, 55)), {"region": ["Heart"]}),
        (
            [LUNGS[0] | LUNGS[1]],
            "Is the left lung seen?",
            (slice(10, 50), slice(60, 95)),
            {"region": ["Left Lung"]},
        ),
        (LUNGS, "Which plane?", None, {"region": "whole", "region_reason": "nothing_named"}),
        (None, "Is the heart seen?", None, {"region": "whole", "region_reason": "no_boxes"}),
        ("[{", "Is the heart seen?", None, {"region": "whole", "region_reason": "boxes_unreadable"}),
        ([{"Heart": [45, 30, 10]}], "Heart?", None, {"region": "whole", "region_reason": "boxes_unreadable"}),
        (
            [{"Heart": [900, 30, 10, 5]}],
            "Heart?",
            None,
            {"region": "whole", "region_reason": "boxes_beside_mask"},
        ),
        ([], "Is the heart seen?", None, {"region": "whole", "region_reason": "nothing_named"}),
    ],
)
def test_boxes_cut_the_mask(
    tmp_path: Path, boxes: Any, question: str, part: tuple[slice, slice] | None, choice: dict[str, Any]
) -> None:
    uri = slake_image(tmp_path, boxes)
    marked = np.asarray(Image.open(uri)) > 0
    row = {"sample_id": "s", "question": question, "answer": "Yes", "mask_uri": uri}
    [found] = DatasetMask(Config()).localise([Image.new("L", (100, 60))], [row])
    expected = marked.copy()
    if part is not None:
        expected[:] = False
        expected[part] = marked[part]
    assert found.heat_map is not None
    assert np.array_equal(found.heat_map, expected.astype(np.float32))
    assert (found.confidence, found.choice) == (1.0, choice)


def test_boxes_that_a_store_withholds_are_no_reason_for_another_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = slake_image(tmp_path, LUNGS)
    monkeypatch.setattr(images, "WAITS", ())

    def withhold(uri: str, *_: Any) -> bytes:
        raise OSError(5, "try later", uri)

    monkeypatch.setattr(storage, "read_bytes", withhold)
    with pytest.raises(OSError, match="try later"):
        asked_region(np.ones((4, 4), bool), uri, "Is the heart seen?", "Yes")


def test_masks_of_other_data_sets_are_whole(tmp_path: Path) -> None:
    uri = slake_image(tmp_path, LUNGS)
    mask = np.ones((4, 4), bool)
    region, choice = asked_region(mask, uri.replace("mask.png", "lesion.png"), "Is the heart seen?", "Yes")
    assert region is mask
    assert choice == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b"[1]",
        b'[{"a": null}]',
        b'[{"a": [1, 2, 3, true]}]',
        b'[{"a": [1, 2, 3, "4"]}]',
        b'[{"a": [1, 2, 0, 4]}]',
        b'[{"a": [1, 2, 3, -4]}]',
        b'[{"a": [NaN, 2, 3, 4]}]',
        b'[{"a": [1e308, 2, 1e308, 4]}]',
        b'[{"a": [1' + b"0" * 400 + b", 2, 3, 4]}]",
        b'[{"a": [1' + b"0" * 9000 + b", 2, 3, 4]}]",
        b"[" * 100_000,
        b"\xff\xfe[",
        b'[{"a": [[1, 2, 3, 4]]}]',
    ],
)
def test_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse(data)


_NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
_VALUES = st.recursive(
    st.one_of(st.lists(_NUMBERS, max_size=5), _NUMBERS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
_ROWS = st.lists(
    st.dictionaries(
        st.one_of(st.sampled_from(["Heart", "Left Lung", ""]), st.text(max_size=9)),
        st.one_of(st.lists(_NUMBERS, min_size=4, max_size=4), _VALUES),
        max_size=3,
    ),
    max_size=4,
)


@given(st.one_of(_ROWS, _VALUES), st.text(max_size=30))
def test_any_json_gives_a_part_of_the_mask(
    tmp_path_factory: pytest.TempPathFactory, boxes: Any, question: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    uri = slake_image(folder, json.dumps(boxes))
    marked = np.asarray(Image.open(uri)) > 0
    region, choice = asked_region(marked, uri, f"Is the heart seen? {question}", "Yes")
    assert region.any()
    assert not (region & ~marked).any()
    if choice["region"] == "whole":
        assert np.array_equal(region, marked)
        assert choice["region_reason"] in ("boxes_unreadable", "nothing_named", "boxes_beside_mask")
    else:
        assert set(choice["region"]) <= {label for row in boxes for label in row}
