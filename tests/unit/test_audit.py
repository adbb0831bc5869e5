"""Audit: every planted fault is found with its count, the figures equal brute force, --fix mends what it says."""

from __future__ import annotations

import argparse
import ast
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from mmedpo_ray import cli
from mmedpo_ray.audit.extract import extract
from mmedpo_ray.audit.features import features_of
from mmedpo_ray.audit.fix import removals, write_fixed
from mmedpo_ray.audit.hashing import normalised
from mmedpo_ray.audit.run_checks import NAMES, examine
from mmedpo_ray.audit.stage import audit, audit_command
from mmedpo_ray.audit.statistics import explained, separation
from mmedpo_ray.commands import parser
from mmedpo_ray.commands.options import settings_of
from mmedpo_ray.config.load import dump, known_keys, load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.meta_text import COMMENTARY, LEAKED_PROMPT
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import read_manifest

_QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """A text pair without any fault; both sides alike in form, chosen and rejected the longer one by turns."""
    fillers = (("Small nodule", "Large nodule on the left"), ("Small nodule on the left", "Large nodule"))
    chosen, rejected = fillers[number % 2]
    return {
        "pair_id": f"p{number}",
        "sample_id": f"s{number}",
        "image_id": f"i{number}",
        "dataset": "made",
        "task": "vqa",
        "answer_type": "open",
        "kind": "text",
        "image_uri": f"/images/{number}.png",
        "rejected_image_uri": f"/images/{number}.png",
        "question": "What is seen?" if number % 3 else "Where is it?",
        "chosen": f"{chosen} {number}",
        "rejected": f"{rejected} {number}",
        "generator": "rewrite",
        "score": 0.5,
        # Unrelated to the question (period 3) and to the answers (period 2).
        "weight": 0.8 + 0.1 * ((number * 7) % 5),
        "consensus": True,
        "rounds": 1,
        "history": [],
    } | changes


def visual(number: int, **changes: Any) -> dict[str, Any]:
    answer = f"Small nodule {number}"
    noise = json.dumps({"mode": "diffusion", "mask_share": 0.1})
    defaults = {
        "pair_id": f"v{number}",
        "kind": "visual",
        "image_uri": f"/images/v{number}.png",
        "rejected_image_uri": f"/noised/v{number}.png",
        "question": "What is seen in the noise?",
        "chosen": answer,
        "rejected": answer,
        "noise": noise,
    }
    return pair(number, **(defaults | changes))


def write(folder: Path, rows: list[dict[str, Any]], files: int = 1) -> str:
    """A scored table, over several files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = schemas.to_table([rows[i] for i in part], schemas.SCORED)
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=7)
    return str(folder)


def samples(folder: Path, rows: list[dict[str, Any]]) -> str:
    defaults = {
        "dataset": "made",
        "task": "vqa",
        "answer_type": "open",
        "question": "What is seen?",
        "split": "train",
    }
    complete = [
        {
            "image_id": f"i-{r['sample_id']}",
            "image_uri": f"/images/{r['sample_id']}.png",
            "image_sha256": r["sample_id"],
        }
        | defaults
        | r
        for r in rows
    ]
    folder.mkdir(parents=True)
    pq.write_table(schemas.to_table(complete, schemas.SAMPLES), folder / "part-0.parquet")
    return str(folder)


def run(tmp_path: Path, table: str, known: str | None = None, **options: Any) -> dict[str, Any]:
    out = str(tmp_path / "found.json")
    config = load(
        None, [f"run.folder={tmp_path}", *(f"audit.{key}={value}" for key, value in options.items())]
    )
    assert audit_command(config, table, known, out, None) in (0, 1)
    return json.loads(Path(out).read_text())


def found(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["check"]: item for item in result["findings"]}


# ---------------------------------------------------------------------- released data


@pytest.mark.parametrize(
    ("name", "rows", "equal", "leaks"), [("slake", 4919, 5, 144), ("vqa-rad", 1797, 0, 23)]
)
def test_released_data_has_the_known_faults(
    shared_data: Path, tmp_path: Path, name: str, rows: int, equal: int, leaks: int
) -> None:
    result = run(tmp_path, str(shared_data / "released" / f"{name}_dpo_weighted.json"))
    faults = found(result)
    assert result["rows"] == result["text_pairs"] == rows
    assert faults.get("equal_sides", {"count": 0})["count"] == equal
    assert faults["leaked_prompt_chosen"]["count"] == leaks
    assert round(100 * faults["length_shortcut"]["figure"], 1) == 92.8
    assert faults["length_shortcut"]["severity"] == faults["leaked_prompt_chosen"]["severity"] == "high"
    assert result["not_checked"] and all(item["reason"] for item in result["not_checked"])


def test_released_data_fixed_is_free_of_what_was_fixed(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "released" / "slake_dpo_weighted.json"
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, str(tmp_path / "a.json"), str(tmp_path / "fixed"))
    before, after = json.loads(source.read_text()), json.loads((tmp_path / "fixed" / source.name).read_text())
    changes = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    removed = {item["pair_id"] for item in changes if item["action"] == "removed"}
    assert {str(row["id"]) for row in before} - {str(row["id"]) for row in after} == removed
    assert len(before) == len(after) + len(removed)
    assert before[0].keys() == after[0].keys()
    again = run(tmp_path, str(tmp_path / "fixed" / source.name))
    assert not any(item["fixable"] for item in again["findings"])


def test_ingest_filter_and_audit_agree_on_meta_text(shared_data: Path) -> None:
    """One definition in two engines: Python's for a text, RE2 for a column."""
    texts = [
        conversation[1]["value"]
        for name in ("slake", "vqa-rad")
        for row in json.loads((shared_data / "released" / f"{name}_dpo_weighted.json").read_text())
        for conversation in (row["conversations"], row["rejected_conversations"])
    ]
    flagged = pa.compute.match_substring_regex(
        pa.array(texts), f"(?im){LEAKED_PROMPT}|{COMMENTARY}"
    ).to_pylist()
    assert flagged == [lexicon.is_meta_text(text) for text in texts]
    # As many as a reading of all of them finds; an ordinary answer is none.
    assert sum(flagged) == 204


