"""The merged model answers as the trained one does, in transformers and in vLLM, whatever was trained."""

from __future__ import annotations

import errno
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from align_world import training_spec
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llava import build_tiny_llava
from transformers import LlavaForConditionalGeneration
from vllm_tokens import vllm_tokens

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint, CheckpointWriter, State
from mmedpo_ray.align.checkpoint.output_weights import write_output
from mmedpo_ray.align.policy import build_policy
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.export.stage import export, merge, put_weights
from mmedpo_ray.models.architectures.llava import Llava
from mmedpo_ray.models.saving import rename_weights
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.tables.run_folder import Role, RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner

QUESTIONS = ["Is there a nodule in the left lung?", "Yes, there is?"]


def train_nothing(config: Config, base: Path, role: str = "aligned", rank: int = 4) -> None:
    """Writes what `align` writes, with random instead of trained LoRA weights."""
    from peft import LoraConfig, get_peft_model

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*\.language_model\..*\.(q_proj|v_proj|up_proj)",
        init_lora_weights=False,
    )
    folder = RunFolder(config.run.folder).align(role)
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"))
    StageRunner("align", str(folder), config).finish()


def train_randomly(config: Config, base: Path, role: Role = "aligned", **settings: Any) -> Any:
    """Writes what `align` writes, after random updates of all that it trains; returns the trained model."""
    folder = RunFolder(config.run.folder).align(role)
    spec = training_spec(folder, base, folder, **settings)
    policy = build_policy(spec)
    torch.manual_seed(7)
    with torch.no_grad():
        for value in policy.trained_parameters().values():
            value += 0.3 * (value.std() if value.std() > 0 else 0.1) * torch.randn_like(value)
    with ThreadPoolExecutor(1) as pool:
        writer = CheckpointWriter(folder, State(1, "test"), keep=1, pool=pool)
        for name, value in policy.trained_parameters().items():
            writer.add(name, {"parameter": value})
        checkpoint = writer.finish().result()
    write_output(policy.model, Checkpoint(checkpoint), folder, torch.float32)
    StageRunner("align", str(folder), config).finish()
    return as_transformers_computes(policy.model.eval())


def as_transformers_computes(model: Any) -> Any:
    """Takes the forwards for packed trees out of a policy's model."""
    for module in model.modules():
        vars(module).pop("forward", None)
        if hasattr(module, "language_model"):
            module.language_model.set_attn_implementation("sdpa")
    return model


# What is trained besides LoRA on the language model alone.
MORE = {
    "projector": {"train_projector": True},
    "full": {"train": "full"},
    "full and projector": {"train": "full", "train_projector": True},
}


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Trained models and the folders that they were exported to, by what was trained."""
    found = {}
    for number, (name, settings) in enumerate(MORE.items()):
        root = tmp_path_factory.mktemp(f"more{number}")
        base = build_tiny_llava(root / "base", 0)
        config = make_config(root, base)
        trained = train_randomly(config, base, **settings)
        # Of an earlier export; it would be served in place of the merged model.
        shutil.copytree(base, RunFolder(config.run.folder).model() / "adapter")
        export(config)
        found[name] = (trained, RunFolder(config.run.folder).model())
        assert run_models(config)["aligned"] == found[name][1] / "merged"
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a base model and of a run with its exported adapter."""
    root = tmp_path_factory.mktemp("export")
    base = build_tiny_llava(root / "base", 0)
    config = make_config(root, base)
    train_nothing(config, base)
    manifest = export(config)
    assert manifest.extra["merged_mib"] > 0
    return base, RunFolder(config.run.folder).model()


def make_config(root: Path, base: Path) -> Config:
    return Config.model_validate({"run": {"folder": str(root / "run")}, "model": {"path": str(base)}})


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)).convert("RGB")


