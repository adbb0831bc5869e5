"""The audit of visual pairs: what the table records of their noise, and what their images show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_tables import found, pair, run, samples, visual, write, write_images
from PIL import Image


def test_noise_is_looked_at(tmp_path: Path) -> None:
    lesion = (slice(0, 10), slice(0, 10))
    mask = np.zeros((40, 40), np.uint8)
    mask[lesion] = 255
    mask_uri = str(tmp_path / "mask.png")
    Image.fromarray(mask).save(mask_uri)
    regions = {"good": lesion, "beside": (slice(20, 40), slice(20, 40)), "same": None}
    rows, known = [], []
    for number, (name, region) in enumerate(regions.items()):
        original, noised = write_images(tmp_path / "images", name, region)
        rows.append(visual(number, pair_id=name, image_uri=original, rejected_image_uri=noised))
        known.append({"sample_id": f"s{number}", "answer": f"Small nodule {number}", "mask_uri": mask_uri})
    rows.append(visual(3, pair_id="gone", image_uri=str(tmp_path / "no.png")))
    rows.append(visual(4, pair_id="named twice", rejected_image_uri="/images/v4.png"))
    rows.append(visual(5, pair_id="all over", image_uri=original, rejected_image_uri=noised))
    rows[-1]["noise"] = '{"mask_share": 0.2, "changed_share": 0.93}'
    result = found(run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known)))
    expected = {
        "noise_beside_lesion": ["beside", "same"],
        "unchanged_image": ["same", "all over"],
        "unreadable_image": ["gone"],
        "same_image": ["named twice"],
        "noise_area": ["all over"],
    }
    assert {name: result[name]["examples"] for name in expected} == expected
    assert result["noise_beside_lesion"]["details"]["regions"] == {"mask": 3, "heat map": 0}


@pytest.mark.parametrize(
    ("tool", "mode", "area", "named", "useless"),
    [
        ("medklip", "diffusion", 0.9, "a smaller curate.visual.noise.area_share", "--preview"),
        ("dataset_mask", "diffusion", 0.15, "mmedpo curate --preview", "a smaller"),
        ("dataset_mask", "diffusion", 1.0, "mmedpo curate --preview", "a smaller"),
        ("text_prompted", "blur", 0.15, "curate.visual.tool", "a smaller"),
        ("dataset_mask", "released", None, "curate.visual.noise.mode=diffusion", "a smaller"),
    ],
)
def test_noise_over_most_of_the_image_has_a_remedy_for_what_made_it(
    tmp_path: Path, tool: str, mode: str, area: float | None, named: str, useless: str
) -> None:
    noise = {"mode": mode, "mask_share": 0.8} | ({"area_share": area} if area else {})
    rows = [visual(i) for i in range(10)] + [visual(10, tool=tool, noise=json.dumps(noise))]
    item = found(run(tmp_path, write(tmp_path / "t", rows)))["noise_area"]
    assert item["examples"] == ["v10"]
    assert named in item["remedy"]
    assert useless not in item["remedy"]
    # Of several causes each has its remedy.
    both = [*rows, visual(11, tool="medklip", noise='{"area_share": 0.7, "mask_share": 0.7}')]
    remedy = found(run(tmp_path, write(tmp_path / "both", both)))["noise_area"]["remedy"]
    assert named in remedy
    assert "a smaller curate.visual.noise.area_share" in remedy


def test_what_the_pairs_record_counts_for_all_of_them(tmp_path: Path) -> None:
    """Far more pairs than are looked at, and no image there."""
    rows = [
        visual(i, noise=json.dumps({"mask_share": 0.1, "lesion_covered": 0.04 if i % 4 == 0 else 0.6}))
        for i in range(400)
    ]
    result = found(run(tmp_path, write(tmp_path / "t", rows)))
    item = result["noise_beside_lesion"]
    assert (item["count"], item["of"], item["severity"], item["figure"]) == (100, 400, "high", 0.25)
    assert item["details"] == {
        "recorded": 400,
        "median_recorded": 0.6,
        "median_cover": None,
        "regions": {"mask": 0, "heat map": 0},
    }
    assert result["unreadable_image"]["count"] == 64
    # Without addresses of images it is still known.
    for row in rows:
        del row["image_uri"], row["rejected_image_uri"]
    (tmp_path / "u").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "u" / "part-0.parquet")
    result = run(tmp_path, str(tmp_path / "u"))
    assert found(result)["noise_beside_lesion"]["count"] == 100
    assert {item["check"] for item in result["not_checked"]} >= {"unreadable_image", "unchanged_image"}
    assert "noise_beside_lesion" not in {item["check"] for item in result["not_checked"]}


@pytest.mark.parametrize(
    ("tool", "named"),
    [("medklip", "curate.visual.noise.area_share"), ("dataset_mask", "curate.visual.noise.steps")],
)
def test_noise_beside_the_lesion_has_a_remedy_for_what_made_it(tmp_path: Path, tool: str, named: str) -> None:
    noise = json.dumps({"area_share": 0.15, "mask_share": 0.1, "lesion_covered": 0.01})
    rows = [visual(i, tool=tool, noise=noise) for i in range(10)]
    remedy = found(run(tmp_path, write(tmp_path / "t", rows)))["noise_beside_lesion"]["remedy"]
    assert named in remedy
    assert ("area_share" in remedy) == (tool == "medklip")


@pytest.mark.parametrize(("others", "severity"), [(1, "medium"), (9, "low"), (39, "info"), (0, "medium")])
def test_visual_pairs_that_ask_for_no_finding(tmp_path: Path, others: int, severity: str) -> None:
    plane = {"question": "What is the plane?", "chosen": "Axial", "rejected": "Axial"}
    rows = [visual(0, **plane), *(visual(number) for number in range(1, others + 1))]
    # A text pair about the plane is what it should be.
    rows.append(pair(99, question="What is the plane?", chosen="Axial", rejected="Coronal"))
    item = found(run(tmp_path, write(tmp_path / "t", rows)))["finding_not_asked"]
    assert (item["severity"], item["count"], item["of"], item["examples"]) == (
        severity,
        1,
        others + 1,
        ["v0"],
    )
    assert "curate.visual.questions=finding" in item["remedy"]


def test_images_contradict_what_the_pairs_record(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:10, :10] = 255
    Image.fromarray(mask).save(tmp_path / "lesion.png")
    original, noised = write_images(tmp_path / "images", "a", (slice(20, 40), slice(20, 40)))
    row = visual(0, image_uri=original, rejected_image_uri=noised, noise='{"lesion_covered": 1.0}')
    others = [visual(i, noise='{"lesion_covered": 1.0}') for i in range(1, 30)]
    known = [{"sample_id": "s0", "answer": "Small nodule 0", "mask_uri": str(tmp_path / "lesion.png")}]
    item = found(run(tmp_path, write(tmp_path / "t", [row, *others]), samples(tmp_path / "known", known)))
    assert (item["noise_beside_lesion"]["count"], item["noise_beside_lesion"]["of"]) == (1, 30)
    assert item["noise_beside_lesion"]["severity"] == "high", "all that could be looked at"


def test_addresses_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    original, noised = write_images(tmp_path / "images", "a", (slice(0, 10), slice(0, 10)))
    good = {"image_uri": original, "rejected_image_uri": noised}
    rows = [
        visual(0, image_uri="https://example.org/a.png"),
        visual(1, **good, heat_map_uri="https://example.org/heat.png"),
        visual(2, rejected_image_uri="nowhere://b.png", image_uri=original),
    ]
    known = [{"sample_id": "s1", "answer": "Small nodule 1", "mask_uri": "https://example.org/mask.png"}]
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    item = found(result)["unreadable_image"]
    assert (item["count"], item["of"], item["details"]["reasons"]) == (2, 3, {"image_missing": 2})


def test_of_a_slake_mask_the_part_counts_that_was_asked_about(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :30], mask[30:, 35:] = 60, 120
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "detection.json").write_text('[{"Liver": [0, 0, 30, 40]}, {"Spleen": [35, 30, 5, 10]}]')
    original, noised = write_images(tmp_path / "images", "a", (slice(30, 40), slice(35, 40)))
    spleen = {"chosen": "Spleen", "rejected": "Spleen"}
    rows = [visual(0, image_uri=original, rejected_image_uri=noised, **spleen)]
    known = [{"sample_id": "s0", "answer": "Spleen", "mask_uri": str(tmp_path / "mask.png")}]
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    assert "noise_beside_lesion" not in found(result)
    assert "noise_beside_lesion" in {item["check"] for item in result["passed"]}


def test_the_fringe_of_a_lossy_mask_is_no_lesion(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[11:29, 11:29] = 255
    Image.fromarray(mask).save(tmp_path / "mask.jpg", quality=75)
    fringe = (np.asarray(Image.open(tmp_path / "mask.jpg")) > 0) & (mask == 0)
    row = int(np.flatnonzero(fringe.any(axis=1))[0])
    column = int(np.flatnonzero(fringe[row])[0])
    pixel = (slice(row, row + 1), slice(column, column + 1))
    original, noised = write_images(tmp_path / "images", "a", pixel)
    rows = [visual(0, image_uri=original, rejected_image_uri=noised)]
    known = [{"sample_id": "s0", "answer": "Nodule", "mask_uri": str(tmp_path / "mask.jpg")}]
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    assert found(result)["noise_beside_lesion"]["count"] == 1


def test_the_heat_map_stands_for_a_missing_mask(tmp_path: Path) -> None:
    original, noised = write_images(tmp_path / "images", "a", (slice(20, 40), slice(20, 40)))
    heat = np.zeros((40, 40), np.uint8)
    heat[:10, :10] = 200
    heat[20:, 20:] = 90  # warm, but less than half of the highest value
    Image.fromarray(heat).save(tmp_path / "heat.png")
    row = visual(0, image_uri=original, rejected_image_uri=noised, heat_map_uri=str(tmp_path / "heat.png"))
    item = found(run(tmp_path, write(tmp_path / "t", [row])))["noise_beside_lesion"]
    assert item["details"]["regions"] == {"mask": 0, "heat map": 1}
