"""Loading a LLaVA, its prompts, and the rows made into pairs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from align_world import write_scored
from pairs_in_memory import prepare_pairs
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import build_tiny_llava
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig

from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, read_ahead
from mmedpo_ray.align.packing.logps import response_logps
from mmedpo_ray.align.packing.trees import TokenSequence, pack
from mmedpo_ray.errors import UserError
from mmedpo_ray.models import loading
from mmedpo_ray.models.loading import (
    PromptWriter,
    load_model,
    load_processor,
    model_fingerprint,
    resolve_model,
    template_with_bos,
)
from mmedpo_ray.tables import schemas


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def writer(model_folder: Path) -> PromptWriter:
    return PromptWriter(load_processor(str(model_folder)))


def test_a_folder_resolves_to_itself(model_folder: Path) -> None:
    assert resolve_model(str(model_folder)) == str(model_folder)
    assert resolve_model("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ('{"model_type": "llava_mistral"}', "mmedpo convert"),
        ('{"model_type": "mistral"}', "Supported is LlavaForConditionalGeneration"),
        ('{"model_type": "llava", "vision_config": {"model_type": "pixtral"}}', "pixtral tower"),
    ],
)
def test_what_is_no_llava_is_refused_with_what_to_do(
    tmp_path: Path, config: str | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        resolve_model(str(tmp_path))


def test_a_missing_folder_is_not_taken_for_a_hub_name() -> None:
    with pytest.raises(UserError, match="no model folder"):
        resolve_model("./nowhere/model")


def test_a_hub_name_that_is_not_cached_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cannot load the model"):
        load_model("nobody/nothing", torch.float32)


@pytest.mark.parametrize("load", [load_processor, lambda name: load_model(name, torch.float32)])
def test_a_hub_name_of_another_architecture_is_refused_as_such(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processor would be read first, and fail for a reason that says nothing."""
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: ({"model_type": "qwen2_vl"}, {}))
    with pytest.raises(UserError, match=r"someone/qwen is a qwen2_vl\. Supported is LlavaForConditional"):
        load("someone/qwen")


def test_damaged_weights_are_a_user_error(model_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(damaged), torch.float32)


