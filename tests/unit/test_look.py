"""Questions asked again about other images, and what is left of the answers."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedpo_ray.evaluate.client import image_data_url
from mmedpo_ray.evaluate.look import (
    BLANK,
    LESION_NOISED,
    NO_LESION,
    SHUFFLED,
    LesionNoise,
    blank,
    shown_instead,
)
from mmedpo_ray.evaluate.look_scores import headline, look_figures
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.evaluate.summary import summarise, summary_table
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.metrics import Answer
from mmedpo_ray.noise.settings import NoiseConfig
from mmedpo_ray.tables import schemas

OPTIONS = Options(resamples=200, confidence=0.95, seed=0)


def sample(number: int, sha256: str, answer_type: str = "closed", mask: str | None = None) -> dict[str, Any]:
    return {
        "sample_id": f"s{number}", "image_uri": f"{sha256}.png", "image_sha256": sha256,
        "question": "Is there a nodule?", "answer": "Yes", "answer_type": answer_type, "mask_uri": mask,
    }  # fmt: skip


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_every_question_but_reports_gets_its_other_images() -> None:
    samples = [sample(0, "a"), sample(1, "a", "open"), sample(2, "b", mask="m.png"), sample(3, "c", "report")]
    shown = [(row["sample_id"], it) for row, it in shown_instead(samples, NoiseConfig(), 0, 100)]
    conditions = {name: [it.condition for of, it in shown if of == name] for name, _ in shown}
    assert conditions == {
        "s0": [BLANK, SHUFFLED],
        "s1": [BLANK, SHUFFLED],
        "s2": [BLANK, SHUFFLED, LESION_NOISED],
    }
    assert {it.image_uri for name, it in shown if it.condition == SHUFFLED and name != "s2"} == {"b.png"}


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffled_image_is_never_a_copy_of_the_own_one(seed: int) -> None:
    samples = [sample(number, "abcde"[number % 5]) for number in range(20)]
    for row, it in shown_instead(samples, NoiseConfig(), seed, 100):
        assert (it.image_uri == row["image_uri"]) == (it.condition == BLANK)
    alone = [it.condition for _, it in shown_instead(samples[::5], NoiseConfig(), seed, 100)]
    assert alone == [BLANK] * 4


def test_images_are_altered_as_they_are_sent(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    marked = np.zeros((32, 40), np.uint8)
    marked[5:15, 10:30] = 255
    for name, mask in (("mask", marked), ("none", marked * 0), ("small", marked[1:])):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    uri = str(tmp_path / "a.png")

    def noise(mask: str, seed: int = 1) -> LesionNoise:
        return LesionNoise(str(tmp_path / mask), "Is there a nodule?", "Yes", seed, NoiseConfig(), 10_000)

    grey = decoded(image_data_url(uri, alteration=blank))
    assert grey.shape == (32, 40, 3) and (grey == 128).all()
    noised = decoded(image_data_url(uri, alteration=noise("mask.png")))
    assert ((noised == pixels) | (marked > 0)).all(), "only the lesion changes"
    assert (noised != pixels)[marked > 0].mean() > 0.8
    assert (noised == decoded(image_data_url(uri, alteration=noise("mask.png")))).all()
    for mask, reason in (("none.png", NO_LESION), ("small.png", "mask_size"), ("absent.png", "mask_missing")):
        with pytest.raises(ImageError) as error:
            image_data_url(uri, alteration=noise(mask))
        assert error.value.reason == reason


def rows(model: str, said: list[str], *, failed: int | None = None) -> list[Row]:
    return [
        Row(model, f"q{number}", f"i{number // 2}", "closed" if number < 6 else "open",
            Answer("Yes" if number < 6 else "left lung", text, "Is there?" if number < 6 else "Where?"),
            failed=number == failed)
        for number, text in enumerate(said)
    ]  # fmt: skip


def test_what_survives_without_the_image() -> None:
    own = rows("base", ["Yes."] * 4 + ["No"] * 2 + ["left lung", "right lung"])
    other = rows("base", ["Yes", "Yes", "Yes", "No", "No", "Yes", "right lung", "left lung"])
    figures = look_figures(own, {BLANK: other}, ["base"], OPTIONS)["models"]["base"]
    assert set(figures) == {BLANK}
    value = {kind: {name: item["value"] for name, item in of.items()} for kind, of in figures[BLANK].items()}
    # Right with the own image: 5 of 8; without: 4 + 1 of 8; both: 3. "Yes." and "Yes" are the same words.
    assert value["all"] == pytest.approx(
        {"accuracy": 5 / 8, "accuracy_without": 5 / 8, "drop": 0, "changed": 4 / 8, "survive": 3 / 5}
    )
    assert value["closed"]["survive"] == pytest.approx(3 / 4)
    assert value["open"]["survive"] == 0
    survive = figures[BLANK]["all"]["survive"]
    assert survive["low"] < survive["value"] < survive["high"] and survive["n"] == 8


def test_a_model_that_looks_drops_more_than_one_that_does_not() -> None:
    own, other = [], []
    for model, without in (("base", "Yes"), ("aligned", "No")):
        for number in range(40):
            own.append(Row(model, f"q{number}", f"i{number}", "closed", Answer("Yes", "Yes", "Is there?")))
            other.append(
                Row(model, f"q{number}", f"i{number}", "closed", Answer("Yes", without, "Is there?"))
            )
    found = look_figures(own, {BLANK: other, SHUFFLED: other}, ["base", "aligned"], OPTIONS)
    difference = found["differences"]["aligned"][BLANK]
    assert difference["value"] == difference["low"] == 1.0
    assert difference["p_holm"] == pytest.approx(2 * difference["p"]) and difference["p_holm"] < 0.01
    assert "100 %" in headline(found, "base") and " 0 %" in headline(found, "aligned")


def test_a_failed_request_about_another_image_is_no_answer() -> None:
    own, other = rows("base", ["Yes"] * 4), rows("base", ["Yes"] * 4, failed=2)
    figures = look_figures(own, {BLANK: other}, ["base"], OPTIONS)["models"]["base"][BLANK]["all"]
    assert figures["drop"]["n"] == 3
    nothing = look_figures(rows("base", ["No"] * 4), {BLANK: other}, ["base"], OPTIONS)
    assert nothing["models"]["base"][BLANK]["all"]["survive"]["value"] is None
    assert headline(nothing, "base") is None


def test_answers_about_other_images_enter_no_score() -> None:
    """From the stage's table, failed requests apart, to the summary and the line under the table."""
    base = {"task": "vqa", "answer_type": "closed", "reference": "Yes", "seconds": 0.1}
    answers, failed = [], []
    for model in ("base", "aligned"):
        for number in range(6):
            row = {"model": model, "sample_id": f"s{number}", "image_id": f"i{number}", **base}
            answers.append({"answer_id": f"{model}/s{number}", "prediction": "Yes", **row})
            said = "Yes" if model == "base" or number else "No"
            other = {"answer_id": f"{model}/s{number}~blank", "shown": "blank", **row}
            (failed if number == 5 else answers).append(other | {"prediction": said})
    tables = [schemas.to_table(each, schemas.LOOK_ANSWERS) for each in (answers, failed)]
    questions = {f"s{number}": "Is there a nodule?" for number in range(6)}
    names = {"base": "base", "aligned": "aligned"}
    summary = summarise(tables[0], questions, names=names, options=OPTIONS, failed=tables[1])
    assert summary["models"]["aligned"]["closed_accuracy"]["n"] == summary["questions"] == 6
    assert summary["counts"]["aligned"]["failed"] == 0
    figures = {name: of["blank"]["all"]["survive"] for name, of in summary["look"]["models"].items()}
    assert {name: (item["value"], item["n"]) for name, item in figures.items()} == {
        "base": (1.0, 5),
        "aligned": (0.8, 5),
    }
    shown = summary | {"names": names, "confidence": 0.95}
    caption = str(summary_table(shown).caption)
    assert "aligned" in caption and "80 %" in caption and "100 %" in caption
    plain = summarise(tables[0].drop_columns("shown").slice(0, 1), questions, names=names, options=OPTIONS)
    assert "look" not in plain
