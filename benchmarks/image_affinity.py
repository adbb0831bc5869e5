"""Two replicas, several questions about every image: routing by image against Serve's default router.

    python benchmarks/image_affinity.py --images 32 --questions 11 --rounds 3

Both endpoints run at the same time with the same random LLaVA (576 image tokens); rounds alternate,
with new images in every round, so that no cache is warm. Answers must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from serving_model import build_model, draw_image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.evaluate.client import Question, QuestionClient
from mmedpo_ray.serve.endpoint import Endpoint, start_endpoint

ROUTERS = ("image", "power_of_two")


def main() -> None:
    """Prints answers per second of both routers and the ratio, and writes them to ``--json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--questions", type=int, default=11, help="per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = build_model(folder / "model", arguments.hidden, arguments.layers)
        endpoints = {
            router: stack.enter_context(start(folder, model, router, arguments.concurrency))
            for router in ROUTERS
        }
        rates: dict[str, list[float]] = {router: [] for router in ROUTERS}
        for number in range(arguments.rounds):
            questions = draw_questions(
                folder / str(number), arguments.images, arguments.questions, seed=number
            )
            answers = {}
            for router in ROUTERS if number % 2 else reversed(ROUTERS):
                seconds, answers[router] = ask(endpoints[router], questions, arguments.concurrency)
                rates[router].append(len(questions) / seconds)
                print(f"round {number}, {router}: {rates[router][-1]:.1f} answers/s", flush=True)
            assert answers["image"] == answers["power_of_two"], "a router must not change an answer"
    ratios = [ours / theirs for ours, theirs in zip(rates["image"], rates["power_of_two"], strict=True)]
    print(
        f"routing by image answers {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"answers_per_second": rates, "ratios": ratios}, indent=1))


def start(folder: Path, model: Path, router: str, concurrency: int) -> Endpoint:
    """An endpoint with two replicas."""
    config = Config.model_validate(
        {
            "run": {"folder": str(folder / "run")},
            "ray": {"local_cpus": 8},
            "model": {"path": str(model), "engine": {"kv_cache_gib": 0.5, "max_model_len": 1024}},
            "serve": {
                "port": 0,
                "router": router,
                "route_prefix": f"/{router}",
                "min_replicas": 2,
                "max_replicas": 2,
                "target_ongoing_requests": concurrency,
            },
        }
    )
    return start_endpoint(config, {config.model.name: model})


def draw_questions(folder: Path, images: int, each: int, seed: int) -> list[Question]:
    """Questions about random images, in random order."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(images):
        draw_image(generator).save(folder / f"{number}.png")
    questions = [
        Question(
            f"{number}/{place}", "base", str(folder / f"{number}.png"), f"Is there a nodule in lung {place}?"
        )
        for number in range(images)
        for place in range(each)
    ]
    random.Random(seed).shuffle(questions)
    return questions


def ask(
    endpoint: Endpoint, questions: list[Question], concurrency: int
) -> tuple[float, dict[str, str | None]]:
    """Seconds for all answers, and the answers."""
    settings = Config.model_validate({"evaluate": {"max_tokens": 8, "concurrency": concurrency}}).evaluate
    client = QuestionClient(endpoint.base_url, settings)

    async def collect() -> dict[str, str | None]:
        return {reply.answer_id: reply.text async for reply in client.ask(questions)}

    started = time.monotonic()
    answers = asyncio.run(collect())
    seconds = time.monotonic() - started
    assert all(text is not None for text in answers.values()), "nothing may be lost"
    return seconds, answers


if __name__ == "__main__":
    main()
