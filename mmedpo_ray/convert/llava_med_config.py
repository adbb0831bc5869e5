"""LLaVA-Med 1.5's ``config.json`` → the configuration of a ``LlavaForConditionalGeneration``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from mmedpo_ray.convert.json_files import (
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    bad_setting,
    maybe,
    number,
    one_line,
    one_of,
    read_object,
    shorten,
    take,
    whole,
)
from mmedpo_ray.convert.weight_names import saved_name
from mmedpo_ray.errors import UserError

_MODEL_TYPE = "llava_mistral"
# transformers checks the types of settings with the second, which is no ValueError.
_BAD_CONFIG = (TypeError, ValueError, OSError, StrictDataclassError)
# Far above every model there is; keeps a slip of the file from taking all memory or time.
_SIZE = whole(1, 2**20)
_LAYERS = whole(1, 1024)
_LENGTH = whole(1, 2**40)
_TOKEN = whole(0, 2**24)
_SHARE = number(0, 1)
_TOKENS = Kind(
    lambda value: (
        _TOKEN.fits(value) or (isinstance(value, list) and bool(value) and all(map(_TOKEN.fits, value)))
    ),
    "the id of a token, or a list of some",
)
_ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
# What Mistral's configuration consists of in the original's config.json; the rest of it is about LLaVA.
_TEXT: dict[str, Kind] = {
    "vocab_size": whole(1, 2**24),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": maybe(_SIZE),
    # The only one that vLLM's Mistral computes.
    "hidden_act": one_of("silu"),
    "max_position_embeddings": _LENGTH,
    "initializer_range": number(0, 100),
    "rms_norm_eps": number(0, 1),
    "use_cache": FLAG,
    # -1 stands for none in old configurations.
    "pad_token_id": Kind(
        lambda value: value in (None, -1) or _TOKEN.fits(value), "the id of a token, or null"
    ),
    "bos_token_id": maybe(_TOKEN),
    "eos_token_id": maybe(_TOKENS),
    "tie_word_embeddings": FLAG,
    "rope_theta": number(0, 1e12, above=True),
    "rope_scaling": maybe(OBJECT),
    "sliding_window": maybe(_LENGTH),
    "attention_dropout": _SHARE,
}
# Without one of these transformers would take a default of its own, and another model would come out.
_TEXT_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
)
_VISION: dict[str, Kind] = {
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "num_channels": whole(3, 3),
    "image_size": whole(1, 2**14),
    "patch_size": whole(1, 2**14),
    "projection_dim": _SIZE,
    "hidden_act": one_of("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"),
    "layer_norm_eps": number(0, 1),
    "attention_dropout": _SHARE,
    "initializer_range": number(0, 100),
    "initializer_factor": number(0, 100),
}
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
    if not path.exists():
        raise UserError(f"{source} is no checkpoint: it has no config.json. Download the checkpoint again.")
    original = read_object(path)
    found = original.get("model_type")
    if found == "llava":
        raise UserError(
            f"{source} is a LlavaForConditionalGeneration already: use it as it is, model.path={source}."
        )
    if found != _MODEL_TYPE:
        named = found if isinstance(found, str) else shorten(found)
        raise UserError(
            f"{source} has model_type {named}. Only {_MODEL_TYPE}, the layout of LLaVA-Med 1.5, can "
            "be converted."
        )
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for key, values in expected.items():
        supported = " or ".join(repr(value) for value in values if value is not None)
        if key not in original and None not in values:
            raise UserError(
                f"{path} has no {key}, LLaVA-Med 1.5 has {supported}. The file is incomplete: download it again."
            )
        if original.get(key) not in values:
            raise UserError(
                f"{path} says {key}={shorten(original[key])}, LLaVA-Med 1.5 has {supported}. Other variants of LLaVA "
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
    name = _tower_of(original, source / "config.json")
    folders = [given] if given is not None else [Path(name), source / name] if name else []
    for folder in folders:
        found = _folder(folder)
        if found is not None and found != source and (found / "config.json").is_file():
            return found, _clip_config(found)
    if given is not None:
        raise UserError(f"{given} is no vision tower: it has no config.json. Name the folder of a CLIP.")
    if Path(name).name == _KNOWN_TOWER:
        return None, CLIPVisionConfig(**_KNOWN_VISION)
    raise UserError(
        f"{source / 'config.json'} names the vision tower {name[:200] or '(none)'}, which is no folder here "
        "(mm_vision_tower). Download it and name its folder with --vision-tower."
    )


def _tower_of(original: dict[str, Any], path: Path) -> str:
    """What the original calls its tower: a folder or a name on the hub; empty if it does not say."""
    names = take(original, {"mm_vision_tower": maybe(TEXT), "vision_tower": maybe(TEXT)}, path)
    return names.get("mm_vision_tower") or names.get("vision_tower") or ""


def _folder(path: Path) -> Path | None:
    """The folder of this name; ``None`` for a name that can be no folder's."""
    try:
        found = path.expanduser()
        return found if found.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _clip_config(folder: Path) -> CLIPVisionConfig:
    path = folder / "config.json"
    content = read_object(path)
    kind = content.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(
            f"the tower in {folder} is a {shorten(kind)} (model_type in {path}). LLaVA-Med 1.5 has a CLIP."
        )
    within = ""
    if kind == "clip":
        content = take(content, {"vision_config": OBJECT}, path, required=["vision_config"])["vision_config"]
        within = "vision_config."
    # What equals a default of CLIP's is often left out of the file.
    settings = CLIPVisionConfig().to_dict() | take(content, _VISION, path, within=within)
    heads, side, patch = settings["num_attention_heads"], settings["image_size"], settings["patch_size"]
    if settings["hidden_size"] % heads:
        raise bad_setting(path, f"{within}num_attention_heads", heads, _divides("hidden_size", settings))
    if side % patch:
        raise bad_setting(path, f"{within}image_size", side, f"a multiple of patch_size, which is {patch}")
    return _built(CLIPVisionConfig, {key: settings[key] for key in _VISION}, path)


