"""A trained model → a folder to hand on: the merged model, and the adapter if nothing else was trained.

``model/merged`` is a whole model with processor, chat template and generation settings, under weight names
that vLLM and transformers both load (:mod:`mmedpo_ray.models.saving`). ``model/adapter`` is what training
wrote (peft). It exists only after LoRA on the language model alone, because an endpoint would ignore a
projector that came with the adapter. Both appear complete or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.fingerprint import model_fingerprint
from mmedpo_ray.models.loading import load_model, load_processor, read_model_config, resolve_model
from mmedpo_ray.models.saving import replaced_folder, save_model
from mmedpo_ray.models.shards import ShardReader
from mmedpo_ray.tables.run_folder import ADAPTER, WEIGHTS, Role, RunFolder
from mmedpo_ray.tables.stage_runner import MANIFEST, Manifest, StageRunner

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Share of an update that rounding may take before the user is warned.
_ROUNDING_WARN_ABOVE = 0.2


def export(config: Config, role: Role = "aligned") -> Manifest:
    """Writes ``merged/`` and, for LoRA on the language model alone, ``adapter/`` of a trained model.

    Args:
        config: all settings.
        role: aligned or control.

    Raises:
        UserError: nothing has been trained, or it does not belong to ``model.path``.
    """
    run = RunFolder(config.run.folder)
    base, target = config.model.path, run.model(role)
    stage = StageRunner(
        "export" if role == "aligned" else f"export {role}",
        str(target),
        config,
        settings=[base, model_fingerprint(base)],
        inputs=[str(run.align(role))],
    )
    finished = stage.finished()
    if finished is not None and (target / "merged" / "config.json").is_file():
        return finished
    weights, adapter = run.align(role) / WEIGHTS, run.align(role) / ADAPTER
    has_adapter = not weights.is_dir()
    shutil.rmtree(target / ADAPTER, ignore_errors=True)
    # An endpoint would not load whole modules (a projector) that come with the adapter.
    if has_adapter and not (settings := _check_adapter(adapter)).get("modules_to_save"):
        with replaced_folder(target / ADAPTER) as folder:
            shutil.copyfile(adapter / _ADAPTER_WEIGHTS, folder / _ADAPTER_WEIGHTS)
            # Not a place on this machine.
            settings["base_model_name_or_path"] = base
            text = json.dumps(settings, indent=2, sort_keys=True)
            (folder / _ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    figures = {}
    with replaced_folder(target / "merged") as folder:
        if has_adapter:
            figures["merge_rounding"] = round(merge(base, adapter, folder), 4)
        else:
            put_weights(base, weights, folder)
    _warn_of_rounding(figures.get("merge_rounding", 0.0), target)
    size = sum(file.stat().st_size for file in (target / "merged").iterdir())
    return stage.finish(extra={"merged_mib": round(size / 2**20, 1), **figures})


def merge(base: str, adapter: Path, folder: Path) -> float:
    """Saves the base model with the adapter's weights added, in the base's precision.

    Args:
        base: as ``model.path``.
        adapter: peft folder, trained on the whole model.
        folder: where to save.

    Returns:
        How much rounding the sums to that precision changes the update: the norm of the difference over the
        norm of the update. 1 means that the merged model is as good as untrained.

    Raises:
        UserError: the adapter is damaged, or its layers are not those of the base.
    """
    # Before the model is loaded, which takes minutes.
    _check_adapter(adapter)
    dtype = _dtype_of(base)
    adapted = _with_adapter(load_model(base, dtype), adapter, base)
    rounding = _rounding(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    # A trained projector comes in the precision it was stored in.
    save_model(merged.to(dtype), load_processor(base), folder)
    return rounding


def _with_adapter(model: Any, adapter: Path, base: str) -> Any:
    """The ``PeftModel`` with the adapter's weights.

    Raises:
        UserError: the base has no such layers, or layers of other shapes.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        # from_pretrained ignores weights that belong to no layer; this tells which.
        unknown = adapted.load_adapter(str(adapter), "default").unexpected_keys
        problem = f"that has no layer for {unknown[0]}" if unknown else ""
    except (RuntimeError, ValueError) as error:
        problem = str(error).strip().splitlines()[-1].strip().rstrip(".")
    if problem:
        raise UserError(
            f"the adapter in {adapter} does not belong to {base}: {problem}. Set model.path to the model it "
            "was trained on."
        )
    return adapted


