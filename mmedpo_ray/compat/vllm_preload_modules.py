"""Imported by the fork server first; see :mod:`mmedpo_ray.compat.vllm_preload`."""

from mmedpo_ray.compat.vllm_plugin import alias_image_processor

alias_image_processor()