def llava_config(original: dict[str, Any], vision: CLIPVisionConfig, source: Path) -> LlavaConfig:
    """The converted model's configuration; ``image_token_index`` and precision are still to be set.

    Args:
        original: its ``config.json``.
        vision: architecture of the tower.
        source: folder of the original, for messages.

    Raises:
        UserError: a setting is missing, of the wrong type, or out of its range.
    """
    path = source / "config.json"
    text = _text_config(original, path)
    side: Any = vision
    depth: int = side.num_hidden_layers
    # Of the states before the first layer and after each.
    layer = Kind(
        whole(-depth - 1, depth).fits,
        f"a whole number from {-depth - 1} to {depth}, for the vision tower has {depth} layers",
    )
    key = "mm_vision_select_layer"
    settings = {
        "vision_config": vision,
        "text_config": text,
        "image_seq_length": (side.image_size // side.patch_size) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": take(original, {key: layer}, path, required=[key])[key],
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    config = _built(LlavaConfig, settings, path)
    config.architectures = ["LlavaForConditionalGeneration"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def _text_config(original: dict[str, Any], path: Path) -> MistralConfig:
    settings = take(original, _TEXT, path, required=_TEXT_REQUIRED)
    if settings.get("pad_token_id") == -1:
        settings["pad_token_id"] = None
    heads, shared = settings["num_attention_heads"], settings["num_key_value_heads"]
    if settings.get("head_dim") is None and settings["hidden_size"] % heads:
        raise bad_setting(path, "num_attention_heads", heads, _divides("hidden_size", settings))
    if heads % shared:
        raise bad_setting(path, "num_key_value_heads", shared, _divides("num_attention_heads", settings))
    rows = settings["vocab_size"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        if any(token >= rows for token in (value if isinstance(value, list) else [value or 0])):
            raise bad_setting(path, key, value, f"the id of a token, below vocab_size, which is {rows}")
    _check_rope(settings, path)
    return _built(MistralConfig, settings, path)


def _check_rope(settings: dict[str, Any], path: Path) -> None:
    """Whether transformers computes rotary frequencies from the settings, all of them finite and positive."""
    scaling = settings.get("rope_scaling")
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _ROPE_TYPES:
        raise bad_setting(
            path, "rope_scaling", scaling, f"an object whose type is {' or '.join(_ROPE_TYPES)}, or null"
        )
    try:
        # A copy: transformers writes what it infers into the object.
        config = MistralConfig(**settings | {"rope_scaling": dict(scaling)})
        table: Any = MistralRotaryEmbedding(config)
        sound = bool(torch.isfinite(table.inv_freq).all()) and bool((table.inv_freq > 0).all())
        reason = "" if sound else " (these make frequencies of zero or infinity)"
    except Exception as error:
        # Each type computes with parameters of its own, unchecked: a wrong one raises whatever comes of it.
        reason = f" ({type(error).__name__}: {one_line(error)})"
    if reason:
        raise bad_setting(
            path, "rope_scaling", scaling, f"what type {kind!r} needs, such as its factor{reason}"
        )


_Config = TypeVar("_Config", bound=PreTrainedConfig)


def _built(config: type[_Config], settings: dict[str, Any], path: Path) -> _Config:
    try:
        return config(**settings)
    except _BAD_CONFIG as error:
        raise UserError(
            f"{path} cannot be understood: {one_line(error)}. Correct it or download the file again."
        ) from error


def _divides(key: str, settings: dict[str, Any]) -> str:
    return f"a number that divides {key}, which is {settings[key]}"


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
