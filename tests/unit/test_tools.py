"""Visual tools: the data set's mask, and the attention of the model to align."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.config import Config, load
from mmedpo_ray.curate.tools import TOOLS, DatasetMask, SelfAttention
from mmedpo_ray.curate.tools.self_attention import concentration, crop_box, patch_grid, upsample
from mmedpo_ray.data.phantom import generate
from mmedpo_ray.images import load_image


def sample(mask_uri: Path | None = None, question: str = "Is there a nodule?") -> dict[str, Any]:
    uri = str(mask_uri) if mask_uri else None
    return {"sample_id": "s", "question": question, "answer": "Yes", "mask_uri": uri}


def test_every_configured_tool_exists() -> None:
    for name in TOOLS:
        assert load(None, (f"curate.visual.tool={name}",)).curate.visual.tool == name


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
