"""The names of LLaVA-Med 1.5's weights and their names in ``LlavaForConditionalGeneration``.

The original (``llava_mistral``) is a Mistral that holds the CLIP tower and the projector; the conversion
separates them. Names on the right are those of LLaVA checkpoints on the hub
(:mod:`mmedpo_ray.models.architectures.llava`).
"""

from __future__ import annotations

from mmedpo_ray.models.architectures.base import TOWER

# From the longest prefix to the shortest: the first that fits decides.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    # mlp2x_gelu is a torch Sequential of linear, GELU, linear: 1 has no weights.
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
_CLIP_TOWER = "vision_model."
# The other half of a whole CLIP, which is not needed.
_CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
# Tables that old versions of transformers saved and that every version computes from the configuration.
_RECOMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


def converted_name(name: str) -> str | None:
    """A weight's new name; ``None`` for a name that LLaVA-Med 1.5 does not have."""
    return next((new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)), None)


def original_name(name: str) -> str | None:
    """The inverse of :func:`converted_name`; ``None`` for what is no converted name."""
    return next((old + name.removeprefix(new) for old, new in _PREFIXES if name.startswith(new)), None)


def tower_name(name: str) -> str | None:
    """The new name of a weight of CLIP's vision tower, alone or in a whole CLIP; ``None`` for other names."""
    return TOWER + name.removeprefix(_CLIP_TOWER) if name.startswith(_CLIP_TOWER) else None


def is_clip_text(name: str) -> bool:
    """Whether a weight belongs to the text side of a whole CLIP."""
    return name.startswith(_CLIP_TEXT)


def is_recomputed(name: str) -> bool:
    """Whether a tensor is a table that the model computes itself (rotary frequencies, position numbers)."""
    return name.endswith(_RECOMPUTED)
