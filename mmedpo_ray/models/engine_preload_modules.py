"""Imported by the fork server first; see :mod:`mmedpo_ray.models.engine_preload`."""

from mmedpo_ray.models.vllm_plugin import alias_image_processor

alias_image_processor()
