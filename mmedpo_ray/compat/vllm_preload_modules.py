"""Imported by the fork server before it forks; see :mod:`mmedpo_ray.compat.vllm_preload`."""

from mmedpo_ray.compat import vllm_without_torchvision

# First: it makes vLLM's LLaVA module importable.
vllm_without_torchvision.install()
