"""DICOM in every compression that has a decoder here, at every depth, and damaged."""

from __future__ import annotations

import subprocess
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
from dicom_files import RAMP, SAMPLES, colour_of, compressed, dataset_of, file_of, seen, seen_file
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid

from mmedpo_ray.io import images
from mmedpo_ray.io.image_error import MADE_BY, ImageError

DEPTHS = (2, 4, 6, 7, 8, 10, 12, 14, 16)
_ENCODERS = {
    uid.JPEGLosslessSV1: lambda pixels, bits: imagecodecs.ljpeg_encode(pixels, bitspersample=bits),
    uid.JPEGLSLossless: lambda pixels, bits: imagecodecs.jpegls_encode(pixels),  # whole bytes only
    uid.JPEG2000Lossless: lambda pixels, bits: imagecodecs.jpeg2k_encode(
        pixels, level=0, codecformat="j2k", bitspersample=bits, reversible=True
    ),
    uid.HTJ2KLossless: lambda pixels, bits: imagecodecs.htj2k_encode(pixels, reversible=True),  # as well
}
_PAIRS = [
    (syntax, bits)
    for syntax in _ENCODERS
    for bits in ((8, 16) if syntax in (uid.JPEGLSLossless, uid.HTJ2KLossless) else DEPTHS)
]


def ramp_of(bits: int) -> np.ndarray:
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint8 if bits <= 8 else np.uint16)
    # Noise that a decoder must not smooth.
    noise = np.random.default_rng(bits).integers(0, 2**bits, (16, 64)).astype(ramp.dtype)
    return np.concatenate([np.tile(ramp, (8, 1)), noise])


@pytest.mark.parametrize(("syntax", "bits"), _PAIRS)
def test_lossless_compressions_at_every_depth(syntax: uid.UID, bits: int) -> None:
    pixels = ramp_of(bits)
    data = compressed(dataset_of(pixels, bits), [_ENCODERS[syntax](pixels, bits)], syntax)
    plain = images.decode(file_of(dataset_of(pixels, bits)), "x")
    found = images.decode(data, "x")
    assert found.mode == plain.mode
    assert (np.asarray(found) == np.asarray(plain)).all()


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.HTJ2KLossless], ids=["j2k", "htj2k"])
@pytest.mark.parametrize("bits", [8, 16])
def test_signed_pixels(syntax: uid.UID, bits: int) -> None:
    pixels = (ramp_of(bits).astype(np.int64) - 2 ** (bits - 1)).astype(f"i{bits // 8}")
    data = compressed(dataset_of(pixels), [_ENCODERS[syntax](pixels, bits)], syntax)
    assert (
        np.asarray(images.decode(data, "x")) == np.asarray(images.decode(file_of(dataset_of(pixels)), "x"))
    ).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("term", ["RGB", "YBR_RCT"])
def test_colours_by_jpeg_2000(bits: int, term: str) -> None:
    """Pillow reads no more than 8 bits of them."""
    grey = ramp_of(bits)
    pixels = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1)
    frame = imagecodecs.jpeg2k_encode(
        pixels, level=0, codecformat="j2k", bitspersample=bits, reversible=True, mct=term == "YBR_RCT"
    )
    data = compressed(colour_of(pixels, bits, PhotometricInterpretation=term), [frame], uid.JPEG2000Lossless)
    assert (np.asarray(images.decode(data, "x")) == pixels >> (bits - 8)).all()


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_a_real_12_bit_jpeg(name: str) -> None:
    path = SAMPLES / name
    if not path.is_file():
        folder = pytest.importorskip("data_store").__path__[0]
        path = next(path for path in (type(path)(folder) / "data").rglob(name))
    image = images.decode(path.read_bytes(), "x")
    assert image.mode == "I;16"
    # As GDCM and libjpeg of the JPEG committee decode it.
    assert (image.size, image.getextrema()) == ((256, 1024), (0, 264))


@pytest.mark.parametrize("quality", [98, 90])
def test_12_bit_jpeg(quality: int) -> None:
    frame = imagecodecs.jpeg8_encode(RAMP, level=quality, bitspersample=12)
    data = compressed(dataset_of(RAMP, 12), [frame], uid.JPEGExtended12Bit)
    assert np.abs(seen_file(data) - seen(dataset_of(RAMP, 12))).max() <= 2


