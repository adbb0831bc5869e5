"""What every architecture must do, on tiny random models made from configurations.

The reference is transformers alone: its processor writes prompt and image, its own forward computes one
sequence at a time, with whatever positions and masks it makes itself.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from tiny_models import build_tiny
from torch import Tensor

from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack
from mmedpo_ray.align.policy import projector_names, target_pattern
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.export.stage import merge
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.architectures.base import Architecture
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter, chat_messages

TOLERANCE = 1e-5
# Wide, tall, small, large and square.
SIZES = ((150, 100), (70, 120), (40, 30), (300, 90), (64, 64))
TURNS = {
    "Is there a nodule?": ("Yes, of the left lung.", "No, the lungs are clear."),
    "What modality is shown?": ("A chest radiograph.", "A CT of the abdomen."),
    "Which organ is enlarged? Name the lobe, the side and the likely cause.": ("The heart.", "The liver."),
}


@dataclass(frozen=True)
class World:
    """A tiny model with LoRA whose B matrices are not 0, as transformers computes it and set up for trees."""

    folder: Path
    processor: Any
    writer: PromptWriter
    model: Any
    packed: Any

    @property
    def architecture(self) -> Architecture:
        return self.writer.architecture


# The others are checked with the slow tests.
IN_EVERY_RUN = {"llava", "qwen2_5_vl", "gemma3"}
KINDS = [
    kind if kind in IN_EVERY_RUN else pytest.param(kind, marks=pytest.mark.slow)
    for kind in sorted(ARCHITECTURES)
]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = build_tiny(request.param, tmp_path_factory.mktemp("model") / request.param)
    processor = load_processor(str(folder))
    writer = PromptWriter(processor)
    torch.manual_seed(0)
    targets = target_pattern(writer.architecture, AlignConfig().lora.target_modules)
    model = get_peft_model(
        load_model(str(folder), torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    packed = copy.deepcopy(model)
    use_packed_forward(packed)
    return World(folder, processor, writer, model, packed)


def images() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def sequences(world: World) -> list[TokenSequence]:
    """Both answers to all questions about all images."""
    found = []
    for number, size in enumerate(SIZES):
        for question, answers in TURNS.items():
            prompt = world.writer.prompt(question, size)
            for answer in answers:
                response = world.writer.response(question, answer)
                assert prompt is not None and response is not None
                found.append(TokenSequence(prompt, response, number))
    return found


def packed_batch(world: World) -> PackedTrees:
    inputs = [world.writer.pixels([image]) for image in images()]
    return pack(sequences(world), world.architecture.collate(inputs), world.writer.pad_token_id)


def encoded(world: World, question: str, image: Image.Image) -> dict[str, Tensor]:
    """A prompt as transformers writes it."""
    text = world.processor.apply_chat_template(
        chat_messages(question), tokenize=False, add_generation_prompt=True
    )
    return dict(world.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False))


def alone(world: World, model: Any) -> Tensor:
    """Log-probabilities of the responses by transformers' own forward, a sequence at a time."""
    found = []
    pictures, turns = images(), [turn for turn, answers in TURNS.items() for _ in answers]
    for number, sequence in enumerate(sequences(world)):
        inputs = encoded(world, turns[number % len(turns)], pictures[sequence.image])
        prompt_length = inputs["input_ids"].shape[1]
        response = torch.tensor([sequence.response])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                filled = torch.full_like(response, int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], filled], 1)
        logits = model(**inputs).logits[0, prompt_length - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, response.T).sum())
    return torch.stack(found)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("attention", "checkpointing"), [("tree", False), ("tree", True), ("sdpa", False)])
def test_packed_log_probabilities_and_lora_gradients_are_those_of_separate_forwards(
    world: World, attention: str, checkpointing: bool
) -> None:
    expected = alone(world, world.model)
    packed = copy.deepcopy(world.model)
    use_packed_forward(packed, attention=attention)
    if checkpointing:
        language_model = packed.get_base_model().get_submodule(world.architecture.language_model)
        language_model.gradient_checkpointing_enable({"use_reentrant": True})
        packed.train()
    found = response_logps(packed, packed_batch(world)).logps
    per_token = [len(sequence.response) for sequence in sequences(world)]
    assert ((found - expected).abs() / torch.tensor(per_token)).max() < TOLERANCE
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    ours, theirs = gradients(packed), gradients(world.model)
    assert ours.keys() == theirs.keys() and all("lora_" in name for name in ours)
    inside = world.architecture.language_model
    assert all(name.startswith(f"base_model.model.{inside}.") for name in ours)
    largest = max(value.norm() for value in theirs.values())
    for name, value in ours.items():
        assert (value - theirs[name]).norm() < TOLERANCE * max(theirs[name].norm(), 1e-2 * largest), name


def test_a_trained_projector_has_the_gradients_of_separate_forwards(world: World) -> None:
    targets = target_pattern(world.architecture, ["q_proj"])
    base = load_model(str(world.folder), torch.float32)
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=projector_names(base))
    model = get_peft_model(base, config)
    packed = copy.deepcopy(model)
    use_packed_forward(packed)
    response_logps(packed, packed_batch(world)).logps.sum().backward()
    alone(world, model).sum().backward()
    ours, theirs = gradients(packed), gradients(model)
    projector = {name for name in ours if "modules_to_save" in name}
    tower = [f"base_model.model.{name}" for name in world.architecture.projector]
    assert projector and all(name.startswith(tuple(tower)) for name in projector)
    largest = max(theirs[name].norm() for name in projector)
    assert largest > 0.1
    for name in projector:
        difference = (ours[name] - theirs[name]).norm()
        assert difference < TOLERANCE * max(theirs[name].norm(), 1e-2 * largest), name


