"""vLLM 0.32: its LLaVA needs torchvision although it never uses it.

vLLM's LLaVA module imports its Pixtral module, which imports ``image_processing_pixtral`` of transformers 5,
which needs torchvision. The CPU build of torch has no matching torchvision wheel on PyPI, so CPU
installations lack it. transformers' PIL version of that module offers the same names; Pixtral itself is not
used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_TORCHVISION_MODULE = "transformers.models.pixtral.image_processing_pixtral"
_PIL_MODULE = "transformers.models.pixtral.image_processing_pil_pixtral"


def install() -> None:
    """Puts the PIL module in the place of the torchvision one; does nothing if torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None and _TORCHVISION_MODULE not in sys.modules:
        sys.modules[_TORCHVISION_MODULE] = importlib.import_module(_PIL_MODULE)
