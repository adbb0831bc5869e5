"""The models of a run that can be served."""

from __future__ import annotations

from pathlib import Path

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import find_architecture
from mmedpo_ray.models.loading import read_model_config, resolve_model
from mmedpo_ray.serve.application import Models, is_adapter
from mmedpo_ray.tables.run_folder import ADAPTER, RunFolder


def served_models(config: Config) -> Models:
    """The models that ``serve.models`` names, with the base model if one of them is an adapter on it.

    Raises:
        UserError: it names one that the run does not have.
    """
    models = run_models(config)
    chosen = config.serve.models
    if chosen is None:
        return models
    if missing := [name for name in chosen if name not in models]:
        raise UserError(
            f"serve.models names {missing[0]!r}; {config.run.folder} has {', '.join(models)}. Name one of "
            "these, or run `mmedpo export` first."
        )
    needs_base = any(is_adapter(models[name]) for name in chosen)
    return {
        name: path
        for name, path in models.items()
        if name in chosen or (needs_base and name == config.model.name)
    }


def run_models(config: Config) -> Models:
    """The models of a run that exist: base, aligned and control, by served name.

    A trained one is an adapter on the base's engine if only an adapter was trained and vLLM serves adapters
    of the architecture, else the merged model with its own engine.

    Raises:
        UserError: ``model.path`` is no model.
    """
    run = RunFolder(config.run.folder)
    base = resolve_model(config.model.path)
    models: Models = {config.model.name: base}
    if aligned := _exported(run.model("aligned"), base):
        models[config.evaluate.aligned_name] = aligned
    if config.control.enabled and (control := _exported(run.model("control"), base)):
        models[config.control.name] = control
    return models


def _exported(folder: Path, base: str) -> Path | None:
    if is_adapter(folder / ADAPTER) and _serves_adapters(base):
        return folder / ADAPTER
    merged = folder / "merged"
    return merged if (merged / "config.json").is_file() else None


def _serves_adapters(base: str) -> bool:
    config = read_model_config(base)
    # A hub name that is not cached says nothing yet; `prepare` has checked it.
    return config is None or find_architecture(config, base).serves_adapters
