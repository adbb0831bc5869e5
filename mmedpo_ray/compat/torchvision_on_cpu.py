"""torchvision 0.28: its PyPI wheel does not import beside the CPU build of torch; here its Python part does.

The wheel is a CUDA build, so its compiled operators do not load, and ``import torchvision`` fails for want of
two of their declarations (``operator torchvision::nms does not exist``). transformers' processors of
Qwen-VL, InternVL, OneVision and SmolVLM and vLLM's modules of many models import it, for videos and for
resizing, and call no such operator. With both declared first, all of them load. GPU installations have a
torchvision that loads by itself and are not changed.

transformers would also process images with torchvision as soon as it can be imported. On CPU it stays with
Pillow, in training, sampling and serving alike, so images are what they were.

:func:`install` only prepares this; nothing is imported until somebody imports torchvision. It has to come
before any import of transformers, also in processes that vLLM starts: ``make .venv`` writes a ``.pth`` file
that does it at the start of every interpreter.
"""

from __future__ import annotations

import functools
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Imported by torchvision before its operators' fake implementations, which need the declarations.
_BEFORE = "torchvision.extension"
_PROCESSING = "transformers.models.auto.image_processing_auto"
_DECLARATIONS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; sees what is about to be imported."""

    def __init__(self) -> None:
        # Operators disappear with the object that declared them.
        self._declared: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _BEFORE and self._declared is None:
            self._declare()
        if fullname == _PROCESSING:
            return self._with_pillow(fullname, path, target)
        return None

    def _declare(self) -> None:
        import torch

        if torch.version.cuda is None:
            self._declared = torch.library.Library("torchvision", "DEF")
            for declaration in _DECLARATIONS:
                self._declared.define(declaration)

    def _with_pillow(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module
                spec.loader.exec_module = functools.partial(_execute, execute)  # type: ignore[method-assign]
                return spec
        return None


def _execute(execute: Callable[[ModuleType], None], module: Any) -> None:
    """Executes transformers' module and makes it choose Pillow where nobody chooses."""
    import torch

    execute(module)
    if torch.version.cuda is not None:
        return
    resolve = module._resolve_backend
    module._resolve_backend = lambda backend, use_fast, name: resolve(
        "pil" if backend is None and use_fast is None else backend, use_fast, name
    )


def install() -> None:
    """Makes ``import torchvision`` work beside a CPU build of torch; costs nothing until then."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
