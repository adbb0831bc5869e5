"""The names of LLaVA-Med 1.5's weights and their names in ``LlavaForConditionalGeneration``.

The original (``llava_mistral``) is a Mistral with the CLIP tower and the projector hung into it; the conversion takes
them apart. Names on the right are those of LLaVA checkpoints on the hub, which vLLM and transformers both load.
"""

from __future__ import annotations

from mmedpo_ray.export.stage import hub_name

# From the longest prefix to the shortest: the first that fits decides.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    # mlp2x_gelu is a torch Sequential of linear, GELU, linear: 1 has no weights.
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
TOWER = "vision_tower.vision_model."
_CLIP_TOWER = "vision_model."
# The other half of a whole CLIP, which is of no use here.
_CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
# Tables that old versions of transformers saved and that every version computes anew from the configuration.
_RECOMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


def converted_name(name: str) -> str | None:
    """A weight's new name; ``None`` for a name that LLaVA-Med 1.5 does not have."""
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def original_name(name: str) -> str | None:
    """The inverse of :func:`converted_name`; ``None`` for what is no converted name."""
    for old, new in _PREFIXES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return None


def tower_name(name: str) -> str | None:
    """The new name of a weight in a folder that holds CLIP's vision tower, or a whole CLIP; ``None`` for other names."""
    return TOWER + name.removeprefix(_CLIP_TOWER) if name.startswith(_CLIP_TOWER) else None


def is_clip_text(name: str) -> bool:
    """Whether a weight belongs to the text side of a whole CLIP."""
    return name.startswith(_CLIP_TEXT)


def is_recomputed(name: str) -> bool:
    """Whether a saved tensor is a table that the model computes itself (rotary frequencies, position numbers)."""
    return name.endswith(_RECOMPUTED)


def saved_name(parameter: str) -> str:
    """The name under which a parameter of a built ``LlavaForConditionalGeneration`` (transformers 5) is saved."""
    if parameter.startswith("lm_head."):
        return f"language_model.{parameter}"
    name = parameter.removeprefix("model.")
    if name.startswith("language_model."):
        return f"language_model.model.{name.removeprefix('language_model.')}"
    return hub_name(name)