@pytest.mark.parametrize("term", ["YBR_FULL_422", "YBR FULL 422", "YBR_PARTIAL_422", "YCBCR", "", "UNKNOWN"])
def test_colours_by_jpeg_under_any_name(term: str) -> None:
    """Luminance and differences, without a marker that says so."""
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    pixels = np.stack([grey, grey[:, ::-1], np.full_like(grey, 40)], axis=-1)
    frame = imagecodecs.jpeg8_encode(pixels, level=98, subsampling="444")
    start = frame.index(b"\xff\xe0")
    frame = frame[:start] + frame[start + 2 + int.from_bytes(frame[start + 2 : start + 4], "big") :]
    made = colour_of(pixels, PhotometricInterpretation=term)
    found = np.asarray(images.decode(compressed(made, [frame], uid.JPEGBaseline8Bit), "x")).astype(int)
    assert np.abs(found - pixels).max() <= 6


def test_frames_deflated_one_by_one() -> None:
    frames = [RAMP, RAMP[:, ::-1]]
    packers = [zlib.compressobj(wbits=-15) for _ in frames]
    packed = [
        packer.compress(frame.tobytes()) + packer.flush()
        for packer, frame in zip(packers, frames, strict=True)
    ]
    made = dataset_of(np.stack(frames), 12, NumberOfFrames=2)
    # pydicom does not write a syntax that it does not know.
    data = compressed(made, packed, uid.JPEGLosslessSV1).replace(
        uid.JPEGLosslessSV1.encode(), b"1.2.840.10008.1.2.8.1\0"
    )
    plain = seen(dataset_of(RAMP, 12))
    assert (seen_file(data, frame=1) == plain).all()
    assert (seen_file(data, frame=2) == plain[::-1]).all()


def test_only_the_frame_that_is_asked_for_is_decoded() -> None:
    frames = [imagecodecs.ljpeg_encode(RAMP, bitspersample=12), b"damaged "]
    data = compressed(dataset_of(np.stack([RAMP, RAMP]), 12, NumberOfFrames=2), frames, uid.JPEGLosslessSV1)
    assert (seen_file(data, frame=1) == seen(dataset_of(RAMP, 12))).all()
    with pytest.raises(ImageError):
        images.decode(data, "x", frame=2)


@pytest.mark.parametrize("syntax", [uid.MPEG4HP41, uid.HEVCMP51])
def test_video_says_what_to_do(syntax: uid.UID) -> None:
    with pytest.raises(ImageError) as error:
        images.decode(compressed(dataset_of(RAMP, 12), [b"video "], syntax), "x")
    assert error.value.reason == "image_undecodable"
    assert "export its frames" in error.value.detail


def test_damaged_frames_say_what_may_help() -> None:
    with pytest.raises(ImageError) as error:
        images.decode(compressed(dataset_of(RAMP, 12), [b"damaged "], uid.JPEGLosslessSV1), "x")
    assert "install a decoder" in error.value.detail


def test_a_frame_larger_than_declared_is_not_decoded() -> None:
    big = imagecodecs.ljpeg_encode(np.zeros((4000, 4000), np.uint16), bitspersample=12)
    with pytest.raises(ImageError):
        images.decode(compressed(dataset_of(RAMP, 12), [big], uid.JPEGLosslessSV1), "x")


def test_few_bits_do_not_end_the_process() -> None:
    """GDCM, where it is installed, aborts on such files."""
    pixels = ramp_of(4)
    data = compressed(
        dataset_of(pixels, 4), [imagecodecs.ljpeg_encode(pixels, bitspersample=4)], uid.JPEGLosslessSV1
    )
    code = (
        "import sys; from mmedpo_ray.io import images; print(images.decode(sys.stdin.buffer.read(), "
        "'x').info)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert MADE_BY.encode() in done.stdout


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from([uid.JPEGLosslessSV1, uid.JPEG2000Lossless]),
)
def test_damaged_frames_are_refused_or_shown(changes: list[tuple[int, int]], syntax: uid.UID) -> None:
    frame = bytearray(_ENCODERS[syntax](RAMP, 12))
    for place, value in changes:
        frame[place % len(frame)] = value
    try:
        image = images.decode(compressed(dataset_of(RAMP, 12), [bytes(frame)], syntax), "x")
    except ImageError as error:
        assert error.reason == "image_undecodable"
    else:
        assert image.size == (64, 64)
