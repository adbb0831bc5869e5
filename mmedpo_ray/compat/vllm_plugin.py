"""A vLLM plugin that applies this package's changes to vLLM.

vLLM runs every ``vllm.general_plugins`` entry point in each of its processes before it inspects a model, so
the package only needs to be installed for this to take effect.
"""

from __future__ import annotations

from mmedpo_ray.compat import vllm_preload


def register() -> None:
    """Called by vLLM."""
    vllm_preload.install()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from mmedpo_ray.compat import vllm_lora_cpu

        vllm_lora_cpu.install()
