"""What a training step computes, moves and keeps: exact arithmetic on the geometry of a model, no measurement.

Counted are the parameters themselves (the model is built without memory) and, for every micro-batch of packed tokens,

- floating-point operations: 2 a weight and token for the forward pass, 2 for the gradient of the activations, 2 for that of
  trained weights, and the layers' forward again where activations are recomputed (Kaplan et al., 2020, section 2.1); attention
  adds 4·T·hidden a layer and token in a row of T tokens, and its backward twice that. It is counted over all pairs of tokens of
  a row, of which tree attention computes a third to a half: at 1,024 tokens that makes a few per cent too many;
- ZeRO-3's traffic: every weight is gathered for the forward, those of the language model again for the backward (nothing is
  differentiated through the tower), and gradients of trained weights are reduced once (Rajbhandari et al., 2020, section 7.2).
  A ring over R ranks moves (R - 1)/R of the whole through each.

What overlaps is up to the hardware: :func:`bandwidth_to_overlap` says which interconnect hides the traffic behind a given rate
of computation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mmedpo_ray.models.loading import PROJECTOR

Train = Literal["lora", "full"]
Strategy = Literal["zero3", "zero2", "ddp"]

# Weight, and Adam's two moments, in float32.
_CHECKPOINT_BYTES = 12
_FLOAT32 = 4


@dataclass(frozen=True)
class Geometry:
    """Sizes of a LLaVA.

    Attributes:
        total: all parameters without the adapter.
        language: parameters of the language model, embeddings and head included.
        layers: parameters of its linear layers, without the head.
        head: parameters of the head.
        tower: parameters of the vision tower and the projector.
        projector: of these, those of the projector.
        adapter: parameters that are trained beside the model's own: LoRA.
        num_layers, hidden, intermediate, heads, key_heads, head_size: of the language model.
        image_tokens: ids that stand for an image.
    """

    total: int
    language: int
    layers: int
    head: int
    tower: int
    projector: int
    adapter: int
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    image_tokens: int

    @classmethod
    def of(cls, config: Any, rank: int, target_modules: list[str]) -> Geometry:
        """Counts the parameters of a ``LlavaConfig``; allocates none.

        Args:
            config: of the model.
            rank: of LoRA.
            target_modules: names of the language model's layers that carry it.
        """
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        linear = {
            name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        inner = {name: module for name, module in linear.items() if ".language_model." in f".{name}"}
        sizes = {name: value.numel() for name, value in model.named_parameters()}
        head = model.get_output_embeddings().weight.numel()
        tower = sum(size for name, size in sizes.items() if "vision_tower" in name or PROJECTOR in name)
        text = config.text_config
        return cls(
            total=sum(sizes.values()),
            language=sum(sizes.values()) - tower,
            layers=sum(module.weight.numel() for module in inner.values()),
            head=head,
            tower=tower,
            projector=sum(size for name, size in sizes.items() if PROJECTOR in name),
            adapter=sum(
                rank * (module.in_features + module.out_features)
                for name, module in inner.items()
                if name.rsplit(".", 1)[-1] in target_modules
            ),
            num_layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            image_tokens=config.image_seq_length,
        )

    @property
    def vocabulary(self) -> int:
        """Entries of the head."""
        return self.head // self.hidden

    def with_trained_projector(self) -> Geometry:
        """The same where the projector is trained too: a copy of it beside LoRA, itself with the language model."""
        return replace(self, adapter=self.adapter + self.projector, language=self.language + self.projector)

    def trained(self, train: Train) -> int:
        """Parameters that are trained: LoRA's, or those of the language model."""
        return self.adapter if train == "lora" else self.language

    def held(self, train: Train) -> int:
        """All parameters that ranks hold."""
        return self.total + (self.adapter if train == "lora" else 0)


@dataclass(frozen=True)
class Forward:
    """A micro-batch.

    Attributes:
        tokens: packed tokens, those of images included.
        response_tokens: of these, those with logits.
        images: distinct images.
        rows: rows that the tokens are laid out in; a token's attention is computed over its row.
    """

    tokens: int
    response_tokens: int
    images: int
    rows: int = 1


def forward_flops(shape: Geometry, forward: Forward, train: Train, *, recompute: bool) -> int:
    """Floating-point operations of the forward and backward pass of a micro-batch."""
    passes = 2 + int(recompute)  # forward, (forward again,) gradient of the activations
    layers = 2 * shape.layers * forward.tokens
    row = forward.tokens / forward.rows
    attention = int(4 * row**2 * forward.rows * shape.hidden * shape.num_layers)
    head = 2 * shape.head * forward.response_tokens
    adapter = 2 * shape.adapter * forward.tokens
    # The tower is never differentiated, so nothing of it is computed again.
    tower = 2 * shape.tower * (shape.image_tokens + 1) * forward.images
    total = passes * layers + (passes + 1) * attention + 2 * head + tower
    if train == "lora":
        return total + (passes + 1) * adapter
    return total + layers + head


def step_traffic(
    shape: Geometry,
    train: Train,
    strategy: Strategy,
    ranks: int,
    *,
    micro_batches: int = 1,
    weight_bytes: int = 2,
) -> int:
    """Bytes that a rank receives in an optimizer step.

    ``zero3`` gathers the weights twice in every micro-batch and reduces the gradients of the trained ones; ``zero2`` only
    reduces, and gathers the trained weights once after the update; ``ddp`` sums float32 gradients once, which moves them twice.

    Args:
        shape: of the model.
        train: what is trained.
        strategy: as ``align.strategy``.
        ranks: number of ranks.
        micro_batches: of a rank in a step.
        weight_bytes: of a weight and of its gradient, 2 (bf16) or 4.
    """
    trained = weight_bytes * shape.trained(train)
    held = weight_bytes * shape.held(train)
    whole = {
        "zero3": micro_batches * (2 * held - weight_bytes * shape.tower + trained),
        "zero2": micro_batches * trained + trained,
        "ddp": 2 * _FLOAT32 * shape.trained(train),
    }
    return whole[strategy] * (ranks - 1) // ranks


def bandwidth_to_overlap(traffic: int, flops: int, flops_per_second: float) -> float:
    """Bytes a second at which the traffic takes as long as the computation."""
    return traffic * flops_per_second / flops


def checkpoint_bytes(shape: Geometry, train: Train) -> int:
    """A checkpoint: trained weights and Adam's two moments, whole and in float32."""
    return _CHECKPOINT_BYTES * shape.trained(train)
