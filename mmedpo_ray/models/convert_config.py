"""LLaVA-Med 1.5's ``config.json`` → the configuration of a ``LlavaForConditionalGeneration``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.convert_names import saved_name

_MODEL_TYPE = "llava_mistral"
# transformers checks the types of settings with the second, which is no ValueError.
_BAD_CONFIG = (TypeError, ValueError, OSError, StrictDataclassError)
# What Mistral's configuration consists of in the original's config.json; the rest of it is about LLaVA.
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "sliding_window", "attention_dropout"),
)
# openai/clip-vit-large-patch14-336, the tower of LLaVA 1.5 and LLaVA-Med 1.5.
_KNOWN_TOWER = "clip-vit-large-patch14-336"
_KNOWN_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


def read_original(source: Path) -> dict[str, Any]:
    """The original's ``config.json``.

    Raises:
        UserError: there is none, or it is not that of LLaVA-Med 1.5.
    """
    if not source.is_dir():
        raise UserError(
            f"there is no folder {source}. Download the checkpoint and name its folder with --source."
        )
    path = source / "config.json"
    try:
        original = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{source} is no checkpoint: it has no config.json.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Download it again.") from error
    found = original.get("model_type")
    if found == "llava":
        raise UserError(
            f"{source} is a LlavaForConditionalGeneration already: use it as it is, model.path={source}."
        )
    if found != _MODEL_TYPE:
        raise UserError(
            f"{source} has model_type {found}. Only {_MODEL_TYPE}, the layout of LLaVA-Med 1.5, can be converted."
        )
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for key, values in expected.items():
        if original.get(key) not in values:
            supported = " or ".join(repr(value) for value in values if value is not None)
            raise UserError(
                f"{path} says {key}={original.get(key)!r}, LLaVA-Med 1.5 has {supported}. Other variants of LLaVA "
                "cannot be converted."
            )
    return original


def vision_config(
    original: dict[str, Any], source: Path, given: Path | None
) -> tuple[Path | None, CLIPVisionConfig]:
    """The tower's folder, if there is one here, and its architecture.

    Args:
        original: its ``config.json``.
        source: its folder; ``mm_vision_tower`` may be relative to it.
        given: a folder that takes the place of ``mm_vision_tower``.

    Raises:
        UserError: the tower is unknown, or no CLIP.
    """
    name = str(original.get("mm_vision_tower") or original.get("vision_tower") or "")
    folders = [given] if given is not None else [Path(name).expanduser(), source / name] if name else []
    for folder in folders:
        if folder != source and (folder / "config.json").is_file():
            return folder, _clip_config(folder)
    if given is not None:
        raise UserError(f"{given} is no vision tower: it has no config.json. Name the folder of a CLIP.")
    if Path(name).name == _KNOWN_TOWER:
        return None, CLIPVisionConfig(**_KNOWN_VISION)
    raise UserError(
        f"config.json names the vision tower {name or '(none)'}, which is no folder here. Download it and name its folder "
        "with --vision-tower."
    )


def _clip_config(folder: Path) -> CLIPVisionConfig:
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(f"the tower in {folder} is a {kind}. LLaVA-Med 1.5 has a CLIP.")
        return CLIPVisionConfig.from_pretrained(folder)
    except _BAD_CONFIG as error:
        raise UserError(f"{path} cannot be understood: {_one_line(error)}.") from error


def llava_config(original: dict[str, Any], vision: CLIPVisionConfig) -> LlavaConfig:
    """The converted model's configuration; ``image_token_index`` and precision are still to be set.

    Raises:
        UserError: a setting of the language model is of the wrong type.
    """
    side: Any = vision
    try:
        text: Any = MistralConfig(**{key: original[key] for key in _TEXT_FIELDS if key in original})
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_seq_length=(side.image_size // side.patch_size) ** 2,
            projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            vision_feature_layer=original.get("mm_vision_select_layer", -2),
            tie_word_embeddings=text.tie_word_embeddings,
        )
    except _BAD_CONFIG as error:
        raise UserError(f"config.json of the original cannot be understood: {_one_line(error)}.") from error
    config.architectures = ["LlavaForConditionalGeneration"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the converted model, from transformers itself; allocates nothing."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    parameters = model.named_parameters(remove_duplicate=False)
    return {saved_name(name): tuple(parameter.shape) for name, parameter in parameters}


def generation_config(config: LlavaConfig) -> GenerationConfig:
    """Only where answers end: sampling is for the caller to choose, not for the checkpoint."""
    text: Any = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
