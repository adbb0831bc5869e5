"""LLaVA-Med 1.5's ``config.json`` → the configuration of a ``LlavaForConditionalGeneration``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from mmedpo_ray.convert.json_files import JsonSettings, bad_setting, checked, read_object, shorten
from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.models.architectures.llava import saved_parameter

MODEL_TYPE = "llava_mistral"
# The upper bounds are far above every model there is; they keep a typing error from taking all memory or
# time.
Size = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Length = Annotated[int, Field(ge=1, le=2**40)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Token = Annotated[int, Field(ge=0, le=2**24)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Activation = Literal["quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"]

# The tower of LLaVA 1.5 and LLaVA-Med 1.5 (openai/clip-vit-large-patch14-336).
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


def _check_divides(value: int, key: str, info: ValidationInfo) -> int:
    """``value``, if it divides the setting ``key``, which stands before it."""
    whole = info.data.get(key, 0)
    if whole % value:
        raise ValueError(f"must divide {key}, which is {whole}")
    return value


class TextSettings(JsonSettings):
    """What Mistral's configuration consists of.

    The settings without a default are required: transformers would use its own default for them, and
    another model would come out.
    """

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    head_dim: Size | None = None
    num_attention_heads: Size
    num_key_value_heads: Size
    # The only one that vLLM's Mistral computes.
    hidden_act: Literal["silu"]
    max_position_embeddings: Length
    initializer_range: Scale = 0.02
    rms_norm_eps: Share
    use_cache: bool = True
    # -1 stands for none in old configurations.
    pad_token_id: Annotated[int, Field(ge=-1, le=2**24)] | None = None
    bos_token_id: Token | None = None
    eos_token_id: Annotated[
        Annotated[list[Token], Field(min_length=1)] | None,
        BeforeValidator(lambda value: [value] if type(value) is int else value),
    ] = None
    tie_word_embeddings: bool = False
    rope_theta: Annotated[float, Field(gt=0, le=1e12)]
    rope_scaling: dict[str, Any] | None = None
    sliding_window: Length | None = None
    attention_dropout: Share = 0.0

    @field_validator("num_attention_heads")
    @classmethod
    def _heads_divide(cls, value: int, info: ValidationInfo) -> int:
        return value if info.data.get("head_dim") else _check_divides(value, "hidden_size", info)

    @field_validator("num_key_value_heads")
    @classmethod
    def _shared_heads_divide(cls, value: int, info: ValidationInfo) -> int:
        return _check_divides(value, "num_attention_heads", info)

    @field_validator("bos_token_id", "eos_token_id", "pad_token_id")
    @classmethod
    def _is_in_vocabulary(cls, value: Any, info: ValidationInfo) -> Any:
        rows = info.data.get("vocab_size", 2**24 + 1)
        if any(token >= rows for token in (value if isinstance(value, list) else [value or 0])):
            raise ValueError(f"must be below vocab_size, which is {rows}")
        return value


class LlavaMedSettings(TextSettings):
    """What is read of the original's ``config.json``; other variants of LLaVA fail the checks."""

    mm_vision_select_layer: int
    mm_projector_type: Literal["mlp2x_gelu"]
    mm_vision_select_feature: Literal["patch"] | None = None
    mm_use_im_start_end: Literal[False] | None = None
    mm_patch_merge_type: Literal["flat"] | None = None
    image_aspect_ratio: Literal["pad", "square"] | None = None
    mm_vision_tower: str | None = None
    vision_tower: str | None = None

    @property
    def tower(self) -> str:
        """What the original calls its tower: a folder or a name on the hub; empty if it does not say."""
        return self.mm_vision_tower or self.vision_tower or ""


class VisionSettings(JsonSettings, validate_default=True):
    """What CLIP's vision configuration consists of; a file often leaves out what equals CLIP's default."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    num_channels: Literal[3] = 3
    patch_size: Pixels = 32
    image_size: Pixels = 224
    projection_dim: Size = 512
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Share = 1e-5
    attention_dropout: Share = 0.0
    initializer_range: Scale = 0.02
    initializer_factor: Scale = 1.0

    @field_validator("num_attention_heads")
    @classmethod
    def _heads_divide(cls, value: int, info: ValidationInfo) -> int:
        return _check_divides(value, "hidden_size", info)

    @field_validator("image_size")
    @classmethod
    def _patches_fit(cls, value: int, info: ValidationInfo) -> int:
        patch = info.data.get("patch_size", 1)
        if value % patch:
            raise ValueError(f"must be a multiple of patch_size, which is {patch}")
        return value


def read_original(source: Path) -> tuple[dict[str, Any], LlavaMedSettings]:
    """The original's ``config.json`` as it is, and what is read of it.

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
    kind = original.get("model_type")
    if kind == "llava":
        raise UserError(
            f"{source} is a LlavaForConditionalGeneration already: use it as it is, model.path={source}."
        )
    if kind != MODEL_TYPE:
        raise UserError(
            f"{source} has model_type {shorten(kind)}. Only {MODEL_TYPE}, the layout of LLaVA-Med 1.5, can "
            "be converted."
        )
    return original, checked(LlavaMedSettings, original, path)