def transformers_tokens(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    from peft import PeftModel

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return greedy_tokens(model, folder)


def greedy_tokens(model: Any, processor_folder: Path) -> list[list[int]]:
    from transformers import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(processor_folder)
    tokens = []
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        # As apply_chat_template tokenises: once, whether the template or the tokenizer writes the beginning.
        begins = text.startswith(processor.tokenizer.bos_token)
        inputs = processor(images=image(), text=text, add_special_tokens=not begins, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tokens.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    return tokens


def test_merged_equals_base_with_adapter(exported):
    base, model = exported
    merged = transformers_tokens(model / "merged")
    assert merged == transformers_tokens(base, model / "adapter")
    assert merged != transformers_tokens(base)


@pytest.mark.parametrize(("size", "rounding"), [(1.0, 0.01), (1e-3, 1.0)])
def test_an_update_that_rounding_takes_is_reported(tmp_path, caplog, size, rounding):
    """The base's bfloat16 keeps eight bits of a weight: an update below that is not in the merged model."""
    base = build_tiny_llava(tmp_path / "base", 0)
    LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    config = make_config(tmp_path, base)
    train_nothing(config, base)
    weights = RunFolder(config.run.folder).align() / "adapter/adapter_model.safetensors"
    save_file({name: size * value for name, value in load_file(weights).items()}, weights)
    manifest = export(config)
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for folder in (base, RunFolder(config.run.folder).model() / "merged")
    )
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    stored = after.get_parameter(name) - before.get_parameter(name)
    with safe_open(weights, "pt") as file:
        a, b = (
            file.get_tensor(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight")
            for side in "AB"
        )
    update = 2.0 * b @ a
    found = float((stored - update).detach().norm() / update.norm())
    assert found == pytest.approx(rounding, abs=0.3 if rounding == 1.0 else 0.05)
    assert manifest.extra["merge_rounding"] == pytest.approx(found, abs=0.1)
    assert ("is exact, and `mmedpo serve` uses it" in caplog.text) == (rounding == 1.0)


def test_what_lies_beside_the_weights(exported):
    base, model = exported
    merged = {file.name for file in (model / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} <= merged
    settings = json.loads((model / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert not [file for file in model.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("name", MORE)
def test_merged_equals_what_was_trained(exported, more, name):
    base, _ = exported
    trained, model = more[name]
    assert not (model / "adapter").exists()
    merged = transformers_tokens(model / "merged")
    assert merged == greedy_tokens(trained, model / "merged")
    assert merged != transformers_tokens(base)


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["lora", "full and projector"]),
        ["projector", "full"],
    ],
)
def test_vllm_and_transformers_give_the_same_greedy_tokens(exported, more, names):
    _, model = exported
    folders = {"lora": model} | {name: folder for name, (_, folder) in more.items()}
    merged = [folders[name] / "merged" for name in names]
    found = vllm_tokens(merged, [(image(), question) for question in QUESTIONS], max_tokens=8)
    expected = [transformers_tokens(folder) for folder in merged]
    assert [[tokens["answer"] for tokens in answers] for answers in found] == expected
    assert len({json.dumps(tokens) for tokens in expected}) == len(expected), "the models must differ"


def test_a_second_export_is_skipped_and_a_damaged_one_repeated(tmp_path):
    base = build_tiny_llava(tmp_path / "base", 0)
    config = make_config(tmp_path, base)
    train_nothing(config, base, "control")
    export(config, "control")
    weights = RunFolder(config.run.folder).model("control") / "merged/model.safetensors"
    written = weights.stat().st_mtime_ns
    export(config, "control")
    assert weights.stat().st_mtime_ns == written
    (weights.parent / "config.json").unlink()
    export(config, "control")
    assert (weights.parent / "config.json").is_file()


def test_what_can_be_wrong_with_an_adapter(tmp_path):
    base = build_tiny_llava(tmp_path / "base", 0)
    config = make_config(tmp_path, base)
    with pytest.raises(UserError, match="align"):
        export(config)
    StageRunner("align", str(RunFolder(config.run.folder).align()), config).finish()
    with pytest.raises(UserError, match="no adapter"):
        export(config)
    train_nothing(config, build_tiny_llava(tmp_path / "deeper", 0, layers=3))
    with pytest.raises(UserError, match=r"does not belong to .*layers\.2"):
        export(config)
    assert not (RunFolder(config.run.folder).model() / "merged").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", bytes(20)),
        ("adapter_model.safetensors", None),
        ("adapter_config.json", b""),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"\xff"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"{}"),
    ],
)
def test_a_damaged_adapter_is_named(tmp_path, exported, name, content):
    """``None``: the last byte is missing."""
    base, _ = exported
    config = make_config(tmp_path, base)
    shutil.copytree(base.parent / "run/align/adapter", RunFolder(config.run.folder).align() / "adapter")
    StageRunner("align", str(RunFolder(config.run.folder).align()), config).finish()
    file = RunFolder(config.run.folder).align() / "adapter" / name
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is damaged.*manifest\.json.*mmedpo align"):
        export(config)
    assert not any(RunFolder(config.run.folder).model().glob("[!.]*"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_read_error_of_an_adapter_is_no_damage(tmp_path, exported, name, monkeypatch):
    base, _ = exported
    adapter = tmp_path / "adapter"
    shutil.copytree(base.parent / "run/align/adapter", adapter)
    real = Path.open

    def fail(path, *arguments, **options):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read .*Input/output error"):
        merge(str(base), adapter, tmp_path / "merged")


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"weight_map": []}'])
def test_a_damaged_index_of_whole_weights_is_refused(tmp_path, content):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/index.json").write_bytes(content)
    with pytest.raises(UserError, match="weights is damaged"):
        put_weights("no model", tmp_path / "weights", tmp_path / "merged")


def test_what_can_be_wrong_with_whole_weights(tmp_path):
    base = build_tiny_llava(tmp_path / "base", 0)
    config = make_config(tmp_path, base)
    train_randomly(config, build_tiny_llava(tmp_path / "deeper", 0, layers=3), train="full")
    with pytest.raises(UserError, match=r"do not belong to .*layers\.2.* no such weight"):
        export(config)
    (RunFolder(config.run.folder).align() / "weights/shard-00001.safetensors").write_bytes(b"{")
    with pytest.raises(UserError, match="damaged"):
        export(config)
    assert not (RunFolder(config.run.folder).model() / "merged").exists()


def test_hub_names_in_shards(tmp_path):
    save_file({"vision_tower.embeddings.x": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"language_model.model.y": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"vision_tower.embeddings.x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rename_weights(tmp_path, Llava().saved_name)
    rename_weights(tmp_path, Llava().saved_name)
    assert list(load_file(tmp_path / "model-00001-of-00002.safetensors")) == [
        "vision_tower.vision_model.embeddings.x"
    ]
    assert list(load_file(tmp_path / "model-00002-of-00002.safetensors")) == ["language_model.model.y"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == ["vision_tower.vision_model.embeddings.x"]
    assert (
        Llava().saved_name("multi_modal_projector.linear_1.weight") == "multi_modal_projector.linear_1.weight"
    )