def _rounding(adapted: Any) -> float:
    """What :func:`merge` returns; computed in float32, one layer's update at a time."""
    import torch
    from peft.tuners.lora import LoraLayer

    lost, total = 0.0, 0.0
    with torch.no_grad():
        layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            weight = layer.get_base_layer().weight
            for name in layer.lora_A:
                update = layer.get_delta_weight(name).float()
                stored = (weight.float() + update).to(weight.dtype).float() - weight.float()
                lost += float((stored - update).square().sum(dtype=torch.float64))
                total += float(update.square().sum(dtype=torch.float64))
    return math.sqrt(lost / total) if total else 0.0


def _warn_of_rounding(rounding: float, target: Path) -> None:
    if rounding <= _ROUNDING_WARN_ABOVE:
        return
    exact = target / ADAPTER
    log.warning(
        "export: the update is so small beside the base's weights that rounding the merged ones changes it "
        "by %.0f %%. %s",
        100 * rounding,
        f"The adapter in {exact} is exact, and `mmedpo serve` uses it: hand that on"
        if exact.is_dir()
        else "Raise align.learning_rate or train longer",
    )


def put_weights(base: str, weights: Path, folder: Path) -> None:
    """Saves the base model with the trained weights in place of its own, in the base's precision.

    Args:
        base: as ``model.path``.
        weights: shards of trained weights (:mod:`mmedpo_ray.align.checkpoint.output_weights`).
        folder: where to save.

    Raises:
        UserError: the weights are damaged, or are not those of the base.
    """
    import torch

    with _naming_damage(weights):
        reader = ShardReader(weights)
    model = load_model(base, _dtype_of(base))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in reader.names:
            shape = reader.shape(name)
            expected = list(parameters[name].shape) if name in parameters else "no such weight"
            if shape != expected:
                raise UserError(
                    f"the weights in {weights} do not belong to {base}: {name} has the shape {shape}, there "
                    f"{expected}. Set model.path to the model they were trained from."
                )
            parameters[name].copy_(reader.tensor(name))
    save_model(model, load_processor(base), folder)


def _check_adapter(folder: Path) -> dict[str, Any]:
    """What peft wrote beside the weights of an adapter, after a look at both files.

    Raises:
        UserError: one is missing, is damaged, or cannot be read.
    """
    from safetensors import safe_open

    file, weights = folder / _ADAPTER_CONFIG, folder / _ADAPTER_WEIGHTS
    for name in (file, weights):
        if not name.is_file():
            raise UserError(
                f"there is no adapter in {folder} ({name.name} is missing). Run `mmedpo align` first."
            )
    with _naming_damage(file):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "peft_type" not in settings:
            raise ValueError("not the settings of an adapter")
    with _naming_damage(weights), safe_open(weights, "pt"):
        return settings


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns errors from reading ``path``, a file or folder that `align` wrote, into a ``UserError``."""
    from safetensors import SafetensorError

    try:
        if path.is_file():
            # safetensors says of every file that it cannot open that it is missing.
            with path.open("rb"):
                pass
        yield
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        folder = path if path.is_dir() else path.parent
        # Without the manifest `align` counts as unfinished.
        raise UserError(
            f"the trained weights cannot be exported: {path} is damaged ({type(error).__name__}). Delete "
            f"{folder} and {folder.parent / MANIFEST}, and run `mmedpo align` again: it trains from the "
            "start."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}). Run `mmedpo export` again when it can be."
        ) from error


def _dtype_of(base: str) -> torch.dtype:
    """The precision the base was saved in; another would change untouched weights or double their size."""
    import torch

    settings = read_model_config(resolve_model(base)) or {}
    name = settings.get("dtype") or settings.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
