"""The page in a real browser: an image, two answers, a vote, noise and an empty image, keys and errors."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import uvicorn
from dicom_files import RAMP, dataset_of, file_of
from endpoint_app import KEY, Endpoint, png
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
MARKUP = "<img src=x onerror=document.title='hacked'> <b>No</b> effusion."


class Server:
    """The application on a free port; answers depend on the model and on whether the image is empty."""

    def __init__(self, **settings: Any) -> None:
        self.endpoint = Endpoint(max_pixels=1_000_000, **settings)
        self.endpoint.engines.stream = self._stream  # type: ignore[method-assign]
        self.server = uvicorn.Server(
            uvicorn.Config(self.endpoint.app, host="127.0.0.1", port=0, log_level="warning")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    async def _stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        answer = MARKUP if body["model"] == "base" or len(image) < 2_000 else "Yes, on the left."
        for word in answer.split(" "):
            await asyncio.sleep(0.01)
            yield 200, f"data: {json.dumps({'choices': [{'delta': {'content': word + ' '}}]})}\n\n"
        yield 200, "data: [DONE]\n\n"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def page(browser: Any, errors: list[str]) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()


def test_two_models_are_compared_blind_and_the_vote_is_kept(
    page: Any, errors: list[str], tmp_path: Path
) -> None:
    server = Server(votes_folder=str(tmp_path / "votes"))
    try:
        page.goto(server.url)
        page.locator("#examples button").first.click()
        page.locator("#canvas").wait_for()
        page.locator("#ask").click()
        page.locator("#votes").wait_for()
        names = [page.locator(f"#{side}-name").inner_text() for side in ("left", "right")]
        assert names == ["Left", "Right"], "no name before the vote"
        answers = {page.locator(f"#{side}").inner_text() for side in ("left", "right")}
        assert answers == {MARKUP, "Yes, on the left."}, "an answer is shown as it is, never read as HTML"
        assert page.locator("article img, article b").count() == 0 and "hacked" not in page.title()
        page.locator("[data-vote=left]").click()
        page.locator("#voted:not(:empty)").wait_for()
        revealed = [page.locator(f"#{side}-name").inner_text() for side in ("left", "right")]
        assert sorted(revealed) == ["aligned", "base"]
        [row] = pq.read_table(tmp_path / "votes" / "votes.parquet").to_pylist()
        assert [row["left_model"], row["right_model"]] == revealed
        assert row["chosen"] == row["left_answer"] and row["rejected"] == row["right_answer"]

        page.locator("#look").click()
        page.locator("#look-rows td").nth(7).wait_for()
        page.locator("#stop").wait_for(state="hidden")
        changed = [cell.get_attribute("class") for cell in page.locator("#look-rows td").all()]
        assert changed.count("changed") == 1 and changed[-1] == "changed", "one model ignores the image"
        assert errors == []
    finally:
        server.stop()


def test_the_heat_map_is_laid_over_the_image(page: Any, errors: list[str]) -> None:
    asked: list[tuple[bytes, str, str]] = []
    grey = np.zeros((64, 64), np.uint8)
    grey[:, 32:] = 255

    async def heat_map(*given: Any) -> tuple[bytes, float]:
        asked.append(given)
        return png(grey), 0.5

    server = Server(heat_maps=heat_map, heat_map="self_attention")
    try:
        page.goto(server.url)
        page.locator("#examples button").first.click()
        page.locator("#canvas").wait_for()
        before = Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
        page.locator("#heat-map").fill("80")
        page.locator("#heat[title*='0.500']").wait_for()
        after = Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
        changed = np.abs(np.asarray(after, int) - np.asarray(before, int)).sum(2) > 30
        middle = changed.shape[1] // 2
        assert changed[:, :middle].mean() < 0.01 and changed[:, middle:].mean() > 0.3
        page.locator("#heat-map").fill("30")
        assert len(asked) == 1, "the map stays; only its opacity changes"
        assert errors == []
    finally:
        server.stop()


def test_a_dicom_file_is_windowed_and_used_from_the_keyboard(page: Any, errors: list[str]) -> None:
    server = Server()
    try:
        page.goto(server.url)
        files = {"name": "image.dcm", "mimeType": "", "buffer": file_of(dataset_of(RAMP, 12))}
        page.locator("#file").set_input_files(files)
        page.locator("#canvas").wait_for()
        assert "16 bits" in page.locator("#about").inner_text()
        before = page.locator("#canvas").screenshot()
        page.locator("#invert").press("Enter")
        assert page.locator("#invert").get_attribute("aria-pressed") == "true"
        assert page.locator("#canvas").screenshot() != before
        page.locator("#question").fill("Is there a nodule?")
        page.locator("#question").press("Enter")
        page.locator("#left").get_by_text("effusion").or_(
            page.locator("#left").get_by_text("Yes")
        ).first.wait_for()
        assert errors == []
    finally:
        server.stop()


def test_errors_are_told_and_keys_are_asked_for(page: Any, errors: list[str]) -> None:
    server = Server(keys=(KEY,))
    try:
        page.goto(server.url)
        page.locator("#key").fill("a-wrong-key-of-this-test")
        page.locator("button[value=save]").click()
        page.locator("#key-dialog[open]").wait_for()
        page.locator("#key").fill(KEY)
        page.locator("button[value=save]").click()
        page.locator("#examples img").nth(5).wait_for()
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"hello"})
        page.locator("#message").get_by_text("image_undecodable").wait_for()
        page.locator("#examples button").first.click()
        page.locator("#canvas").wait_for()
        server.endpoint.engines.up = False
        page.locator("#ask").click()
        page.locator("#message").get_by_text("Try again in 5 s").wait_for()
        server.stop()
        page.locator("#ask").click()
        page.locator("#message").get_by_text("cannot be reached").wait_for()
        assert errors == []
    finally:
        server.stop()


def test_it_fits_a_phone(browser: Any) -> None:
    server = Server()
    try:
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.goto(server.url)
        page.locator("#examples img").nth(5).wait_for()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        page.close()
    finally:
        server.stop()
