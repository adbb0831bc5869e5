"""Whether an image for which rows were dropped can be used now."""

from __future__ import annotations

import errno
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mmedpo_ray.ingest.retry_images import any_changed
from mmedpo_ray.ingest.settings import DataConfig
from mmedpo_ray.io import images, storage


def failed(path: Path, reason: str) -> pa.Table:
    return pa.table({"image_uri": [str(path)], "drop_reason": [reason]})


def test_images_that_fail_as_before_have_not_changed(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    data = DataConfig(max_pixels=399)
    assert not any_changed(failed(tmp_path / "none.png", "image_missing"), data)
    assert not any_changed(failed(tmp_path / "text.png", "image_undecodable"), data)
    assert not any_changed(failed(tmp_path / "large.png", "image_too_large"), data)


def test_images_that_came_or_were_repaired_have_changed(tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    for reason in ("image_missing", "image_undecodable", "image_too_large", "image_unreadable"):
        assert any_changed(failed(tmp_path / "good.png", reason), DataConfig())
    both = [failed(tmp_path / "none.png", "image_missing"), failed(tmp_path / "good.png", "image_missing")]
    assert any_changed(pa.concat_tables(both), DataConfig())
    assert any_changed(failed(tmp_path / "text.png", "image_missing"), DataConfig()), (
        "its reason is another now"
    )


def test_an_outage_says_nothing_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "read_bytes", fails)
    monkeypatch.setattr(images, "WAITS", (0.0,))
    for reason in ("image_missing", "image_undecodable", "image_unreadable"):
        assert not any_changed(failed(tmp_path / "a.png", reason), DataConfig())
