"""The page's routes: files under a strict policy, decoded images, and votes that train the next model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_files import RAMP, dataset_of, file_of
from endpoint_app import KEY, Endpoint, data_url, png
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.serve.page.heat_map import HeatMapTool, build_heat_maps

BYTES = {"Content-Type": "application/octet-stream"}
DEEP = np.random.default_rng(0).integers(900, 41_000, (12, 16)).astype(np.uint16)


def vote(endpoint: Endpoint, choice: str, **changes: Any) -> httpx.Response:
    body = {
        "question": "Is there an effusion?",
        "image": data_url(png()),
        "left": {"model": "base", "answer": "No."},
        "right": {"model": "aligned", "answer": "Yes, on the left."},
        "vote": choice,
    }
    return endpoint.send("POST", "/page/votes", json=body | changes)


def test_the_page_loads_without_a_key_and_without_anything_from_elsewhere() -> None:
    endpoint = Endpoint(keys=(KEY,))
    page = endpoint.send("GET", "/")
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("page.css", "page.js", "viewer.js", "client.js"):
        assert endpoint.send("GET", f"/page/{name}").status_code == 200
    for name in ("page/settings", "page/examples/0", "v1/models"):
        assert endpoint.send("GET", f"/{name}").status_code == 401
    assert (
        endpoint.send("GET", "/page/..%2Frouter.py", headers={"Authorization": f"Bearer {KEY}"}).status_code
        == 404
    )


@pytest.mark.parametrize(
    ("data", "kind", "pixels"),
    [
        (png(), "grey8", np.arange(64).reshape(8, 8)),
        (png(DEEP), "grey16", DEEP),
        (file_of(dataset_of(RAMP, 12)), "grey16", None),
        (png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), "rgb", np.arange(192).reshape(8, 8, 3)),
    ],
)
def test_images_come_as_pixels(data: bytes, kind: str, pixels: np.ndarray | None) -> None:
    answer = Endpoint().send("POST", "/page/decode", content=data, headers=BYTES)
    assert answer.headers["X-Kind"] == kind
    found = np.frombuffer(answer.content, np.uint8 if kind == "rgb" else "<u2")
    height, width = int(answer.headers["X-Height"]), int(answer.headers["X-Width"])
    assert found.size == height * width * (3 if kind == "rgb" else 1)
    if pixels is not None:
        assert np.array_equal(found, pixels.ravel())


def test_files_that_are_no_image_are_refused() -> None:
    endpoint = Endpoint(max_pixels=63, max_image_mib=0.01)
    for data, status in ((b"hello", 400), (b"", 400), (png(), 400), (b"\0" * 11_000, 413)):
        assert endpoint.send("POST", "/page/decode", content=data, headers=BYTES).status_code == status


def test_examples_are_radiographs_of_the_embedded_world() -> None:
    endpoint = Endpoint()
    count = endpoint.send("GET", "/page/settings").json()["examples"]
    pictures = {endpoint.send("GET", f"/page/examples/{number}").content for number in range(count)}
    assert len(pictures) == count
    assert all(Image.open(io.BytesIO(item)).size == (256, 256) for item in pictures)
    assert endpoint.send("GET", f"/page/examples/{count}").status_code == 404


def test_votes_are_preference_pairs_for_ingest(tmp_path: Path) -> None:
    endpoint = Endpoint(votes_folder=str(tmp_path / "votes"))
    for number, choice in enumerate(("left", "right", "tie", "both_wrong"), start=1):
        assert vote(endpoint, choice, question=f"Question {number}?").json() == {"votes": number}
    rows = pq.read_table(tmp_path / "votes" / "votes.parquet").to_pylist()
    assert [row["vote"] for row in rows] == ["left", "right", "tie", "both_wrong"]
    settings = [
        "data.format=trl",
        f"data.root={tmp_path / 'votes'}",
        "data.train_file=votes.parquet",
        f"run.folder={tmp_path / 'run'}",
        "curate.text.method=released",
    ]
    reader = FORMATS["trl"](load(None, settings))
    samples: dict[str, Any] = {}
    pairs, dropped = [], []
    for unit in reader.units():
        samples |= {row["sample_id"]: row for row in reader.samples(unit) if not row.get("drop_reason")}
        for pair in reader.pairs(unit, samples):
            (dropped if pair.get("drop_reason") else pairs).append(pair)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("No.", "Yes, on the left."),
        ("Yes, on the left.", "No."),
    ]
    assert len(dropped) == 2, "a tie and two wrong answers are no pairs"


@pytest.mark.parametrize(
    "changes",
    [
        {"vote": "up"},
        {"vote": None},
        {"question": ""},
        {"left": {"model": "base"}},
        {"left": {"model": "base", "answer": ""}},
        {"image": "https://images.example/a.png"},
        {"image": data_url(b"hello")},
        {"more": 1},
    ],
)
def test_a_vote_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    endpoint = Endpoint(votes_folder=str(tmp_path / "votes"))
    assert vote(endpoint, "left", **changes).status_code == 400
    assert not (tmp_path / "votes").exists()


def test_votes_can_be_switched_off() -> None:
    endpoint = Endpoint()
    assert endpoint.send("GET", "/page/settings").json()["votes"] is False
    assert vote(endpoint, "left").status_code == 404


def test_a_tool_gives_a_heat_map_of_the_images_size() -> None:
    """The embedded model's own attention, in the class that a Serve replica holds."""
    config = load(None, ["serve.heat_map=self_attention", "model.path=phantom"])
    tool = HeatMapTool(config.model_dump(mode="json"), 10_000)
    found = tool(png(np.zeros((48, 64), np.uint8)), "Is there a nodule?", "")
    assert isinstance(found, tuple) and 0 <= found[1] <= 1
    heat_map = Image.open(io.BytesIO(found[0]))
    assert heat_map.size == (64, 48) and heat_map.mode == "L" and heat_map.getextrema()[1] > 200
    assert tool(b"no image", "Is there a nodule?", "") == "image_undecodable"


def test_heat_maps_are_asked_for_through_the_endpoint() -> None:
    asked: list[tuple[bytes, str, str]] = []

    async def heat_map(*given: Any) -> tuple[bytes, float]:
        asked.append(given)
        return png(), 0.25

    endpoint = Endpoint(heat_maps=heat_map, heat_map="self_attention")
    body = {"image": data_url(png()), "question": "Is there a nodule?", "answer": "No."}
    answer = endpoint.send("POST", "/page/heat_map", json=body)
    assert answer.content == png() and answer.headers["X-Confidence"] == "0.250"
    assert asked == [(png(), "Is there a nodule?", "No.")]
    assert endpoint.send("GET", "/page/settings").json()["heat_map"] == "self_attention"
    for wrong in ({"image": "x"}, {"extra": 1}, {"question": "x" * 5000}):
        assert endpoint.send("POST", "/page/heat_map", json=body | wrong).status_code == 400
    assert Endpoint().send("POST", "/page/heat_map", json=body).status_code == 404


def test_an_unknown_tool_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"serve\.heat_map"):
        build_heat_maps(load(None, ["serve.heat_map=self_atention"]), 10_000)
