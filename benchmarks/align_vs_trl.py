"""Our training step against TRL's DPOTrainer: pairs per second, peak memory, loss, in one interleaved run.

    python benchmarks/align_vs_trl.py [--shape slake|report] [--rounds N] [--images N] [--visual] [--json
    FILE]

Both train the same random LLaVA (576 image tokens, CLIP 336/14) with the same LoRA, AdamW and pairs; both get
their batches ready-made, so reading images and tokenising count on neither side. TRL runs its fastest working
settings for a vision-language model: LoRA with the adapter switched off as reference, no gradient
checkpointing (TRL 1.16 has no padding-free batches and no precomputed reference for images). Ours are packed
trees; the one reference pass is included, spread over three epochs. Each side runs in the smallest
micro-batches that were within 3 % of its fastest in a trial.

shapes    slake   images with 11 questions each, chosen about 3 tokens, rejected about 17 (the released SLAKE
pairs)
          report  images with one report each, about 75 tokens a side
--visual  adds a visual pair to every text pair. TRL has none, so the other side is the padded way of the
authors' code
          on the same model: every pair's two sides in rows of their own, reference recomputed, (2 text + 2
          visual) × (policy + reference) forwards.

The ratio is that of the medians; its spread is the ratio of each round. The default takes less than 5 minutes
on two idle cores; ``--images 2 --rounds 5`` (slake) and ``--images 8 --rounds 5`` (report) are the larger
runs of the docs. Peak memory is measured in a process of its own for each side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor

from mmedpo_ray.align.data.batch import Pair, pack_pairs, pair_batch
from mmedpo_ray.align.engines.ddp import DdpEngine
from mmedpo_ray.align.losses import Normaliser, preference_objective
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.policy import Policy, TrainingSpec
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter

BETA = 0.1
EPOCHS = 3
RANK = 8
WORDS = [
    "the",
    "left",
    "right",
    "lung",
    "heart",
    "is",
    "normal",
    "enlarged",
    "effusion",
    "nodule",
    "small",
    "large",
    "no",
    "yes",
    "seen",
    "in",
    "lower",
    "upper",
    "zone",
]


@dataclass(frozen=True)
class Shape:
    """How many pairs, and how long."""

    images: int
    questions: int
    question_words: int
    chosen_words: int
    rejected_words: int


SHAPES = {"slake": Shape(2, 11, 9, 2, 16), "report": Shape(8, 1, 8, 74, 74)}
# Images of a step unless --images is given, so that a run takes minutes.
FEW_IMAGES = {"slake": 1, "report": 4}


@dataclass(frozen=True)
class Size:
    """Sizes of the random LLaVA; the language model has 20 to 30 times the tower's work, as in LLaVA 7B."""

    hidden: int = 384
    layers: int = 8
    tower_hidden: int = 96
    tower_layers: int = 4


# ---------------------------------------------------------------------- the model and the pairs


def build_model(folder: Path, size: Size) -> None:
    """Saves a random LLaVA with 576 image tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    from mmedpo_ray.phantom.tokenizer import make_processor, train_tokenizer

    # Repeated, so that every word becomes one token.
    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, 512)
    processor = make_processor(tokenizer, 336, 14)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=size.tower_hidden,
                intermediate_size=4 * size.tower_hidden,
                num_hidden_layers=size.tower_layers,
                num_attention_heads=4,
                image_size=336,
                patch_size=14,
            ),
            text_config=MistralConfig(
                vocab_size=len(tokenizer),
                hidden_size=size.hidden,
                intermediate_size=size.hidden * 8 // 3,
                num_hidden_layers=size.layers,
                num_attention_heads=size.hidden // 64,
                num_key_value_heads=max(1, size.hidden // 128),
                max_position_embeddings=4096,
                sliding_window=None,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=processor.image_token_id,
            image_seq_length=576,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def draw_rows(shape: Shape, *, visual: bool) -> list[dict[str, Any]]:
    """Pairs as texts and images."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, max(1, count)))

    rows = []
    for number in range(shape.images):
        image, noised = (
            Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8)) for _ in range(2)
        )
        for index in range(shape.questions):
            row = {
                "id": f"{number}-{index}",
                "image": image,
                "rejected_image": image,
                "question": f"{words(shape.question_words)}?",
                "chosen": words(shape.chosen_words),
                "rejected": words(shape.rejected_words),
                "visual": False,
            }
            rows.append(row)
            if visual:
                rows.append(row | {"rejected_image": noised, "rejected": row["chosen"], "visual": True})
    return rows


