"""Packed trees equal the padded way: one row a sequence, two forwards (chosen, rejected), nothing shared.

The padded way is written here with transformers alone: right-padded rows, an image a row,
``model(**inputs).logits`` at every position. Log-probabilities, losses and every LoRA gradient must be those
of the packed trees, in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs_in_memory import plain_side
from peft import LoraConfig, get_peft_model
from tiny_llava import build_tiny_llava, put_the_image_last
from torch import Tensor

from mmedpo_ray.align.losses import (
    Normaliser,
    PairBatch,
    ResponseLogps,
    kl_divergence,
    preference_objective,
)
from mmedpo_ray.align.packing import lm_head
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.trees import TokenSequence, pack
from mmedpo_ray.align.settings import LOSSES, AlignConfig
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter

TOLERANCE = 1e-5


@dataclass
class World:
    """A tiny LLaVA with LoRA whose B matrices are not 0, and its prompts.

    Attributes:
        model: as transformers and peft compute it.
        packed: copies of it set up for packed trees, by the way of attention.
        writers: of both, by where the template puts the image, ``first`` or ``last``.
    """

    model: Any
    packed: dict[str, Any]
    writers: dict[str, PromptWriter]

    @property
    def writer(self) -> PromptWriter:
        return self.writers["first"]


def take_gradients(model: Any) -> dict[str, Tensor]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = {name: value.grad.clone() for name, value in named.items()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = build_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")
    writers = {"first": PromptWriter(load_processor(str(folder)))}
    put_the_image_last(folder)
    writers["last"] = PromptWriter(load_processor(str(folder)))
    torch.manual_seed(0)
    model = get_peft_model(
        load_model(str(folder), torch.float32),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=r".*\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        ),
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    copies = {name: copy.deepcopy(model) for name in ("tree", "sdpa", "flex")}
    for attention, packed_model in copies.items():
        use_packed_forward(packed_model, attention=attention, sharded=attention != "tree")
    return World(model, copies, writers)


@dataclass(frozen=True)
class Draw:
    """A drawn pair: texts as token ids, images as numbers; a visual pair has two images and one answer."""

    question: str
    chosen: list[int]
    rejected: list[int]
    image: int
    rejected_image: int
    weight: float
    is_visual: bool


QUESTIONS = ("Is there a nodule?", "Is there a nodule in the left lung?", "Where?", "Describe the chest.")
answers = st.lists(st.integers(5, 40), min_size=1, max_size=7)


@st.composite
def pairs(draw: st.DrawFn) -> list[Draw]:
    """One to seven pairs over up to three images: text and visual, repeated questions, one-token answers."""
    found = []
    for _ in range(draw(st.integers(1, 7))):
        image = draw(st.integers(0, 2))
        chosen = draw(answers)
        is_visual = draw(st.booleans())
        # Answers that share a beginning meet in the tree.
        other = draw(answers) if draw(st.booleans()) else chosen[:1] + draw(answers)
        found.append(
            Draw(
                question=draw(st.sampled_from(QUESTIONS)),
                chosen=chosen,
                rejected=chosen if is_visual else other,
                image=image,
                rejected_image=image + 3 if is_visual else image,
                weight=draw(st.sampled_from([0.75, 1.0, 1.25])),
                is_visual=is_visual,
            )
        )
    return found


def _sequences(world: World, drawn: list[Draw], image: str = "first") -> list[TokenSequence]:
    prompts = {text: world.writers[image].prompt(text) or [] for text in QUESTIONS}
    sides = [(pair.question, pair.chosen, pair.image) for pair in drawn]
    sides += [(pair.question, pair.rejected, pair.rejected_image) for pair in drawn]
    return [TokenSequence(prompts[question], response, image) for question, response, image in sides]


def _pixels() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def packed(
    world: World, sequences: list[TokenSequence], attention: str = "tree", **options: Any
) -> ResponseLogps:
    """The packed forward; images are numbered as they come."""
    used = list(dict.fromkeys(sequence.image for sequence in sequences))
    renumbered = [
        TokenSequence(item.prompt, item.response, used.index(item.image), item.weights) for item in sequences
    ]
    size = world.writer.pixels([_blank()])["pixel_values"].shape[-1]
    pixels = torch.nn.functional.interpolate(_pixels(), size)[used]
    return response_logps(
        world.packed[attention],
        pack(renumbered, {"pixel_values": pixels}, world.writer.pad_token_id),
        **options,
    )


def padded(world: World, sequences: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Response logits of each sequence in its own padded row, (N, T, V), and the response mask."""
    length = max(len(item.prompt) + len(item.response) for item in sequences)
    ids = torch.full((len(sequences), length), world.writer.pad_token_id)
    attended = torch.zeros(len(sequences), length, dtype=torch.int64)
    is_response = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, item in enumerate(sequences):
        whole = item.prompt + item.response
        ids[row, : len(whole)] = torch.tensor(whole)
        attended[row, : len(whole)] = 1
        is_response[row, len(item.prompt) : len(whole)] = True
    size = world.writer.pixels([_blank()])["pixel_values"].shape[-1]
    pixels = torch.nn.functional.interpolate(_pixels(), size)[[item.image for item in sequences]]
    logits = world.model(input_ids=ids, attention_mask=attended, pixel_values=pixels).logits.float()
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * is_response[:, 1:]).sum(-1), logits


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (32, 32))


