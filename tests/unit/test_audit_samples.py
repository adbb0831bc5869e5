"""The audit against a samples table: reference answers, and images that are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from audit_tables import found, pair, released, run, samples, visual, write

from mmedpo_ray.audit.stage import audit_command
from mmedpo_ray.config.load import load
from mmedpo_ray.errors import UserError


def test_samples_tell_truth_and_leakage(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(40)]
    rows[0] |= {"chosen": "Yes"}
    rows[1] |= {"chosen": "Some other thing"}
    known = [{"sample_id": row["sample_id"], "answer": row["chosen"].upper() + "."} for row in rows]
    known[0]["answer"], known[1]["answer"] = "No.", "The reference"
    known[2] |= {"split": "test"}
    known[3] |= {"image_sha256": "shared"}
    known.append({"sample_id": "held out", "answer": "x", "split": "test", "image_sha256": "shared"})
    table, truth = write(tmp_path / "t", rows), samples(tmp_path / "known", known[:5] + known[6:])
    result = found(run(tmp_path, table, truth))
    expected = {
        "chosen_against_truth": (2, ["p0", "p1"]),
        "pairs_of_test_samples": (1, ["p2"]),
        "images_shared_with_test": (1, ["p3"]),
        "unknown_sample": (1, ["p5"]),
    }
    assert {name: (result[name]["count"], result[name]["examples"]) for name in expected} == expected
    assert result["chosen_against_truth"]["details"] == {"opposite_polarity": 1}
    assert result["images_shared_with_test"]["severity"] == "high"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"image_id": "held"}, "images_shared_with_test"),
        (
            {"image_uri": "/images/held.png", "rejected_image_uri": "/images/held.png"},
            "images_shared_with_test",
        ),
        ({"rejected_image_uri": "/images/held.png"}, "images_shared_with_test"),
        # A copy of the test image elsewhere, under a name of its own.
        ({"image_uri": "/images/copy.png"}, "images_shared_with_test"),
        ({"image_uri": "/images/kept.png"}, "images_shared_with_validation"),
        ({"image_id": "elsewhere"}, None),
        ({"image_id": "", "image_uri": "", "rejected_image_uri": ""}, None),
    ],
)
@pytest.mark.parametrize("name", ["set/train/1", "s9"])
def test_an_image_that_is_held_out_now_is_found_whatever_sample_its_pair_names(
    tmp_path: Path, shown: dict[str, str], expected: str | None, name: str
) -> None:
    """The split is part of a sample's id: a pair made before another split of the data finds no sample."""
    rows = [pair(i) for i in range(9)] + [visual(9, sample_id=name, **shown)]
    known: list[dict[str, Any]] = [{"sample_id": f"s{i}", "answer": rows[i]["chosen"]} for i in range(10)]
    known += [
        {"sample_id": "set/test/1", "image_id": "held", "image_uri": "/images/held.png", "split": "test"},
        {"sample_id": "set/train/2", "image_uri": "/images/copy.png", "image_sha256": "same"},
        {"sample_id": "set/validate/3", "image_uri": "/images/kept.png", "split": "validate"},
        {"sample_id": "set/test/4", "image_id": "", "image_uri": "", "image_sha256": "", "split": "test"},
    ]
    known = [{"answer": "x"} | row for row in known]
    known[10]["image_sha256"] = "same"
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    faults = {check: item for check, item in found(result).items() if check.startswith("images_shared")}
    assert {check: item["examples"] for check, item in faults.items()} == (
        {expected: ["v9"]} if expected else {}
    )
    assert ("unknown_sample" in found(result)) == (name != "s9")