def load_policy(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with LoRA whose B is not 0, so that policy and reference differ; equal at every call."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    # In the base's precision, as `align` trains it: exact weights are the engine's.
    policy = get_peft_model(model, lora(), autocast_adapter_dtype=False)
    draw_adapter(policy)
    return policy.to(device)


def draw_adapter(policy: Any) -> None:
    """The same LoRA weights for everyone, B not 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in sorted(policy.named_parameters()):
            if "lora_" in name:
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))


def lora() -> LoraConfig:
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=rf".*\.language_model\..*\.({names})",
        task_type="CAUSAL_LM",
    )


# ---------------------------------------------------------------------- our side


class Ours:
    """A step of our trainer on one rank, ``batch_size`` images in a forward."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.policy = load_policy(folder, device, dtype)
        use_packed_forward(self.policy)
        writer = PromptWriter(load_processor(str(folder)))
        images: dict[str, Image.Image] = {}
        for row in rows:
            for side in ("image", "rejected_image"):
                images[str(id(row[side]))] = row[side]
        pixels = {name: writer.pixels([image]) for name, image in images.items()}

        def load(uris: list[str]) -> dict[str, Tensor]:
            return writer.architecture.collate([pixels[uri] for uri in uris])

        trees: dict[str, list[Pair]] = {}
        for row in rows:
            trees.setdefault(row["id"].split("-")[0], []).append(_pair(row, writer))
        self.batches = []
        whole = list(trees.values())
        for start in range(0, len(whole), batch_size):
            pairs = list(itertools.chain.from_iterable(whole[start : start + batch_size]))
            packed_trees = pack_pairs(pairs, load, writer.pad_token_id, both_sides=True)  # type: ignore[arg-type]
            self.batches.append((packed_trees.to(device), pair_batch(pairs, device=device)))
        tokens = sum(len(pair.chosen) for tree in trees.values() for pair in tree)
        self.total = Normaliser(float(len(rows)), tokens, len(rows))
        spec = TrainingSpec(
            align=AlignConfig(strategy="ddp", learning_rate=1e-4, max_grad_norm=1e9, precision="fp32"),
            model=str(folder),
            seed=0,
            folder=folder,
            prepared="",
            key="",
            use_gpu=device.type == "cuda",
            launch="",
        )
        self.engine = DdpEngine(Policy(self.policy), spec)

    def reference_pass(self) -> None:
        """What the stage `prepare` does once."""
        known = []
        for packed_trees, pairs in self.batches:
            count = len(pairs.weight)
            with torch.no_grad(), self.policy.disable_adapter():
                out = response_logps(self.policy, packed_trees).logps
            known.append((packed_trees, replace(pairs, ref_chosen=out[:count], ref_rejected=out[count:])))
        self.batches = known

    def step(self) -> float:
        """Forward, backward, update."""
        value = 0.0
        for number, (packed_trees, pairs) in enumerate(self.batches):
            out = self.engine.logps(packed_trees)
            sides = out.sides(len(pairs.weight))
            loss, _ = preference_objective(*sides, pairs, self.total, AlignConfig(beta=BETA))
            self.engine.backward(loss, is_last=number == len(self.batches) - 1)
            value += float(loss.detach())
        self.engine.update(1e-4)
        return value


def _pair(row: dict[str, Any], writer: PromptWriter) -> Pair:
    question = row["question"]
    prompt, chosen, rejected = (
        writer.prompt(question),
        writer.response(question, row["chosen"]),
        writer.response(question, row["rejected"]),
    )
    assert prompt is not None and chosen is not None and rejected is not None
    return Pair(
        pair_id=row["id"],
        image_id=row["id"].split("-")[0],
        is_visual=row["visual"],
        image_uri=str(id(row["image"])),
        rejected_image_uri=str(id(row["rejected_image"])),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        weight=1.0,
    )


# ---------------------------------------------------------------------- the other sides


class Trl:
    """A step of TRL's DPOTrainer: its own collator and loss, in micro-batches of ``batch_size`` pairs."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        import datasets
        import trl
        from transformers import LlavaForConditionalGeneration

        data = datasets.Dataset.from_list([_trl_row(row) for row in rows])
        self.trainer = trl.DPOTrainer(
            # Given an adapter TRL would take a copy of it as reference; given its settings it switches the
            # adapter off.
            model=LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype),
            peft_config=lora(),
            args=trl.DPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=batch_size,
                beta=BETA,
                use_cpu=device.type == "cpu",
                bf16=dtype is torch.bfloat16,
                report_to=[],
                gradient_checkpointing=False,
                max_length=None,
            ),
            train_dataset=data,
            processing_class=load_processor(str(folder)),
        )
        assert self.trainer.model is not None
        self.model = self.trainer.model
        draw_adapter(self.model)
        self.model.train()
        self.count = len(rows)
        collate = self.trainer.data_collator
        listed = [data[index] for index in range(len(data))]
        self.batches = [
            self.trainer._prepare_inputs(collate(listed[start : start + batch_size]))
            for start in range(0, len(listed), batch_size)
        ]
        self.sizes = [min(batch_size, len(listed) - start) for start in range(0, len(listed), batch_size)]
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> float:
        """Forward of policy and reference, backward, update."""
        value = 0.0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            loss = self.trainer.compute_loss(self.model, dict(batch)) * (size / self.count)
            loss.backward()
            value += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value


def _trl_row(row: dict[str, Any]) -> dict[str, Any]:
    ask = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    return {
        "images": [row["image"]],
        "prompt": [{"role": "user", "content": ask}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": row["chosen"]}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": row["rejected"]}]}],
    }


class Padded:
    """The padded way: each side of each pair in its own row, with policy and reference forwards."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.policy = load_policy(folder, device, dtype)
        self.policy.train()
        writer = PromptWriter(load_processor(str(folder)))
        self.batches = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            self.batches.append(
                [_padded(part, writer, side, device, dtype) for side in ("chosen", "rejected")]
            )
        self.sizes = [len(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        self.count = len(rows)
        trained = [value for value in self.policy.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> float:
        """Forward of policy and reference, backward, update."""
        value = 0.0
        for sides, size in zip(self.batches, self.sizes, strict=True):
            with torch.no_grad(), self.policy.disable_adapter():
                reference = [self._logps(*side) for side in sides]
            chosen, rejected = (self._logps(*side) - ref for side, ref in zip(sides, reference, strict=True))
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean() * (size / self.count)
            loss.backward()
            value += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _logps(self, inputs: dict[str, Tensor], is_response: Tensor) -> Tensor:
        logits = self.policy(**inputs).logits.float()
        ids = inputs["input_ids"]
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (logps * is_response[:, 1:]).sum(-1)


def _padded(
    rows: list[dict[str, Any]], writer: PromptWriter, side: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    image = "image" if side == "chosen" else "rejected_image"
    sequences = []
    for row in rows:
        prompt, response = writer.prompt(row["question"]), writer.response(row["question"], row[side])
        assert prompt is not None and response is not None
        sequences.append((prompt, response))
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(rows), length), writer.pad_token_id)
    attended, is_response = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for number, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[number, :end] = torch.tensor(prompt + response)
        attended[number, :end] = 1
        is_response[number, len(prompt) : end] = True
    pixels = writer.pixels([row[image] for row in rows])
    inputs = {"input_ids": ids, "attention_mask": attended}
    inputs |= {name: value.to(dtype) for name, value in pixels.items()}
    return {name: value.to(device) for name, value in inputs.items()}, is_response.to(device)


# ---------------------------------------------------------------------- measuring


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best_batch_size(make: Callable[[int], Any], count: int, device: torch.device) -> int:
    """The smallest micro-batch that is within 3 % of the fastest."""
    seconds: dict[int, float] = {}
    for size in sorted({1, min(4, count)}):
        side = make(size)
        side.step()
        seconds[size] = timed(side.step, device)
    return min(size for size, value in seconds.items() if value <= 1.03 * min(seconds.values()))


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The shape with the number of images on the command line."""
    return replace(SHAPES[arguments.shape], images=arguments.images or FEW_IMAGES[arguments.shape])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Interleaved repetitions of both sides."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    rows = draw_rows(shape_of(arguments), visual=arguments.visual)
    other = Padded if arguments.visual else Trl

    def make_ours(size: int) -> Ours:
        return Ours(folder, rows, device, dtype, size)

    def make_theirs(size: int) -> Any:
        return other(folder, rows, device, dtype, size)

    sizes = {
        "ours": best_batch_size(make_ours, shape_of(arguments).images, device),
        "theirs": best_batch_size(make_theirs, len(rows), device),
    }
    # Both begin again from the same weights; the first step of each gives the losses to compare.
    ours = make_ours(sizes["ours"])
    ours.reference_pass()
    theirs = make_theirs(sizes["theirs"])
    losses = {"ours": ours.step(), "theirs": theirs.step()}
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "reference": []}
    for _ in range(arguments.rounds):
        times["theirs"].append(timed(theirs.step, device))
        times["ours"].append(timed(ours.step, device))
        times["reference"].append(timed(ours.reference_pass, device))
    ours_seconds = statistics.median(times["ours"]) + statistics.median(times["reference"]) / EPOCHS
    theirs_seconds = statistics.median(times["theirs"])
    ratios = [
        theirs_step / (ours_step + reference / EPOCHS)
        for ours_step, theirs_step, reference in zip(*times.values(), strict=True)
    ]
    return {
        "shape": arguments.shape,
        "visual": arguments.visual,
        "against": "padded" if arguments.visual else "trl",
        "pairs": len(rows),
        "pairs_per_second": {"ours": len(rows) / ours_seconds, "theirs": len(rows) / theirs_seconds},
        "pairs_per_second_ratio": theirs_seconds / ours_seconds,
        "ratio_spread": [min(ratios), max(ratios)],
        "loss_difference": abs(losses["ours"] - losses["theirs"]),
        "losses": losses,
        "batch_sizes": sizes,
        "seconds": times,
    }


def peak_memory(arguments: argparse.Namespace, folder: Path, side: str, batch_size: int) -> float:
    """MiB that two steps of one side take above the loaded model, in a process of its own."""
    command = [sys.executable, __file__, "--memory", side, "--model", str(folder)]
    command += ["--shape", arguments.shape, "--images", str(shape_of(arguments).images)]
    command += ["--batch-size", str(batch_size)]
    command += ["--visual"] * arguments.visual + ["--bf16"] * arguments.bf16
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.strip().splitlines()[-1])


def print_peak_memory(arguments: argparse.Namespace) -> None:
    """The child's part of :func:`peak_memory`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    rows = draw_rows(shape_of(arguments), visual=arguments.visual)
    if arguments.memory == "ours":
        side: Any = Ours(arguments.model, rows, device, dtype, arguments.batch_size)
        side.reference_pass()
    else:
        other = Padded if arguments.visual else Trl
        side = other(arguments.model, rows, device, dtype, arguments.batch_size)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        side.step(), side.step()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    process = psutil.Process()
    # Linux keeps the peak of a process; writing 5 sets it back to the present.
    Path("/proc/self/clear_refs").write_text("5")
    before = process.memory_info().rss
    side.step(), side.step()
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print((peak - before) / 2**20)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="slake")
    parser.add_argument("--visual", action="store_true", help="text and visual pairs, against the padded way")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--images", type=int, help="images in a step; default: 1 (slake) or 4 (report)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_peak_memory(arguments)
        return 0
    size = Size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder, size)
        result = measure(arguments, folder)
        memory = {
            side: peak_memory(arguments, folder, side, result["batch_sizes"][side])
            for side in ("ours", "theirs")
        }
    result |= {
        "peak_memory_mib": memory,
        "peak_memory_ratio": memory["ours"] / memory["theirs"],
        "model": asdict(size),
        "command": " ".join(["python", *sys.argv]),
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    speed, sizes, (low, high) = result["pairs_per_second"], result["batch_sizes"], result["ratio_spread"]
    print(
        f"{result['shape']}{' + visual' if arguments.visual else ''} against {result['against']}: "
        f"{speed['ours']:.2f} and {speed['theirs']:.2f} pairs/s, ratio "
        f"{result['pairs_per_second_ratio']:.1f} ({low:.1f} to {high:.1f} in {arguments.rounds} rounds); "
        f"peak memory {memory['ours']:.0f} and {memory['theirs']:.0f} MiB, ratio "
        f"{result['peak_memory_ratio']:.2f}; loss difference {result['loss_difference']:.1e} (in a forward: "
        f"{sizes['ours']} images, {sizes['theirs']} pairs)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
