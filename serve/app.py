"""The endpoint as a Ray Serve application, for `serve run` and `serve deploy`.

    serve run serve.app:build config=configs/phantom.yaml run.folder=/shared/runs/phantom

`mmedpo serve` does the same with waiting, checks and a help text; this is the form that Serve's own tools,
its dashboard and KubeRay's RayService take. Arguments are the configuration file and overrides, as of
`mmedpo`.
"""

from __future__ import annotations

from ray.serve.deployment import Application

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import load, resolve_run_folder
from mmedpo_ray.serve.access import read_key_hashes
from mmedpo_ray.serve.application import build_app
from mmedpo_ray.serve.models import served_models


def build(arguments: dict[str, str]) -> Application:
    """The application of a run: the base model and what was trained on it, under one OpenAI API.

    Args:
        arguments: ``config`` (optional path of a YAML file) and dotted overrides, such as ``run.folder``.

    Raises:
        UserError: the configuration does not fit, or a model is missing.
    """
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "config"]
    config = resolve_run_folder(load(arguments.get("config"), overrides))
    cluster.start(config.ray)
    keys = read_key_hashes(config.serve)
    return build_app(config, served_models(config), has_gpu=cluster.has_gpu(), key_hashes=keys)
