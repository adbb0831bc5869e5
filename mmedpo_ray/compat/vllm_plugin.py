"""A vLLM plugin: LLaVA without torchvision, and on CPU quick starts and adapters that work in mixed batches.

vLLM runs every ``vllm.general_plugins`` entry point in each of its processes before it inspects a model, so the
package only needs to be installed for this to take effect.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from mmedpo_ray.compat import vllm_preload

_TORCHVISION_MODULE = "transformers.models.pixtral.image_processing_pixtral"
_PIL_MODULE = "transformers.models.pixtral.image_processing_pil_pixtral"


def register() -> None:
    """Called by vLLM."""
    alias_image_processor()
    vllm_preload.install()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from mmedpo_ray.compat import vllm_lora_cpu

        vllm_lora_cpu.install()


def alias_image_processor() -> None:
    """Puts the PIL image processor in the place of the torchvision one.

    vLLM's LLaVA module imports its Pixtral module, which imports ``image_processing_pixtral`` of transformers, which
    needs torchvision. The CPU build of torch has no matching torchvision wheel on PyPI, so it is left out there. The
    PIL twin offers the same names; Pixtral itself is not used. Does nothing where torchvision is installed.
    """
    if importlib.util.find_spec("torchvision") is not None or _TORCHVISION_MODULE in sys.modules:
        return
    sys.modules[_TORCHVISION_MODULE] = importlib.import_module(_PIL_MODULE)
