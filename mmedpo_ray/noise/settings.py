"""Settings of the noise in the lesion region."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedpo_ray.config.base import Section, Share


class NoiseConfig(Section):
    """Noise in the lesion region."""

    mode: Literal["diffusion", "additive", "blur", "released"] = Field(
        "diffusion",
        description="the paper's formula; additive Gaussian noise; Gaussian blur; or the authors' script",
    )
    steps: int = Field(500, ge=1, le=1000, description="diffusion steps k of 1000; sets the signal share")
    schedule: Literal["sigmoid", "linear", "cosine"] = "sigmoid"
    signal_share: float | None = Field(
        None, ge=0, lt=1, description="ξ̄ itself; null: from steps and schedule"
    )
    std: float = Field(0.25, gt=0, description="additive: standard deviation, as a share of the value range")
    blur_sigma: float = Field(
        0.04, gt=0, description="blur: standard deviation, as a share of the image's shorter edge"
    )
    model_side: int | None = Field(
        336,
        ge=1,
        description="diffusion, additive: shorter side at which the model sees an image, in pixels; in a "
        "larger image the noise has grains of two such pixels, since single ones are averaged away; null: "
        "always single pixels",
    )
    mask: Literal["hard", "soft"] = "hard"
    area_share: Share = Field(0.15, description="largest share of the image that a tool's heat map may cover")
