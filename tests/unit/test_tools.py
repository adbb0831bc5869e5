"""Visual tools: the data set's mask, and the attention of the model to align."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from tiny_llava import build_tiny_llava

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.settings import VisualCurationConfig
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual.tools.base import VisualTool, upsample
from mmedpo_ray.curate.visual.tools.dataset_mask import DatasetMask
from mmedpo_ray.curate.visual.tools.pretrained import path_fingerprint
from mmedpo_ray.curate.visual.tools.self_attention import SelfAttention, concentration, crop_box, patch_grid
from mmedpo_ray.io.images import load_image
from mmedpo_ray.phantom.world import generate


def sample(mask_uri: Path | None = None, question: str = "Is there a nodule?") -> dict[str, Any]:
    uri = str(mask_uri) if mask_uri else None
    return {"sample_id": "s", "question": question, "answer": "Yes", "mask_uri": uri}


def test_every_tool_of_the_settings_exists() -> None:
    for name in TOOLS:
        assert issubclass(TOOLS[name], VisualTool)
        values = {"medklip": {"checkpoint": "x"}, "text_prompted": {"model": "x"}}
        assert VisualCurationConfig.model_validate({"tool": name, **values}).tool == name
    assert {name for name in TOOLS if TOOLS[name].has_model} == set(TOOLS) - {"dataset_mask"}
    assert TOOLS["dataset_mask"].fingerprint(Config()) == []
    assert len(TOOLS["self_attention"].fingerprint(Config())) == 1
    assert "none" not in TOOLS


def test_asking_for_a_tool_imports_no_model_library() -> None:
    """Neither the registry nor any tool's class; only making one with a model does."""
    code = (
        "import sys\n"
        "from mmedpo_ray.config.tree import Config\n"
        "from mmedpo_ray.curate.tool_registry import TOOLS\n"
        "assert 'mmedpo_ray.curate.visual.tools.dataset_mask' not in sys.modules\n"
        "TOOLS['dataset_mask'](Config())\n"
        "assert 'mmedpo_ray.curate.visual.tools.medklip' not in sys.modules\n"
        "[TOOLS[name] for name in TOOLS]\n"
        "heavy = {'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_a_mask_of_any_mode_is_read(tmp_path: Path, mode: str) -> None:
    lesion = np.zeros((6, 8), bool)
    lesion[1:3, 2:5] = True
    if mode == "I;16":
        mask = Image.fromarray(lesion.astype(np.uint16) * 4000)
    else:
        mask = (
            Image.fromarray(lesion.astype(np.uint8) * 255)
            .convert("RGB" if mode == "P" else mode)
            .convert(mode)
        )
    mask.save(tmp_path / "m.png")
    [found] = DatasetMask(Config()).localise([Image.new("L", (8, 6))], [sample(tmp_path / "m.png")])
    assert found.heat_map is not None
    assert np.array_equal(found.heat_map, lesion.astype(np.float32))
    assert found.confidence == 1.0


def test_masks_that_are_no_use_say_why(tmp_path: Path) -> None:
    Image.new("L", (8, 6)).save(tmp_path / "empty.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    names = [None, "empty.png", "small.png", "broken.png", "absent.png"]
    rows = [sample(tmp_path / name if name else None) for name in names]
    found = DatasetMask(Config()).localise([Image.new("L", (8, 6))] * len(rows), rows)
    assert [f.problem for f in found] == ["no_mask", None, "mask_size", "mask_undecodable", "mask_missing"]
    assert [f.confidence for f in found] == [0.0] * 5


@pytest.mark.parametrize("kind", ["jpg", "webp", "jp2"])
@pytest.mark.parametrize("colour", [255, 200, (220, 30, 30)])
def test_a_lossy_mask_marks_no_ringing(tmp_path: Path, kind: str, colour: int | tuple[int, ...]) -> None:
    """What a lossy compression leaves around the lesion is no lesion."""
    shape = (64, 64) if isinstance(colour, int) else (64, 64, 3)
    pixels = np.zeros(shape, np.uint8)
    pixels[21:31, 19:29] = colour
    mask = tmp_path / f"m.{kind}"
    rates = {"irreversible": True, "quality_mode": "rates", "quality_layers": [10]}
    # Colours at full resolution, so that the edge is where it was.
    Image.fromarray(pixels).save(mask, **(rates if kind == "jp2" else {"quality": 75, "subsampling": 0}))
    [found] = DatasetMask(Config()).localise([Image.new("L", (64, 64))], [sample(mask)])
    assert np.count_nonzero(np.asarray(Image.open(mask))) > 100
    assert found.heat_map is not None
    marked = found.heat_map > 0
    assert marked[22:30, 20:28].all()
    assert not (marked[:19].any() or marked[33:].any() or marked[:, :17].any() or marked[:, 31:].any())
    assert abs(int(marked.sum()) - 100) <= (15 if kind == "jpg" else 40)


def test_a_jpeg_without_a_lesion_and_one_of_ones(tmp_path: Path) -> None:
    for name, value in (("black", 0), ("ones", 1)):
        Image.new("L", (8, 6), value).save(tmp_path / f"{name}.jpg")
    rows = [sample(tmp_path / "black.jpg"), sample(tmp_path / "ones.jpg")]
    found = DatasetMask(Config()).localise([Image.new("L", (8, 6))] * 2, rows)
    assert [one.confidence for one in found] == [0.0, 1.0]


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("P", "png"), ("I;16", "png"), ("L", "tiff")])
def test_every_label_of_a_lossless_mask_counts(tmp_path: Path, mode: str, suffix: str) -> None:
    labels = np.zeros((6, 8), np.uint16 if mode == "I;16" else np.uint8)
    labels[0, :3] = (1, 2, 255)
    mask = Image.fromarray(labels)
    if mode == "P":
        mask.putpalette([0, 0, 0] + [9, 200, 3] * 255)
    mask.save(tmp_path / f"m.{suffix}")
    [found] = DatasetMask(Config()).localise([Image.new("L", (8, 6))], [sample(tmp_path / f"m.{suffix}")])
    assert found.heat_map is not None
    assert np.array_equal(found.heat_map, (labels > 0).astype(np.float32))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_black_is_no_lesion_in_any_colours(tmp_path: Path, mode: str) -> None:
    lesion = np.zeros((6, 8), np.uint8)
    lesion[1:3, 2:5] = 255
    Image.fromarray(lesion).convert("RGB").convert(mode).save(tmp_path / "m.tiff")
    [found] = DatasetMask(Config()).localise([Image.new("L", (8, 6))], [sample(tmp_path / "m.tiff")])
    assert found.heat_map is not None
    assert np.array_equal(found.heat_map, (lesion > 0).astype(np.float32))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_mask_is_turned_as_its_image(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("image.png", "m.png", "m.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    image = load_image(str(tmp_path / "image.png"))
    for name in ("m.png", "m.jpg"):
        [found] = DatasetMask(Config()).localise([image], [sample(tmp_path / name)])
        assert found.heat_map is not None
        assert np.array_equal(found.heat_map > 0, np.asarray(image) > 0)


@pytest.mark.parametrize(("limit", "problem"), [(48, None), (47, "mask_too_large")])
def test_the_limit_on_pixels_is_that_of_the_images(tmp_path: Path, limit: int, problem: str | None) -> None:
    Image.new("L", (8, 6), 255).save(tmp_path / "m.png")
    tool = DatasetMask(load(None, (f"data.max_pixels={limit}",)))
    [found] = tool.localise([Image.new("L", (8, 6))], [sample(tmp_path / "m.png")])
    assert found.problem == problem


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> SelfAttention:
    folder = build_tiny_llava(tmp_path_factory.mktemp("model") / "llava")
    return SelfAttention(load(None, (f"model.path={folder}",)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_attention_covers_an_image_of_any_mode_and_shape(attention: SelfAttention, mode: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 70, 3), dtype=np.uint8)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 9)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    [found] = attention.localise([image], [sample()])
    assert found.heat_map is not None
    assert found.heat_map.shape == (40, 70)
    assert found.heat_map.dtype == np.float32
    assert found.heat_map.min() == 0
    assert 0.5 < found.heat_map.max() <= 1
    assert 0 < found.confidence < 1


def test_attention_depends_on_image_and_question(attention: SelfAttention) -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    first, second = attention.localise(images, [sample(), sample()])
    [other] = attention.localise(images[:1], [sample(question="Where is the effusion?")])
    [again] = attention.localise(images[:1], [sample()])
    assert np.array_equal(first.heat_map, again.heat_map)
    assert not np.allclose(first.heat_map, second.heat_map)
    assert not np.allclose(first.heat_map, other.heat_map)


def test_a_batch_gives_each_row_what_it_gets_alone(attention: SelfAttention) -> None:
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 255, (32, 24 + i, 3), dtype=np.uint8)) for i in range(4)]
    questions = [
        "Where?",
        "<image> What?",
        "Is there a large effusion in the lower zone of the left lung?",
        "Side?",
    ]
    rows = [sample(question=question) for question in questions]
    together = attention.localise(images, rows)
    assert [found.problem is None for found in together] == [True, False, True, True]
    for image, row, found in zip(images, rows, together, strict=True):
        [alone] = attention.localise([image], [row])
        assert found.problem == alone.problem
        assert found.confidence == pytest.approx(alone.confidence, abs=1e-5)
        if alone.heat_map is not None:
            assert found.heat_map is not None
            assert np.allclose(found.heat_map, alone.heat_map, atol=1e-5)


