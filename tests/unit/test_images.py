"""Image files: what is read and how often, what is decoded, and what a model sees of it."""

from __future__ import annotations

import errno
import gzip
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pyarrow import fs

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import images, pillow_images, storage
from mmedpo_ray.io.images import ImageError
from mmedpo_ray.noise.lesion_noise import add_lesion_noise
from mmedpo_ray.noise.settings import NoiseConfig


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes, **limits: Any) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        images.decode(data, "x", **limits)
    return caught.value.reason, caught.value.detail


# ---------------------------------------------------------------------- size


def headers_only(width: int, height: int) -> dict[str, bytes]:
    small = {kind: saved(Image.new("L", (3, 2)), kind) for kind in ("BMP", "GIF", "TIFF")}
    ifd = small["TIFF"]
    for tag, value in ((256, width), (257, height)):
        short = struct.pack("<HHI", tag, 3, 1)
        at = ifd.find(short) if short in ifd else ifd.index(struct.pack("<HHI", tag, 4, 1))
        ifd = ifd[:at] + struct.pack("<HHII", tag, 4, 1, value) + ifd[at + 12 :]
    return {
        "PNG": png(width, height, 8, 2, b""),
        "BMP": small["BMP"][:18] + struct.pack("<ii", width, height) + small["BMP"][26:],
        "GIF": small["GIF"][:6] + struct.pack("<HH", width, height) + small["GIF"][10:],
        "TIFF": ifd,
    }


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_the_limit_on_pixels_is_ours_alone(kind: str) -> None:
    data = headers_only(20_000, 20_000)[kind]
    assert reason_of(data) == ("image_too_large", "x: 20000×20000 pixels, limit 100000000")
    if kind in ("PNG", "BMP"):
        # Pillow's limit would end it here; ours lets the decoder find that there are no pixels.
        assert reason_of(data, max_pixels=400_000_000)[0] == "image_undecodable"
    if kind == "TIFF":
        found = ("image_too_large", "x: more pixels than Pillow decodes of this format")
        assert reason_of(data, max_pixels=400_000_000) == found


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "PPM"])
def test_pillows_own_limit_has_no_say_and_stays_for_others(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.new("L", (40, 30), 7), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.decode(data, "x").size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_an_image_of_a_table_has_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 4)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert images.load_rgb(str(tmp_path / "a.png")).size == (8, 8)


def test_a_loader_answers_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    refused = {0: PermissionError(errno.EACCES, "Permission denied")} | {
        number: OSError(_SLOW_DOWN) for number in (1, 2, 3, 4, 5, 7, 8)
    }
    asked: list[int] = []
    whole = storage.read_bytes

    def failing(uri: str, max_bytes: int | None = None) -> bytes:
        asked.append(int(Path(uri).stem))
        if asked[-1] in refused:
            raise refused[asked[-1]]
        return whole(uri, max_bytes)

    monkeypatch.setattr(storage, "read_bytes", failing)
    monkeypatch.setattr(images, "WAITS", (0.0, 0.0))
    loader = images.ImageLoader(max_pixels=16)
    uris = [str(tmp_path / f"{number}.png") for number in range(9)]
    found = [loader.load(uri) for uri in uris]
    assert [number for number, image in enumerate(found) if isinstance(image, Image.Image)] == [6]
    assert all(image.reason == "image_unreadable" for image in found if isinstance(image, ImageError))
    assert str(found[0]) == f"image_unreadable: {uris[0]}: PermissionError"
    assert str(found[1]) == f"image_unreadable: {uris[1]}: OSError", "no words of the store"
    # A store that failed three times running is waited for again once it has answered.
    assert [asked.count(number) for number in range(9)] == [1, 3, 3, 3, 1, 1, 1, 3, 3]
    Image.new("L", (4, 5)).save(tmp_path / "9.png")
    large = loader.load(str(tmp_path / "9.png"))
    assert isinstance(large, ImageError)
    assert large.reason == "image_too_large"


