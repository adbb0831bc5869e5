"""What the project asks of a model architecture; every answer that most of them share is the default.

Letters of shapes: I images, R rows of packed trees, T their tokens, F features of all images, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mmedpo_ray.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# What the vision tower takes of one or several images, by the keyword of the model's forward.
Inputs: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of packed rows.

    Attributes:
        is_image: (R, T) bool, tokens that stand for an image feature.
        feature: (R, T) int64, the feature's row among those of all images; arbitrary for other tokens.
        within: (R, T) int64, its number among those of its image, likewise.
        image: (R, T) int64, the image of a token's tree.
        depth: (R, T) int64, depth in the tree, which is the position in the sequence.
        subtree_end: (R, T) int64, the column after the last descendant.
    """

    is_image: Tensor
    feature: Tensor
    within: Tensor
    image: Tensor
    depth: Tensor
    subtree_end: Tensor


class Architecture:
    """One architecture; objects hold no state.

    Attributes:
        title: as people call it.
        language_model: dotted name of the module that takes embeddings and gives hidden states.
        tower: beginnings of the dotted names of what is never trained: the vision tower.
        projector: dotted names of the modules between tower and language model.
        one_image_size: every image has the same number of tokens, whatever its size.
        patch_grid: an image's tokens are the patches of the whole image, row by row.
        layer_masks: whether layers do not just attend to all that is before; :meth:`masks` has what they do.
        serves_adapters: whether vLLM serves LoRA adapters of it.
        exact_on_cpu: whether vLLM on CPU computes the same model as transformers.
    """

    title: str
    language_model = "model.language_model"
    tower: tuple[str, ...] = ("model.vision_tower",)
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    one_image_size = False
    patch_grid = False
    layer_masks = False
    serves_adapters = True
    exact_on_cpu = True

    # ------------------------------------------------------------------ checks

    def check(self, config: Mapping[str, Any], name: str) -> None:
        """Refuses a model of this architecture that would not be computed exactly.

        Args:
            config: content of ``config.json``.
            name: of the model, for messages.

        Raises:
            UserError: it would not.
        """

    def check_processor(self, processor: Any, config: Any, name: str) -> None:
        """Compares what the processor writes and makes with what the configured model takes.

        Args:
            processor: of the model.
            config: the model's configuration.
            name: of the model, for messages.

        Raises:
            UserError: they differ.
        """
        written = self.image_token_id(processor)
        if written != config.image_token_id:
            raise UserError(
                f"the processor of {name} writes an image as id {written} "
                f"({processor.image_token}), but the model's image_token_index is {config.image_token_id}. "
                "Set image_token in processor_config.json, or image_token_index in config.json."
            )

    # ------------------------------------------------------------------ prompts

    def image_token_id(self, processor: Any) -> int:
        """The id that stands for one feature of an image."""
        return processor.image_token_id

    def placeholder(self, processor: Any) -> str:
        """What the chat template writes for an image."""
        return processor.image_token

    def written_image(self, processor: Any) -> str:
        """What the processor puts in the placeholder's place, its image tokens written once."""
        return processor.image_token

    def image_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        """How many image tokens an image has.

        Args:
            processor: of the model.
            size: width and height in pixels; of no effect with ``one_image_size``.
        """
        width, height = size
        return int(processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])

    def fixed_image_tokens(self, config: Any) -> int | None:  # noqa: ARG002
        """How many tokens every image has by the model's configuration; ``None``: its size decides."""
        return None

    # ------------------------------------------------------------------ images

    def inputs(self, processor: Any, images: Sequence[Image.Image]) -> Inputs:
        """Image processing of RGB images."""
        return {"pixel_values": processor.image_processor(list(images), return_tensors="pt")["pixel_values"]}

    def collate(self, inputs: Sequence[Inputs]) -> Inputs:
        """The inputs of several images as those of one call."""
        import torch

        return {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}

    def features(self, model: Any, inputs: Inputs) -> tuple[list[Tensor], list[int]]:
        """Features of images, projected, in one pass of the frozen tower.

        Returns:
            Levels of (F, D), images one after the other: what stands in the places of image tokens, and then
            what :meth:`arguments` makes use of. And the number of features of each image.
        """
        import torch

        found = model.get_image_features(**in_type_of(model, inputs), return_dict=True).pooler_output
        counts = [len(image) for image in found]
        return [found.flatten(0, 1) if isinstance(found, torch.Tensor) else torch.cat(list(found))], counts

    # ------------------------------------------------------------------ language model

    def positions(self, tokens: ImageTokens, inputs: Inputs, config: Any) -> Tensor:  # noqa: ARG002
        """Position ids of the language model: (R, T), or (3, R, T) with one for each axis.

        Args:
            tokens: of the packed rows.
            inputs: of the images.
            config: of the model.
        """
        return tokens.depth

    def arguments(self, levels: Sequence[Tensor], tokens: ImageTokens) -> dict[str, Any]:  # noqa: ARG002
        """Further keywords of the language model's forward."""
        return {}

    def masks(self, sees: Tensor, tokens: ImageTokens, config: Any) -> dict[str, Tensor]:
        """With ``layer_masks``, (R, 1, T, T) bool for each type of layer.

        Args:
            sees: (R, T, T) bool, the token (second axis) sees its ancestors and itself.
            tokens: of the packed rows.
            config: of the model.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ saving

    def saved_name(self, weight: str) -> str:
        """The name under which vLLM loads a saved weight, which transformers must load too."""
        return weight


# In weight names of CLIP and SigLIP towers.
TOWER = "vision_tower.vision_model."


def hub_tower_name(weight: str) -> str:
    """The name of a CLIP or SigLIP tower's weight as checkpoints on the hub spell it.

    transformers 5 leaves ``vision_model`` out when it saves, and vLLM 0.32 does not load that.
    """
    short = "vision_tower."
    if weight.startswith(short) and not weight.startswith(TOWER):
        return TOWER + weight.removeprefix(short)
    return weight


def in_type_of(model: Any, inputs: Inputs) -> Inputs:
    """The inputs with numbers of the model's precision."""
    dtype = model.get_input_embeddings().weight.dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def check_known_layers(config: Mapping[str, Any], known: set[str], name: str) -> None:
    """Refuses a language model with other kinds of layers.

    Args:
        config: content of ``config.json``.
        known: names of layer types whose attention a tree's mask describes.
        name: of the model, for messages.

    Raises:
        UserError: there are others.
    """
    layers = (config.get("text_config") or config).get("layer_types") or ()
    if other := sorted(set(layers) - known):
        raise UserError(
            f"{name} has {', '.join(other)} layers, which tree packing cannot compute exactly: it needs "
            f"attention under a mask ({', '.join(sorted(known))})."
        )


def loading_error(name: str, error: BaseException) -> UserError:
    """The error for a model whose files do not load."""
    return UserError(f"cannot load the model {name}: {first_line(error)}.")