def _places_in_rows(self: Architecture, tokens: Any, inputs: Any, config: Any) -> Tensor:
    return torch.arange(tokens.depth.shape[1]).expand_as(tokens.depth)


def test_a_wrong_position_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = packed_batch(world)
    expected = response_logps(world.packed, batch).logps
    monkeypatch.setattr(type(world.architecture), "positions", _places_in_rows)
    assert (response_logps(world.packed, batch).logps - expected).abs().max() > 0.01


def test_one_position_a_token_is_noticed_where_there_are_three(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if type(world.architecture).positions is Architecture.positions:
        pytest.skip("has one position a token")
    batch = packed_batch(world)
    expected = response_logps(world.packed, batch).logps
    monkeypatch.setattr(type(world.architecture), "positions", Architecture.positions)
    assert (response_logps(world.packed, batch).logps - expected).abs().max() > 0.01


def test_a_wrong_mask_is_noticed(world: World) -> None:
    """Every branch also sees the branches before it."""
    batch = packed_batch(world)
    expected = response_logps(world.packed, batch).logps
    sees = batch.layout.sees.clone()
    queries = sees.shape[1]
    sees[:, :, -queries:] |= torch.tril(torch.ones(queries, queries, dtype=torch.bool))
    length = batch.subtree_end.shape[1]
    wrong = replace(
        batch,
        layout=replace(batch.layout, sees=sees),
        subtree_end=torch.full_like(batch.subtree_end, length),
    )
    assert (response_logps(world.packed, wrong).logps - expected).abs().max() > 0.01


def test_plain_masks_are_noticed_where_layers_have_their_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(world.architecture)
    if not kind.layer_masks:
        pytest.skip("a token sees its ancestors and itself")
    batch, own = packed_batch(world), kind.masks
    expected = response_logps(world.packed, batch).logps

    def without(name: str) -> Any:
        """The masks of the architecture, as if there were no windows, or no image."""

        def masks(self: Architecture, sees: Tensor, tokens: Any, config: Any) -> Any:
            if name == "images":
                tokens = replace(tokens, is_image=torch.zeros_like(tokens.is_image))
            else:
                tokens = replace(tokens, depth=torch.zeros_like(tokens.depth))
            return own(self, sees, tokens, config)

        return masks

    for name in ("images", "windows"):
        monkeypatch.setattr(kind, "masks", without(name))
        assert (response_logps(world.packed, batch).logps - expected).abs().max() > 0.01, name


def test_another_image_is_noticed(world: World) -> None:
    batch = packed_batch(world)
    expected = response_logps(world.packed, batch).logps
    images = {name: value.clone() for name, value in batch.images.items()}
    images["pixel_values"] = images["pixel_values"].flip(0)
    found = response_logps(world.packed, replace(batch, images=images)).logps
    assert (found - expected).abs().max() > 0.01


def test_prompts_are_the_processors_for_images_of_any_size(world: World) -> None:
    for image in images():
        for question in TURNS:
            expected = encoded(world, question, image)["input_ids"][0].tolist()
            assert world.writer.prompt(question, image.size) == expected, image.size


def test_an_answer_ends_where_the_template_and_generation_end_it(world: World) -> None:
    tokenizer, image = world.processor.tokenizer, images()[0]
    ends = json.loads((world.folder / "generation_config.json").read_text())["eos_token_id"]
    for question, (answer, _) in TURNS.items():
        turn = world.processor.apply_chat_template(chat_messages(question, answer), tokenize=False)
        whole = world.processor(text=[turn], images=[image], add_special_tokens=False)["input_ids"][0]
        prompt, response = world.writer.prompt(question, image.size), world.writer.response(question, answer)
        assert prompt is not None and response is not None
        assert list(whole)[: len(prompt) + len(response)] == prompt + response
        assert response[-1] in (ends if isinstance(ends, list) else [ends])
        behind = tokenizer.decode(list(whole)[len(prompt) + len(response) :])
        assert not behind.strip(), "nothing but blanks follows the end"


def test_a_placeholder_in_a_text_gives_none(world: World) -> None:
    placeholder = world.architecture.placeholder(world.processor)
    assert world.writer.prompt(f"Is there {placeholder} a nodule?", SIZES[0]) is None
    assert world.writer.engine_prompt(f"Is there {placeholder} a nodule?") is None
    assert world.writer.response("?", f"Yes {placeholder}.") is None


def test_vllm_gets_one_placeholder(world: World) -> None:
    prompt = world.writer.engine_prompt("?")
    placeholder = world.processor.tokenizer.convert_tokens_to_ids(
        world.architecture.placeholder(world.processor)
    )
    assert prompt is not None and prompt.count(placeholder) == 1


def test_a_merged_model_loads_and_computes_what_the_adapter_did(world: World, tmp_path: Path) -> None:
    world.model.save_pretrained(tmp_path / "adapter")
    merge(str(world.folder), tmp_path / "adapter", tmp_path / "merged")
    expected = alone(world, world.model)
    merged = load_model(str(tmp_path / "merged"), torch.float32)
    assert torch.allclose(alone(world, merged), expected, atol=1e-4)
    writer = PromptWriter(load_processor(str(tmp_path / "merged")))
    assert writer.prompt("?", SIZES[0]) == world.writer.prompt("?", SIZES[0])
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as opened:
        names = list(opened.keys())
    assert [world.architecture.saved_name(name) for name in names] == names
