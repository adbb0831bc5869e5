"""A visual tool of models that find what a text names: CLIPSeg, Grounding DINO, OWL-ViT, OWLv2, SAM 3.

``curate.visual.text_prompted.model`` names a folder or a hub repository; its configuration says which of
these it is. To a model that gives boxes a second one can be added, ``segmenter`` (SAM, MedSAM), which turns
each box into a mask. The value of the heat map at a pixel is the score of what lies there: CLIPSeg's
probability, or the best score among the boxes around the
    pixel, times the mask's probability if there are masks. The confidence is the best score in the image.

Image processing goes through the Pillow forms of transformers' processors, and SAM 3's network is imported
from its own module: nothing here needs torchvision.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.settings import TextPromptedConfig
from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool
from mmedpo_ray.curate.visual.tools.pretrained import (
    check_vocabulary,
    first_line,
    load_companion,
    load_pretrained,
    path_fingerprint,
)
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import to_rgb
from mmedpo_ray.radiology.finding_prompts import prompt_for

if TYPE_CHECKING:
    import torch

_SECTION = "curate.visual.text_prompted"


class TextPrompted(VisualTool):
    """Asks a text-prompted model for the finding that question and answer are about.

    Raises:
        UserError: model or segmenter are none of the supported ones, or cannot be loaded whole.
    """

    has_model = True

    @classmethod
    def fingerprint(cls, config: Config) -> list[str]:
        settings = config.curate.visual.text_prompted
        names = [name for name in (settings.model, settings.segmenter) if name]
        # The driver need not reach the hub, and what is there cannot be known to be wrong.
        if all(Path(name).expanduser().is_dir() for name in names):
            _finder(settings)
        return [path_fingerprint(name) for name in names]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = config.curate.visual.text_prompted
        finder = _finder(settings)
        assert settings.model is not None
        self._find = finder(settings.model, settings.box_threshold)
        self._segment = _Sam(settings.segmenter) if settings.segmenter is not None else None

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        import torch

        pictures = [to_rgb(image) for image in images]
        asked = self.config.curate.visual
        is_generic = asked.prompt == "generic"
        prompts = [
            prompt_for(row["question"], row["answer"], asked.generic_prompt, always_generic=is_generic)
            for row in rows
        ]
        with torch.inference_mode():
            seen = self._find(pictures, prompts)
            if self._segment is not None:
                seen = self._segment(pictures, seen)
            heat_maps = [
                heat_map(found, picture.height, picture.width)
                for found, picture in zip(seen, pictures, strict=True)
            ]
        return [
            Localisation(heat, max(found.scores, default=0.0))
            for heat, found in zip(heat_maps, seen, strict=True)
        ]


@dataclass(frozen=True)
class Seen:
    """What a model sees in one image.

    Attributes:
        scores: of the things it found, each in [0, 1]; empty if it found nothing.
        boxes: (N, 4) left, top, right, bottom of each in pixels, inside the image.
        pixel_scores: (h, w) in [0, 1] over the whole image at the model's own resolution, the best score at
            each place; None where the boxes are all there is.
    """

    scores: list[float]
    boxes: np.ndarray
    pixel_scores: torch.Tensor | None = None


def heat_map(seen: Seen, height: int, width: int) -> np.ndarray:
    """Float32 (height, width) in [0, 1]: the best score at each pixel, 0 if nothing was found."""
    if seen.pixel_scores is not None:
        from torch.nn.functional import interpolate

        grid = seen.pixel_scores.float()[None, None]
        spread = interpolate(grid, (height, width), mode="bilinear", align_corners=False)
        return np.clip(spread[0, 0].cpu().numpy(), 0.0, 1.0)
    heat = np.zeros((height, width), dtype=np.float32)
    for score, (left, top, right, bottom) in sorted(zip(seen.scores, seen.boxes.tolist(), strict=True)):
        heat[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = score
    return heat


# ---------------------------------------------------------------------- models


class _Loaded:
    """A model of transformers on the device of this process, and its image processing.

    Attributes:
        model_class, processor_class: ``module:name``, imported when an instance is made.
    """

    model_class: str
    processor_class: str

    def __init__(self, source: str) -> None:
        import torch

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_pretrained(resolve_name(self.model_class), source, _SECTION)
        self._model = model.to(self._device)
        processor = resolve_name(self.processor_class)
        self._processor = load_companion(processor, source, "image processing", **self._size(source))

    def _size(self, _source: str) -> dict[str, Any]:
        """What the image processing must be told about the model's input size."""
        return {}

    def _on_device(self, values: Any) -> dict[str, Any]:
        return {name: value.to(self._device) for name, value in values.items()}


