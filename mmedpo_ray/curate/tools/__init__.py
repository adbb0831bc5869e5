"""Visual tools: where in an image is the lesion, and how sure is the tool.

A new tool is a file with a :class:`VisualTool` and a line in ``TOOLS``.
"""

from __future__ import annotations

from mmedpo_ray.curate.tools.base import Localisation, VisualTool
from mmedpo_ray.curate.tools.dataset_mask import DatasetMask
from mmedpo_ray.curate.tools.self_attention import SelfAttention

TOOLS: dict[str, type[VisualTool]] = {"dataset_mask": DatasetMask, "self_attention": SelfAttention}

__all__ = ["TOOLS", "DatasetMask", "Localisation", "SelfAttention", "VisualTool"]
