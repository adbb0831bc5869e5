"""Memory, traffic and checkpoint size of a training run: arithmetic on the sizes of a model, no measurement.

Memory is counted tensor by tensor as the packed forward keeps them for its backward pass (a test compares the
count with what autograd keeps); losses of the allocator, the vision tower's and NCCL's buffers are not
included.

Traffic under ZeRO-3: every weight is gathered for the forward pass, those of the language model again for the
backward pass (nothing is differentiated through the tower), and gradients of trained weights are reduced once
(Rajbhandari et al., 2020, section 7.2). A ring over R ranks moves (R - 1)/R of the whole through each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from mmedpo_ray.align.engines.deepspeed import MOST_IN_BUCKET
from mmedpo_ray.align.packing import lm_head
from mmedpo_ray.align.packing.tree_attention import QUERIES_PER_BLOCK
from mmedpo_ray.align.plan.plan import ForwardSize
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.architectures import architecture_of

Train = Literal["lora", "full"]
Strategy = Literal["zero3", "zero2", "ddp"]

# Weights that DeepSpeed keeps gathered at a time (stage3_max_live_parameters).
_MOST_GATHERED = 1_000_000_000
_GIB = 2**30
_FLOAT32 = 4


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    Attributes:
        total: all parameters without the adapter.
        language: parameters of the language model, embeddings and head included; a trained projector counts
            here too.
        layers: parameters of its linear layers, without the head.
        head: parameters of the head.
        tower: parameters of the vision tower and the projector.
        adapter: parameters that ``train: lora`` trains beside the model's own.
        num_layers, hidden, intermediate, heads, key_heads, head_size: of the language model.
        image_tokens: tokens of an image, on average where its size decides.
    """

    total: int
    language: int
    layers: int
    head: int
    tower: int
    adapter: int
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    image_tokens: int

    @classmethod
    def of(cls, config: Any, align: AlignConfig, image_tokens: int) -> Geometry:
        """Counts the parameters of a model's configuration without allocating any."""
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        sizes = {name: value.numel() for name, value in model.named_parameters()}
        architecture = architecture_of(model)
        projector = _total(sizes, architecture.projector)
        # A projector may be part of the tower.
        tower = _total(sizes, (*architecture.projector, *architecture.tower))
        inner = [
            (name.rsplit(".", 1)[-1], module)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(f"{architecture.language_model}.")
        ]
        targets = [module for name, module in inner if name in align.lora.target_modules]
        text = config.text_config
        beside = projector if align.train_projector else 0
        return cls(
            total=sum(sizes.values()),
            language=sum(sizes.values()) - tower + beside,
            layers=sum(module.weight.numel() for _, module in inner),
            head=model.get_output_embeddings().weight.numel(),
            tower=tower,
            adapter=beside
            + align.lora.rank * sum(module.in_features + module.out_features for module in targets),
            num_layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            image_tokens=image_tokens,
        )

    def trained(self, train: Train) -> int:
        """Parameters that are trained: LoRA's, or those of the language model."""
        return self.adapter if train == "lora" else self.language

    def held(self, train: Train) -> int:
        """All parameters that ranks hold."""
        return self.total + (self.adapter if train == "lora" else 0)


def _total(sizes: Mapping[str, int], modules: Sequence[str]) -> int:
    """Parameters in modules of these dotted names, each counted once."""
    inside = tuple(f"{name}." for name in modules)
    return sum(size for name, size in sizes.items() if name.startswith(inside))


class Memory(NamedTuple):
    """Expected memory of one rank, GiB.

    Attributes:
        weights: of the model; under ZeRO-3 a share of them, and those that are gathered at a time.
        trained: gradients, their buckets and Adam's state of what is trained, and the weights of an adapter.
        activations: of the largest micro-batch, logits of response tokens included.
    """

    weights: float
    trained: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self._asdict().items())
        return f"{self.total:.2f} GiB: {parts}"


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

    ``zero3`` gathers the weights twice in every micro-batch and reduces the gradients of the trained ones;
    ``zero2`` only reduces, and gathers the trained weights once after the update; ``ddp`` sums float32
    gradients once, which moves them twice.

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