# ---------------------------------------------------------------------- planted faults


def test_a_table_without_faults_has_no_finding(tmp_path: Path) -> None:
    result = run(tmp_path, write(tmp_path / "t", [pair(i) for i in range(60)], files=3))
    assert result["findings"] == []
    assert {item["check"] for item in result["passed"]} >= {
        "length_shortcut",
        "equal_sides",
        "invalid_weight",
    }


def _leak(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": f"Question: {row['question']}\n-Original Answer: No\n{row['chosen']}"}


# Check → what turns a good text pair into one that it must find.
_PLANTS = {
    "equal_sides": lambda row: row | {"rejected": row["chosen"]},
    "near_equal_sides": lambda row: row | {"rejected": "  " + row["chosen"].upper() + "!"},
    "empty_side": lambda row: row | {"rejected": " \n"},
    "untrimmed_text": lambda row: row | {"chosen": " " + row["chosen"], "rejected": " " + row["rejected"]},
    "leaked_prompt_chosen": _leak,
    "leaked_prompt_rejected": lambda row: row | {"rejected": "<image> " + row["rejected"]},
    "task_commentary": lambda row: row | {"rejected": "As an AI I see: " + row["rejected"]},
    "confounded_pair": lambda row: row | {"rejected_image_uri": "/elsewhere.png"},
    "zero_weight": lambda row: row | {"weight": 0.0},
    "invalid_weight": lambda row: row | {"weight": float("nan")},
}


@pytest.mark.parametrize("name", _PLANTS)
@pytest.mark.parametrize("places", [(0,), (3, 20, 41)])
def test_a_planted_fault_is_found_with_its_count_and_ids(
    tmp_path: Path, name: str, places: tuple[int, ...]
) -> None:
    rows = [_PLANTS[name](pair(i)) if i in places else pair(i) for i in range(60)]
    result = found(run(tmp_path, write(tmp_path / "t", rows, files=2)))
    assert result[name]["count"] == len(places)
    assert result[name]["examples"] == [f"p{i}" for i in places]
    # What the plant brings along is no other fault.
    assert set(result) - {name, "untrimmed_text"} == set()


# Shortcut → what makes one side of every pair recognisable without the image.
_MARKS: dict[str, Callable[[str], str]] = {
    "length_shortcut": lambda text: text + " as far as it can be told from here",
    "leading_space_shortcut": lambda text: " " + text,
    "trailing_space_shortcut": lambda text: text + " ",
    "capital_shortcut": lambda text: text[0].lower() + text[1:],
    "final_period_shortcut": lambda text: text + ".",
    "newline_shortcut": lambda text: text.replace(" ", "\n", 1),
    "quotes_shortcut": lambda text: f'"{text}"',
    "says_yes_shortcut": lambda text: "Yes, " + text,
    "says_no_shortcut": lambda text: "No, " + text,
}


@pytest.mark.parametrize("name", _MARKS)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_shortcut_on_either_side_is_a_high_finding(tmp_path: Path, name: str, side: str) -> None:
    rows = [pair(i) for i in range(60)]
    marked = [row | {side: _MARKS[name](row[side])} for row in rows]
    assert name not in found(run(tmp_path, write(tmp_path / "plain", rows)))
    finding = found(run(tmp_path, write(tmp_path / "marked", marked)))[name]
    assert (finding["severity"], finding["figure"]) == ("high", 1.0)
    # In half of the pairs it is a weaker sign, in a few it is none.
    half = [marked[i] if i % 2 else rows[i] for i in range(60)]
    assert found(run(tmp_path, write(tmp_path / "half", half)))[name]["figure"] < 1.0
    few = [marked[i] if i % 20 == 0 else rows[i] for i in range(60)]
    assert name not in found(run(tmp_path, write(tmp_path / "few", few)))


@pytest.mark.parametrize(
    ("repeat", "expected"),
    [
        ({}, {"duplicate_pair": 1}),
        ({"rejected": "Nothing of that kind"}, {"repeated_question": 1}),
        ({"chosen": "Mass"}, {"contradicting_chosen": 2, "repeated_question": 1}),
        ({"question": "another"}, {}),
        ({"image_uri": "/images/x.png", "rejected_image_uri": "/images/x.png"}, {}),
    ],
)
def test_repeats_are_told_apart(tmp_path: Path, repeat: dict[str, str], expected: dict[str, int]) -> None:
    rows = [pair(i) for i in range(30)] + [pair(4, pair_id="again", **repeat)]
    result = found(run(tmp_path, write(tmp_path / "t", rows)))
    assert {name: item["count"] for name, item in result.items()} == expected


def test_yes_against_no_is_a_contradiction_and_yes_against_yes_is_none(tmp_path: Path) -> None:
    same = {"image_uri": "/images/a.png", "rejected_image_uri": "/images/a.png", "question": "Is it there?"}
    agree = [pair(30, chosen="Yes", **same), pair(31, chosen="Yes, it is there", **same)]
    rows = [pair(i) for i in range(30)]
    assert "contradicting_chosen" not in found(run(tmp_path, write(tmp_path / "a", rows + agree)))
    conflict = [*agree, pair(32, chosen="No", **same)]
    item = found(run(tmp_path, write(tmp_path / "b", rows + conflict)))["contradicting_chosen"]
    assert (item["count"], item["details"]) == (3, {"questions": 1, "opposite_polarity": 1})


# The same answer in other characters, and answers that differ in what looks like a trifle.
_SAME = [
    ("肝脏", "肝脏。"),
    ("肝脏、脾脏", "肝脏，脾脏！"),
    ("CT 检查", "《ＣＴ检查》"),
    ("X-ray", "X\u2011ray"),
    ("5-10", "5\u201310"),
    ("5-10 mm", "５ － １０ｍｍ"),
    ("< 5 mm", "＜5\u00a0mm"),
    ("<=5", "\u22645"),
    ("-5", "\u22125"),
    ("1.5 cm", "1．5 cm"),
    ("1.5 cm", "1·5cm"),
    ("5 x 4 x 3 cm", "5×4×3 cm"),
    ('patient\'s "left"', "patient\u2019s \u201cleft\u201d"),
    ("effusion", "\ufeffeffu\u00adsion\u200b"),
    ("effusion - right", "Effusion\u2014right."),
    ("fibrosis", "ﬁbrosis\u2026"),
    ("café", "cafe\u0301"),
    ("Yes", "ＹＥＳ！"),
]
_OTHER = [
    ("1.5 cm", "15 cm"),
    (".5 cm", "5 cm"),
    ("1:5", "1.5"),
    ("< 5 mm", "> 5 mm"),
    ("＜5", "＞5"),
    ("\u22645", "<5"),
    ("-5", "5"),
    ("\u22125", "5"),
    ("5-10", "510"),
    ("5\u201310", "5 10"),
    ("10\u00b2", "102"),
    ("1½", "11/2"),
    ("+", "-"),
    ("HER2+", "HER2"),
    ("A", "B"),
    ("肝脏", "脾脏"),
]


@pytest.mark.parametrize(("places", "is_same"), [(_SAME, True), (_OTHER, False)])
def test_one_answer_in_other_characters_is_one_answer(
    tmp_path: Path, places: list[tuple[str, str]], is_same: bool
) -> None:
    sides = [pair(i, chosen=one, rejected=other) for i, (one, other) in enumerate(places)]
    near = found(run(tmp_path, write(tmp_path / "sides", sides))).get("near_equal_sides", {"count": 0})
    assert near["count"] == (len(places) if is_same else 0)
    asked = [
        pair(
            2 * i + turn,
            question="Which?",
            image_uri=f"/{i}.png",
            rejected_image_uri=f"/{i}.png",
            chosen=said,
        )
        for i, both in enumerate(places)
        for turn, said in enumerate(both)
    ]
    against = found(run(tmp_path, write(tmp_path / "asked", asked))).get("contradicting_chosen", {"count": 0})
    assert against["count"] == (0 if is_same else 2 * len(places))


@given(
    st.lists(st.text(st.sampled_from("aB1 .,:-<>x%。–５肝\u00ad\u3000"), max_size=12), min_size=1, max_size=6)
)
def test_the_form_of_a_text_does_not_depend_on_the_texts_beside_it(texts: list[str]) -> None:
    together = normalised(pa.array(texts, pa.string())).to_pylist()
    assert together == [normalised(pa.array([text]))[0].as_py() for text in texts]
    assert normalised(pa.array(["", *texts]).slice(1)).to_pylist() == together


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
    """The split is part of a sample's id, so that a pair made before the data was split anew finds no sample."""
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


def test_weights_that_follow_the_question_are_found(tmp_path: Path) -> None:
    rows = [pair(i, weight=1.2 if i % 3 else 0.8 + 0.001 * (i % 2)) for i in range(120)]
    item = found(run(tmp_path, write(tmp_path / "t", rows)))["weights_by_question"]
    assert item["figure"] > 0.99
    assert item["severity"] == "medium"
    constant = found(run(tmp_path, write(tmp_path / "c", [pair(i, weight=1.0) for i in range(60)])))
    assert set(constant) == {"constant_weight"}


def test_duplicate_ids_are_a_high_finding(tmp_path: Path) -> None:
    rows = [pair(i, pair_id=f"p{min(i, 28)}") for i in range(30)]
    item = found(run(tmp_path, write(tmp_path / "t", rows)))["duplicate_id"]
    assert (item["count"], item["severity"]) == (1, "high")


# ---------------------------------------------------------------------- visual pairs


def _images(folder: Path, name: str, region: tuple[slice, slice] | None) -> tuple[str, str]:
    """An image and a copy with other pixels in a region."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(60, 190, (40, 40)).astype(np.uint8)
    noised = pixels.copy()
    if region is not None:
        noised[region] = 255 - noised[region] // 2
    paths = []
    for suffix, values in (("", pixels), ("_noised", noised)):
        paths.append(str(folder / f"{name}{suffix}.png"))
        Image.fromarray(values).save(paths[-1])
    return paths[0], paths[1]


def test_noise_is_looked_at(tmp_path: Path) -> None:
    lesion = (slice(0, 10), slice(0, 10))
    mask = np.zeros((40, 40), np.uint8)
    mask[lesion] = 255
    mask_uri = str(tmp_path / "mask.png")
    Image.fromarray(mask).save(mask_uri)
    regions = {"good": lesion, "beside": (slice(20, 40), slice(20, 40)), "same": None}
    rows, known = [], []
    for number, (name, region) in enumerate(regions.items()):
        original, noised = _images(tmp_path / "images", name, region)
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
    ("tool", "noise", "named", "useless"),
    [
        ("medklip", {"mode": "diffusion", "area_share": 0.9, "mask_share": 0.8}, "a smaller curate.visual.noise.area_share", "--preview"),
        ("dataset_mask", {"mode": "diffusion", "area_share": 0.15, "mask_share": 0.8}, "mmedpo curate --preview", "a smaller"),
        ("dataset_mask", {"mode": "diffusion", "area_share": 1.0, "mask_share": 0.8}, "mmedpo curate --preview", "a smaller"),
        ("text_prompted", {"mode": "blur", "area_share": 0.15, "mask_share": 0.8}, "curate.visual.tool", "a smaller"),
        ("dataset_mask", {"mode": "released", "mask_share": 0.8}, "curate.visual.noise.mode=diffusion", "a smaller"),
    ],
)  # fmt: skip
def test_noise_over_most_of_the_image_has_a_remedy_for_what_made_it(
    tmp_path: Path, tool: str, noise: dict[str, Any], named: str, useless: str
) -> None:
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
    original, noised = _images(tmp_path / "images", "a", (slice(20, 40), slice(20, 40)))
    row = visual(0, image_uri=original, rejected_image_uri=noised, noise='{"lesion_covered": 1.0}')
    others = [visual(i, noise='{"lesion_covered": 1.0}') for i in range(1, 30)]
    known = [{"sample_id": "s0", "answer": "Small nodule 0", "mask_uri": str(tmp_path / "lesion.png")}]
    item = found(run(tmp_path, write(tmp_path / "t", [row, *others]), samples(tmp_path / "known", known)))
    assert (item["noise_beside_lesion"]["count"], item["noise_beside_lesion"]["of"]) == (1, 30)
    assert item["noise_beside_lesion"]["severity"] == "high", "all that could be looked at"


def test_addresses_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    original, noised = _images(tmp_path / "images", "a", (slice(0, 10), slice(0, 10)))
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
    original, noised = _images(tmp_path / "images", "a", (slice(30, 40), slice(35, 40)))
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
    original, noised = _images(tmp_path / "images", "a", (slice(row, row + 1), slice(column, column + 1)))
    rows = [visual(0, image_uri=original, rejected_image_uri=noised)]
    known = [{"sample_id": "s0", "answer": "Nodule", "mask_uri": str(tmp_path / "mask.jpg")}]
    result = run(tmp_path, write(tmp_path / "t", rows), samples(tmp_path / "known", known))
    assert found(result)["noise_beside_lesion"]["count"] == 1


def test_the_heat_map_stands_for_a_missing_mask(tmp_path: Path) -> None:
    original, noised = _images(tmp_path / "images", "a", (slice(20, 40), slice(20, 40)))
    heat = np.zeros((40, 40), np.uint8)
    heat[:10, :10] = 200
    heat[20:, 20:] = 90  # warm, but less than half of the highest value
    Image.fromarray(heat).save(tmp_path / "heat.png")
    row = visual(0, image_uri=original, rejected_image_uri=noised, heat_map_uri=str(tmp_path / "heat.png"))
    item = found(run(tmp_path, write(tmp_path / "t", [row])))["noise_beside_lesion"]
    assert item["details"]["regions"] == {"mask": 0, "heat map": 1}


# ---------------------------------------------------------------------- the released layout


def released(number: int, image: str, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]

    row = {"id": number, "image": image, "conversations": turns(chosen)}
    return row | {"rejected_conversations": turns(rejected), "weighted_score": 0.5}


def test_json_lines_are_audited_and_fixed_as_lines(tmp_path: Path) -> None:
    rows = [released(i, f"{i}.jpg", "Where is it?", f"Left {i}", f" Right {i}") for i in range(5)]
    rows[3]["conversations"][1]["value"] = "\ud800 Left"
    rows[4]["rejected_conversations"][1]["value"] = rows[4]["conversations"][1]["value"]
    source = tmp_path / "pairs.JSONL"
    lines = [json.dumps(row) for row in rows]
    source.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, None, str(tmp_path / "fixed"))
    result = json.loads((tmp_path / "pairs.JSONL.audit.json").read_text())
    assert result["rows"] == 5
    assert {item["check"]: item["count"] for item in result["findings"]}["malformed_row"] == 1
    fixed = [json.loads(line) for line in (tmp_path / "fixed" / source.name).read_text().splitlines()]
    assert [row["id"] for row in fixed] == [0, 1, 2, 3]
    assert fixed[0]["rejected_conversations"][1]["value"] == "Right 0"
    again = run(tmp_path, str(tmp_path / "fixed" / source.name))
    assert not any(item["fixable"] for item in again["findings"])


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


# ---------------------------------------------------------------------- figures against brute force

_LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=25)


@given(_LENGTHS)
@_QUICK
def test_separation_equals_brute_force(lengths: list[tuple[int, int]]) -> None:
    chosen, rejected = (np.array(side) for side in zip(*lengths, strict=True))
    measured = separation(chosen, rejected)
    assert measured is not None
    size = len(lengths)
    accuracies = [
        max(right, 2 * size - right) / (2 * size)
        for right in (np.sum(chosen <= t) + np.sum(rejected > t) for t in range(-1, 13))
    ]
    assert measured.accuracy == pytest.approx(max(accuracies))
    wins = sum(float(r > c) + 0.5 * float(r == c) for c in chosen for r in rejected)
    assert measured.auc == pytest.approx(wins / size**2)
    within = sum(float(r > c) + 0.5 * float(r == c) for c, r in lengths) / size
    assert measured.pair_accuracy == pytest.approx(max(within, 1 - within))
    # The rule that is named reaches the accuracy that is named.
    above = np.sum(chosen <= measured.threshold) + np.sum(rejected > measured.threshold)
    right = above if measured.rejected_is == "more" else 2 * size - above
    assert right / (2 * size) == pytest.approx(measured.accuracy)


@given(st.lists(st.tuples(st.floats(0, 2, width=16), st.integers(0, 3)), min_size=3, max_size=30))
@_QUICK
def test_explained_variance_equals_scipy(rows: list[tuple[float, int]]) -> None:
    values, codes = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    measured = explained(values, codes)
    groups = [values[codes == code] for code in np.unique(codes)]
    if measured is None:
        assert len(groups) < 2 or len(values) <= len(groups) or np.ptp(values) < 1e-5
        return
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    total = ((values - values.mean()) ** 2).sum()
    assert measured.eta_squared == pytest.approx(1 - within / total, abs=1e-9)
    if within > 1e-9 * total:
        assert measured.p_value == pytest.approx(stats.f_oneway(*groups).pvalue, rel=1e-6, abs=1e-12)


_TEXT = st.one_of(
    st.sampled_from(
        [
            "Yes",
            "No",
            " Yes",
            "yes.",
            "",
            " ",
            "\u00a0No",
            "Question: Is it?\n Yes",
            "T2",
            "I cannot see the image",
        ]
    ),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
_ROW = st.fixed_dictionaries(
    {
        "image_uri": st.sampled_from(["/a.png", "/b.png", ""]),
        "rejected_image_uri": st.sampled_from(["/a.png", "/b.png"]),
        "kind": st.sampled_from(["text", "visual"]),
        "question": _TEXT,
        "chosen": _TEXT,
        "rejected": _TEXT,
        "weight": st.sampled_from([0.0, 0.75, 1.0, 1.25, -1.0, float("nan"), float("inf")]),
        "noise": st.sampled_from(
            [None, "", "{", '{"mask_share": 0.9}', '{"mask_share": 1e', '{"changed_share": .5}']
        ),
    }
)


@given(st.lists(_ROW, max_size=12), st.integers(1, 3))
@_QUICK
def test_random_tables_are_audited_and_fixed(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], files: int
) -> None:
    """No table crashes; in = out + removed; an audit of the fixed table finds nothing that --fix mends."""
    folder = tmp_path_factory.mktemp("random")
    config = load(None, [f"run.folder={folder}"])
    pairs = open_pairs(write(folder / "t", [pair(i, **row) for i, row in enumerate(rows)], files))
    features = extract(pairs, None)
    words = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
    assert features.words_chosen.tolist() == words[0]
    assert features.words_rejected.tolist() == words[1]
    assert features.chars_chosen.tolist() == [len(row["chosen"]) for row in rows]
    result = examine(config, pairs, features, None)
    named = {item["check"] for part in ("findings", "passed", "not_checked") for item in result[part]}
    assert named == set(NAMES)
    assert json.loads(json.dumps(result)) == result
    assert extract(pairs, None).equal.tolist() == [row["chosen"] == row["rejected"] for row in rows]
    stay = removals(features) < 0
    if not stay.any():
        with pytest.raises(UserError, match="no row"):
            write_fixed(pairs, features, None, str(folder / "fixed"))
        assert not (folder / "fixed").exists()
        return
    fixed = write_fixed(pairs, features, None, str(folder / "fixed"))
    assert fixed.rows_in == len(rows) == fixed.rows_out + sum(fixed.removed.values())
    cleaned = pads.dataset(fixed.folder, format="parquet", exclude_invalid_files=True).to_table()
    assert cleaned.schema.names == schemas.SCORED.names
    assert cleaned["pair_id"].to_pylist() == [f"p{i}" for i in np.flatnonzero(stay)]
    assert all(text == text.strip() for side in ("chosen", "rejected") for text in cleaned[side].to_pylist())
    again = open_pairs(fixed.folder)
    second = examine(config, again, extract(again, None), None)
    assert not [item["check"] for item in second["findings"] if item["fixable"]]
    assert (removals(extract(again, None)) < 0).all()


# ---------------------------------------------------------------------- command, step, files


def test_fix_logs_every_change_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(20)]
    rows[1] |= {"chosen": " padded "}
    rows[2] |= {"rejected": rows[2]["chosen"]}
    rows[7] = _leak(rows[7])
    rows.append(rows[5] | {"pair_id": "copy"})
    table = write(tmp_path / "scored", rows, files=2)
    (tmp_path / "scored" / "manifest.json").write_text(json.dumps({"stage": "score", "key": "k1"}))
    config = load(None, [f"run.folder={tmp_path}"])
    before = time.monotonic()
    for _ in range(2):  # an earlier fixed table may be replaced
        assert audit_command(config, table, None, None, str(tmp_path / "fixed")) == 0
    log = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    assert [(item["row"], item["pair_id"], item["action"], item["rule"]) for item in log] == [
        (1, "p1", "trimmed", "untrimmed_text"),
        (2, "p2", "removed", "equal_sides"),
        (7, "p7", "removed", "leaked_prompt"),
        (20, "copy", "removed", "duplicate_pair"),
    ]
    manifest = json.loads((tmp_path / "fixed" / "manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["dropped"].values()) == 21
    assert manifest["key"] != "k1"
    assert 0 < manifest["seconds"] <= time.monotonic() - before
    assert abs(datetime.now(UTC) - datetime.fromisoformat(manifest["finished_at"])) < timedelta(minutes=1)
    assert manifest["versions"]["mmedpo-ray"]
    expected = [row for row in rows if row["pair_id"] not in ("p2", "p7", "copy")]
    expected[1]["chosen"] = "padded"
    written = schemas.check(pq.read_table(tmp_path / "fixed" / "part-00000.parquet"), schemas.SCORED, "fixed")
    assert written.equals(schemas.to_table(expected, schemas.SCORED))
    assert (tmp_path / "audit.json").is_file()


def test_fix_keeps_what_a_radiologist_says(tmp_path: Path) -> None:
    said = (
        "The prior images are not available for comparison.",
        "Note: The endotracheal tube has been replaced.",
        "I cannot identify a fracture.",
        "QUESTION: pneumonia? FINDINGS: No pneumonia.",
        "GPT: 45",
    )
    rows = [pair(i, chosen=said[i % len(said)]) for i in range(20)]
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, write(tmp_path / "t", rows), None, None, str(tmp_path / "fixed"))
    assert pq.read_table(tmp_path / "fixed" / "part-00000.parquet").num_rows == len(rows)


_TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.string()),
)


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Texts as another type, in chunks of 100, so that each has a dictionary of its own."""
    texts = [
        pa.array(column.slice(start, 100).to_pylist(), pa.string()) for start in range(0, len(column), 100)
    ]
    return pa.chunked_array([chunk.cast(kind) for chunk in texts], kind)


@pytest.mark.parametrize("kind", _TEXT_TYPES, ids=str)
def test_texts_of_any_type_are_audited_and_fixed(tmp_path: Path, kind: pa.DataType) -> None:
    """The result is that of a table of strings, and the copy has the input's types."""
    rows = [pair(i) for i in range(300)]
    rows[1] |= {"chosen": " padded "}
    rows[2] |= {"rejected": rows[2]["chosen"]}
    rows[3] |= {"rejected": None}
    rows[4] |= {"pair_id": "p5"}
    names = [
        "pair_id",
        "sample_id",
        "kind",
        "image_uri",
        "question",
        "chosen",
        "rejected",
        "answer_type",
        "weight",
    ]
    plain = pa.Table.from_pylist(rows).select(names)
    plain = plain.append_column("comment", pa.array([f"note {i}" for i in range(300)]))
    columns = [
        column if name == "weight" else _typed(column, kind)
        for name, column in zip(plain.column_names, plain.columns, strict=True)
    ]
    known = samples(
        tmp_path / "samples", [{"sample_id": f"s{i}", "answer": f"Nodule {i}"} for i in range(300)]
    )
    truth = pq.read_table(f"{known}/part-0.parquet").select(["sample_id", "answer", "split", "image_uri"])
    pq.write_table(
        pa.table([_typed(column, kind) for column in truth.columns], truth.column_names),
        tmp_path / "s.parquet",
        row_group_size=100,
    )
    config, results = load(None, [f"run.folder={tmp_path}"]), []
    for name, table in (("plain", plain), ("typed", pa.table(columns, plain.column_names))):
        path, out = tmp_path / f"{name}.parquet", tmp_path / f"{name}.json"
        pq.write_table(table, path, row_group_size=100)
        audit_command(
            config, str(path), str(tmp_path / "s.parquet"), str(out), str(tmp_path / f"{name}-fixed")
        )
        results.append(json.loads(out.read_text()) | {"key": None, "table": None})
    assert results[0] == results[1]
    assert {"duplicate_id", "equal_sides", "empty_side", "untrimmed_text"} <= found(results[1]).keys()
    fixed = [tmp_path / f"{name}-fixed" for name in ("plain", "typed")]
    assert len({(folder / "changes.jsonl").read_text() for folder in fixed}) == 1
    expected, written = (pads.dataset(folder / "part-00000.parquet").to_table() for folder in fixed)
    assert [_text_of(item) for item in written.to_pylist()] == expected.to_pylist()
    # Dictionaries of all chunks together may need a wider index.
    is_narrow = kind == pa.dictionary(pa.int8(), pa.string())
    assert set(written.schema.types) == {
        pa.dictionary(pa.int32(), pa.string()) if is_narrow else kind,
        pa.float64(),
    }
    assert written.schema.names == expected.schema.names


def test_fix_copies_columns_of_nested_types(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(20)]
    rows[2] |= {"rejected": rows[2]["chosen"]}
    extra: dict[str, tuple[pa.DataType, Callable[[int], Any]]] = {
        "views": (pa.list_(pa.string_view()), lambda i: [f"a{i}", None]),
        "struct": (pa.struct([("a", pa.int64())]), lambda i: {"a": i} if i % 3 else None),
        "map": (pa.map_(pa.string(), pa.int64()), lambda i: [("c", i)]),
    }
    table = schemas.to_table(rows, schemas.SCORED)
    for name, (kind, value) in extra.items():
        table = table.append_column(name, pa.array([value(i) for i in range(20)], kind))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    audit_command(
        load(None, [f"run.folder={tmp_path}"]),
        str(tmp_path / "t.parquet"),
        None,
        None,
        str(tmp_path / "fixed"),
    )
    source = pads.dataset(tmp_path / "t.parquet").to_table()
    expected = [row for row in source.to_pylist() if row["pair_id"] != "p2"]
    written = pads.dataset(tmp_path / "fixed" / "part-00000.parquet").to_table()
    assert written.to_pylist() == expected
    assert written.schema == source.schema


def _text_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}