def test_a_processor_without_template_is_a_user_error(model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no chat template"):
        load_processor(str(bare))


def test_the_fingerprint_follows_weights_and_template(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    assert model_fingerprint(str(other)) == model_fingerprint(str(model_folder))
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    assert model_fingerprint(str(other)) != model_fingerprint(str(model_folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "merges.txt", "vocab.txt", "tokenizer.model"])
def test_the_fingerprint_follows_every_file_of_a_model(model_folder: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    (other / "README.txt").write_text("notes")
    assert model_fingerprint(str(other)) == model_fingerprint(str(model_folder))
    found = set()
    for content in ("one", "two"):
        (other / name).write_text(content)
        found.add(model_fingerprint(str(other)))
    assert len(found - {model_fingerprint(str(model_folder))}) == 2


def test_large_weights_are_known_by_their_content(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is the same model; other values are not, in whichever tensor, nor other shapes of the same bytes."""
    monkeypatch.setattr(loading, "_HASH_WHOLE_BYTES", 0)
    monkeypatch.setattr(loading, "_SAMPLE_BYTES", 64)
    original = model_fingerprint(str(model_folder))
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    path = other / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert model_fingerprint(str(other)) == original
    tensors = load_file(path)
    names = sorted(tensors)
    changes = [{name: tensors[name] + 1} for name in names[:: len(names) // 8]]
    matrix = next(name for name in names if tensors[name].ndim == 2)
    changes.append({matrix: tensors[matrix].reshape(-1)})
    for change in changes:
        save_file({**tensors, **change}, path, {"format": "pt"})
        assert model_fingerprint(str(other)) != original
    save_file(tensors, path, {"format": "pt"})
    content = path.read_bytes()
    for damaged in (content[:-1], content[:4], b"\xff" * 64):
        path.write_bytes(damaged)
        assert model_fingerprint(str(other)) != original


def test_prompt_and_response_are_what_the_processor_makes_of_the_turn(
    model_folder: Path, writer: PromptWriter
) -> None:
    processor = load_processor(str(model_folder))
    question, answer = "Is there a nodule?", "Yes, in the left lung."
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    image = Image.new("RGB", (50, 40))
    for turns, generate, expected in (
        (messages[:1], True, writer.prompt(question)),
        (messages, False, writer.prompt(question) + writer.response(question, answer)),  # type: ignore[operator]
    ):
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
        ids = processor(images=image, text=text, add_special_tokens=False)["input_ids"][0]
        assert list(ids) == expected
    assert writer.prompt(question).count(writer.image_token_id) == 16  # type: ignore[union-attr]
    assert writer.response(question, answer)[-1] == writer.eos_token_id  # type: ignore[index]
    assert writer.response(question, f"  {answer} ") == writer.response(question, answer)


def test_a_placeholder_in_the_text_is_noticed(writer: PromptWriter) -> None:
    assert writer.prompt("What does <image> show?") is None
    assert writer.response("What?", "An <image>.") is None


def test_a_template_without_end_token_still_ends_the_answer(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vicuna"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}{% if c.type == 'image' %}"
        "<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} {% else %}ASSISTANT: {{ m.content[0].text }} "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    writer = PromptWriter(load_processor(str(folder)))
    response = writer.response("Is it?", "Yes")
    assert response is not None
    assert response[-1] == writer.eos_token_id and response.count(writer.eos_token_id) == 1
    tokenizer = load_processor(str(folder)).tokenizer
    assert tokenizer.decode(response) == " Yes</s>"


VICUNA_TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("added", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("template", ["", "{{ bos_token }}"])
def test_a_prompt_begins_as_the_tokenizer_begins_its_texts(
    model_folder: Path, added: str, template: str
) -> None:
    """Once, whether the template writes the beginning or not; an end token belongs to the answer alone."""
    processor = load_processor(str(model_folder))
    tokenizer = processor.tokenizer
    processor.chat_template = template + VICUNA_TEMPLATE
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=special)
    writer = PromptWriter(processor)
    question, answer = "Is there a nodule?", "Yes."
    content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": question}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"][0]
    expected = [int(token) for token in expected if token != tokenizer.eos_token_id]
    prompt, response = writer.prompt(question), writer.response(question, answer)
    assert prompt is not None and response is not None
    assert prompt == expected
    assert prompt.count(tokenizer.bos_token_id) == (1 if template or added.startswith("<s>") else 0)
    assert tokenizer.decode(response) == " Yes.</s>"
    assert writer.widen(writer.narrow(prompt)) == prompt
    served = template_with_bos(processor) or processor.chat_template
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=served, add_generation_prompt=True
    )
    # Endpoints add no token to what the template writes.
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == writer.narrow(prompt)


def test_logps_equal_the_model_s_own_on_every_row(
    model_folder: Path, writer: PromptWriter, tmp_path: Path
) -> None:
    """Padded together with per-response images = each response alone through transformers' forward."""
    rows = write_scored(tmp_path, num_images=2)
    pairs, _ = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED), writer, max_length=256, visual_coefficient=1.0
    )
    model = load_model(str(model_folder), torch.float32)
    batch = pack_pairs(pairs, ImageLoader(writer), writer.pad_token_id, both_sides=True)
    assert batch.pixel_values.shape[0] == 4, "two images and their two noised ones, each once"
    found = response_logps(model, batch)
    images = ImageLoader(writer)
    sides = [(pair.prompt, pair.chosen, pair.image_uri) for pair in pairs]
    sides += [(pair.prompt, pair.rejected, pair.rejected_image_uri) for pair in pairs]
    for row, (prompt, response, uri) in enumerate(sides):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=images([uri])).logits[0]
        logps = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)
        expected = logps.gather(1, torch.tensor(response)[:, None]).sum()
        assert found.logps[row].item() == pytest.approx(expected.item(), rel=1e-4)
        assert found.num_tokens[row] == len(response)
    visual = next(index for index, pair in enumerate(pairs) if pair.is_visual)
    assert found.logps[visual] != found.logps[visual + len(pairs)], "the noised image must matter"


def test_rows_that_cannot_be_trained_on_are_dropped_with_the_reason(
    writer: PromptWriter, tmp_path: Path
) -> None:
    rows = write_scored(
        tmp_path,
        num_images=2,
        **{
            "s000-0:text": {"weight": 0.0},
            "s000-1:text": {"rejected": "In the left lower zone. "},
            "s000-2:text": {"question": "Describe " + "the lungs " * 40},
            "s001-0:text": {"chosen": "No. <image>"},
        },
    )
    scored = schemas.to_table(rows, schemas.SCORED)
    pairs, dropped = prepare_pairs(scored, writer, max_length=64, visual_coefficient=0.5)
    assert {row["pair_id"]: row[schemas.DROP_REASON] for row in dropped} == {
        "s000-0:text": "weight_zero",
        "s000-1:text": "equal_sides",
        "s000-2:text": "prompt_too_long",
        "s001-0:text": "image_placeholder_in_text",
    }
    assert len(pairs) + len(dropped) == len(rows)
    weights = {row["pair_id"]: row["weight"] for row in rows}
    for pair in pairs:
        assert pair.weight == pytest.approx(weights[pair.pair_id] * (0.5 if pair.is_visual else 1.0))
    # The visual pair of the second image shares its answer with a text pair; that of the first has lost its
    # own.
    assert {pair.pair_id: pair.counts_nll for pair in pairs if pair.is_visual} == {
        "s000-1:visual": True,
        "s001-1:visual": False,
    }