def checkpoint_bytes(shape: Geometry, train: Train) -> int:
    """Size of a checkpoint: trained weights and Adam's two moments, whole and in float32."""
    return 3 * _FLOAT32 * shape.trained(train)


def weight_bytes(align: AlignConfig) -> int:
    """Bytes of a number in the precision of training."""
    return 2 if align.precision == "bf16" else 4


def estimate_memory(shape: Geometry, align: AlignConfig, largest: ForwardSize, ranks: int) -> Memory:
    """Memory of one rank.

    A trained number takes, besides itself in the precision of training, in float32: Adam's two moments, the
    sum of the gradients, and an exact copy of a weight that is not exact itself. ddp has a rounded gradient
    beside the sum; DeepSpeed always makes the copy, and one of the sum while it updates. It gathers gradients
    in buckets before it sums them over the ranks; ZeRO-2 fills a second bucket while the first is sent.

    Args:
        shape: of the model.
        align: precision, strategy, attention and checkpointing.
        largest: micro-batch of a rank.
        ranks: that share weights or state.
    """
    size, trained = weight_bytes(align), shape.trained(align.train)
    weights: float = shape.total * size
    state = trained * 20 / ranks
    if align.strategy == "ddp":
        state = trained * (12 if size == 4 else 16 + size)
    elif align.strategy == "zero3":
        weights = weights / ranks + (min(_MOST_GATHERED, shape.total) * size if ranks > 1 else 0)
    buckets = {"zero3": 1, "zero2": 2, "ddp": 0}[align.strategy] * min(MOST_IN_BUCKET, trained)
    # An adapter's weights are additional to the model's.
    beside = trained if align.train == "lora" else 0
    activations = size * kept_numbers(shape, align, largest) + logit_bytes(shape, align, largest)
    return Memory(weights / _GIB, (state + (buckets + beside) * size) / _GIB, activations / _GIB)


def kept_numbers(shape: Geometry, align: AlignConfig, forward: ForwardSize) -> int:
    """Numbers that the layers keep of a micro-batch for its backward pass, in the precision of training.

    A layer keeps per token: its input, the residual behind attention and both normalised (4·hidden); gate,
    up, the activated gate and the product of both (4·intermediate); queries, their block's copy, the attended
    values and these in the rows' order; keys and values, and their copies for every block
    (:mod:`~mmedpo_ray.align.packing.tree_attention`); LoRA's products of rank size. The last layer keeps most
    of that for response tokens only. The masks of blocks and of response tokens exist once. With
    checkpointing there is the input of every layer, and the rest of one layer.
    """
    tokens, outputs = forward.tokens, min(forward.response_tokens, forward.tokens)
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    reduced = align.lora.rank * len(align.lora.target_modules) if align.train == "lora" else 0
    per_token = 4 * shape.hidden + 4 * shape.intermediate + 4 * queries + 2 * keys + reduced
    shared = shape.heads // shape.key_heads
    copies, mask = 0, shared * outputs * tokens // max(1, forward.images)
    if align.attention == "tree":
        branches = max(0, tokens - forward.images * shape.image_tokens)
        blocks = math.ceil(branches / max(1, forward.images) / QUERIES_PER_BLOCK) * forward.images
        copies = 2 * keys * (blocks * shape.image_tokens + branches)
        seen = shape.image_tokens + branches // max(1, blocks)
        mask += shared * branches * seen
    layer = tokens * per_token + copies
    if align.gradient_checkpointing:
        return shape.num_layers * tokens * shape.hidden + layer + mask
    last = tokens * (2 * shape.hidden + 4 * keys) + outputs * per_token
    return (shape.num_layers - 1) * layer + last + mask


def logit_bytes(shape: Geometry, align: AlignConfig, forward: ForwardSize) -> int:
    """Logits of response tokens and their gradient at the peak of the backward pass, in float32.

    See :mod:`~mmedpo_ray.align.packing.lm_head`.
    """
    vocabulary = shape.head // shape.hidden
    logits = min(forward.response_tokens * vocabulary, max(lm_head.MOST_LOGITS, vocabulary))
    # Log-probabilities, their gradient and the logits; the divergence has both models' with probabilities and
    # products.
    return logits * _FLOAT32 * (8 if align.kl_coefficient else 3)
