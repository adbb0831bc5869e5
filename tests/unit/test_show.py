"""`mmedpo show`, and the frames of files that hold several pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_ray.cli import main
from mmedpo_ray.config.load import load
from mmedpo_ray.evaluate.client import image_data_url
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.io import images
from mmedpo_ray.io.image_error import ImageError


def pages(path: Path, count: int, side: int = 8) -> Path:
    frames = [Image.new("L", (side, side), 10 * (number + 1)) for number in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def test_show_writes_what_a_model_sees(tmp_path, capsys):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    (tmp_path / "other").mkdir()
    Image.new("RGBA", (4, 2), (200, 0, 0, 0)).save(tmp_path / "other" / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    files = [str(tmp_path / name) for name in ("deep.png", "other/deep.png", "broken.png", "missing.png")]
    assert main(["show", *files, "--out", str(tmp_path / "out"), "--json"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line.get("reason") for line in lines] == [None, None, "image_undecodable", "image_missing"]
    first, second = (np.asarray(Image.open(line["png"])) for line in lines[:2])
    assert (first == np.asarray(images.to_rgb(images.load_image(files[0])))).all()
    assert second.shape == (2, 4, 3)
    assert not second.any()
    assert Path(lines[1]["png"]).name == "deep-2.png"


def test_show_prints_a_line_a_picture(tmp_path, capsys):
    path = pages(tmp_path / "stack.tif", 3)
    assert main(["show", str(path), "--out", str(tmp_path)]) == 2
    assert main(["show", str(path), "--out", str(tmp_path), "--frames", "all"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "image_multi_frame" in printed[0]
    assert [Path(line.split(" -> ")[1].split(": ")[0]).name for line in printed[1:]] == [
        f"stack-frame{number}.png" for number in (1, 2, 3)
    ]
    assert "8×8" in printed[1]


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_an_address_names_a_frame(tmp_path, suffix):
    path = str(pages(tmp_path / f"stack.{suffix}", 3))
    for number in (1, 2, 3):
        uri = images.with_frame(path, number)
        assert images.file_and_frame(uri) == (path, number)
        assert np.asarray(images.load_rgb(uri))[0, 0, 0] == pytest.approx(10 * number, abs=2)
        assert images.exists(uri)
        # The endpoint gets this frame, not the file.
        assert image_data_url(uri).startswith("data:image/png;base64,")
    with pytest.raises(ImageError):
        images.load_image(path)
    with pytest.raises(ImageError) as error:
        images.load_image(images.with_frame(path, 4))
    assert error.value.reason == "image_no_such_frame"


def test_a_single_picture_is_its_first_frame(tmp_path):
    path = str(tmp_path / "one.png")
    Image.new("L", (4, 4), 7).save(path)
    assert (
        np.asarray(images.load_rgb(images.with_frame(path, 1))) == np.asarray(images.load_rgb(path))
    ).all()


def test_rows_that_name_frames(tmp_path):
    pages(tmp_path / "a.tif", 3)
    rows = [
        {"id": str(number), "image": f"a.tif#frame={number}", "conversations": [
            {"from": "human", "value": "Is there a mass?"}, {"from": "gpt", "value": "Yes"}]}
        for number in (1, 3, 4)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = [f"run.folder={tmp_path / 'run'}", f"data.root={tmp_path}", "data.image_folder=."]
    config = load(None, [*settings, "data.format=llava_json", "data.train_file=rows.json"])
    reader = FORMATS["llava_json"](config)
    found = [row for unit in reader.units() for row in reader.samples(unit)]
    assert [row.get("drop_reason") for row in found] == [None, None, "image_no_such_frame"]
    greys = [np.asarray(images.load_rgb(row["image_uri"]))[0, 0, 0] for row in found[:2]]
    assert greys == [10, 30]
    assert [row["image_id"].rsplit("/", 1)[1] for row in found[:2]] == ["a.tif~f1", "a.tif~f3"]
    assert found[0]["split"] == found[1]["split"]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ("refuse", {"a": None, "b": ""}),
        ("first", {"a": "#frame=1", "b": ""}),
        ("middle", {"a": "#frame=2", "b": ""}),
        ("all", {"a~f1": "#frame=1", "a~f2": "#frame=2", "a~f3": "#frame=3", "b": ""}),
    ],
)
def test_samples_of_files_with_several_frames(tmp_path, frames, expected):
    (tmp_path / "images").mkdir()
    pages(tmp_path / "images" / "a.tif", 3)
    pages(tmp_path / "images" / "a_mask.tif", 3)
    Image.new("L", (4, 4)).save(tmp_path / "images" / "b.png")
    rows = [
        {"id": name, "image": image, "mask": mask, "conversations": [
            {"from": "human", "value": "Is there a mass?"}, {"from": "gpt", "value": "Yes"}]}
        for name, image, mask in (("a", "a.tif", "a_mask.tif"), ("b", "b.png", None))
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = load(
        None,
        [
            f"run.folder={tmp_path / 'run'}",
            f"data.root={tmp_path}",
            "data.format=llava_json",
            "data.train_file=rows.json",
            f"data.frames={frames}",
        ],
    )
    reader = FORMATS["llava_json"](config)
    found = [row for unit in reader.units() for row in reader.samples(unit)]
    by_name = {row["sample_id"].rsplit("/", 1)[1]: row for row in found}
    assert by_name.keys() == expected.keys()
    for name, suffix in expected.items():
        row = by_name[name]
        if suffix is None:
            assert row["drop_reason"] == "image_multi_frame"
            continue
        assert images.file_and_frame(row["image_uri"])[1] == (
            int(suffix.removeprefix("#frame=")) if suffix else None
        )
        if suffix:
            assert row["mask_uri"].endswith(suffix)
    kept = [row for name, row in by_name.items() if name.startswith("a") and expected[name] is not None]
    # All frames are of one split, and each is an image of its own.
    assert len({row["split"] for row in kept}) <= 1
    assert len({row["image_id"] for row in kept}) == len(kept)
    assert len({row["image_sha256"] for row in kept}) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_that_pillow_does_not_know_is_turned_as_others_are(orientation):
    import io

    import tifffile

    pixels = np.arange(12).reshape(3, 4) * 20
    pictures = []
    for kind in ("uint8", "float64"):
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer,
            pixels.astype(kind),
            photometric="minisblack",
            extratags=[(274, "H", 1, orientation, True)],
        )
        pictures.append(
            np.asarray(images.to_rgb(images.decode(buffer.getvalue(), "x")))[..., 0].astype(float)
        )
    eight, deep = pictures
    assert eight.shape == deep.shape
    assert np.abs(deep - eight * 255 / 220).max() <= 1


def test_a_narrow_range_far_from_0_keeps_its_levels():
    import io

    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, 2.0**30 + np.arange(12, dtype=np.float64).reshape(3, 4), photometric="minisblack"
    )
    shown = np.asarray(images.to_rgb(images.decode(buffer.getvalue(), "x")))[..., 0]
    assert len(set(shown.ravel().tolist())) == 12
