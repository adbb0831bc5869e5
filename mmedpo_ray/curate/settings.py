"""Settings of `curate`."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.config.base import Section, Share
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.noise.settings import NoiseConfig


class TextCurationConfig(Section):
    """Dispreferred answers."""

    method: Literal["on_policy", "rewrite", "rule_edit", "released", "none"] = Field(
        "on_policy",
        description="on_policy: wrong answers of the target model; rewrite: a strong model edits one fact of "
        "the reference; rule_edit: the lexicon does; released: the pairs that came with the data",
    )
    num_candidates: int = Field(3, ge=1, description="on_policy: answers sampled per question")
    temperature: float | list[float] = Field(
        1.0,
        description="on_policy: above 0; of a list the k-th answer to a question gets the k-th, over and "
        "over",
    )
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(64, ge=1, description="longest sampled answer")
    judge: Literal["rules", "endpoint"] = Field(
        "rules", description="on_policy: what picks the most conflicting plausible candidate"
    )
    fallback: Literal["rule_edit", "rewrite", "none"] = Field(
        "rule_edit", description="where no candidate is wrong, or a rewrite fails (rule_edit or none)"
    )
    max_length_ratio: float = Field(
        4.0,
        gt=1,
        description="drop a rejected answer that is longer than chosen by this factor (and by 8 words)",
    )
    endpoint: EndpointConfig = Field(
        default_factory=EndpointConfig, description="model of rewrite and of judge: endpoint"
    )

    @field_validator("temperature", mode="before")
    @classmethod
    def _check_temperature(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [value]
        if not given or not all(type(item) in (int, float) and 0 < item < math.inf for item in given):
            raise ValueError("give a number above 0, or a list of such numbers, as [0.7, 1.0]")
        return value

    @model_validator(mode="after")
    def _check_fallback(self) -> TextCurationConfig:
        if self.method == self.fallback == "rewrite":
            raise ValueError(
                "curate.text.fallback=rewrite cannot follow curate.text.method=rewrite; use rule_edit or none"
            )
        return self

    def temperature_of(self, number: int) -> float:
        """The temperature of the ``number``-th answer to a question, counted from 0."""
        given = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        return given[number % len(given)]


class MedklipConfig(Section):
    """MedKLIP (``tool: medklip``)."""

    required: ClassVar[tuple[str, ...]] = ("checkpoint",)

    checkpoint: str | None = Field(
        None,
        description="the official checkpoint (.pth, opened with weights_only), "
        "its 'observation explanation.json' beside it",
    )
    text_model: str = Field(
        "emilyalsentzer/Bio_ClinicalBERT", description="folder or hub name of the clinical BERT"
    )


class TextPromptedConfig(Section):
    """A segmentation or detection model that takes a text prompt (``tool: text_prompted``)."""

    required: ClassVar[tuple[str, ...]] = ("model",)

    model: str | None = Field(
        None,
        description="folder or hub name of a CLIPSeg, SAM 3, Grounding DINO or OWL-ViT, as transformers "
        "knows them",
    )
    segmenter: str | None = Field(
        None,
        description="folder or hub name of a SAM (MedSAM) that turns a detector's boxes into masks; "
        "null: the boxes",
    )
    box_threshold: Share = Field(0.25, description="boxes under this score are ignored")


class VisualCurationConfig(Section):
    """Dispreferred images."""

    tool: str = Field(
        "dataset_mask",
        description="what finds the lesion: dataset_mask, self_attention, medklip, text_prompted, "
        "a tool that another package adds, or none",
    )
    prompt: Literal["question", "generic"] = Field(
        "question", description="question: the finding that question and answer name, else the generic word"
    )
    generic_prompt: str = Field(
        "disease", pattern=r"\S", description="what a tool looks for where no finding is named"
    )
    min_confidence: Share = Field(0.05, description="below this the tool found nothing: no pair is made")
    per_image: int = Field(1, ge=1, description="visual pairs per image (of its questions, drawn by seed)")
    questions: Literal["all", "finding"] = Field(
        "all",
        description="of which questions: all, as in the paper; finding: those that name a finding in "
        "question or answer. Noise on a lesion does not change the answer to others (modality, plane, organ)",
    )
    batch_images: int = Field(8, ge=1, description="images handed to a tool at a time")
    noise: NoiseConfig = NoiseConfig()
    medklip: MedklipConfig = MedklipConfig()
    text_prompted: TextPromptedConfig = TextPromptedConfig()

    @field_validator("tool")
    @classmethod
    def _check_tool(cls, name: str) -> str:
        return name if name == "none" else TOOLS.check(name)

    @model_validator(mode="after")
    def _check_settings_of_tool(self) -> VisualCurationConfig:
        section = getattr(self, self.tool, None)
        for key in getattr(section, "required", ()):
            if getattr(section, key) is None:
                raise ValueError(f"curate.visual.tool={self.tool} needs curate.visual.{self.tool}.{key}")
        return self


class CurateConfig(Section):
    """samples → pairs."""

    text: TextCurationConfig = TextCurationConfig()
    visual: VisualCurationConfig = VisualCurationConfig()

    @model_validator(mode="after")
    def _check_pairs(self) -> CurateConfig:
        if self.text.method == self.visual.tool == "none":
            raise ValueError(
                "curate.text.method and curate.visual.tool are both none: there would be no pair"
            )
        return self