def _batch(drawn: list[Draw]) -> tuple[PairBatch, Normaliser]:
    count = len(drawn)
    generator = torch.Generator().manual_seed(2)
    batch = PairBatch(
        weight=torch.tensor([pair.weight for pair in drawn]),
        ref_chosen=-20 * torch.rand(count, generator=generator),
        ref_rejected=-20 * torch.rand(count, generator=generator),
        is_visual=torch.tensor([pair.is_visual for pair in drawn]),
        counts_nll=torch.ones(count, dtype=torch.bool),
    )
    total = Normaliser(
        sum(pair.weight for pair in drawn), sum(len(pair.chosen) for pair in drawn), len(drawn)
    )
    return batch, total


def _same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(value.abs().max() > 1e-6 for value in theirs.values()), "there must be a gradient to compare"
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=TOLERANCE), name


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=pairs(),
    loss=st.sampled_from(sorted(LOSSES)),
    attention=st.sampled_from(["tree", "sdpa"]),
    image=st.sampled_from(["first", "last"]),
)
def test_losses_and_lora_gradients_equal_the_padded_ones(
    world: World, drawn: list[Draw], loss: str, attention: str, image: str
) -> None:
    sequences, (batch, total) = _sequences(world, drawn, image), _batch(drawn)
    objective = AlignConfig(
        loss=loss,
        beta=0.3,
        label_smoothing=0.1 if loss in ("cdpo", "robust") else 0.0,
        nll_coefficient=0.5,
        anchor_coefficient=0.3,
    )
    count = len(drawn)
    out = packed(world, sequences, attention)
    ours, _ = preference_objective(*out.sides(count), batch, total, objective)
    ours.backward()
    our_gradients = take_gradients(world.packed[attention])

    chosen_logps, _ = padded(world, sequences[:count])
    rejected_logps, _ = padded(world, sequences[count:])
    tokens = out.num_tokens
    theirs, _ = preference_objective(
        plain_side(chosen_logps, tokens[:count]),
        plain_side(rejected_logps, tokens[count:]),
        batch,
        total,
        objective,
    )
    theirs.backward()
    assert torch.allclose(
        out.logps, torch.cat([chosen_logps, rejected_logps]), rtol=TOLERANCE, atol=TOLERANCE
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=TOLERANCE)
    _same_gradients(our_gradients, take_gradients(world.model))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=pairs(), forward_share=st.sampled_from([0.0, 0.3, 1.0]))
