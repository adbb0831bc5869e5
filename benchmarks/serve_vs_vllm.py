"""The endpoint against bare vLLM: the same engine arguments, the same questions, interleaved on one machine.

    python benchmarks/serve_vs_vllm.py --model embedded --concurrency 1 8 32 --rounds 4
    python benchmarks/serve_vs_vllm.py --model image576 --tokens 64 --concurrency 8 32 200 1200
    python benchmarks/serve_vs_vllm.py --build before=../before        # another checkout beside this one

Every server is a process of its own and stays up; rounds alternate between them, with new images in each, so
that no cache is warm. A figure is the median over rounds of the ratio to bare vLLM in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from serving_model import IMAGE_SIZE, build_model, draw_image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.models.loading import load_processor, resolve_model
from mmedpo_ray.models.prompts import template_with_bos
from mmedpo_ray.models.vllm_engine import engine_settings

ROOT = Path(__file__).parents[1]
BARE = "vllm"


@dataclass
class Answer:
    """One answer.

    Attributes:
        seconds: from the request to its end.
        first: seconds until the first token; the whole for an answer that is not streamed.
        text: of the answer.
        tokens: of the answer.
    """

    seconds: float
    first: float
    text: str
    tokens: int


def main() -> None:
    """Prints ratios to bare vLLM for each concurrency, and writes all figures to ``--json``."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        embedded = arguments.model == "embedded"
        model = (
            Path(resolve_model("phantom")) if embedded else build_model(folder / "model", arguments.hidden, 8)
        )
        servers = {BARE: stack.enter_context(start_vllm(folder, model, arguments.max_num_seqs))}
        builds = {"here": str(ROOT)} | dict(item.split("=", 1) for item in arguments.build)
        for name, checkout in builds.items():
            started = start_endpoint(folder, name, Path(checkout), model, arguments.max_num_seqs)
            servers[name] = stack.enter_context(started)
        figures = []
        for concurrency in arguments.concurrency:
            for stream in {"both": (False, True), "no": (False,), "only": (True,)}[arguments.stream]:
                figures.append(compare(servers, arguments, concurrency, stream))
                print(describe(figures[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("embedded", "image576"), default="embedded")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model image576")
    parser.add_argument("--tokens", type=int, default=8, help="of every answer")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=128, help="per round, or as many as are in flight")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stream", choices=("both", "no", "only"), default="both")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--build", action="append", default=[], metavar="NAME=CHECKOUT")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextlib.contextmanager
def start_vllm(folder: Path, model: Path, max_num_seqs: int) -> Iterator[str]:
    """vLLM's own server with the arguments of the endpoint's engine. Yields its address."""
    config = Config.model_validate({"model": {"engine": {"max_num_seqs": max_num_seqs}}})
    settings = engine_settings(config.model.engine, has_gpu=False, model=model)
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--model={model}", "--served-model-name=base"]
    command += ["--disable-uvicorn-access-log", *map(as_option, settings.engine_kwargs.items())]
    if (template := template_with_bos(load_processor(str(model)))) is not None:
        (folder / "template.jinja").write_text(template)
        command.append(f"--chat-template={folder / 'template.jinja'}")
    with running(command, folder / "vllm.log", settings.env, port):
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def start_endpoint(folder: Path, name: str, checkout: Path, model: Path, max_num_seqs: int) -> Iterator[str]:
    """The endpoint of a checkout. Yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "mmedpo_ray.cli", "serve", f"run.folder={folder / name}"]
    command += [f"model.path={model}", f"model.engine.max_num_seqs={max_num_seqs}", f"serve.port={port}"]
    with running(command, folder / f"{name}.log", {"PYTHONPATH": str(checkout)}, port):
        yield f"http://127.0.0.1:{port}/v1"


def as_option(item: tuple[str, Any]) -> str:
    """An engine argument as an option of vLLM's command line."""
    name, value = item
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option}={json.dumps(value) if isinstance(value, dict) else value}"


