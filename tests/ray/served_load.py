"""Clients that ask an endpoint all the time, and what they see; for the tests of rollouts and faults."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mmedpo_ray.config.tree import Config
from mmedpo_ray.models.loading import resolve_model
from mmedpo_ray.phantom.render import render
from mmedpo_ray.tables.run_folder import ADAPTER, RunFolder

QUESTION = "Is there a nodule?"


def write_adapter(
    run: Path, seed: int, *, rank: int = 4, base: str = "phantom", columns: int | None = None
) -> None:
    """Writes what `export` writes after LoRA, with random weights that change the answers.

    ``columns``: fewer than the model's layers have, as of another model.
    """
    model = LlavaForConditionalGeneration.from_pretrained(resolve_model("phantom"), dtype=torch.float32)
    torch.manual_seed(seed)
    layers = r".*\.language_model\..*\.(q_proj|v_proj|up_proj)"
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = base
    folder = RunFolder(str(run)).model() / ADAPTER
    adapted.save_pretrained(str(folder))
    if columns is not None:
        weights = folder / "adapter_model.safetensors"
        save_file({name: value[:, :columns].clone() for name, value in load_file(weights).items()}, weights)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def make_config(run: Path, **serve: Any) -> Config:
    """Settings of an endpoint of the embedded model."""
    return Config.model_validate(
        {
            "run": {"folder": str(run)},
            "model": {"path": "phantom", "engine": {"kv_cache_gib": 0.25, "max_model_len": 256}},
            "serve": {"port": 0, "start_timeout_s": 240} | serve,
        }
    )


def body(model: str = "aligned", number: int = 0, **fields: Any) -> dict[str, Any]:
    """A question about a radiograph."""
    buffer = io.BytesIO()
    Image.fromarray(render(number, ())[0]).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
    } | fields


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        sent: seconds (:func:`time.monotonic`).
        received: seconds.
        status: of HTTP; 0: the connection broke.
        text: of the body.
        retry_after: header; None: there was none.
    """

    sent: float
    received: float
    status: int
    text: str
    retry_after: str | None = None

    @property
    def model(self) -> str:
        """Which version answered."""
        return json.loads(self.text)["model"]

    @property
    def tokens(self) -> list[tuple[str, float]]:
        """Tokens of the answer with their log-probabilities."""
        found = json.loads(self.text)["choices"][0]["logprobs"]["content"]
        return [(item["token"], round(item["logprob"], 3)) for item in found]


def ask(client: httpx.Client, base_url: str, request: dict[str, Any]) -> Answer:
    """One request."""
    sent = time.monotonic()
    try:
        response = client.post(f"{base_url}/chat/completions", json=request)
    except httpx.TransportError as error:
        return Answer(sent, time.monotonic(), 0, type(error).__name__)
    return Answer(
        sent, time.monotonic(), response.status_code, response.text, response.headers.get("Retry-After")
    )


@dataclass
class Load:
    """Answers to all clients, in the order in which they came."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def failed(self) -> list[Answer]:
        """Answers that are none."""
        return [answer for answer in self.answers if answer.status != 200]

    def longest_gap(self, start: float, end: float) -> float:
        """Longest time without a success, in seconds."""
        times = [answer.received for answer in self.answers if answer.status == 200]
        times = [start, *sorted(each for each in times if start < each < end), end]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def wait_for(self, count: int, timeout_s: float = 60) -> None:
        """Waits for so many more successes."""
        goal = sum(answer.status == 200 for answer in self.answers) + count
        deadline = time.monotonic() + timeout_s
        while sum(answer.status == 200 for answer in self.answers) < goal:
            assert time.monotonic() < deadline, self.failed[-3:]
            time.sleep(0.05)


@contextlib.contextmanager
def clients(base_url: str, count: int, requests: list[dict[str, Any]], pause_s: float = 0) -> Iterator[Load]:
    """Clients that ask one request after the other, in turn, until the block ends."""
    load, stop = Load(), threading.Event()

    def run(number: int) -> None:
        with httpx.Client(trust_env=False, timeout=180) as client:
            while not stop.is_set():
                load.answers.append(ask(client, base_url, requests[number % len(requests)]))
                number += 1
                # As a client that is told to come back later, though sooner than told.
                stop.wait(pause_s if load.answers[-1].status == 200 else 1)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()
