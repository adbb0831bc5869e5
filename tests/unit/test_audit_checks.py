"""Checks of the audit: every planted fault is found with its count and its pairs."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_tables import found, leak, pair, run, write
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.audit.checks import CHECKS
from mmedpo_ray.audit.features import features_of
from mmedpo_ray.audit.hashing import normalised
from mmedpo_ray.commands.parser import build_parser
from mmedpo_ray.config.load import known_keys, load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.meta_text import COMMENTARY, LEAKED_PROMPT


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


def test_a_table_without_faults_has_no_finding(tmp_path: Path) -> None:
    result = run(tmp_path, write(tmp_path / "t", [pair(i) for i in range(60)], files=3))
    assert result["findings"] == []
    assert {item["check"] for item in result["passed"]} >= {
        "length_shortcut",
        "equal_sides",
        "invalid_weight",
    }


# Check → what turns a good text pair into one that it must find.
_PLANTS = {
    "equal_sides": lambda row: row | {"rejected": row["chosen"]},
    "near_equal_sides": lambda row: row | {"rejected": "  " + row["chosen"].upper() + "!"},
    "empty_side": lambda row: row | {"rejected": " \n"},
    "untrimmed_text": lambda row: row | {"chosen": " " + row["chosen"], "rejected": " " + row["rejected"]},
    "leaked_prompt_chosen": leak,
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


def _shown_texts() -> list[str]:
    """Everything that a check may tell the user."""
    remedies = [
        [check.remedy] if isinstance(check.remedy, str) else list(check.remedy.values())
        for check in CHECKS.values()
    ]
    return [check.message for check in CHECKS.values()] + [text for texts in remedies for text in texts]


def test_what_messages_and_remedies_name_exists() -> None:
    """Settings (also their values), commands and options."""
    sections = "|".join(Config.model_fields)
    keys = {key.rsplit(".", depth)[0] for key in known_keys() for depth in range(3)}
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    options = {name: set(command._option_string_actions) for name, command in commands.choices.items()}
    seen: set[str] = set()
    for text in _shown_texts():
        for key, value in re.findall(rf"\b((?:{sections})(?:\.[a-z_]+)+)(?:=([a-z_]+))?", text):
            assert key in keys, text
            if value:
                load(None, [f"{key}={value}"])
            seen.add(key)
        for command, rest in re.findall(r"mmedpo ([a-z]+)([^`;]*)", text):
            assert command in options, text
            assert set(re.findall(r"--[a-z-]+", rest)) <= options[command], text
            seen.add(command)
        bare = re.sub(r"mmedpo [a-z]+[^`;]*", "", text)
        assert set(re.findall(r"--[a-z-]+", bare)) <= options["audit"], text
    assert {"curate.visual.noise.area_share", "data.test_share", "score.weights.mode", "curate"} <= seen


def test_every_check_is_documented(repository: Path) -> None:
    page = (repository / "docs" / "how-to" / "audit.md").read_text()
    assert [name for name in CHECKS if f"`{name}`" not in page] == []


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