class _Finder(_Loaded, ABC):
    """Images and one prompt each → what is seen in each.

    Args:
        source: folder or hub name.
        threshold: things of a lower score are ignored.
    """

    def __init__(self, source: str, threshold: float) -> None:
        from transformers import AutoTokenizer

        super().__init__(source)
        self._threshold = threshold
        self._tokenizer = load_companion(AutoTokenizer, source, "tokenizer")
        check_vocabulary(self._tokenizer, self._model.config.text_config.vocab_size, source)

    @abstractmethod
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[Seen]:
        """One answer per image; scores and positions refer to that image."""

    def _pixels(self, images: list[Image.Image]) -> dict[str, Any]:
        return self._on_device(self._processor(images, return_tensors="pt"))

    def _tokens(self, prompts: list[str], length: int | None = None) -> dict[str, Any]:
        """The prompts padded to ``length`` tokens, or to the longest of them."""
        padding = True if length is None else "max_length"
        return self._on_device(
            self._tokenizer(prompts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        )


class _ClipSeg(_Finder):
    """CLIPSeg: a probability for each pixel of a square copy of the image."""

    model_class = "transformers:CLIPSegForImageSegmentation"
    processor_class = "transformers.models.vit.image_processing_pil_vit:ViTImageProcessorPil"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[Seen]:
        logits = self._model(**self._pixels(images), **self._tokens(prompts)).logits
        # The model drops the batch axis of a batch of one.
        maps = logits.reshape(len(images), *logits.shape[-2:]).sigmoid()
        return [Seen([float(grid.max())], np.zeros((1, 4)), grid) for grid in maps]


class _Sam3(_Finder):
    """SAM 3: a score and a mask for each instance of what the prompt names."""

    model_class = "transformers.models.sam3.modeling_sam3:Sam3Model"
    # SAM 3 has no Pillow processor of its own; it resizes, rescales and normalises as this one does.
    processor_class = "transformers.models.vit.image_processing_pil_vit:ViTImageProcessorPil"
    _PROMPT_TOKENS = 32

    def _size(self, source: str) -> dict[str, Any]:
        from transformers import AutoConfig

        side = AutoConfig.from_pretrained(source).vision_config.backbone_config.image_size
        return {"size": {"height": side, "width": side}}

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[Seen]:
        out = self._model(**self._pixels(images), **self._tokens(prompts, self._PROMPT_TOKENS))
        scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()
        seen = []
        for i, image in enumerate(images):
            keep = scores[i] > self._threshold
            edges = np.array([image.width, image.height] * 2)
            boxes = out.pred_boxes[i, keep].cpu().numpy() * edges
            masks = _pixel_scores(scores[i, keep], out.pred_masks[i, keep]) if keep.any() else None
            seen.append(Seen(scores[i, keep].tolist(), boxes, masks))
        return seen


class _Detector(_Finder):
    """Models that answer with boxes; their processors know how these lie in the image."""

    def _boxes(self, outputs: Any, images: list[Image.Image]) -> list[Seen]:
        sizes = [(image.height, image.width) for image in images]
        seen = []
        for result, (height, width) in zip(
            self._processor.post_process_object_detection(outputs, self._threshold, sizes), sizes, strict=True
        ):
            boxes = np.clip(result["boxes"].cpu().numpy(), 0, [width, height, width, height])
            # Some models pad the image, and can see things in the padding.
            inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            seen.append(Seen(result["scores"].cpu().numpy()[inside].tolist(), boxes[inside]))
        return seen


class _OwlVit(_Detector):
    """OWL-ViT."""

    model_class = "transformers:OwlViTForObjectDetection"
    processor_class = "transformers.models.owlvit.image_processing_pil_owlvit:OwlViTImageProcessorPil"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[Seen]:
        tokens = self._tokens(prompts, self._model.config.text_config.max_position_embeddings)
        return self._boxes(self._model(**self._pixels(images), **tokens), images)


class _OwlV2(_OwlVit):
    """OWLv2."""

    model_class = "transformers:Owlv2ForObjectDetection"
    processor_class = "transformers.models.owlv2.image_processing_pil_owlv2:Owlv2ImageProcessorPil"


class _GroundingDino(_Detector):
    """Grounding DINO and its MM form: lower-case phrases that end in a full stop."""

    model_class = "transformers:AutoModelForZeroShotObjectDetection"
    processor_class = (
        "transformers.models.grounding_dino.image_processing_pil_grounding_dino:"
        "GroundingDinoImageProcessorPil"
    )

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[Seen]:
        seen: dict[int, Seen] = {}
        # Images of one shape together: padding would change what the model sees of the smaller ones.
        order = sorted(range(len(images)), key=lambda i: images[i].size)
        for _, group in groupby(order, key=lambda i: images[i].size):
            chosen = list(group)
            pictures = [images[i] for i in chosen]
            tokens = self._tokens([f"{prompts[i].lower().rstrip('. ')}." for i in chosen])
            out = self._model(**self._pixels(pictures), **tokens)
            seen.update(zip(chosen, self._boxes(out, pictures), strict=True))
        return [seen[i] for i in range(len(images))]


class _Sam(_Loaded):
    """SAM or MedSAM: boxes → masks."""

    model_class = "transformers:SamModel"
    processor_class = "transformers.models.sam.image_processing_pil_sam:SamImageProcessorPil"

    def __call__(self, images: list[Image.Image], seen: list[Seen]) -> list[Seen]:
        """The same things with their masks; images where nothing was found stay as they are."""
        chosen = [i for i, found in enumerate(seen) if found.scores]
        if not chosen:
            return seen
        inputs = self._processor([images[i] for i in chosen], return_tensors="pt")
        embeddings = self._model.get_image_embeddings(inputs["pixel_values"].to(self._device))
        masked = list(seen)
        for row, i in enumerate(chosen):
            reshaped = [int(edge) for edge in inputs["reshaped_input_sizes"][row]]
            scale = np.array([reshaped[1] / images[i].width, reshaped[0] / images[i].height] * 2)
            out = self._model(
                image_embeddings=embeddings[row : row + 1],
                input_boxes=self._torch.tensor(seen[i].boxes * scale, dtype=self._torch.float32)[None].to(
                    self._device
                ),
                multimask_output=False,
            )
            scores = self._torch.tensor(seen[i].scores, device=self._device)
            padded = _pixel_scores(scores, out.pred_masks[0, :, 0])[None, None]
            # The masks cover the padded square; this cuts the image out of it.
            [cut] = self._processor.post_process_masks(
                [padded], [(images[i].height, images[i].width)], [reshaped], binarize=False
            )
            masked[i] = Seen(seen[i].scores, seen[i].boxes, cut[0, 0])
        return masked


# Classes that are made with a source and a threshold.
_FINDERS: dict[str, type[Any]] = {
    "clipseg": _ClipSeg,
    "grounding-dino": _GroundingDino,
    "mm-grounding-dino": _GroundingDino,
    "owlvit": _OwlVit,
    "owlv2": _OwlV2,
    "sam3": _Sam3,
}


def _pixel_scores(scores: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
    """Scores (N,) and mask logits (N, h, w), N > 0 → the best score times mask probability, (h, w)."""
    return (mask_logits.float().sigmoid() * scores[:, None, None]).amax(0)


def _finder(settings: TextPromptedConfig) -> type[Any]:
    """The class for the configured model.

    Raises:
        UserError: model or segmenter are none of the supported ones, or the segmenter would be ignored.
    """
    assert settings.model is not None, "the configuration asks for it"
    finder = _FINDERS[_model_type(settings.model, "model", tuple(_FINDERS))]
    if settings.segmenter is not None:
        if not issubclass(finder, _Detector):
            raise UserError(
                f"{settings.model} gives masks by itself, so the segmenter would be ignored. Set "
                f"{_SECTION}.segmenter to null."
            )
        _model_type(settings.segmenter, "segmenter", ("sam",))
    return finder


def _model_type(source: str, key: str, supported: tuple[str, ...]) -> str:
    """The architecture that a model's configuration names.

    Raises:
        UserError: there is no configuration, or it names none of ``supported``.
    """
    listed = f"Set {_SECTION}.{key} to a folder or hub name of one of: {', '.join(supported)}."
    file = Path(source).expanduser() / "config.json"
    try:
        if file.is_file():
            found = json.loads(file.read_text("utf-8")).get("model_type")
        else:
            from transformers import AutoConfig

            found = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the configuration of {source}: {first_line(error)} {listed}") from error
    if found not in supported:
        raise UserError(
            f"the model type of {source} is {found or 'not named'}, which cannot be used here. {listed}"
        )
    return str(found)
