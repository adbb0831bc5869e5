"""Settings of `audit`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedpo_ray.config.base import Section, Share


class AuditConfig(Section):
    """Shortcuts and faults in preference data."""

    enabled: bool = Field(True, description="audit the scored pairs as a step of `mmedpo run`")
    fail_on: Literal["high", "medium", "low", "never"] = Field(
        "never", description="a finding of this severity or above ends the command with an error"
    )
    examples: int = Field(5, ge=0, description="ids shown of each finding")
    shortcut_accuracy: Share = Field(
        0.75, description="a single feature that tells chosen from rejected this often is a shortcut"
    )
    max_noise_share: Share = Field(
        0.5, description="a visual pair whose noise covers more of the image than this is reported"
    )
