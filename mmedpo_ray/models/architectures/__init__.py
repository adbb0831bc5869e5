"""The model architectures, each by the ``model_type`` of its ``config.json``.

A new architecture is a file with an :class:`~mmedpo_ray.models.architectures.base.Architecture` and a line
here, or an entry point of another package. Nothing else in the project knows the name of a model's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures.base import Architecture
from mmedpo_ray.plugins import Registry

ARCHITECTURES = Registry(
    "model architecture",
    "mmedpo_ray.architectures",
    {
        "gemma3": "mmedpo_ray.models.architectures.gemma3:Gemma3",
        "internvl": "mmedpo_ray.models.architectures.internvl:InternVL",
        "llava": "mmedpo_ray.models.architectures.llava:Llava",
        "llava_next": "mmedpo_ray.models.architectures.llava_next:LlavaNext",
        "llava_onevision": "mmedpo_ray.models.architectures.llava_next:LlavaOneVision",
        "qwen2_5_vl": "mmedpo_ray.models.architectures.qwen2_5_vl:Qwen25VL",
        "qwen3_vl": "mmedpo_ray.models.architectures.qwen3_vl:Qwen3VL",
    },
)

# Why models that might be tried are refused.
_REFUSED = {
    "llava_mistral": "neither transformers nor vLLM loads it: convert it first (`mmedpo convert`)",
    "llava_llama": "neither transformers nor vLLM loads it: convert it first (`mmedpo convert`)",
    "qwen2_vl": "it is the predecessor of Qwen2.5-VL, and nobody has checked it here",
    "idefics3": "its image tokens stand in many runs with row and column tokens between them, which is not "
    "written yet",
    "smolvlm": "as Idefics3, its image tokens stand in many runs",
    "paligemma": "its questions attend to the image and the image to them, so an image's questions share "
    "nothing that tree packing could compute once",
    "qwen3_5": "its linear-attention layers carry a state through the sequence, which no mask divides into "
    "the branches of a tree",
}


def find_architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of a model, by its configuration alone.

    Args:
        config: content of ``config.json``.
        name: of the model, for messages.

    Raises:
        UserError: it is unknown, or it is known and this model of it would not be computed exactly.
    """
    kind = config.get("model_type")
    if kind is None or kind not in ARCHITECTURES:
        reason = f": {_REFUSED[kind]}" if kind in _REFUSED else ""
        raise UserError(
            f"{name} is a {kind or 'model of unknown type'}, which is not supported{reason}. Supported are "
            f"{', '.join(ARCHITECTURES)} (`mmedpo models`); docs/how-to/models.md shows how to add one."
        )
    architecture: Architecture = ARCHITECTURES[kind]()
    architecture.check(config, name)
    return architecture


def architecture_of(model: Any) -> Architecture:
    """The architecture of a loaded model, which may be wrapped by peft, or of its configuration."""
    return ARCHITECTURES[getattr(model, "config", model).model_type]()