def vision_config(name: str, source: Path, given: Path | None) -> tuple[Path | None, CLIPVisionConfig]:
    """The tower's folder, if there is one here, and its architecture.

    Args:
        name: what the original calls its tower; may be a folder relative to ``source``.
        source: folder of the original.
        given: a folder to take instead.

    Raises:
        UserError: the tower is unknown, or no CLIP.
    """
    folders = [given] if given is not None else [Path(name), source / name] if name else []
    for folder in folders:
        found = _existing_folder(folder)
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


def _existing_folder(path: Path) -> Path | None:
    """The folder of this name; ``None`` if there is none, also if no folder can have the name."""
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
        within = "vision_config."
        content = content.get("vision_config")  # type: ignore[assignment]
        if not isinstance(content, dict):
            raise UserError(f"{path} has no object vision_config. Download it again.")
    checked(VisionSettings, content, path, within=within)
    settings = CLIPVisionConfig().to_dict() | content
    return _built(CLIPVisionConfig, {key: settings[key] for key in VisionSettings.model_fields}, path)


def llava_config(original: dict[str, Any], vision: CLIPVisionConfig, source: Path) -> LlavaConfig:
    """The converted model's configuration; ``image_token_index`` and precision are still to be set.

    Args:
        original: its ``config.json``, checked by :func:`read_original`.
        vision: architecture of the tower.
        source: folder of the original, for messages.

    Raises:
        UserError: the layer of the tower does not exist, or the rotary embedding cannot be computed.
    """
    path = source / "config.json"
    text = _text_config(original, path)
    tower: Any = vision
    layer, depth = original["mm_vision_select_layer"], tower.num_hidden_layers
    # Of the states before the first layer and after each.
    if not -depth - 1 <= layer <= depth:
        reason = f"the vision tower has {depth} layers: from {-depth - 1} to {depth}"
        raise bad_setting(path, "mm_vision_select_layer", layer, reason)
    settings = {
        "vision_config": vision,
        "text_config": text,
        "image_seq_length": (tower.image_size // tower.patch_size) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": layer,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    config = _built(LlavaConfig, settings, path)
    config.architectures = ["LlavaForConditionalGeneration"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def _text_config(original: dict[str, Any], path: Path) -> MistralConfig:
    settings = {key: original[key] for key in TextSettings.model_fields if key in original}
    if settings.get("pad_token_id") == -1:
        settings["pad_token_id"] = None
    if settings.get("rope_scaling") is not None:
        _check_rope(settings, path)
    return _built(MistralConfig, settings, path)


def _check_rope(settings: dict[str, Any], path: Path) -> None:
    """Checks that transformers computes finite, positive rotary frequencies from ``rope_scaling``."""
    scaling = settings["rope_scaling"]
    kind = scaling.get("rope_type", scaling.get("type"))
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in kinds:
        raise bad_setting(path, "rope_scaling", scaling, f"its type must be {' or '.join(kinds)}")
    try:
        # A copy: transformers writes what it infers into the object.
        table: Any = MistralRotaryEmbedding(MistralConfig(**settings | {"rope_scaling": dict(scaling)}))
        is_sound = bool(torch.isfinite(table.inv_freq).all()) and bool((table.inv_freq > 0).all())
        problem = "" if is_sound else "these make frequencies of zero or infinity"
    except Exception as error:
        # Each type computes with unchecked parameters of its own, so a wrong one raises any kind of error.
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem:
        reason = f"type {kind!r} needs other parameters, such as its factor; {problem}"
        raise bad_setting(path, "rope_scaling", scaling, reason)


_Config = TypeVar("_Config", bound=PreTrainedConfig)


def _built(kind: type[_Config], settings: dict[str, Any], path: Path) -> _Config:
    try:
        return kind(**settings)
    except (TypeError, ValueError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"{path} cannot be understood: {' '.join(str(error).split())}. Correct it or download the file "
            "again."
        ) from error


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the converted model, from transformers itself; allocates nothing."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    parameters = model.named_parameters(remove_duplicate=False)
    return {saved_parameter(name): tuple(parameter.shape) for name, parameter in parameters}
