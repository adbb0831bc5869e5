"""Judges through the pipeline against the bare vLLM engine, in rows per second.

    python benchmarks/judge_throughput.py [--model MODEL] [--rows 1500] [--repetitions 3] [--scoring choice]
    [--json FILE]

Both sides ask the same prompts with the same sampling and the same engine arguments, each in a fresh Ray
actor with the same resources, one after the other, either side first in turn; the ratio is that of the
medians. Beside it stands the share of the pipeline's time that was spent inside the engine's ``generate``: on
a machine that does other work as well, it tells what the pipeline itself costs.

- *Bare*: ``vllm.LLM.generate``, all prompts in one call. Prompts are tokenised and sampling parameters made
  before the clock starts.
- *Pipeline*: the debate of the stage ``score`` with this one agent, so one pass: rows from the table through
  Ray Data, prompts written and tokenised, answers read, histories, parts on disk, the sorted final table and
  its manifest. The clock stops when the manifest is written.

Not counted on either side: the engine's start and a warm-up on other prompts (as many as are decoded
together), after which the prefix cache holds the common instructions only. Without ``--model`` a chat model
of two layers with random weights is judged with, on which Python weighs more than on any real model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs both sides in turn and prints the ratio."""
    arguments = _arguments()
    import ray

    from mmedpo_ray.compat import cluster
    from mmedpo_ray.config.tree import RayConfig
    from mmedpo_ray.judge.agents.vllm import VllmAgentConfig
    from mmedpo_ray.models.settings import EngineConfig

    with tempfile.TemporaryDirectory(prefix="judges-") as scratch:
        model = arguments.model or _tiny_model(Path(scratch) / "model")
        engine = EngineConfig(
            max_num_seqs=arguments.max_num_seqs,
            batch_rows=arguments.batch_rows,
            kv_cache_gib=arguments.kv_cache_gib,
        )
        agent = VllmAgentConfig(
            name="judge",
            model=str(model),
            temperature=arguments.temperature,
            max_tokens=arguments.max_tokens,
            scoring=arguments.scoring,
            engine=engine,
        )
        cluster.start(RayConfig())
        sides: dict[str, list[float]] = {"bare": [], "pipeline": []}
        busy: list[float] = []
        for repetition in range(arguments.repetitions):
            rows = _rows(arguments.rows, f"{repetition}")
            warm_up = _rows(arguments.max_num_seqs, f"{repetition} warm")
            folder = Path(scratch) / f"run-{repetition}"
            # Either side goes first in turn, so that a machine that slows down favours none.
            for side in ("bare", "pipeline") if repetition % 2 == 0 else ("pipeline", "bare"):
                if side == "bare":
                    sides[side].append(_bare(agent, rows, warm_up))
                else:
                    speed, share = _pipeline(agent, rows, warm_up, folder)
                    sides[side].append(speed)
                    busy.append(share)
            print({name: round(values[-1], 2) for name, values in sides.items()}, file=sys.stderr)
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}" + (
            f", {ray.cluster_resources().get('GPU'):g} GPU" if cluster.has_gpu() else ""
        )
        ray.shutdown()
    result = _result(sides, busy, arguments, hardware)
    print(_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


# ---------------------------------------------------------------------- the two sides


def _bare(agent: Any, rows: list[dict[str, Any]], warm_up: list[dict[str, Any]]) -> float:
    """Rows per second of the engine alone."""
    import ray

    options = _options(agent)
    actor: Any = (
        ray.remote(_Bare)
        .options(
            num_cpus=options["num_cpus"], num_gpus=options["num_gpus"], runtime_env=options["runtime_env"]
        )
        .remote(agent)
    )
    try:
        ray.get(actor.seconds.remote(warm_up))
        return len(rows) / ray.get(actor.seconds.remote(rows))
    finally:
        ray.kill(actor)


class _Bare:
    """The judge's engine without the judge."""

    def __init__(self, agent: Any) -> None:
        from mmedpo_ray.judge.agents.vllm import VllmAgent

        self._agent = VllmAgent(agent)
        self._settings = agent

    def seconds(self, rows: list[dict[str, Any]]) -> float:
        """Time that the engine needs for all rows in one call (two, where the score is read from a second
        turn)."""
        from mmedpo_ray.judge.agents import prompt
        from mmedpo_ray.judge.agents.vllm import letter_sampling

        cases = [_case(row) for row in rows]
        agent, limit = self._agent, self._settings.max_tokens
        if self._settings.scoring == "choice":
            conversations = [prompt.messages(case) for case in cases]
            schemas = [prompt.schema(case, limit) for case in cases]
        else:
            conversations = [prompt.rationale_messages(case) for case in cases]
            schemas = [prompt.rationale_schema(limit)] * len(cases)
        forms = [agent._form(*pair) for pair in zip(schemas, conversations, strict=True)]
        seconds, outputs = self._timed(conversations, forms)
        if self._settings.scoring == "expectation":
            rationales = [prompt.parse_rationale(output.outputs[0].text) or "none" for output in outputs]
            second = [prompt.letter_messages(*pair) for pair in zip(cases, rationales, strict=True)]
            seconds += self._timed(second, [letter_sampling()] * len(cases))[0]
        return seconds

    def _timed(self, conversations: list[Any], forms: list[Any]) -> tuple[float, list[Any]]:
        from vllm import TokensPrompt

        tokens = self._agent._tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in tokens]
        started = time.perf_counter()
        outputs = self._agent._llm.generate(prompts, forms, use_tqdm=False)
        return time.perf_counter() - started, outputs


