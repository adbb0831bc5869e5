"""``mmedpo evaluate --answers``: scores answers that exist, says what it cannot use, and quotes nobody's
text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmedpo_ray import cli
from mmedpo_ray.metrics import METRICS

Rows = Sequence[dict[str, Any]]
SECRET = "Mister Patientname"


def row(**fields: Any) -> dict[str, Any]:
    usual = {
        "answer_type": "closed",
        "question": "Is there an effusion?",
        "reference": "Yes",
        "prediction": "Yes.",
    }
    return usual | fields


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def evaluate(path: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and rows of a file."""
    out, rows = path.parent / "out.json", path.parent / "rows.jsonl"
    assert (
        cli.main(["evaluate", "--answers", str(path), "--json", str(out), "--rows", str(rows), *options]) == 0
    )
    assert "NaN" not in out.read_text() and "NaN" not in rows.read_text()
    return json.loads(out.read_text()), [json.loads(line) for line in rows.read_text().splitlines()]


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["evaluate", "--answers", str(path)]) == 2
    said = capsys.readouterr().err
    assert SECRET not in said
    return said


def test_every_shared_case_counts_as_it_must(shared_data: Path, tmp_path: Path) -> None:
    cases = shared_data.parent / "cases" / "metrics.jsonl"
    if not cases.is_file():
        pytest.skip("no shared cases")
    wanted = [json.loads(line) for line in cases.read_text(encoding="utf-8").splitlines()]
    copy = tmp_path / cases.name
    copy.write_bytes(cases.read_bytes())
    _, rows = evaluate(copy)
    assert [item["id"] for item in rows] == [item["id"] for item in wanted]
    wrong = [
        item["id"]
        for item, found in zip(wanted, rows, strict=True)
        if (found[item["metric"]] == 1) != item["right"]
    ]
    assert not wrong


def test_rows_have_every_metric_and_null_where_it_does_not_apply(tmp_path: Path) -> None:
    rows = [
        row(id=7),
        row(
            answer_type="report",
            question="Describe.",
            reference="The lungs are clear.",
            prediction="Clear lungs.",
        ),
        row(answer_type="open", question="Where?", reference="left lung", prediction="left"),
    ]
    _, found = evaluate(write(tmp_path / "a.jsonl", rows))
    assert [set(item) - {"id", "model"} for item in found] == [set(METRICS)] * 3
    assert found[0]["id"] == 7 and "id" not in found[1]
    for item, given in zip(found, rows, strict=True):
        for name, metric in METRICS.items():
            if metric.answer_type != given["answer_type"]:
                assert item[name] is None, name
    assert found[0]["closed_accuracy"] == 1.0
    assert found[2]["open_f1"] == pytest.approx(2 / 3)
    assert 0 < found[1]["report_rouge_l"] < 1


def test_empty_undecided_and_failed_answers_are_wrong_and_counted_apart(tmp_path: Path) -> None:
    said = ["Yes.", "", ".", "<think>Yes</think>", None, "Hard to say.", "No."]
    summary, rows = evaluate(
        write(tmp_path / "a.jsonl", [row(prediction=text, id=str(n)) for n, text in enumerate(said)])
    )
    name = "answers"
    counts = summary["counts"][name]
    assert counts.pop("undecided_share") == pytest.approx(1 / 7)
    assert counts == {"answers": 7, "failed": 1, "empty": 3, "closed": 7, "undecided": 1}
    assert summary["models"][name]["closed_accuracy"]["n"] == 7
    assert summary["models"][name]["closed_accuracy"]["value"] == pytest.approx(1 / 7)
    assert [item["closed_accuracy"] for item in rows] == [1, 0, 0, 0, 0, 0, 0]