# ---------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize(
    ("colour", "values", "mode", "expected"),
    [
        (0, [40_000, 255], "I;16", [40_000, 255]),
        (2, [0, 256, 65535, 40_000, 128, 32_768], "RGB", [[0, 1, 255], [156, 0, 128]]),
        (4, [40_000, 65535, 255, 0], "RGBA", [[156, 156, 156, 255], [0, 0, 0, 0]]),
        (6, [0, 256, 65535, 40_000] * 2, "RGBA", [[0, 1, 255, 156]] * 2),
    ],
    ids=["grey", "RGB", "grey with alpha", "RGBA"],
)
def test_of_sixteen_bits_only_grey_keeps_its_depth(
    colour: int, values: list[int], mode: str, expected: list[Any]
) -> None:
    image = images.decode(png(2, 1, 16, colour, b"\0" + struct.pack(f">{len(values)}H", *values)), "x")
    assert (image.mode, np.asarray(image).tolist()) == (mode, [expected])


def several(kind: str, **options: Any) -> bytes:
    first, second = Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 200)
    return saved(first, kind, save_all=True, append_images=[second], **options)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_several_pages_or_an_animation_are_not_one_image(kind: str) -> None:
    found = reason_of(several(kind))
    assert found == ("image_multi_frame", "x: 2 frames; set data.frames, or export the one that is meant")
    assert images.decode(saved(Image.new("L", (8, 8), 10), kind), "x").size == (8, 8)


def test_a_photo_with_a_preview_is_one_image() -> None:
    image = images.decode(several("MPO"), "x.jpg")
    assert (image.format, image.size) == ("MPO", (8, 8))


def test_what_cannot_be_shown_is_not_decoded() -> None:
    lab = saved(Image.new("LAB", (4, 4)), "TIFF")
    assert reason_of(lab) == ("image_undecodable", "x: colours as LAB; convert it to RGB")
    packed = gzip.compress(saved(Image.new("L", (4, 4)), "PNG"))
    assert reason_of(packed) == ("image_undecodable", "x: compressed with gzip; unpack it first")
    assert reason_of(b"") == ("image_undecodable", "x: ValueError")


