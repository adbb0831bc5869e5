"""The computed figures of docs/scaling.md: traffic, computation, memory and checkpoints at 7B.

    python benchmarks/scaling.py

Exact arithmetic on the geometry of LLaVA-Med 1.5 (Mistral 7B, CLIP-L/14-336, LoRA r 128 on all linear layers
of the language model); nothing is measured and nothing is allocated. Rates of computation are inputs: the
peak of an H100 SXM as its vendor states it, and 40 % of it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from mmedpo_ray.align.plan.estimates import Geometry, Train, checkpoint_bytes, step_traffic
from mmedpo_ray.align.settings import AlignConfig

# NVIDIA H100 SXM data sheet: dense bf16.
PEAK = 989e12
ASSUMED = 0.4 * PEAK
RANKS = (8, 64, 512)
GB = 1e9
TRAIN: tuple[Train, ...] = ("lora", "full")


class Forward(NamedTuple):
    """A micro-batch.

    Attributes:
        tokens: packed tokens, those of images included.
        response_tokens: of these, those with logits.
        images: distinct images.
        rows: rows that the tokens are packed into; a token's attention is counted over its row.
    """

    tokens: int
    response_tokens: int
    images: int
    rows: int = 1


# Packed tokens of a micro-batch: one, four and sixteen trees of about a thousand.
FORWARDS = tuple(Forward(1024 * trees, 256 * trees, trees, rows=trees) for trees in (1, 4, 16))


def forward_flops(shape: Geometry, forward: Forward, train: Train, *, recompute: bool) -> int:
    """Floating-point operations of the forward and backward pass of a micro-batch.

    2 per weight and token for the forward pass, 2 for the gradient of the activations, 2 for that of trained
    weights, and the layers' forward again if activations are recomputed (Kaplan et al., 2020, section 2.1).
    Attention adds 4·T·hidden per layer and token in a row of T tokens, and its backward twice that. It is
    counted over all pairs of tokens of a row, of which tree attention computes a third to a half: at 1,024
    tokens that is a few per cent too many.
    """
    passes = 2 + int(recompute)  # forward, (forward again,) gradient of the activations
    layers = 2 * shape.layers * forward.tokens
    row = forward.tokens / forward.rows
    attention = int(4 * row**2 * forward.rows * shape.hidden * shape.num_layers)
    head = 2 * shape.head * forward.response_tokens
    adapter = 2 * shape.adapter * forward.tokens
    # The tower is never differentiated, so nothing of it is computed again.
    tower = 2 * shape.tower * (shape.image_tokens + 1) * forward.images
    total = passes * layers + (passes + 1) * attention + 2 * head + tower
    return total + ((passes + 1) * adapter if train == "lora" else layers + head)


def llava_med() -> Any:
    """The configuration of LLaVA-Med 1.5 in transformers' form."""
    from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=MistralConfig(vocab_size=32000, sliding_window=None),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]]


def geometry_lines(shape: Geometry) -> list[str]:
    """Parameters, weights a rank holds, checkpoints."""
    rows = []
    for train in TRAIN:
        rows.append(
            [
                train,
                f"{shape.trained(train) / 1e6:,.1f}",
                f"{2 * shape.held(train) / GB:.1f}",
                *(f"{2 * shape.held(train) / GB / ranks:.2f}" for ranks in RANKS),
                f"{checkpoint_bytes(shape, train) / GB:.1f}",
            ]
        )
    heads = ["train", "trained parameters, 10⁶", "weights in bf16, GB"]
    return table([*heads, *(f"a rank of {ranks}" for ranks in RANKS), "checkpoint, GB"], rows)


def traffic_lines(shape: Geometry) -> list[str]:
    """Bytes a rank receives in a step of one micro-batch, and what each further one adds."""
    rows = []
    for train in TRAIN:
        for strategy in ("zero3", "zero2", "ddp"):
            one = [step_traffic(shape, train, strategy, ranks) / GB for ranks in RANKS]
            further = step_traffic(shape, train, strategy, 512, micro_batches=2) / GB - one[-1]
            rows.append([train, strategy, *(f"{value:.2f}" for value in one), f"{further:.2f}"])
    return table(
        ["train", "strategy", *(f"{ranks} ranks, GB" for ranks in RANKS), "each further micro-batch, GB"],
        rows,
    )


def overlap_lines(shape: Geometry) -> list[str]:
    """Computation of a micro-batch and the bandwidth at which ZeRO-3's traffic takes as long."""
    rows = []
    for train in TRAIN:
        for forward in FORWARDS:
            flops = forward_flops(shape, forward, train, recompute=True)
            traffic = step_traffic(shape, train, "zero3", 512)
            needed = [traffic * rate / flops / GB for rate in (ASSUMED, PEAK)]
            rows.append(
                [
                    train,
                    f"{forward.tokens:,}",
                    f"{flops / 1e12:,.0f}",
                    f"{1000 * flops / ASSUMED:,.0f}",
                    *(f"{value:,.0f}" for value in needed),
                ]
            )
    heads = ["train", "tokens a rank computes at once", "TFLOP", "ms at 40 % of the peak"]
    return table([*heads, "GB/s to hide zero3, at 40 %", "at the peak"], rows)


def storage_lines(shape: Geometry) -> list[str]:
    """Images a rank asks for, from the computation of trees of about a thousand tokens."""
    seconds = forward_flops(shape, FORWARDS[0], "lora", recompute=True)
    rows = []
    for name, rate in (("40 % of the peak", ASSUMED), ("the peak", PEAK)):
        images = rate / seconds
        rows.append(
            [
                name,
                f"{images:.1f}",
                *(f"{images * ranks * 0.5e6 / GB:.2f}" for ranks in RANKS),
            ]
        )
    return table(
        ["rate", "images a second and rank", *(f"{ranks} ranks, GB/s at 0.5 MB an image" for ranks in RANKS)],
        rows,
    )


def lines() -> list[str]:
    """All tables."""
    shape = Geometry.of(llava_med(), AlignConfig(), llava_med().image_seq_length)
    return [
        *geometry_lines(shape),
        "",
        *traffic_lines(shape),
        "",
        *overlap_lines(shape),
        "",
        *storage_lines(shape),
    ]


def main() -> int:
    """Prints the tables."""
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
