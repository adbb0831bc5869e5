"""Settings of `report`."""

from __future__ import annotations

from pydantic import Field

from mmedpo_ray.config.base import Section


class ReportConfig(Section):
    """report.html."""

    gallery: int = Field(6, ge=0, description="examples shown of each kind of pair")
    show_text: bool = Field(
        True, description="show questions, answers and images; set false for identifiable data"
    )
