"""The settings that the finished tables of a run were made with, which its manifests keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables.manifest import Manifest, read_manifest
from mmedpo_ray.tables.provenance import by_name, changes
from mmedpo_ray.tables.run_folder import STAGES, RunFolder


def read_manifests(run: RunFolder) -> dict[str, Manifest]:
    """The manifests of the stages that have finished, in the order of the pipeline."""
    found = {name: read_manifest(folder) for name, folder in run.stages.items()}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def manifests_to_report(run: RunFolder) -> dict[str, Manifest]:
    """The manifests of the stages that have finished, at least one.

    Raises:
        UserError: no stage has finished.
    """
    found = read_manifests(run)
    if not found:
        raise UserError(
            f"report: nothing has run in {run.root} yet. Give the folder of a run with run.folder=DIR, or "
            "start one with `mmedpo run`."
        )
    return found


def settings_of_tables(config: Config, manifests: Mapping[str, Manifest]) -> Config:
    """The settings, with the seed and the sections of finished stages as they were when these ran.

    Args:
        config: the present settings.
        manifests: of the stages that have finished.
    """
    recorded = config.model_copy(deep=True)
    for item in STAGES:
        settings = manifests[item.stage].settings if item.sections and item.stage in manifests else {}
        for section in item.sections:
            kind = type(getattr(config, section))
            try:
                setattr(recorded, section, kind.model_validate(settings[section]))
            except (KeyError, ValidationError):
                # Not kept, or kept by another version of this package.
                continue
        recorded.run.seed = settings.get("run", {}).get("seed", recorded.run.seed)
    return recorded


def changes_since(config: Config, manifests: Mapping[str, Manifest]) -> str:
    """How settings differ from those of finished tables: ``align.beta 0.1 → 0.5``; empty if they do not."""
    made, now = (_by_key(settings) for settings in (settings_of_tables(config, manifests), config))
    return changes(made, now) if made != now else ""


def _by_key(config: Config) -> dict[str, Any]:
    """Setting → value, of those that tables depend on."""
    tree = config.model_dump(mode="json")
    found = {"run.seed": config.run.seed}
    for section in (section for item in STAGES for section in item.sections):
        found |= by_name(section, tree[section])
    return found
