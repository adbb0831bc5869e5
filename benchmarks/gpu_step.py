"""Our training step at 7B on one GPU: pairs and tokens per second, model FLOP utilisation, memory; attention
along trees against a dense mask and FlexAttention.

    python benchmarks/gpu_step.py [--attention tree sdpa flex] [--checkpointing] [--json FILE]
    python benchmarks/gpu_step.py --tiny          the same code on a tiny model, on any machine

Random bf16 weights in the geometry of LLaVA-Med 1.5 (Mistral 7B, CLIP-L/14-336, 576 image tokens), LoRA r 128
on all linear layers of the language model, packed trees of one SLAKE-shaped image (11 questions) each. The
rate that a step could reach is measured in the same run: large bf16 matrix products. Utilisation counts what
a step must compute: 2 FLOPs per weight and token for the forward pass and 2 for the gradient of activations
(frozen weights have no gradient of their own), plus LoRA's own 6; in the last layer queries, output
projection and MLP only at the tokens that predict a response.

Memory, reckoned and not measured: 14 GiB of frozen weights, 6 GiB of adapter, gradient and optimizer state,
and for each tree in a forward about 6 GiB of activations, with checkpointing half a GiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from align_vs_trl import SHAPES, draw_rows
from peft import LoraConfig, get_peft_model

from mmedpo_ray.align.engines.ddp import DdpEngine
from mmedpo_ray.align.losses import Normaliser, PairBatch, preference_objective
from mmedpo_ray.align.packing.logps import use_packed_forward
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack
from mmedpo_ray.align.policy import Policy, TrainingSpec
from mmedpo_ray.align.settings import AlignConfig

IMAGE_TOKENS = 576
IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model; the defaults are LLaVA-Med 1.5's."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32064
    tower_hidden: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    rank: int = 128


TINY = Geometry(
    hidden=128,
    intermediate=256,
    layers=2,
    heads=2,
    kv_heads=1,
    tower_hidden=64,
    tower_layers=2,
    tower_heads=2,
    rank=8,
)


def build_policy(geometry: Geometry, device: torch.device, attention: str, *, checkpointing: bool) -> Policy:
    """A random model with LoRA on its language model."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=geometry.tower_hidden,
            intermediate_size=4 * geometry.tower_hidden,
            num_hidden_layers=geometry.tower_layers,
            num_attention_heads=geometry.tower_heads,
            image_size=336,
            patch_size=14,
        ),
        text_config=MistralConfig(
            vocab_size=geometry.vocabulary,
            hidden_size=geometry.hidden,
            intermediate_size=geometry.intermediate,
            num_hidden_layers=geometry.layers,
            num_attention_heads=geometry.heads,
            num_key_value_heads=geometry.kv_heads,
            max_position_embeddings=32768,
            sliding_window=None,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=geometry.rank,
            lora_alpha=2 * geometry.rank,
            target_modules=rf".*\.language_model\..*\.({names})",
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    use_packed_forward(peft_model, attention=attention)
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": True})
    return Policy(peft_model)


def draw_packed(images: int, device: torch.device) -> tuple[PackedTrees, int, int]:
    """Trees of random tokens in SLAKE's shape: the packed_trees, its pairs and their chosen tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(replace(SHAPES["slake"], images=1), visual=False)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 31000, (count,), generator=generator).tolist()

    chosen: list[TokenSequence] = []
    rejected: list[TokenSequence] = []
    for image in range(images):
        start = tokens(4) + [IMAGE_TOKEN] * IMAGE_TOKENS
        for row in rows:
            prompt = start + tokens(len(row["question"].split()) + 4)
            chosen.append(TokenSequence(prompt, tokens(3), image))
            rejected.append(TokenSequence(prompt, tokens(17), image))
    pixels = torch.randn(images, 3, 336, 336, generator=generator)
    packed_trees = pack([*chosen, *rejected], {"pixel_values": pixels}, 0).to(device)
    return packed_trees, len(chosen), sum(len(item.response) for item in chosen)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products, the best of several."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        best = max(best, 2 * size**3 / _seconds(lambda: left @ left, device))
    return best


def step_flops(policy: Policy, packed_trees: PackedTrees, geometry: Geometry) -> float:
    """FLOPs that a step must compute (a checkpointed forward repeated is not counted as work)."""
    tokens = packed_trees.input_ids.numel()
    linear = [
        (name, module) for name, module in policy.model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    last = f".layers.{geometry.layers - 1}."

    def uses(name: str) -> int:
        """Tokens that pass a layer."""
        is_cut = last in name and ".k_proj" not in name and ".v_proj" not in name
        return packed_trees.outputs.numel() if is_cut else tokens

    lora = sum(module.weight.numel() * uses(name) for name, module in linear if "lora_" in name)
    frozen = sum(
        module.weight.numel() * uses(name)
        for name, module in linear
        if "language_model" in name and "lora_" not in name
    )
    tower = sum(module.weight.numel() for name, module in linear if "vision_tower" in name)
    head = geometry.vocabulary * geometry.hidden
    edges = packed_trees.edge_token.numel()
    images = packed_trees.images["pixel_values"].shape[0]
    return float(4 * frozen + 6 * lora + 4 * head * edges + 2 * tower * images * (IMAGE_TOKENS + 1))


def measure(arguments: argparse.Namespace, attention: str, device: torch.device) -> dict[str, Any]:
    """Times steps of one attention implementation."""
    # Replaced forwards tie the model before this one into cycles, which would stay in memory.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    geometry = TINY if arguments.tiny else Geometry()
    policy = build_policy(geometry, device, attention, checkpointing=arguments.checkpointing)
    packed_trees, pairs, chosen_tokens = draw_packed(arguments.images, device)
    spec = TrainingSpec(
        align=AlignConfig(strategy="ddp", learning_rate=1e-6),
        model="",
        seed=0,
        folder=Path(),
        prepared="",
        key="",
        use_gpu=device.type == "cuda",
        launch="",
    )
    engine = DdpEngine(policy, spec)
    zeros, ones = torch.zeros(pairs, device=device), torch.ones(pairs, device=device)
    batch = PairBatch(ones, zeros, zeros, zeros.bool(), ones.bool())
    total = Normaliser(float(pairs), chosen_tokens, pairs)

    def step() -> None:
        out = engine.logps(packed_trees)
        loss, _ = preference_objective(*out.sides(pairs), batch, total, AlignConfig())
        engine.backward(loss, is_last=True)
        engine.update(1e-6)

    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(_seconds(step, device) for _ in range(arguments.repetitions))
    flops = step_flops(policy, packed_trees, geometry)
    rate = matmul_rate(device)
    return {
        "attention": attention,
        "seconds": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": packed_trees.input_ids.numel() / seconds,
        "pairs": pairs,
        "tokens": packed_trees.input_ids.numel(),
        "utilisation_of_measured_matmul": flops / seconds / rate,
        "matmul_tflops": rate / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def _seconds(function: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    """Measures and prints a line an implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention", nargs="+", choices=["tree", "sdpa", "flex"], default=["tree", "sdpa", "flex"]
    )
    parser.add_argument("--images", type=int, default=4, help="trees in one forward")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("no GPU here: use --tiny to run the same code on a tiny model")
    # FlexAttention has no backward pass on a CPU.
    chosen = [name for name in arguments.attention if name != "flex" or device.type == "cuda"]
    results = [measure(arguments, attention, device) for attention in chosen]
    for result in results:
        memory = result["peak_memory_gib"]
        print(
            f"{result['attention']}: {result['pairs_per_second']:.1f} pairs/s, "
            f"{result['tokens_per_second']:.0f} tokens/s, {result['utilisation_of_measured_matmul']:.0%} of "
            f"{result['matmul_tflops']:.1f} TFLOP/s" + (f", {memory:.1f} GiB" if memory else "")
        )
    if arguments.json:
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        content = {"command": " ".join(["python", *sys.argv]), "hardware": hardware, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