def test_the_online_reference_and_the_divergence_equal_the_padded_ones(
    world: World, drawn: list[Draw], forward_share: float
) -> None:
    sequences = _sequences(world, drawn)
    out = packed(world, sequences, with_reference=True, kl_forward_share=forward_share)
    assert out.ref_logps is not None and out.kl is not None
    out.kl.sum().backward()
    our_gradients = take_gradients(world.packed["tree"])
    _, logits = padded(world, sequences)
    with torch.no_grad(), world.model.disable_adapter():
        ref_logps, ref_logits = padded(world, sequences)
    divergence = torch.stack(
        [
            kl_divergence(
                logits[row, len(item.prompt) - 1 : len(item.prompt) + len(item.response) - 1],
                ref_logits[row, len(item.prompt) - 1 : len(item.prompt) + len(item.response) - 1],
                forward_share,
            ).sum()
            for row, item in enumerate(sequences)
        ]
    )
    divergence.sum().backward()
    assert torch.allclose(out.ref_logps, ref_logps, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(out.kl, divergence, rtol=1e-4, atol=TOLERANCE)
    _same_gradients(our_gradients, take_gradients(world.model))


@pytest.mark.parametrize("forward_share", [None, 0.3])
def test_values_and_gradients_do_not_depend_on_chunks(
    world: World, forward_share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [
        Draw(QUESTIONS[0], [6, 7, 10], [8, 9], 0, 0, 1.0, False),
        Draw(QUESTIONS[1], [6, 11], [6, 11], 1, 3, 1.0, True),
    ]
    sequences = _sequences(world, drawn)
    model = world.packed["tree"]
    vocabulary = model.get_base_model().lm_head.weight.shape[0]
    model.get_base_model().lm_head.requires_grad_(True)
    found = []
    for rows in (1000, 3):
        monkeypatch.setattr(lm_head, "MOST_LOGITS", rows * vocabulary + 1)
        out = packed(
            world, sequences, with_reference=forward_share is not None, kl_forward_share=forward_share
        )
        loss = (out.logps * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()
        if out.kl is not None:
            loss = loss + out.kl.square().sum()
        loss.backward()
        found.append((out, take_gradients(model)))
    model.get_base_model().lm_head.requires_grad_(False)
    (whole, expected), (chunked, gradients) = found
    assert chunked.logps.grad_fn is not None
    for ours, theirs in zip(chunked, whole, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert "base_model.model.lm_head.weight" in gradients
    _same_gradients(gradients, expected)


def test_chunks_bound_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the logits of many tokens nothing stays until the backward pass; of few, all."""
    rows, size, vocabulary = 64, 4, 100
    layer = torch.nn.Linear(size, vocabulary, bias=False)
    lm_head.install(layer)

    def kept(most_logits: int) -> int:
        monkeypatch.setattr(lm_head, "MOST_LOGITS", most_logits)
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: numbers.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            layer(torch.randn(rows, size, requires_grad=True), torch.randint(vocabulary, (rows,)))
        return sum(numbers)

    assert kept(rows * vocabulary) > rows * vocabulary
    assert kept(8 * vocabulary) == rows * size + size * vocabulary + rows


def test_span_weights_count_only_what_differs(world: World) -> None:
    prompt = world.writer.prompt(QUESTIONS[0]) or []
    plain = [TokenSequence(prompt, [6, 7, 8], 0), TokenSequence(prompt, [6, 9, 8], 0)]
    weighted = [TokenSequence(prompt, item.response, 0, weights=[0.25, 1.0, 0.25]) for item in plain]
    out, base = packed(world, weighted), packed(world, plain)
    assert torch.allclose(out.likelihood, base.logps, atol=1e-6), "the likelihood is of all tokens"
    assert out.tokens.tolist() == [1.5, 1.5]
    single = [
        packed(world, [TokenSequence(prompt + item.response[:k], item.response[k:], 0)]).logps
        for item in plain
        for k in (0, 1, 2)
    ]
    logps = [value.item() for value in single]
    for index, (a, b, c) in enumerate((logps[:3], logps[3:])):
        expected = 0.25 * (a - b) + (b - c) + 0.25 * c
        assert out.logps[index].item() == pytest.approx(expected, abs=1e-5)


def test_every_way_of_attention_gives_the_same_values(world: World) -> None:
    drawn = [
        Draw(QUESTIONS[0], [6, 7], [8], 0, 0, 1.0, False),
        Draw(QUESTIONS[1], [6], [6], 0, 3, 1.0, True),
        Draw(QUESTIONS[3], [9, 10, 11], [9, 12], 1, 1, 1.0, False),
    ]
    sequences = _sequences(world, drawn)
    with torch.no_grad():
        dense, flex, tree = (packed(world, sequences, name).logps for name in ("sdpa", "flex", "tree"))
    assert torch.allclose(tree, dense, rtol=0, atol=1e-4)
    assert torch.allclose(flex, dense, rtol=0, atol=1e-4)


def test_a_block_mask_gives_the_same_lora_gradients(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch refuses FlexAttention's backward pass on a CPU as its kernel has none there; the uncompiled form
    # has one.
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as in_transformers

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(
        in_transformers,
        "compile_friendly_flex_attention",
        lambda *states, training=False, **options: flex.flex_attention(*states, **options),
    )
    drawn = [
        Draw(QUESTIONS[0], [6, 7], [8], 0, 0, 1.0, False),
        Draw(QUESTIONS[1], [6], [6], 0, 3, 0.75, True),
        Draw(QUESTIONS[3], [9, 10, 11], [9, 12], 1, 1, 1.25, False),
    ]
    sequences, (batch, total) = _sequences(world, drawn), _batch(drawn)
    gradients = {}
    for attention in ("sdpa", "flex"):
        out = packed(world, sequences, attention)
        preference_objective(*out.sides(len(drawn)), batch, total, AlignConfig())[0].backward()
        gradients[attention] = take_gradients(world.packed[attention])
    _same_gradients(gradients["flex"], gradients["sdpa"])