def test_a_long_answer_is_cut_and_its_prompt_is_not(writer: PromptWriter, tmp_path: Path) -> None:
    rows = write_scored(tmp_path, num_images=1, **{"s000-2:text": {"chosen": "The heart is normal. " * 30}})
    pairs, _ = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED), writer, max_length=128, visual_coefficient=1.0
    )
    cut = next(pair for pair in pairs if pair.pair_id == "s000-2:text")
    assert len(cut.prompt) + len(cut.chosen) == 128
    assert cut.prompt == writer.prompt(rows[-1]["question"])


def with_settings(model: Path, folder: Path, file: str, **changes: Any) -> Path:
    """A copy of a model with other settings in one of its JSON files; ``None`` removes a setting, dicts are merged."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / file).read_text())
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    kept = {name: value for name, value in settings.items() if value is not None}
    (folder / file).write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor_config.json", {"num_additional_image_tokens": None}, "15 ids .* 16 features.*patch_size"),
        ("processor_config.json", {"patch_size": 16}, "4 ids .* 16 features.*num_additional_image_tokens"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "17 ids .* 16 features"),
        ("processor_config.json", {"patch_size": None}, "lacks patch_size.*num_additional_image_tokens"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "16 ids .* 17 features"),
        ("config.json", {"image_token_index": 7}, "image_token_index is 7"),
        (
            "processor_config.json",
            {"image_processor": {"do_center_crop": False}},
            "makes images of 32 x 48 pixels.*takes 32 x 32",
        ),
    ],
)
def test_a_processor_that_does_not_fit_the_tower_is_refused_before_weights_load(
    model_folder: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = with_settings(model_folder, tmp_path / "other", file, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        load_processor(str(folder))


def test_a_writer_whose_processor_cannot_count_image_ids_is_refused(model_folder: Path) -> None:
    processor = load_processor(str(model_folder))
    processor.patch_size = None
    with pytest.raises(UserError, match="lacks patch_size"):
        PromptWriter(processor)


def test_a_siglip_tower_has_no_class_token(model_folder: Path, tmp_path: Path) -> None:
    folder = with_settings(
        model_folder,
        tmp_path / "siglip",
        "config.json",
        vision_config={"model_type": "siglip_vision_model"},
        vision_feature_select_strategy="full",
    )
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings |= {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    path.write_text(json.dumps(settings))
    assert PromptWriter(load_processor(str(folder))).num_image_tokens == 16


@pytest.mark.parametrize("ids", [15, 17, 32])
def test_ids_that_do_not_meet_as_many_features_are_refused(
    model_folder: Path, writer: PromptWriter, ids: int
) -> None:
    model = load_model(str(model_folder), torch.float32)
    prompt = [1] + [writer.image_token_id] * ids + [5, 6]
    batch = pack([TokenSequence(prompt, [7, 8], image) for image in (0, 1)], torch.zeros(2, 3, 32, 32), 0)
    with pytest.raises(UserError, match=rf"{ids} ids .* 16 features"):
        response_logps(model, batch)


@pytest.mark.parametrize("weight", [-0.5, float("nan")])
def test_an_impossible_weight_stops_the_run(writer: PromptWriter, tmp_path: Path, weight: float) -> None:
    rows = write_scored(tmp_path, num_images=1, **{"s000-0:text": {"weight": weight}})
    with pytest.raises(UserError, match="s000-0:text"):
        prepare_pairs(schemas.to_table(rows, schemas.SCORED), writer, max_length=128, visual_coefficient=1.0)


def test_an_image_that_is_gone_stops_the_run_by_name(writer: PromptWriter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        ImageLoader(writer)([str(tmp_path / "gone.png")])


def test_images_read_side_by_side_are_the_same_in_the_same_order(
    writer: PromptWriter, tmp_path: Path
) -> None:
    uris = [str(tmp_path / f"{number}.png") for number in range(9)]
    for number, uri in enumerate(uris):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30), np.uint8)
        Image.fromarray(pixels).save(uri)
    asked = [*uris, uris[2], uris[0]]
    assert torch.equal(ImageLoader(writer, threads=3)(asked), ImageLoader(writer)(asked))
    with pytest.raises(UserError, match="cannot be read any more"):
        ImageLoader(writer, threads=3)([*uris, str(tmp_path / "gone.png")])


def test_one_item_is_read_ahead_and_no_more() -> None:
    read: list[int] = []

    def square(number: int) -> int:
        if number == 3:
            raise ValueError("unreadable")
        read.append(number)
        return number**2

    squares = read_ahead(square, range(3))
    assert next(squares) == 0
    assert read in ([0], [0, 1]), "the next may be read by now, the one after it must not"
    assert list(squares) == [1, 4]
    assert list(read_ahead(square, [])) == []
    failing = read_ahead(square, range(5))
    assert [next(failing) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="unreadable"):
        next(failing)