def test_fix_never_overwrites_anything_else(tmp_path: Path) -> None:
    table = write(tmp_path / "t", [pair(i) for i in range(10)])
    config = load(None, [f"run.folder={tmp_path}"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    for folder, message in (
        (table, "audited table"),
        (str(tmp_path / "mine"), "not empty"),
        (table + "/part-0.parquet", "folder"),
    ):
        with pytest.raises(UserError, match=message):
            audit_command(config, table, None, None, folder)
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"
    assert open_pairs(table).num_rows == 10


def test_a_fix_that_was_killed_is_repeated_by_the_same_command(tmp_path: Path) -> None:
    table = write(tmp_path / "scored", [pair(i) for i in range(20)])
    killed = """
import os, signal, sys
from mmedpo_ray.config.load import load
from mmedpo_ray.audit import fix, stage as stage
fix._write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
stage.audit_command(load(None, [f"run.folder={sys.argv[1]}"]), sys.argv[2], None, None, sys.argv[3])
"""
    target = str(tmp_path / "fixed")
    arguments = [sys.executable, "-c", killed, str(tmp_path), table, target]
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "fixed" / "part-00000.parquet").exists()
    config = load(None, [f"run.folder={tmp_path}"])
    assert audit_command(config, table, None, None, target) == 0
    assert audit_command(config, table, None, None, str(tmp_path / "quiet")) == 0
    names = {path.name for path in (tmp_path / "fixed").iterdir()}
    assert names == {"part-00000.parquet", "changes.jsonl", "manifest.json"}
    for name in names - {"manifest.json"}:
        assert (tmp_path / "fixed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    again, quiet = (read_manifest(str(tmp_path / name)) for name in ("fixed", "quiet"))
    assert again is not None
    assert quiet is not None
    when = {"seconds": 0.0, "finished_at": ""}
    assert again.model_copy(update=when) == quiet.model_copy(update=when)


def test_json_rows_that_are_no_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f" Answer {number} \ud83d"},
        ]
        other = [turns[0], {"from": "gpt", "value": f"Other {number}"}]
        return {
            "id": number,
            "image": f"{number}.png",
            "conversations": turns,
            "rejected_conversations": other,
            "extra": [1],
        }

    source = tmp_path / "data.json"
    source.write_text(json.dumps([row(0), 3, row(1) | {"conversations": []}, row(4)]))
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, None, str(tmp_path / "fixed"))
    result = json.loads((tmp_path / "data.json.audit.json").read_text())
    assert found(result)["malformed_row"]["count"] == 2
    assert "1, 2" in found(result)["malformed_row"]["says"]
    after = json.loads((tmp_path / "fixed" / "data.json").read_text())
    assert [item["id"] for item in after] == [0, 4]
    assert after[0]["conversations"][1]["value"] == "Answer 0 \ud83d"
    assert after[0]["extra"] == [1]
    log = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    assert [(item["row"], item["rule"]) for item in log if item["action"] == "removed"] == [
        (1, "malformed_row"),
        (2, "malformed_row"),
    ]


