"""The sections of the settings, one file a part of the road; :mod:`mmedpo_ray.config` puts them together."""
