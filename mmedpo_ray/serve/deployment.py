"""The endpoint as an application that Serve's own tools deploy, such as `serve deploy` and KubeRay.

    serve run mmedpo_ray.serve.deployment:build run.folder=/shared/runs/slake

`mmedpo serve` does the same with waiting, checks and a help text. Arguments are those of `mmedpo`.
"""

from __future__ import annotations

from pathlib import Path

from ray.serve.deployment import Application

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import load, resolve_run_folder
from mmedpo_ray.serve.access import read_key_hashes
from mmedpo_ray.serve.application import build_app
from mmedpo_ray.serve.models import served_models
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder


def build(arguments: dict[str, str]) -> Application:
    """The application of a run: the base model and what was trained on it, under one OpenAI API.

    Args:
        arguments: ``config`` (path of a YAML file; without it that of the run is used) and dotted settings,
            such as ``run.folder``.

    Raises:
        UserError: the configuration does not fit, or a model is missing.
    """
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "config"]
    path = arguments.get("config")
    if path is None and (saved := Path(arguments.get("run.folder", ""), "config.yaml")).is_file():
        path = str(saved)
    config = resolve_run_folder(load(path, overrides))
    cluster.start(config.ray)
    return build_app(
        config,
        served_models(config),
        has_gpu=cluster.has_gpu(),
        key_hashes=read_key_hashes(config.serve),
        versions=VersionFolder(RunFolder(config.run.folder).versions()),
    )