def test_fail_on_decides_the_exit_status(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    rows[0] = _leak(rows[0])  # high: 1 of 30
    table = write(tmp_path / "t", rows)
    arguments = ["audit", table, "--out", str(tmp_path / "a.json"), f"run.folder={tmp_path}"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--fail-on", "high"]) == 1
    clean = write(tmp_path / "clean", [pair(i) for i in range(30)])
    assert (
        cli.main(
            ["audit", clean, "--out", str(tmp_path / "b.json"), "--fail-on", "low", f"run.folder={tmp_path}"]
        )
        == 0
    )
    assert cli.main(["audit", str(tmp_path / "nowhere")]) == 2


def test_the_step_of_a_run_writes_skips_and_fails(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    write(tmp_path / "scored", rows)
    samples(tmp_path / "samples", [{"sample_id": row["sample_id"], "answer": row["chosen"]} for row in rows])
    config = load(None, [f"run.folder={tmp_path}"])
    result = audit(config)
    assert result["findings"] == []
    assert result["samples"] == str(tmp_path / "samples")
    written = (tmp_path / "audit.json").stat().st_mtime_ns
    assert audit(config) == result
    assert (tmp_path / "audit.json").stat().st_mtime_ns == written
    rows[0] = _leak(rows[0])
    write(tmp_path / "scored", rows)
    assert "leaked_prompt_chosen" in found(audit(config))
    with pytest.raises(UserError, match="high"):
        audit(load(None, [f"run.folder={tmp_path}", "audit.fail_on=high"]))


def test_no_text_of_the_data_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "Johnsonville"
    rows = [
        pair(i, chosen=f"{secret} {i}", rejected=f"{secret} {i}", question=f"{secret}?") for i in range(30)
    ]
    rows += [
        pair(31),
        pair(32, chosen=f" {secret}"),
        pair(40, question=secret, chosen=f"Question: {secret}", weight=float("nan")),
    ]
    table = write(tmp_path / "t", rows)
    config = load(None, [f"run.folder={tmp_path}"])
    fixed = tmp_path / "fixed"
    assert audit_command(config, table, None, str(tmp_path / "a.json"), str(fixed)) == 0
    shown = capsys.readouterr()
    assert "equal_sides" in shown.err
    written = [tmp_path / "a.json", fixed / "changes.jsonl", fixed / "manifest.json"]
    for text in (shown.err, shown.out, *(path.read_text() for path in written)):
        assert secret.lower() not in text.lower()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"no parquet"), "Parquet"),
        (lambda p: pq.write_table(pa.table({"question": ["a"]}), p), "chosen"),
        (
            lambda p: pq.write_table(pa.table({"question": [[1]], "chosen": [[1]], "rejected": [[1]]}), p),
            "expected string",
        ),
    ],
)
def test_unusable_tables_are_named(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "t.parquet"
    make(path)
    with pytest.raises(UserError, match=message):
        audit_command(load(None, [f"run.folder={tmp_path}"]), str(path), None, None, None)


def _texts_of_the_audit() -> list[str]:
    """Every text in the audit's code but the docstrings; what is filled in stands as X."""
    texts = []
    for path in Path(examine.__code__.co_filename).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                said = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                texts.append("".join(map(str, said)))
            elif isinstance(node, ast.Constant) and id(node) not in parts | docstrings:
                texts.append(str(node.value))
    return texts


def test_what_the_remedies_name_exists() -> None:
    """Settings (also their values), commands and options."""
    sections = "|".join(Config.model_fields)
    keys = {key.rsplit(".", depth)[0] for key in known_keys() for depth in range(3)}
    (verbs,) = (a for a in parser.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {name: set(verb._option_string_actions) for name, verb in verbs.choices.items()}
    seen: set[str] = set()
    for text in _texts_of_the_audit():
        for key, value in re.findall(rf"\b((?:{sections})(?:\.[a-z_]+)+)(?:=([a-z_]+))?", text):
            if key == "audit.json":
                continue
            assert key in keys, text
            if value:
                load(None, [f"{key}={value}"])
            seen.add(key)
        for verb, rest in re.findall(r"mmedpo ([a-z]+)([^`;]*)", text):
            assert verb in options, text
            assert set(re.findall(r"--[a-z-]+", rest)) <= options[verb], text
            seen.add(verb)
        bare = re.sub(r"mmedpo [a-z]+[^`;]*", "", text)
        assert set(re.findall(r"--[a-z-]+", bare)) <= options["audit"], text
    assert {
        "curate.visual.noise.area_share",
        "data.test_share",
        "score.weights.mode",
        "curate",
        "audit",
    } <= seen


def test_each_table_has_a_result_of_its_own(tmp_path: Path) -> None:
    """The report reads ``audit.json``, which stays that of the scored pairs."""
    rows = [pair(i) for i in range(30)]
    config = load(None, [f"run.folder={tmp_path}"])
    for name in ("scored", "pairs", "visual"):
        write(tmp_path / name, rows)
    audit(config)
    scored = (tmp_path / "audit.json").read_bytes()
    for name in ("pairs", "visual/", "pairs/part-0.parquet"):
        assert audit_command(config, str(tmp_path / name), None, None, None) == 0
    assert (tmp_path / "audit.json").read_bytes() == scored
    for name in ("pairs", "visual", "pairs/part-0.parquet"):
        assert json.loads((tmp_path / f"{name}.audit.json").read_text())["table"] == str(tmp_path / name)
    assert audit_command(config, str(tmp_path / "scored"), None, None, None) == 0
    assert json.loads((tmp_path / "audit.json").read_text())["table"] == str(tmp_path / "scored")


def test_a_fixed_table_of_a_run_goes_on_with_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, new = tmp_path / "mine", tmp_path / "new"
    table = write(mine / "scored", [pair(i) for i in range(10)])
    config = load(None, [f"run.folder={mine}", "align.beta=0.7"])

    def said(fix: Path) -> str:
        assert audit_command(config, table, None, None, str(fix)) == 0
        return capsys.readouterr().err

    assert "mmedpo align" not in said(tmp_path / "of_no_run" / "scored")
    (mine / "config.yaml").write_text(dump(config))
    assert "--fix NEW/scored" in said(tmp_path / "clean")
    command = f"mmedpo align --config {mine}/config.yaml run.folder={new}"
    assert command in said(new / "scored")
    settings_of_new = settings_of(cli._parse(command.split()[1:]))
    assert settings_of_new.align.beta == 0.7
    assert settings_of_new.run.folder == str(new)
    # What `align` asks of the table that it reads.
    manifest = read_manifest(str(new / "scored"))
    assert manifest is not None
    assert manifest.rows_out == 10


_ELSEWHERE = [
    ("nowhere", "there is no nowhere"),
    ("no.json", "there is no no.json. Give a folder"),
    ("note.txt", "note.txt is no Parquet file"),
    ("run", "run is the folder of a run, not a table. Give run/pairs"),
    ("run/scored", "`mmedpo score run.folder=[^ ]*/run` writes it"),
    ("new", "`mmedpo score run.folder=new` writes it"),
    ("run/samples", "table of samples, not of pairs"),
    ("empty", "empty is an empty folder"),
    ("other", "no Parquet file directly in it"),
    ("half", "unfinished table"),
    ("columns.parquet", "it has a; needed are question, chosen and rejected"),
    ("object.json", "not a list of rows .* released layout"),
]


@pytest.mark.parametrize(("path", "message"), _ELSEWHERE)
def test_a_path_to_no_table_of_pairs_is_told_with_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "new", "empty", "other", "half/.parts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("note.txt", "run/config.yaml", "new/config.yaml", "other/Johnsonville.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "object.json").write_text('{"a": 1}')
    pq.write_table(pa.table({"a": [1]}), "columns.parquet")
    samples(tmp_path / "run" / "samples", [{"sample_id": "s0", "answer": "x"}])
    write(tmp_path / "run" / "pairs", [pair(0)])
    with pytest.raises(UserError, match=message) as raised:
        audit_command(load(None), path, None, None, None)
    assert "data.train_file" not in str(raised.value)
    assert "Johnsonville" not in str(raised.value)


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


def test_every_check_is_documented(repository: Path) -> None:
    page = (repository / "docs" / "how-to" / "audit.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page] == []


def test_polarity_is_read_as_everywhere(tmp_path: Path) -> None:
    """Chosen answers that say yes and no to one question contradict each other, however they say it."""
    answers = ["Present", "Not seen", "是的。", "没有", "Nope", "There is no doubt: yes"]
    rows = [
        {
            "pair_id": str(number),
            "image_uri": "a.png",
            "question": "Is there a mass?",
            "chosen": text,
            "rejected": "Maybe",
        }
        for number, text in enumerate(answers)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    pairs = open_pairs(str(tmp_path / "pairs.parquet"))
    found = features_of(next(pairs.batches()), None)
    assert found["polarity"].tolist() == [1, -1, 1, -1, -1, 1]
