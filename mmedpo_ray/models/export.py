"""adapter → a model to hand on: the adapter itself, and the base with the adapter merged in.

``model/adapter`` is what training wrote (peft), ``model/merged`` is a whole LLaVA with processor, chat template and
generation settings. Both appear whole or not at all. The merged weights carry the names of LLaVA checkpoints on the hub
(``vision_tower.vision_model.…``, which transformers 5 no longer writes), so vLLM and transformers both load them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedpo_ray.config import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.engine import read_model_config
from mmedpo_ray.models.loading import load_model, load_processor, model_fingerprint, resolve_model
from mmedpo_ray.run_folder import Role, RunFolder
from mmedpo_ray.stage import Manifest, Station

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

log = logging.getLogger(__name__)

_TOWER = "vision_tower."
_HUB_TOWER = "vision_tower.vision_model."
_INDEX = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def export(config: Config, role: Role = "aligned") -> Manifest:
    """Writes ``adapter/`` and ``merged/`` of a trained model.

    Args:
        config: all settings.
        role: aligned or control.

    Raises:
        UserError: there is no adapter, or it does not belong to ``model.path``.
    """
    run = RunFolder(config.run.folder)
    source = run.align(role) / "adapter"
    target = run.model(role)
    station = Station(
        "export" if role == "aligned" else f"export {role}",
        str(target),
        config,
        settings=[config.model.path, model_fingerprint(config.model.path)],
        inputs=[str(run.align(role))],
    )
    finished = station.finished()
    if finished is not None and (target / "merged" / "config.json").is_file():
        return finished
    _check_adapter(source)
    target.mkdir(parents=True, exist_ok=True)
    with _replaced(target / "adapter") as folder:
        copy_adapter(source, folder, base=config.model.path)
    with _replaced(target / "merged") as folder:
        merge(config.model.path, source, folder)
    size = sum(file.stat().st_size for file in (target / "merged").iterdir())
    return station.finish(extra={"merged_mib": round(size / 2**20, 1)})


def merge(base: str, adapter: Path, folder: Path) -> None:
    """Saves the base model with the adapter's weights added, in the base's precision.

    Args:
        base: as ``model.path``.
        adapter: peft folder, trained on the whole ``LlavaForConditionalGeneration``.
        folder: where to save.

    Raises:
        UserError: the adapter's layers are not those of the base.
    """
    from peft import PeftModel

    model = load_model(base, _dtype_of(base))
    _check_layers(model, adapter, base)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    save_for_serving(merged, load_processor(base), folder)


def save_for_serving(model: LlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Saves a LLaVA and its processor in the spelling that vLLM and transformers both load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    use_hub_names(folder)


def use_hub_names(folder: Path) -> None:
    """Renames the tower's weights in a saved model (one file or shards) to the names used on the hub."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if all(hub_name(name) == name for name in opened.keys()):  # noqa: SIM118 - no dictionary
                continue
        renamed = {hub_name(name): tensor for name, tensor in load_file(file).items()}
        temporary = file.with_suffix(".tmp")
        save_file(renamed, temporary, {"format": "pt"})
        temporary.replace(file)
    index = folder / _INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {hub_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


def hub_name(name: str) -> str:
    """A weight's name as LLaVA checkpoints on the hub spell it."""
    if name.startswith(_TOWER) and not name.startswith(_HUB_TOWER):
        return _HUB_TOWER + name.removeprefix(_TOWER)
    return name


def copy_adapter(source: Path, folder: Path, base: str) -> None:
    """Copies an adapter; its record of the base model becomes ``model.path`` rather than a place on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / _ADAPTER_WEIGHTS, folder / _ADAPTER_WEIGHTS)
    settings = json.loads((source / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base
    (folder / _ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _check_adapter(folder: Path) -> None:
    for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"there is no adapter in {folder} ({name} is missing). Run `mmedpo align` first.")


def _check_layers(model: LlavaForConditionalGeneration, adapter: Path, base: str) -> None:
    """peft only warns about adapter weights that find no layer, and then merges nothing."""
    from safetensors import safe_open

    with safe_open(adapter / _ADAPTER_WEIGHTS, "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    layers: dict[str, Any] = dict(model.named_modules())
    for name, shape in shapes.items():
        layer_name = name.removeprefix(_PEFT_PREFIX).split(".lora_")[0]
        layer = layers.get(layer_name)
        if layer is None:
            raise UserError(
                f"the adapter in {adapter} does not belong to {base}: that has no layer {layer_name}. Set model.path to "
                "the model it was trained on."
            )
        side = "in_features" if ".lora_A." in name else "out_features"
        expected = getattr(layer, side, None)
        found = shape[1] if side == "in_features" else shape[0]
        if expected is not None and expected != found:
            raise UserError(
                f"the adapter in {adapter} does not belong to {base}: {layer_name} has {expected} {side}, the adapter "
                f"{found}. Set model.path to the model it was trained on."
            )


def _dtype_of(base: str) -> torch.dtype:
    """The precision the base was saved in; merging in another would change untouched weights or double their size."""
    import torch

    settings = read_model_config(resolve_model(base)) or {}
    name = settings.get("dtype") or settings.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``folder`` once it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