def test_pairs_of_another_samples_table_are_a_finding(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    known = [{"sample_id": f"other{i}", "answer": "x", "split": ("train", "test")[i % 2]} for i in range(30)]
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    item = found(result)["unknown_sample"]
    assert (item["count"], item["severity"], item["examples"][0]) == (30, "high", "p0")
    assert "mmedpo curate" in item["remedy"]
    assert {"chosen_against_truth", "pairs_of_test_samples"} <= {
        row["check"] for row in result["not_checked"]
    }
    assert "images_shared_with_test" in {row["check"] for row in result["passed"]}


def test_a_samples_table_without_a_test_part_lets_no_check_of_it_pass(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    known = samples(
        tmp_path / "known", [{"sample_id": f"s{i}", "answer": rows[i]["chosen"]} for i in range(30)]
    )
    for drop in ([], ["split"]):
        path = Path(known, "part-0.parquet")
        pq.write_table(pq.read_table(path).drop_columns(drop), path)
        result = run(tmp_path, write(tmp_path / "t", rows), known)
        unchecked = {row["check"]: row["reason"] for row in result["not_checked"]}
        assert "split test" in unchecked["images_shared_with_test"]
        assert "split test" in unchecked["pairs_of_test_samples"]


def test_pairs_without_ids_find_their_sample_by_image_and_question(tmp_path: Path) -> None:
    rows = [
        # Images of one name in folders of their own, as SLAKE has them.
        released(0, "xmlab1/source.jpg", "Where is it?", "Left lung", "Right lung"),
        released(1, "xmlab2/source.jpg", "Where is it?", "Left lung", "Right lung"),
        released(2, "xmlab3/source.jpg", "Where is it?", "Left lung", "Right lung"),
        # Images of names of their own.
        released(3, "synpic1.jpg", "Is it there?", "Yes", "No"),
        released(4, "synpic1.jpg", "What is it?", "A mass", "A cyst"),
        # Asked twice with different answers: which of them is meant?
        released(5, "synpic2.jpg", "What is it?", "A mass", "A cyst"),
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))

    def known(name: str, image: str, question: str, answer: str, **more: str) -> dict[str, str]:
        return {"sample_id": name, "image_uri": image, "question": question, "answer": answer} | more

    table = samples(
        tmp_path / "known",
        [
            known("a", "/data/imgs/xmlab1/source.jpg", "where is it", "Left Lung."),
            known("b", "/data/imgs/xmlab2/source.jpg", "Where is it?", "Right lung", split="test"),
            known("c", "/data/images/synpic1.jpg", "Is it there?", "No"),
            known("d", "s3://bucket/images/synpic1.jpg", "What is it?", "a mass"),
            known("e", "/data/images/synpic2.jpg", "What is it?", "A mass"),
            known("f", "/data/images/synpic2.jpg", "What is it?", "A cyst"),
        ],
    )
    result = found(run(tmp_path, str(tmp_path / "pairs.json"), table))
    assert result["chosen_against_truth"]["examples"] == ["3", "1"]
    assert (result["chosen_against_truth"]["count"], result["chosen_against_truth"]["of"]) == (2, 4)
    assert result["chosen_against_truth"]["details"] == {"opposite_polarity": 1}
    assert result["unknown_sample"]["examples"] == ["2", "5"]
    assert result["pairs_of_test_samples"]["examples"] == ["1"]


def test_an_image_of_the_released_layout_is_held_out_whatever_is_asked_about_it(tmp_path: Path) -> None:
    images = (
        "xmlab1/source.jpg",
        "xmlab2/source.jpg",
        "source.jpg",
        "synpic1.jpg",
        "/data/imgs/xmlab1/source.jpg",
    )
    rows = [
        released(i, image, "Another question?", f"Left {i}", f"Right {i}") for i, image in enumerate(images)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    known = [
        {"sample_id": "a", "image_uri": "/data/imgs/xmlab1/source.jpg", "split": "test"},
        # A name that an image for training has too tells nothing.
        {"sample_id": "b", "image_uri": "/data/imgs/xmlab2/source.jpg"},
        {"sample_id": "c", "image_uri": "s3://bucket/images/synpic1.jpg", "split": "test"},
    ]
    table = samples(tmp_path / "known", [{"answer": "x"} | row for row in known])
    result = found(run(tmp_path, str(tmp_path / "pairs.json"), table))
    assert result["images_shared_with_test"]["examples"] == ["0", "3", "4"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "there is no nowhere. Give with --samples"),
        ("run", "Give run/samples"),
        ("run/pairs", "table of pairs, not of samples"),
        ("pairs.json", "no Parquet file. Give with --samples"),
    ],
)
def test_a_path_to_no_samples_is_told_with_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    samples(tmp_path / "run" / "samples", [{"sample_id": "s0", "answer": "x"}])
    table = write(tmp_path / "run" / "pairs", [pair(0)])
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        audit_command(load(None), table, path, None, None)
