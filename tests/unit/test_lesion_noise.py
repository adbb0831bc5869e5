"""Noise in the lesion region: equal to the formulas written out, confined to the mask, in every image
mode."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from mmedpo_ray.io.images import decode, to_rgb
from mmedpo_ray.io.png import encode_pixels
from mmedpo_ray.noise.lesion_noise import (
    Noised,
    add_lesion_noise,
    lesion_places,
    plain_mode,
    released_places,
)
from mmedpo_ray.noise.noise_schedule import signal_share
from mmedpo_ray.noise.settings import NoiseConfig

KEPT_MODES = ["L", "RGB", "RGBA", "LA", "I;16"]
MODES = [*KEPT_MODES, "1", "P", "I", "F", "CMYK"]
KINDS = ["random", "coarse", "binary", "constant", "zero", "one pixel"]


def picture(mode: str, height: int = 20, width: int = 24, seed: int = 0, grey: bool = False) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode in ("I;16", "I", "F"):
        values = rng.integers(100, 4000, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if grey:
        rgb = rgb.convert("L").convert("RGB")
    if mode in ("RGBA", "LA"):
        rgb.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return rgb.convert(mode)


def heat(height: int = 20, width: int = 24, seed: int = 0, kind: str = "random") -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.random((height, width))
    if kind == "coarse":
        values = rng.integers(0, 4, (height, width)) / 4
    elif kind == "binary":
        values = values > 0.6
    elif kind in ("constant", "zero"):
        values = np.full((height, width), 0.5 if kind == "constant" else 0.0)
    elif kind == "one pixel":
        values = values == values.max()
    return values.astype(np.float32)


def noised(image: Image.Image, heat_map: np.ndarray, seed: int = 0, **settings_: Any) -> Noised:
    return add_lesion_noise(image, heat_map, NoiseConfig(**settings_), np.random.default_rng(seed))


def hottest(heat_map: np.ndarray, area_share: float) -> np.ndarray:
    """The mask rule, slowly: the largest set "at least this hot" that fits, else the pixels of the highest
    value."""
    allowed = int(area_share * heat_map.size + 1e-6)
    for level in np.unique(heat_map[heat_map > 0]):
        if (heat_map >= level).sum() <= allowed:
            return heat_map >= level
    return (heat_map == heat_map.max()) & (heat_map > 0)


def written_out(image: Image.Image, heat_map: np.ndarray, config: NoiseConfig, seed: int) -> np.ndarray:
    """Every mode over the whole image, pixel values in float32, as its formula reads."""
    pixels = np.asarray(plain_mode(image))
    colours = pixels.reshape(*heat_map.shape, -1)
    num_bands = {1: 1, 2: 1, 3: 3, 4: 3}[colours.shape[2]]
    v = colours[..., :num_bands].astype(np.float32)
    low, high = (0.0, 255.0) if pixels.dtype == np.uint8 else (float(v.min()), float(v.max()))
    high = max(high, low + 1)
    if config.mode == "released":
        smooth = ndimage.gaussian_filter(heat_map, 2.6, radius=7, mode="mirror")
        mask = smooth > smooth.mean() - smooth.std()
    else:
        mask = hottest(heat_map, config.area_share)
    h = ((heat_map if config.mask == "soft" else np.float32(1)) * mask.astype(np.float32))[..., None]
    grey = bool((v[mask] == v[mask][:, :1]).all()) and config.mode != "released"
    side = None if config.mode == "released" else config.model_side
    grain = 2 * min(mask.shape) / side if side is not None and min(mask.shape) > side else 1
    y, x = (np.floor((np.arange(length) + 0.5) / grain).astype(int) for length in mask.shape)
    cells, cell = np.unique((y[:, None] * (x[-1] + 1) + x)[mask], return_inverse=True)
    draws = np.random.default_rng(seed).standard_normal((1 if grey else num_bands, len(cells)), np.float32)
    noise = np.zeros_like(v)
    noise[mask] = draws.T[cell]
    middle, half = (low + high) / 2, (high - low) / 2
    if config.mode == "diffusion":
        share = config.signal_share
        share = signal_share(config.steps, config.schedule) if share is None else share
        x = v - middle
        changed = (math.sqrt(share) * x + math.sqrt(1 - share) * half * noise) * h + x * (1 - h) + middle
    elif config.mode == "additive":
        changed = v + h * (config.std * (high - low) * noise)
    elif config.mode == "blur":
        sigma = config.blur_sigma * min(heat_map.shape)
        blurred = np.stack(
            [
                ndimage.gaussian_filter(v[..., i], sigma, truncate=3.0, mode="nearest")
                for i in range(num_bands)
            ],
            axis=2,
        )
        changed = h * blurred + (1 - h) * v
    else:
        stored = np.trunc(10 * noise).astype(np.int64) % 256
        changed = low + stored.astype(np.float32) * ((high - low) / 255.0)
    result = colours.copy()
    after = np.rint(np.clip(changed, low, high)).astype(pixels.dtype)
    result[..., :num_bands] = np.where(mask[..., None], after, colours[..., :num_bands])
    if pixels.dtype == np.uint16:
        # The range must stay: where its end is gone, the first pixel that had it keeps it.
        for end in (colours.min(), colours.max()):
            if not (result == end).any():
                result.ravel()[np.argmax(colours == end)] = end
    return result.reshape(pixels.shape)


CONFIGS = st.builds(
    NoiseConfig,
    mode=st.sampled_from(["diffusion", "additive", "blur", "released"]),
    steps=st.integers(1, 1000),
    schedule=st.sampled_from(["sigmoid", "linear", "cosine"]),
    signal_share=st.none() | st.floats(0, 0.99),
    std=st.floats(0.01, 2),
    blur_sigma=st.floats(0.01, 0.5),
    # Powers of two divide exactly in the slow form as well.
    model_side=st.sampled_from([None, 1, 2, 4, 8, 16, 32, 336]),
    mask=st.sampled_from(["hard", "soft"]),
    area_share=st.floats(0, 1),
)


@given(
    mode=st.sampled_from(MODES),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 1000),
    grey=st.booleans(),
    kind=st.sampled_from(KINDS),
    config=CONFIGS,
)
def test_every_mode_is_its_formula_and_stays_in_its_mask(
    mode: str, height: int, width: int, seed: int, grey: bool, kind: str, config: NoiseConfig
) -> None:
    image, heat_map = picture(mode, height, width, seed, grey), heat(height, width, seed, kind)
    result = add_lesion_noise(image, heat_map, config, np.random.default_rng(seed))
    plain = plain_mode(image)
    before, after = np.asarray(plain), np.asarray(result.image)
    assert (result.image.mode, result.image.size) == (plain.mode, image.size)
    assert before.dtype == after.dtype
    assert np.array_equal(after, written_out(image, heat_map, config, seed))
    assert np.array_equal(before[~result.mask], after[~result.mask])
    if plain.mode in ("RGBA", "LA"):
        assert np.array_equal(before[..., -1], after[..., -1])
    if plain.mode == "I;16":
        assert after.min() >= before.min()
        assert after.max() <= max(before.max(), before.min() + 1)
    changed = (before != after).reshape(*heat_map.shape, -1).any(axis=2)
    assert result.parameters["mask_share"] == pytest.approx(result.mask.mean(), rel=1e-5)
    assert result.parameters["changed_share"] == pytest.approx(changed.mean(), rel=1e-5)
    again = add_lesion_noise(image, heat_map, config, np.random.default_rng(seed))
    assert np.array_equal(np.asarray(again.image), after)
    assert again.parameters == result.parameters


@given(
    size=st.integers(1, 4000),
    levels=st.integers(1, 5000),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
    area_share=st.sampled_from([0.0, 0.15, 1.0]) | st.floats(0, 1),
)
def test_the_mask_is_the_hottest_pixels_that_fit(
    size: int, levels: int, ordered: bool, seed: int, area_share: float
) -> None:
    values = np.random.default_rng(seed).integers(0, levels, (1, size)) / np.float32(levels)
    heat_map = (np.sort(values) if ordered else values).astype(np.float32)
    mask = np.zeros(heat_map.shape, bool)
    mask.ravel()[lesion_places(heat_map, area_share)] = True
    assert np.array_equal(mask, hottest(heat_map, area_share))
    highest = (heat_map == heat_map.max()).mean()
    assert mask.mean() <= max(area_share + 1e-6, highest)


def test_a_sample_that_misleads_does_not_change_the_mask() -> None:
    # The values that the sample sees say nothing about the others.
    for seen, others in ((1.0, 0.2), (0.0, 0.9), (0.5, 0.5)):
        heat_map = np.full((64, 64), others, np.float32) * np.linspace(
            0.9, 1, 4096, dtype=np.float32
        ).reshape(64, 64)
        heat_map.ravel()[::251] = seen
        places = lesion_places(heat_map, 0.1)
        assert np.array_equal(places, np.flatnonzero(hottest(heat_map, 0.1)))


def test_a_lesion_mask_is_kept_whole_and_a_heat_map_is_cut() -> None:
    lesion = np.zeros((10, 10), np.float32)
    lesion[2:8, 2:8] = 1
    assert np.array_equal(lesion_places(lesion, 0.1), np.flatnonzero(lesion))
    assert len(lesion_places(np.zeros((10, 10), np.float32), 0.1)) == 0
    ramp = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    assert lesion_places(ramp, 0.15).tolist() == list(range(85, 100))
    # Four equal pixels at the threshold do not fit into the two places that are left.
    ramp.ravel()[96:] = [0.99, 1, 1, 1]
    ramp.ravel()[92:96] = 0.95
    assert lesion_places(ramp, 0.06).tolist() == [96, 97, 98, 99]


def test_a_grey_picture_in_colour_stays_grey() -> None:
    for mode in ("diffusion", "additive", "blur"):
        after = np.asarray(noised(picture("RGB", grey=True), heat(), mode=mode).image)
        assert (after == after[..., :1]).all()
    after = np.asarray(noised(picture("RGB"), heat()).image)
    assert not (after == after[..., :1]).all()


def test_the_statistics_of_the_papers_noise() -> None:
    image = Image.fromarray(np.full((200, 200), 200, np.uint8))
    whole = np.ones((200, 200), np.float32)
    after = np.asarray(noised(image, whole, steps=120, schedule="linear").image) / 127.5 - 1
    share = signal_share(120, "linear")
    noise = np.random.default_rng(1).standard_normal(10**6)
    expected = np.clip(np.sqrt(share) * (200 / 127.5 - 1) + np.sqrt(1 - share) * noise, -1, 1)
    assert after.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert after.std() == pytest.approx(expected.std(), abs=0.01)


@pytest.mark.parametrize(
    ("mode", "strength"), [("diffusion", {"signal_share": 0.96}), ("additive", {"std": 0.1})]
)
@pytest.mark.parametrize("size", [(512, 512), (1024, 700)])
def test_noise_survives_the_shrinking_to_what_the_model_sees(
    mode: str, strength: dict[str, Any], size: tuple[int, int]
) -> None:
    image, whole = Image.fromarray(np.full(size, 128, np.uint8)), np.ones(size, np.float32)

    def left(**settings_: Any) -> float:
        """Share of the noise's variance left when the shorter side is shrunk to 336, as CLIP's processor
        does."""
        result = noised(image, whole, mode=mode, area_share=1, **strength, **settings_)
        shrunk = [round(side * 336 / min(size)) for side in reversed(size)]
        small = result.image.resize(shrunk, Image.Resampling.BICUBIC)
        return float(np.asarray(small, np.float64).var() / np.asarray(result.image, np.float64).var())

    assert 0.7 < left() < 0.9
    assert left(model_side=None) < 0.35
    # Each pixel alone is as noisy as before.
    coarse, fine = (
        noised(image, whole, mode=mode, area_share=1, **strength, model_side=side) for side in (336, None)
    )
    assert np.asarray(coarse.image).std() == pytest.approx(np.asarray(fine.image).std(), rel=0.03)
    assert coarse.parameters["grain"] == pytest.approx(2 * min(size) / 336, rel=1e-5)
    assert fine.parameters["grain"] == 1


def test_what_the_model_sees_whole_gets_noise_in_single_pixels() -> None:
    image, heat_map = picture("RGB", 40, 60), heat(40, 60)
    fine = noised(image, heat_map, model_side=None)
    assert np.array_equal(fine.pixels, noised(image, heat_map, model_side=40).pixels)
    assert not np.array_equal(fine.pixels, noised(image, heat_map, model_side=39).pixels)
    released = noised(image, heat_map, mode="released", model_side=8)
    assert np.array_equal(released.pixels, noised(image, heat_map, mode="released", model_side=None).pixels)


def test_the_signal_share_can_be_given_itself() -> None:
    share = signal_share(300, "linear")
    by_steps = noised(picture("L"), heat(), steps=300, schedule="linear")
    given_itself = noised(picture("L"), heat(), signal_share=share)
    assert np.array_equal(np.asarray(by_steps.image), np.asarray(given_itself.image))
    assert by_steps.parameters["signal_share"] == given_itself.parameters["signal_share"]
    assert "steps" in by_steps.parameters
    assert "steps" not in given_itself.parameters


@pytest.mark.parametrize("shape", [(90, 120), (90, 120, 3)])
def test_released_is_the_authors_script(shape: tuple[int, ...]) -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    grid = rng.random((14, 14), dtype=np.float32).repeat(16, 0).repeat(16, 1)
    heat_map = cv2.resize(grid, (120, 90), interpolation=cv2.INTER_LINEAR)
    result = noised(Image.fromarray(pixels), heat_map, mode="released")
    # What the script does: blur, threshold, floats stored into 8 bits (its own noise; ours in its place).
    smooth = cv2.GaussianBlur(heat_map, (15, 15), 0)
    mask = smooth > np.mean(smooth) - np.std(smooth)
    assert np.array_equal(result.mask, mask)
    noise = np.zeros(shape)
    bands = 3 if len(shape) == 3 else 1
    draws = np.random.default_rng(0).standard_normal((bands, mask.sum()), np.float32)
    noise[mask] = (np.float32(10) * draws).T.reshape(noise[mask].shape)
    expected = pixels.copy()
    with np.errstate(invalid="ignore"):
        expected[mask] = noise[mask].astype(np.int64).astype(np.uint8)
    assert np.array_equal(np.asarray(result.image), expected)
    # Most of the image is gone; half of the new values are nearly black, half nearly white.
    assert mask.mean() > 0.7
    new = np.asarray(result.image)[mask]
    assert ((new < 50) | (new > 205)).all()
    assert 0.4 < (new > 205).mean() < 0.5


def test_a_constant_map_has_no_released_mask() -> None:
    assert len(released_places(np.zeros((30, 30), np.float32))) == 0


@pytest.mark.parametrize(
    ("image", "settings_"),
    [
        (Image.fromarray(np.full((30, 30), 77, np.uint8)), {"mode": "blur"}),
        (Image.fromarray(np.full((30, 30), 77, np.uint8)), {"mode": "additive", "std": 1e-6}),
        (picture("L", 30, 30), {"signal_share": 0.9999999}),
    ],
)
def test_noise_that_changes_nothing_says_so(image: Image.Image, settings_: dict[str, Any]) -> None:
    result = noised(image, heat(30, 30), **settings_)
    assert result.parameters["changed_share"] == 0
    assert result.parameters["mask_share"] > 0


def test_one_changed_pixel_of_many_is_not_rounded_away() -> None:
    image = Image.fromarray(np.full((2000, 2000), 100, np.uint8))
    heat_map = np.zeros((2000, 2000), np.float32)
    heat_map[7, 7] = 1
    result = noised(image, heat_map, signal_share=0.0)
    assert result.parameters["changed_share"] == result.parameters["mask_share"] == 2.5e-07


@pytest.mark.parametrize("schedule", ["sigmoid", "linear", "cosine"])
def test_the_signal_fades_with_the_steps(schedule: str) -> None:
    shares = [signal_share(steps, schedule) for steps in (1, 250, 500, 750, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert 0 <= shares[-1] < 0.2


@pytest.mark.parametrize(
    "heat_map",
    [np.ones((3, 3)), np.full((20, 24), 1.5), np.full((20, 24), -0.1), np.full((20, 24), np.nan)],
)
def test_a_wrong_heat_map_is_refused(heat_map: np.ndarray) -> None:
    with pytest.raises(ValueError, match="heat map"):
        noised(picture("L"), heat_map)


MARKED = ["L", "RGB", "P", "1"]


def marked_transparent(mode: str, height: int, width: int, seed: int) -> Image.Image:
    """A PNG that declares one of its colours transparent (tRNS), as read back."""
    image = picture(mode, height, width, seed)
    first = image.getpixel((0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bool(first) if mode == "1" else first)
    found = decode(buffer.getvalue(), "x.png")
    assert "transparency" in found.info
    return found


@given(
    mode=st.sampled_from([*MODES, *(f"{mode} tRNS" for mode in MARKED), "I;16 spot", "F spot"]),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    config=CONFIGS,
)
def test_a_model_sees_the_same_outside_the_mask(
    mode: str, height: int, width: int, seed: int, kind: str, config: NoiseConfig
) -> None:
    heat_map = heat(height, width, seed, kind)
    plain, _, more = mode.partition(" ")
    image = (
        marked_transparent(plain, height, width, seed)
        if more == "tRNS"
        else picture(plain, height, width, seed)
    )
    if more == "spot":
        # The brightest pixel of all is in the lesion.
        values = np.asarray(image).copy()
        values.ravel()[np.argmax(heat_map)] = 60_000
        image = Image.fromarray(values)
    result = add_lesion_noise(image, heat_map, config, np.random.default_rng(seed))
    as_file = decode(encode_pixels(result.pixels), "x.png")
    before, after = (np.asarray(to_rgb(item)).astype(int) for item in (image, as_file))
    # Float and 32-bit values pass through 16 bits, which may round one that lies between two greys otherwise.
    most = 1 if plain in ("F", "I") else 0
    assert np.abs(before - after)[~result.mask].max(initial=0) <= most


@pytest.mark.parametrize(("steps", "schedule"), [(0, "linear"), (1001, "linear"), (5, "square")])
def test_a_wrong_schedule_is_refused(steps: int, schedule: str) -> None:
    with pytest.raises(ValueError, match=r"steps|schedule"):
        signal_share(steps, schedule)


def test_float_pictures_with_holes_are_usable() -> None:
    values = np.linspace(0, 5, 480, dtype=np.float32).reshape(20, 24)
    values[3, 3] = np.nan
    plain = plain_mode(Image.fromarray(values))
    assert plain.mode == "I;16"
    assert np.asarray(plain)[3, 3] == 0
    assert np.asarray(plain).max() == 65535