def test_an_image_placeholder_in_the_question_is_refused(attention: SelfAttention) -> None:
    [found] = attention.localise([Image.new("RGB", (32, 32))], [sample(question="<image> What?")])
    assert found.problem == "image_placeholder_in_question"


def test_attention_of_the_embedded_model_finds_lesions() -> None:
    """Half of the answers about a place point into the lesion, which covers about a twelfth of the image."""
    tool = SelfAttention(Config())
    images, rows, masks = [], [], []
    for phantom in generate("align", 25, seed=9):
        for question in phantom.questions:
            if question.topic == "location":
                images.append(Image.fromarray(phantom.image))
                rows.append({"sample_id": "s", "question": question.question, "answer": question.answer})
                masks.append(phantom.mask)
    found = tool.localise(images, rows)
    hits = [
        mask[np.unravel_index(f.heat_map.argmax(), mask.shape)] for f, mask in zip(found, masks, strict=True)
    ]
    assert len(hits) >= 5
    assert np.mean(hits) > 3 * np.mean([mask.mean() for mask in masks])


def test_real_masks_are_read_whole(shared_data: Path) -> None:
    """Every mask of the radiographs, which mark what their list says; images in their own modes."""
    folder = shared_data / "cxr_masks"
    read = 0
    for entry in json.loads((folder / "index.json").read_text()):
        image = load_image(str(folder / "images" / entry["image"]))
        uris = [folder / "masks" / mask["file"] for mask in entry["masks"].values()]
        found = DatasetMask(Config()).localise([image] * len(uris), [sample(uri) for uri in uris])
        for mask, one in zip(entry["masks"].values(), found, strict=True):
            assert one.problem is None
            assert one.confidence == 1.0
            assert one.heat_map is not None
            assert one.heat_map.shape == (image.height, image.width)
            assert set(np.unique(one.heat_map)) == {0.0, 1.0}
            assert one.heat_map.mean() == pytest.approx(mask["frac"], abs=1e-3)
            read += 1
    assert read > 12


