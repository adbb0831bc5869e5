"""What a policy refuses to train, before it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from align_world import align_settings, training_spec
from tiny_llava import build_tiny_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PhiConfig

from mmedpo_ray.align.packing.trees import TokenSequence, pack
from mmedpo_ray.align.plan.resources import check_cluster
from mmedpo_ray.align.policy import build_policy, check_model
from mmedpo_ray.align.settings import LoraConfig
from mmedpo_ray.compat import cluster
from mmedpo_ray.errors import UserError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "llava")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_proj", "k_porj"], r"k_porj \(did you mean k_proj"),
        (["q_proj", "gate-proj", "lm_head"], r"gate-proj \(did you mean gate_proj.*lm_head"),
        (["linear_1"], r"linear_1.*down_proj, gate_proj"),
        (["mlp"], "mlp"),
        (["q_proj", "k_("], r"k_\("),
        ([], "names no layer"),
    ],
)
def test_every_target_of_lora_must_be_a_layer_of_the_language_model(
    model_folder: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    spec = training_spec(
        tmp_path, model_folder, tmp_path / "run", lora=LoraConfig(rank=2, target_modules=names)
    )
    with pytest.raises(UserError, match=message):
        build_policy(spec)
    with pytest.raises(UserError, match=message):
        check_model(spec.model, spec.align)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sliding_window": 64}, "align.max_length to 64"),
        ({"model_type": "gpt2"}, "is a gpt2"),
    ],
)
def test_what_training_would_refuse_is_said_from_the_configuration(
    model_folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """Without the weights, which the folder lacks."""
    check_model(str(model_folder), align_settings())
    settings = json.loads((model_folder / "config.json").read_text())
    settings["text_config"] |= changed
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        check_model(str(folder), align_settings())


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], ["self_attn.q_proj"]])
def test_the_layers_named_are_trained(model_folder: Path, tmp_path: Path, names: list[str]) -> None:
    spec = training_spec(
        tmp_path, model_folder, tmp_path / "run", lora=LoraConfig(rank=2, target_modules=names)
    )
    layers = {name.split(".lora_")[0] for name in build_policy(spec).trained_parameters()}
    assert len(layers) == 2 * len(names)
    assert all(".language_model." in layer and layer.endswith(tuple(names)) for layer in layers)


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
@pytest.mark.parametrize(
    ("family", "changed"),
    [
        (PhiConfig, {"resid_pdrop": 0.3}),
        (PhiConfig, {"embd_pdrop": 0.3}),
        (PhiConfig, {"attention_dropout": 0.5}),
        (MistralConfig, {"attention_dropout": 0.5, "sliding_window": None}),
    ],
)
def test_a_policy_in_training_mode_has_no_dropout_but_that_of_lora(
    model_folder: Path, tmp_path: Path, family: Any, changed: dict[str, Any], attention: str
) -> None:
    """The reference has none, and both must start equal."""
    settings = LlavaConfig.from_pretrained(model_folder)
    settings.text_config = family(
        vocab_size=settings.text_config.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **changed,
    )
    settings.vision_config.attention_dropout = 0.5
    folder = shutil.copytree(model_folder, tmp_path / "model")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(settings).save_pretrained(folder)
    lora = LoraConfig(rank=2, target_modules=["q_proj"], dropout=0.25)
    policy = build_policy(training_spec(tmp_path, folder, tmp_path / "run", lora=lora, attention=attention))
    prompt = [1, *[settings.image_token_index] * settings.image_seq_length, 20, 21]
    sequences = [TokenSequence([*prompt, 30 + number], [40, 41, 42], 0) for number in range(4)]
    batch = pack(sequences, {"pixel_values": torch.randn(1, 3, 32, 32)}, pad_token_id=0)
    with torch.no_grad():
        expected = policy.eval()(batch)[0]
        torch.testing.assert_close(policy.train()(batch)[0], expected)
    dropouts = [module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert dropouts == [0.25] * 2


def test_flex_attention_without_gpu_is_refused_where_the_cluster_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "room_for", lambda _: 8)
    check_cluster(align_settings(attention="tree"), use_gpu=False)
    check_cluster(align_settings(attention="flex"), use_gpu=True)
    with pytest.raises(UserError, match=r"align\.attention=flex needs a GPU"):
        check_cluster(align_settings(attention="flex"), use_gpu=False)