@contextlib.contextmanager
def running(command: list[str], log: Path, variables: dict[str, str], port: int) -> Iterator[None]:
    """A server that answers for its models; it is stopped at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables, cwd=log.parent
        )
    try:
        deadline = time.monotonic() + 600
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[2]} does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=120)


def answers(port: int) -> bool:
    body = json.dumps({"model": "base", "prompt": "Hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compare(
    servers: dict[str, str], arguments: argparse.Namespace, concurrency: int, stream: bool
) -> dict[str, Any]:
    """Asks all servers in every round, in an order that rotates."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    differ = 0
    for number in range(arguments.rounds + 1):
        bodies = draw_bodies(arguments, max(arguments.requests, concurrency), stream, seed=number)
        texts = {}
        names = list(servers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds, replies = asyncio.run(ask(servers[name], bodies, concurrency))
            texts[name] = [reply.text for reply in replies]
            if number > 0:  # the first round warms up
                rounds[name].append(summarise(seconds, replies))
        pairs = zip(*texts.values(), strict=True)
        differ += sum(len(set(found)) > 1 for found in pairs)
    return {"concurrency": concurrency, "stream": stream, "rounds": rounds, "different_answers": differ}


def draw_bodies(arguments: argparse.Namespace, count: int, stream: bool, seed: int) -> list[bytes]:
    """Requests with an image each, which no cache has seen."""
    generator = np.random.default_rng([seed, count, stream])
    side = 32 if arguments.model == "embedded" else IMAGE_SIZE
    bodies = []
    for number in range(count):
        file = io.BytesIO()
        draw_image(generator, side).save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": f"Is there a nodule in lung {number}?"},
        ]
        body = {"model": "base", "messages": [{"role": "user", "content": content}], "temperature": 0}
        body |= {"max_tokens": arguments.tokens, "min_tokens": arguments.tokens}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        bodies.append(json.dumps(body).encode())
    return bodies


async def ask(base_url: str, bodies: list[bytes], concurrency: int) -> tuple[float, list[Answer]]:
    """Seconds for all answers, and the answers in order; an error ends the benchmark."""
    found: dict[int, Answer] = {}
    waiting = iter(enumerate(bodies))
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def work() -> None:
            for number, body in waiting:
                found[number] = await ask_once(session, f"{base_url}/chat/completions", body)

        started = time.monotonic()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.monotonic() - started
    return seconds, [found[number] for number in range(len(bodies))]


async def ask_once(session: aiohttp.ClientSession, url: str, body: bytes) -> Answer:
    started = time.monotonic()
    first, text, tokens = 0.0, "", 0
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {(await response.text())[:300]}")
        if response.content_type == "application/json":
            reply = await response.json()
            text, tokens = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
        else:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                    first = first or time.monotonic() - started
                    text += piece
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    seconds = time.monotonic() - started
    return Answer(seconds, first or seconds, text, tokens)


def summarise(seconds: float, replies: list[Answer]) -> dict[str, float]:
    waits = np.array([reply.seconds for reply in replies])
    return {
        "requests_per_s": len(replies) / seconds,
        "tokens_per_s": sum(reply.tokens for reply in replies) / seconds,
        "first_token_p50_s": float(np.median([reply.first for reply in replies])),
        "p50_s": float(np.median(waits)),
        "p99_s": float(np.quantile(waits, 0.99)),
    }


def describe(figure: dict[str, Any]) -> str:
    """Lines for people: bare vLLM's figures, and each build's ratios to them."""
    rounds, kind = figure["rounds"], "streamed" if figure["stream"] else "whole"
    bare = rounds[BARE]
    middle = {key: statistics.median(row[key] for row in bare) for key in bare[0]}
    lines = [
        f"{figure['concurrency']} in flight, {kind}: vLLM {middle['requests_per_s']:.1f} requests/s, "
        f"{middle['tokens_per_s']:.0f} tokens/s, first token {middle['first_token_p50_s']:.3f} s, "
        f"p99 {middle['p99_s']:.3f} s; {figure['different_answers']} answers differ"
    ]
    for name in rounds:
        if name == BARE:
            continue
        ratios = {
            key: [ours[key] / theirs[key] for ours, theirs in zip(rounds[name], bare, strict=True)]
            for key in middle
        }
        parts = (
            f"{key} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
            for key, found in ratios.items()
        )
        lines.append(f"  {name}: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