def _pipeline(
    agent: Any, rows: list[dict[str, Any]], warm_up: list[dict[str, Any]], folder: Path
) -> tuple[float, float]:
    """The debate of the stage ``score``, which is one pass here: rows per second, and the share of the time
    that its engine worked."""
    from mmedpo_ray.config.load import load
    from mmedpo_ray.judge import debate
    from mmedpo_ray.judge.debate_passes import Passes
    from mmedpo_ray.tables import schemas
    from mmedpo_ray.tables.run_folder import RunFolder
    from mmedpo_ray.tables.stage_runner import StageRunner, read_manifest

    agents = json.dumps([agent.model_dump(mode="json")])
    config = load(None, [f"run.folder={folder}", f"score.agents={agents}", "score.max_rounds=1"])
    pairs = StageRunner("curate", RunFolder(str(folder)).pairs, config)
    pairs.write_rows(
        lambda _: pairs.write_part(rows, schemas.PAIRS, "pair_id"), schema=schemas.PAIRS, id_column="pair_id"
    )
    clock = folder / "ready"
    plain = debate.HoldPass
    debate.HoldPass = _timed(plain, warm_up, str(clock))  # type: ignore[misc]
    try:
        (held,) = Passes(config, []).run(len(rows))
    finally:
        debate.HoldPass = plain  # type: ignore[misc]
    stopped = time.time()
    ready, *calls = (json.loads(line) for line in clock.read_text().splitlines())
    manifest = read_manifest(held)
    if manifest is None or manifest.rows_out != len(rows):
        raise SystemExit(f"{len(rows)} rows in, {manifest and manifest.rows_out} out")
    seconds = stopped - ready[1]
    return len(rows) / seconds, sum(stop - start for start, stop in calls) / seconds


def _timed(plain: Any, warm_up: list[dict[str, Any]], clock: str) -> Any:
    """The class of a pass, which besides notes when its engine was started and warm, and each time that it
    works."""

    class TimedPass(plain):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            (judge,) = self._speakers
            judge.judge([_case(row) for row in warm_up])
            self._generate = judge._llm.generate
            judge._llm.generate = self._noted
            self._note(time.time())

        def _noted(self, *arguments: Any, **named: Any) -> Any:
            started = time.time()
            outputs = self._generate(*arguments, **named)
            self._note(started)
            return outputs

        @staticmethod
        def _note(started: float) -> None:
            with Path(clock).open("a") as file:
                file.write(json.dumps([started, time.time()]) + "\n")

    return TimedPass


# ---------------------------------------------------------------------- what is judged


_FINDINGS = ("pleural effusion", "pneumothorax", "consolidation", "nodule", "atelectasis", "cardiomegaly")


def _rows(count: int, tag: str) -> list[dict[str, Any]]:
    """Open debates about answers of a few words to a few sentences, all different."""
    chance = random.Random(tag)
    rows = []
    for number in range(count):
        first, second, third = chance.sample(_FINDINGS, 3)
        side, other = chance.sample(("left", "right"), 2)
        if chance.random() < 0.5:
            question, chosen, rejected = f"Is there a {first}?", "Yes", f"No, there is no {first}."
        else:
            question = "Describe the findings."
            chosen = f"Moderate {side} {first}. No {second}. Mild {third} in the {side} lower zone."
            rejected = f"Moderate {other} {first}. No {second}. Mild {third} in the {other} lower zone."
        rows.append(
            {
                "pair_id": f"{tag}-{number:06d}",
                "sample_id": f"{tag}-{number:06d}",
                "image_id": f"{number}",
                "dataset": "benchmark",
                "task": "vqa",
                "answer_type": "open",
                "kind": "text",
                "image_uri": "none",
                "rejected_image_uri": "none",
                "question": f"Study {tag} {number}. {question}",
                "chosen": chosen,
                "rejected": rejected,
                "generator": "benchmark",
            }
        )
    return rows


def _case(row: dict[str, Any]) -> Any:
    from mmedpo_ray.judge.agents.base import Case

    return Case(row["question"], row["chosen"], row["rejected"], (), 1)


def _options(agent: Any) -> dict[str, Any]:
    from mmedpo_ray.compat import cluster
    from mmedpo_ray.judge.agents.vllm import VllmAgent

    return VllmAgent.map_options(agent, data_cpus=0.25, has_gpu=cluster.has_gpu())


def _tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from tiny_chat import build_tiny_chat

    return build_tiny_chat(folder, max_positions=4096)


# ---------------------------------------------------------------------- figures


def _result(
    sides: dict[str, list[float]], busy: list[float], arguments: argparse.Namespace, hardware: str
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in sides.items()}
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware,
        "model": arguments.model or "random weights, 2 layers x 64",
        "rows": arguments.rows,
        "rows_per_second": sides,
        "median": medians,
        "ratio": medians["pipeline"] / medians["bare"],
        "engine_busy": busy,
    }


def _table(result: dict[str, Any]) -> str:
    lines = ["| side | rows per second (median) | each repetition |", "| --- | --- | --- |"]
    for name, values in result["rows_per_second"].items():
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {result['median'][name]:.1f} | {each} |")
    each = ", ".join(f"{share:.3f}" for share in result["engine_busy"])
    lines.append(f"\nshare of the pipeline's time in which its engine worked: {each}")
    lines.append(
        f"ratio {result['ratio']:.3f}; {result['model']}; {result['rows']} rows; {result['hardware']}"
    )
    return "\n".join([*lines, result["command"]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="local folder or hub name of a chat model; default: a tiny one, made here"
    )
    parser.add_argument("--rows", type=int, default=1500, help="rows of one repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scoring", choices=("choice", "expectation"), default="choice")
    parser.add_argument("--temperature", type=float, default=1.0, help="1: answers differ in length")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