def held(orientation: int, kind: str, mode: str = "RGB", *, xmp: bool = False) -> bytes:
    """A photograph of 24 × 16 pixels whose camera was held so."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8], pixels[8:, :8] = 255, (90, 20, 160)
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    if xmp:
        options["xmp"] = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    return saved(Image.fromarray(pixels).convert(mode), kind, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"xmp": True}),
        ("JPEG", "L", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {}),
        ("TIFF", "RGB", {}),
    ],
)
def test_everyone_sees_a_photograph_as_a_viewer_shows_it(
    orientation: int, kind: str, mode: str, options: dict[str, bool]
) -> None:
    data = held(orientation, kind, mode, **options)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = images.decode(data, "x")
    assert (image.format, image.size) == (kind, shown.size)
    assert np.array_equal(np.asarray(image), np.asarray(shown))
    if kind != "TIFF":
        # Pillow itself turns TIFF.
        assert (pillow_images.TURNED in image.info) == (orientation > 1)
    for seen in (image, rgb := images.to_rgb(image)):
        # As vLLM does with every image.
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(seen)), np.asarray(seen))
    if mode == "RGB":
        assert np.array_equal(np.asarray(rgb), np.asarray(shown))
        heat_map = np.zeros((shown.height, shown.width), np.float32)
        heat_map[:4, :6] = 1
        noised = add_lesion_noise(image, heat_map, NoiseConfig(), np.random.default_rng(0))
        assert np.array_equal(noised.pixels[heat_map == 0], np.asarray(shown)[heat_map == 0])


def test_damaged_exif_turns_nothing() -> None:
    whole = held(6, "PNG")
    start, size = whole.index(b"eXIf"), len(Image.open(io.BytesIO(whole)).info["exif"]) - 6
    for body in (b"", b"no EXIF at all", whole[start + 4 : start + 4 + size - 9]):
        data = whole[: start - 4] + chunk(b"eXIf", body) + whole[start + size + 8 :]
        image = images.decode(data, "x")
        assert image.size == (24, 16)
        assert not {"exif"} & set(image.info)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"),
        (Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4) * 10**6), "TIFF"),
        (Image.fromarray(np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)), "TIFF"),
        (Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000), "PNG"),
        (Image.new("1", (4, 4), 1), "PNG"),
        (Image.new("P", (4, 4), 1), "PNG"),
        (Image.new("YCbCr", (4, 4)), "TIFF"),
    ],
)
def test_modes_become_rgb(image: Image.Image, kind: str) -> None:
    rgb = images.to_rgb(images.decode(saved(image, kind), "x"))
    assert (rgb.mode, rgb.size) == ("RGB", (4, 4))
    if image.mode in ("I", "F", "I;16"):
        pixels = np.asarray(rgb)[..., 0].ravel()
        assert (pixels[0], pixels[-1]) == (0, 255)
        assert (np.diff(pixels.astype(int)) >= 0).all()


def test_values_that_are_no_numbers_are_the_ends_of_the_range() -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, 5.0], [1.0, 3.0]], np.float32)
    assert np.asarray(images.to_rgb(Image.fromarray(values)))[..., 0].tolist() == [
        [0, 255],
        [0, 255],
        [0, 128],
    ]
    nothing = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    assert not np.asarray(images.to_rgb(nothing)).any()


# ---------------------------------------------------------------------- storage that fails


class Store:
    """Stands in for a file system: fails so many times with an error, then opens the file."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error = error
        self.left = times
        self.asked = 0

    type_name = "store"

    def _look(self) -> None:
        self.asked += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error

    def open_input_file(self, path: str) -> Any:
        self._look()
        return fs.LocalFileSystem().open_input_file(path)

    def get_file_info(self, path: str) -> Any:
        self._look()
        return fs.LocalFileSystem().get_file_info(path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], Store]:
    def make(error: Exception, times: int) -> Store:
        made = Store(error, times)
        monkeypatch.setattr(storage, "resolve", lambda uri: (made, str(uri)))
        monkeypatch.setattr(images, "WAITS", (0.0, 0.0))
        return made

    return make


_SLOW_DOWN = "AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."


def test_errors_that_pass_are_waited_out(tmp_path: Path, store: Callable[..., Store]) -> None:
    (tmp_path / "a").write_bytes(b"data")
    uri = str(tmp_path / "a")
    for error in (
        OSError(_SLOW_DOWN),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
    ):
        failing = store(error, 2)
        assert images.read_file(uri, waits=(0, 0)) == b"data"
        assert failing.asked == 3
        failing = store(error, 2)
        assert images.exists(uri, waits=(0, 0))
        failing = store(error, 9)
        with pytest.raises(type(error)):
            images.read_file(uri, waits=(0, 0))
        assert failing.asked == 3
        with pytest.raises(type(error)):
            images.exists(uri, waits=(0, 0))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (FileNotFoundError(errno.ENOENT, "No such file"), ImageError),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), ImageError),
        (OSError(errno.ENAMETOOLONG, "File name too long"), ImageError),
    ],
)
def test_errors_that_last_are_not(store: Callable[..., Store], error: Exception, found: type) -> None:
    failing = store(error, 9)
    with pytest.raises(found):
        images.read_file("/a", waits=(0, 0))
    assert failing.asked == 1


def test_a_store_that_cannot_be_reached_is_not_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(uri: str) -> Any:
        raise UserError("cannot open") from OSError("no route to host")

    monkeypatch.setattr(storage, "resolve", resolve)
    with pytest.raises(OSError, match="no route"):
        images.read_file("s3://a/b", waits=())
    monkeypatch.undo()
    with pytest.raises(ImageError, match="image_missing"):
        images.read_file("pigeon://a/b", waits=())


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert images.read_file(str(tmp_path / "a"), max_bytes=5) == b"12345"
    with pytest.raises(ImageError, match="5 bytes, limit 4"):
        images.read_file(str(tmp_path / "a"), max_bytes=4)