def world(models: Sequence[str] = ("base", "aligned"), count: int = 60) -> list[dict[str, Any]]:
    """Closed questions, two an image; each further model is right more often."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        for rank, model in enumerate(models):
            right = generator.random() < 0.4 + 0.4 * rank
            rows.append(
                row(
                    model=model,
                    image_id=f"i{number // 2}",
                    id=f"q{number}",
                    prediction="Yes" if right else "No",
                )
            )
    return rows


def test_two_models_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    summary, _ = evaluate(write(tmp_path / "a.jsonl", world()))
    (found,) = summary["differences"]
    assert (found["first"], found["second"], found["paired"], sum(found["unpaired"].values())) == (
        "aligned",
        "base",
        60,
        0,
    )
    difference = found["metrics"]["closed_accuracy"]
    means = [summary["models"][name]["closed_accuracy"]["value"] for name in ("aligned", "base")]
    assert difference["value"] == pytest.approx(means[0] - means[1])
    assert difference["low"] < difference["value"] < difference["high"]
    assert difference["p"] < 0.01 and difference["p_holm"] == difference["p"]
    assert difference["verdict"] == "better"
    assert found["metrics"]["closed_accuracy_official"]["p_holm"] is None
    assert found["metrics"]["closed_accuracy_official"]["verdict"] is None
    assert (summary["images"], summary["questions"], summary["paired_by"]) == (30, 60, "id")


@pytest.mark.parametrize("key", ["id", "sample_id", None])
def test_rows_are_paired_in_any_order_and_those_without_a_partner_counted(
    tmp_path: Path, key: str | None
) -> None:
    rows = world()
    for number, item in enumerate(rows):
        name = item.pop("id")
        if key is None:
            item["question"] += name
        else:
            item[key] = name
        item["number"] = number
    whole, _ = evaluate(write(tmp_path / "a.jsonl", rows))
    shuffled = [rows[index] for index in np.random.default_rng(1).permutation(len(rows))]
    shuffled.sort(key=lambda item: item["model"] == "aligned")
    again, _ = evaluate(write(tmp_path / "b.jsonl", shuffled))
    assert again["differences"] == whole["differences"]
    missing = [item for item in shuffled if item["number"] not in (1, 3, 4)]
    partial, _ = evaluate(write(tmp_path / "c.jsonl", missing))
    assert partial["differences"][0]["paired"] == 57
    assert partial["differences"][0]["unpaired"] == {"aligned": 1, "base": 2}


def test_equal_rows_are_paired_in_order_or_not_at_all(tmp_path: Path) -> None:
    rows = [
        row(model=model, prediction=text)
        for model, said in (("a", "Yes No"), ("b", "No No"))
        for text in said.split()
    ]
    summary, _ = evaluate(write(tmp_path / "a.jsonl", rows))
    assert summary["differences"][0]["paired"] == 2
    assert summary["differences"][0]["metrics"]["closed_accuracy"]["value"] == -0.5
    summary, _ = evaluate(write(tmp_path / "b.jsonl", rows[:3]))
    assert summary["differences"][0]["paired"] == 0
    assert summary["differences"][0]["metrics"]["closed_accuracy"]["value"] is None


def test_ids_that_are_one_a_row_do_not_keep_models_apart(tmp_path: Path) -> None:
    rows = [item | {"question": f"Question {item['id']}?"} for item in world()]
    rows = [item | {"id": number} for number, item in enumerate(rows)]
    summary, _ = evaluate(write(tmp_path / "a.jsonl", rows))
    assert summary["differences"][0]["paired"] == 60 and "question" in summary["paired_by"]


def test_further_models_are_compared_with_the_first(tmp_path: Path) -> None:
    summary, rows = evaluate(write(tmp_path / "a.jsonl", world(("base", "aligned", "control"))))
    assert [(item["first"], item["second"]) for item in summary["differences"]] == [
        ("aligned", "base"),
        ("control", "base"),
    ]
    assert [item["model"] for item in rows[:3]] == ["base", "aligned", "control"]


def test_questions_of_one_image_are_one_cluster(tmp_path: Path) -> None:
    rows = [
        row(id=f"{image}-{n}", image_id=f"i{image}", prediction=said)
        for image, said in enumerate(["Yes", "No"] * 8)
        for n in range(6)
    ]
    alone = [{key: value for key, value in item.items() if key != "image_id"} for item in rows]

    def width(items: Rows) -> float:
        summary, _ = evaluate(write(tmp_path / "a.jsonl", items))
        found = summary["models"]["answers"]["closed_accuracy"]
        return found["high"] - found["low"]

    assert width(rows) > 1.8 * width(alone)
    summary, _ = evaluate(write(tmp_path / "a.jsonl", alone))
    assert summary["clusters"] == "answers" and summary["images"] is None


def test_json_goes_to_the_standard_output_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [*world(), row(model="base", image_id="x", id="r", answer_type="report", reference="Clear lungs.")],
    )
    command = [sys.executable, "-m", "mmedpo_ray.cli", "evaluate", "--answers", str(path), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(json.loads(done.stdout)["models"]) == {"base", "aligned"}
    assert "closed accuracy" in done.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.jsonl"], "it writes nothing else"


def test_lists_and_parquet_are_read_too(tmp_path: Path) -> None:
    rows = world()
    expected = evaluate(write(tmp_path / "a.jsonl", rows))[0]["models"]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        assert evaluate(tmp_path / name)[0]["models"] == expected, name


def test_settings_of_the_interval_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", world())
    summary, _ = evaluate(path, "evaluate.bootstrap=200", "evaluate.confidence=0.8", "run.seed=3")
    assert (summary["bootstrap"], summary["confidence"], summary["seed"]) == (200, 0.8, 3)
    assert evaluate(path) == evaluate(path)


@pytest.mark.parametrize("kind", ["question", "reference"])
@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("هل يوجد انصباب جنبي؟", "Arabic"),
        ("Плевральный выпот", "Cyrillic"),
        ("มีน้ำในช่องเยื่อหุ้มปอด", "Thai"),
        ("흉수가 있습니까", "Hangul"),
        ("きょうすいがありますか", "Hiragana"),
        ("フクスイ", "Katakana"),
        ("क्या बहाव है", "Devanagari"),
    ],
)
def test_other_scripts_are_refused_in_question_and_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, text: str, script: str
) -> None:
    path = write(tmp_path / "a.jsonl", [row(id="q0"), row(id="q1", **{kind: text})])
    said = refused(path, capsys).replace("\n", " ")
    assert "line 2" in said and "q1" in said and script in said and text not in said


def test_a_prediction_in_another_script_is_wrong(tmp_path: Path) -> None:
    summary, _ = evaluate(write(tmp_path / "a.jsonl", [row(prediction="نعم"), row()]))
    assert summary["models"]["answers"]["closed_accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f'{{"answer_type": "closed", "question": "{SECRET}', "line 2"),
        (json.dumps([SECRET]), "object"),
        (json.dumps(row(answer_type=SECRET)), "answer_type"),
        (json.dumps(row(answer_type=3)), "answer_type"),
        (
            json.dumps({key: value for key, value in row(question=SECRET).items() if key != "prediction"}),
            "prediction",
        ),
        (json.dumps(row(reference="  ", prediction=SECRET)), "reference is empty"),
        (json.dumps(row(reference=None, prediction=SECRET)), "reference"),
        (json.dumps(row(prediction=[SECRET])), "prediction"),
        (json.dumps(row(model={"name": SECRET})), "model"),
        (json.dumps(row(image_id="i", prediction=SECRET)), "image_id"),
    ],
)
def test_bad_lines_are_named_without_their_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n", encoding="utf-8")
    said = refused(path, capsys).replace("\n", " ")
    assert says in said and "a.jsonl" in said and "line " in said


def test_files_that_are_no_answers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file" in refused(tmp_path / "absent.jsonl", capsys)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no answers" in refused(tmp_path / "empty.jsonl", capsys)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    assert "UTF-8" in refused(tmp_path / "latin.jsonl", capsys)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    assert "Parquet" in refused(tmp_path / "a.parquet", capsys)


def test_an_id_twice_in_a_model_cannot_be_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(model=model, id="q") for model in ("a", "b", "a")]
    said = refused(write(tmp_path / "a.jsonl", rows), capsys).replace("\n", " ")
    assert "line 3" in said and "twice" in said


def test_an_id_is_one_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row(model="a", id="q", prediction=SECRET),
        row(model="b", id="q", reference="No", prediction=SECRET),
    ]
    said = refused(write(tmp_path / "a.jsonl", rows), capsys).replace("\n", " ")
    assert "line 2" in said and "another reference" in said


def test_outputs_belong_to_a_file_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--json", "-"])
    assert caught.value.code == 2
    assert "--answers" in capsys.readouterr().err


def test_frames_of_one_file_are_one_cluster():
    from mmedpo_ray.evaluate.summary import rows_of
    from mmedpo_ray.tables import schemas

    rows = [
        {"answer_id": f"m/{name}", "model": "m", "sample_id": name, "image_id": name, "task": "vqa",
         "answer_type": "open",
         "reference": "left", "prediction": "left", "seconds": 0.1}
        for name in ("d/a~f1", "d/a~f2", "d/b")
    ]  # fmt: skip
    found = rows_of(schemas.to_table(rows, schemas.ANSWERS), {})
    assert [row.cluster for row in found] == ["d/a", "d/a", "d/b"]
