"""Loading a LLaVA and writing its prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_llava import build_tiny_llava
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor, resolve_model
from mmedpo_ray.models.prompts import PromptWriter, template_with_bos


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
        ('{"model_type": "mistral"}', "Supported are .*llava, "),
        ('{"model_type": "llava", "vision_config": {"model_type": "pixtral"}}', "pixtral tower"),
    ],
)
def test_another_architecture_is_refused_with_what_to_do(
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
    with pytest.raises(UserError, match=r"someone/qwen is a qwen2_vl.*Supported are .*llava, "):
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
    assert writer.response(question, answer)[-1] == writer.end_token_id  # type: ignore[index]
    assert writer.response(question, f"  {answer} ") == writer.response(question, answer)


def test_a_placeholder_in_the_text_gives_none(writer: PromptWriter) -> None:
    assert writer.prompt("What does <image> show?") is None
    assert writer.response("What?", "An <image>.") is None


def test_a_template_without_end_token_still_ends_the_answer(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vicuna"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}{% if c.type "
        "== 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} {% else "
        "%}ASSISTANT: {{ m.content[0].text }} {% endif %}{% endfor %}{% if add_generation_prompt "
        "%}ASSISTANT:{% endif %}"
    )
    writer = PromptWriter(load_processor(str(folder)))
    response = writer.response("Is it?", "Yes")
    assert response is not None
    assert response[-1] == writer.end_token_id and response.count(writer.end_token_id) == 1
    tokenizer = load_processor(str(folder)).tokenizer
    assert tokenizer.decode(response) == " Yes</s>"


VICUNA_TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content if c.type == 'image' "
    "%}<image>\n{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor "
    "%}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("added", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("template", ["", "{{ bos_token }}"])
def test_a_prompt_begins_with_one_beginning_token(model_folder: Path, added: str, template: str) -> None:
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
    narrow = writer.narrow_prompt(question)
    assert narrow is not None and writer.widen(narrow, 16) == prompt
    served = template_with_bos(processor) or processor.chat_template
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=served, add_generation_prompt=True
    )
    # Endpoints add no token to what the template writes.
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == narrow


def with_settings(model: Path, folder: Path, file: str, **changes: Any) -> Path:
    """A copy of a model with other settings in one JSON file; ``None`` removes one, dicts are merged."""
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
        ("processor_config.json", {"image_processor": {"image_mean": [0.5]}}, "cannot process an image"),
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
