"""Visual tools: where in an image is the lesion, and how sure is the tool.

    tool = TOOLS["dataset_mask"](config)
    found = tool.localise(images, rows)

A new tool is a file with a :class:`VisualTool` and a line in ``_CLASSES``. The class is imported when it is asked for, so that
a run with one tool does not import the libraries of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool

_CLASSES = {
    "dataset_mask": "DatasetMask",
    "self_attention": "SelfAttention",
    "medklip": "Medklip",
    "text_prompted": "TextPrompted",
}


class _Tools(Mapping[str, type[VisualTool]]):
    """Name of a tool, which is also the name of its module → its class."""

    def __getitem__(self, name: str) -> type[VisualTool]:
        class_name = _CLASSES[name]
        tool: type[VisualTool] = getattr(import_module(f"{__name__}.{name}"), class_name)
        return tool

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


TOOLS: Mapping[str, type[VisualTool]] = _Tools()

__all__ = ["TOOLS", "Localisation", "VisualTool"]
