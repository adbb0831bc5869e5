"""The sheet of visual pairs: what `curate` would make, without text unless asked for, nothing else
written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from mmedpo_ray.cli import main
from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.visual.preview import _wrapped, preview
from mmedpo_ray.curate.visual.visual_pairs import VisualPairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas

SIDE = 256  # of a picture on the sheet, so that nothing is scaled


def samples(folder: Path, count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        image, mask = folder / f"{index}.png", folder / f"{index}_mask.png"
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        Image.fromarray(((x + 7 * index) % 256).astype(np.uint8)).save(image)
        Image.fromarray((y - 100) ** 2 + (x - 80) ** 2 < 900).save(mask)
        row = {
            "sample_id": f"s{index}",
            "image_id": f"i{index}",
            "dataset": "made",
            "split": "train",
            "task": "vqa",
            "answer_type": "open",
            "image_uri": str(image),
            "image_sha256": "",
            "question": "what is it?",
            "answer": "a nodule",
            "mask_uri": str(mask),
        }
        rows.append(row | changes)
    storage.write_parquet(folder / "samples" / "part-0.parquet", schemas.to_table(rows, schemas.SAMPLES))
    return rows


def config(folder: Path, *overrides: str) -> Config:
    return load(None, (f"run.folder={folder}", "report.show_text=false", *overrides))


def test_the_sheet_shows_the_pairs_that_curate_makes(tmp_path: Path) -> None:
    rows = samples(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    path = preview(config(tmp_path), 4)
    assert path == tmp_path / "preview.png"
    assert {p.name for p in tmp_path.iterdir()} - before == {"preview.png"}
    sheet = np.asarray(Image.open(path))
    pairs = VisualPairs(config(tmp_path))(schemas.to_table(rows, schemas.SAMPLES)).to_pylist()
    assert len(pairs) == 4
    for pair in pairs:
        for column, key in ((0, "image_uri"), (3, "rejected_image_uri")):
            wanted = np.asarray(Image.open(pair[key]).convert("RGB"))
            left = 8 + column * (SIDE + 8)
            strip = sheet[:, left : left + SIDE]
            tops = [
                top
                for top in range(len(strip) - SIDE + 1)
                if np.array_equal(strip[top], wanted[0]) and np.array_equal(strip[top : top + SIDE], wanted)
            ]
            assert len(tops) == 1, f"{pair['pair_id']}: column {column}"


def test_questions_and_answers_are_shown_only_when_asked_for(tmp_path: Path) -> None:
    sheets = {}
    for question in ("what is it?", "something else entirely"):
        for show in ("false", "true"):
            samples(tmp_path, question=question)
            path = preview(config(tmp_path, f"report.show_text={show}"), 2)
            sheets[question, show] = path.read_bytes()
    assert sheets["what is it?", "false"] == sheets["something else entirely", "false"]
    assert sheets["what is it?", "true"] != sheets["something else entirely", "true"]


@pytest.mark.parametrize("words", [40, 1], ids=["many_words", "one_long_word"])
def test_a_long_caption_is_wrapped_and_not_cut(words: int) -> None:
    font = ImageFont.load_default(12)
    line = ("effusion" * (400 // words // 8 or 1) + " ") * words + "end"
    pieces = _wrapped(line, 300, font)
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")
    assert len(pieces) > 3 and all(font.getlength(piece) <= 300 for piece in pieces)


def test_fewer_pairs_than_asked_for_and_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = samples(tmp_path)
    rows[2]["mask_uri"] = None
    storage.write_parquet(tmp_path / "samples" / "part-0.parquet", schemas.to_table(rows, schemas.SAMPLES))
    argv = ["curate", "--preview", "9", f"run.folder={tmp_path}", "curate.visual.tool=dataset_mask"]
    assert main(argv) == 0
    said = capfd.readouterr().err.replace("\n", " ")
    assert "3 visual pairs" in said
    assert "1 no_mask" in said


def test_pictures_of_any_shape_and_mode_fit(tmp_path: Path) -> None:
    rows = samples(tmp_path, 3)
    shapes = {"I;16": (5, 900), "RGBA": (700, 3), "L": (1, 1)}
    for row, (mode, (height, width)) in zip(rows, shapes.items(), strict=True):
        image = Image.fromarray(np.arange(height * width, dtype=np.uint16).reshape(height, width))
        (image if mode == "I;16" else image.convert("L").convert(mode)).save(row["image_uri"])
        Image.new("1", (width, height), 1).save(row["mask_uri"])
    path = preview(config(tmp_path, "curate.visual.noise.signal_share=0"), 3)
    assert Image.open(path).width == 4 * (SIDE + 8) + 8


def test_what_cannot_be_previewed_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run the stage"):
        preview(config(tmp_path), 2)
    samples(tmp_path)
    for count in (0, -1, 65):
        with pytest.raises(UserError, match="1 to 64"):
            preview(config(tmp_path), count)
    with pytest.raises(UserError, match="Choose a tool"):
        preview(config(tmp_path, "curate.visual.tool=none"), 2)
    samples(tmp_path, mask_uri=None)
    with pytest.raises(UserError, match="4 no_mask"):
        preview(config(tmp_path), 2)
    samples(tmp_path, question="What is the plane?", answer="Axial")
    with pytest.raises(UserError, match=r"curate\.visual\.questions=finding"):
        preview(config(tmp_path, "curate.visual.questions=finding"), 2)
    samples(tmp_path, split="test")
    with pytest.raises(UserError, match=r"data\.test_share"):
        preview(config(tmp_path), 2)
    assert not (tmp_path / "preview.png").exists()
    with pytest.raises(UserError, match="needs a path"):
        preview(config(tmp_path, 'run.folder="s3://bucket/run"'), 2)


def test_a_tool_with_a_model_works_in_this_process(tmp_path: Path) -> None:
    samples(tmp_path, 2)
    settings = config(tmp_path, "curate.visual.tool=self_attention", "model.path=phantom")
    assert preview(settings, 2).is_file()
