"""Noise in the lesion region: the paper's formula, its limits, every image mode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedpo_ray.config import NoiseConfig
from mmedpo_ray.curate.lesion_noise import add_lesion_noise, hard_mask, plain_mode, signal_share
from mmedpo_ray.images import encode_png

MODES = ["L", "RGB", "RGBA", "LA", "I;16", "1", "P", "I", "F", "CMYK"]


def picture(mode: str, height: int = 20, width: int = 24, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode in ("I;16", "I", "F"):
        values = rng.integers(100, 4000, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("RGBA", "LA"):
        rgb.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return rgb.convert(mode)


def heat(image: Image.Image) -> np.ndarray:
    """A warm blob off the centre."""
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    return np.exp(-((x - 8.0) ** 2 + (y - 9.0) ** 2) / 20).astype(np.float32)


def noised(
    image: Image.Image, seed: int = 0, **settings_: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    result = add_lesion_noise(image, heat(image), NoiseConfig(**settings_), np.random.default_rng(seed))
    return np.asarray(plain_mode(image)), np.asarray(result.image), result.mask


@pytest.mark.parametrize("mode", MODES)
def test_outside_a_hard_mask_nothing_changes_in_any_mode(mode: str) -> None:
    before, after, mask = noised(picture(mode), area_share=0.2, steps=900)
    assert before.dtype == after.dtype
    assert np.array_equal(before[mask == 0], after[mask == 0])
    changed = (before != after).reshape(*mask.shape, -1).any(axis=2)
    assert changed[mask == 1].mean() > (0.5 if mode == "1" else 0.9)
    assert mask.mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "I;16"])
def test_modes_that_png_knows_are_kept(mode: str) -> None:
    image = picture(mode)
    result = add_lesion_noise(image, heat(image), NoiseConfig(), np.random.default_rng(0))
    assert result.image.mode == mode
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(encode_png(result.image)))), np.asarray(result.image)
    )
    if mode in ("RGBA", "LA"):
        assert np.array_equal(np.asarray(image)[..., -1], np.asarray(result.image)[..., -1])


@pytest.mark.parametrize("mode", ["diffusion", "released"])
def test_the_same_seed_gives_the_same_bytes(mode: str) -> None:
    image = picture("RGB")

    def run(seed: int) -> bytes:
        result = add_lesion_noise(image, heat(image), NoiseConfig(mode=mode), np.random.default_rng(seed))
        return encode_png(result.image)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_grey_picture_in_colour_stays_grey() -> None:
    _, after, _ = noised(picture("L").convert("RGB"))
    assert (after == after[..., :1]).all()
    _, after, _ = noised(picture("RGB"))
    assert not (after == after[..., :1]).all()


def test_the_formula_of_the_paper() -> None:
    image = Image.fromarray(np.full((200, 200), 200, np.uint8))
    whole = np.ones((200, 200), np.float32)
    config = NoiseConfig(steps=120, schedule="linear")
    after = np.asarray(add_lesion_noise(image, whole, config, np.random.default_rng(0)).image) / 127.5 - 1
    share = signal_share(120, "linear")
    clipped_mean = np.clip(
        np.sqrt(share) * (200 / 127.5 - 1)
        + np.sqrt(1 - share) * np.random.default_rng(1).standard_normal(10**6),
        -1,
        1,
    )
    assert after.mean() == pytest.approx(clipped_mean.mean(), abs=0.01)
    assert after.std() == pytest.approx(clipped_mean.std(), abs=0.01)


def test_a_soft_mask_scales_signal_and_noise() -> None:
    image = picture("L")
    config = NoiseConfig(mask="soft", steps=700)
    result = add_lesion_noise(image, heat(image), config, np.random.default_rng(0))
    x = np.asarray(image) / 127.5 - 1
    h, share = heat(image), signal_share(700, "sigmoid")
    noise = np.random.default_rng(0).standard_normal(x.shape)
    expected = np.sqrt(share) * x * h + np.sqrt(1 - share) * noise * h + x * (1 - h)
    expected = np.round(np.clip((expected + 1) * 127.5, 0, 255))
    assert np.abs(np.asarray(result.image) - expected).max() <= 1


def test_the_released_form_blackens_most_of_the_image() -> None:
    before, after, mask = noised(picture("L"), mode="released")
    assert mask.mean() > 0.5
    assert after[mask == 1].mean() < 10
    assert np.array_equal(before[mask == 0], after[mask == 0])


@pytest.mark.parametrize("schedule", ["sigmoid", "linear", "cosine"])
def test_the_signal_fades_with_the_steps(schedule: str) -> None:
    shares = [signal_share(steps, schedule) for steps in (1, 250, 500, 750, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert 0 <= shares[-1] < 0.2


def test_a_lesion_mask_is_kept_whole_and_a_heat_map_is_cut() -> None:
    lesion = np.zeros((10, 10), np.float32)
    lesion[2:8, 2:8] = 1
    assert np.array_equal(hard_mask(lesion, 0.1), lesion)
    assert hard_mask(np.zeros((10, 10), np.float32), 0.1).sum() == 0
    ramp = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    assert hard_mask(ramp, 0.15).sum() == 15


@pytest.mark.parametrize(
    "heat_map",
    [np.ones((3, 3)), np.full((20, 24), 1.5), np.full((20, 24), -0.1), np.full((20, 24), np.nan)],
)
def test_a_wrong_heat_map_is_refused(heat_map: np.ndarray) -> None:
    with pytest.raises(ValueError, match="heat map"):
        add_lesion_noise(picture("L"), heat_map, NoiseConfig(), np.random.default_rng(0))


@pytest.mark.parametrize(("steps", "schedule"), [(0, "linear"), (1001, "linear"), (5, "square")])
def test_a_wrong_schedule_is_refused(steps: int, schedule: str) -> None:
    with pytest.raises(ValueError, match=r"steps|schedule"):
        signal_share(steps, schedule)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 1000),
    settings_=st.builds(
        NoiseConfig,
        mode=st.sampled_from(["diffusion", "released"]),
        steps=st.integers(1, 1000),
        schedule=st.sampled_from(["sigmoid", "linear", "cosine"]),
        mask=st.sampled_from(["hard", "soft"]),
        area_share=st.floats(0, 1),
    ),
)
def test_size_type_and_the_rest_of_the_image_survive(
    mode: str, height: int, width: int, seed: int, settings_: NoiseConfig
) -> None:
    image = picture(mode, height, width, seed)
    heat_map = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    result = add_lesion_noise(image, heat_map, settings_, np.random.default_rng(seed))
    before, after = np.asarray(plain_mode(image)), np.asarray(result.image)
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    assert np.array_equal(before[result.mask == 0], after[result.mask == 0])
    assert result.parameters["mask_share"] == pytest.approx((result.mask > 0).mean(), abs=1e-5)