def test_attention_on_real_images(attention: SelfAttention, shared_data: Path) -> None:
    paths = sorted((shared_data / "vqa_rad_sample" / "images").iterdir())
    images = [load_image(str(path)) for path in paths]
    assert len({image.mode for image in images}) > 1
    for image, found in zip(images, attention.localise(images, [sample()] * len(images)), strict=True):
        assert found.heat_map is not None
        assert found.heat_map.shape == (image.height, image.width)


def test_confidence_is_concentration() -> None:
    assert concentration(np.ones(16)) == pytest.approx(0)
    assert concentration(np.eye(16)[3]) == pytest.approx(1)
    assert concentration(np.zeros(16)) == 0
    assert 0 < concentration(np.r_[np.ones(15), 9.0]) < concentration(np.r_[np.ones(15), 99.0]) < 1


def test_the_heat_lies_where_the_hot_patch_is() -> None:
    grid = np.zeros((4, 4))
    grid[1, 3] = 1
    heat = upsample(grid, 40, 80, (0, 0, 80, 40))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 10 <= y < 20
    assert 60 <= x < 80
    # The model saw only the middle square.
    heat = upsample(np.ones((4, 4)) + grid, 40, 80, (20, 0, 60, 40))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 50 <= x < 60
    assert heat[:, :20].max() == 0
    assert heat[:, 60:].max() == 0
    assert upsample(np.ones((4, 4)), 8, 8, (0, 0, 8, 8)).max() == 0


def test_upsampling_is_bilinear() -> None:
    """Equal to interpolation by SciPy at the pixels' centres."""
    grid = np.random.default_rng(2).random((5, 7))
    heat = upsample(grid, 33, 90)
    y = (np.arange(33) + 0.5) / 33 * 5 - 0.5
    x = (np.arange(90) + 0.5) / 90 * 7 - 0.5
    expected = ndimage.map_coordinates(grid, np.meshgrid(y, x, indexing="ij"), order=1, mode="nearest")
    low, high = grid.min(), grid.max()
    np.testing.assert_allclose(heat, (expected - low) / (high - low), atol=1e-6)


def test_a_fingerprint_follows_what_is_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = path_fingerprint(str(tmp_path / "model"))
    (tmp_path / "model" / "notes.md").write_text("no part of the model")
    assert path_fingerprint(str(tmp_path / "model")) == before
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert path_fingerprint(str(tmp_path / "model")) != before
    file = tmp_path / "weights.pth"
    file.write_bytes(b"1")
    first = path_fingerprint(str(file))
    file.write_bytes(b"2")
    assert path_fingerprint(str(file)) != first
    assert (
        path_fingerprint("owner/model") == path_fingerprint("owner/model") != path_fingerprint("owner/other")
    )


def test_the_crop_of_clip_is_the_middle() -> None:
    clip = SimpleNamespace(
        size={"shortest_edge": 336},
        do_resize=True,
        do_center_crop=True,
        crop_size={"height": 336, "width": 336},
    )
    assert crop_box(clip, (800, 400)) == (200, 0, 600, 400)
    assert crop_box(clip, (400, 800)) == (0, 200, 400, 600)
    squeezed = SimpleNamespace(size={"height": 64, "width": 64}, do_resize=True, do_center_crop=False)
    assert crop_box(squeezed, (800, 400)) == (0, 0, 800, 400)


def test_only_square_grids_are_arranged() -> None:
    grid = patch_grid(np.arange(9))
    assert grid is not None
    assert grid.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert patch_grid(np.arange(8)) is None
