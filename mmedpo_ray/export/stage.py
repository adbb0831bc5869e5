"""What was trained → a model to hand on: the base with it merged in, and the adapter itself where that is all.

``model/merged`` is a whole LLaVA with processor, chat template and generation settings. ``model/adapter`` is what training
wrote (peft); it is there only after LoRA on the language model alone, because an endpoint would leave out a projector that
came with the adapter. Both appear whole or not at all. The merged weights carry the names of LLaVA checkpoints on the hub
(``vision_tower.vision_model.…``, which transformers 5 no longer writes), so vLLM and transformers both load them.
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
from mmedpo_ray.models.loading import (
    load_model,
    load_processor,
    model_fingerprint,
    resolve_model,
    template_with_bos,
)
from mmedpo_ray.models.shards import ShardReader
from mmedpo_ray.models.vllm_engine import read_model_config
from mmedpo_ray.tables.run_folder import ADAPTER, WEIGHTS, Role, RunFolder
from mmedpo_ray.tables.stage_runner import MANIFEST, Manifest, StageRunner

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
# Share of an update that rounding may take before the user hears of it.
_MUCH_ROUNDING = 0.2


def export(config: Config, role: Role = "aligned") -> Manifest:
    """Writes ``merged/`` and, for LoRA on the language model alone, ``adapter/`` of a trained model.

    Args:
        config: all settings.
        role: aligned or control.

    Raises:
        UserError: nothing has been trained, or it does not belong to ``model.path``.
    """
    run = RunFolder(config.run.folder)
    target = run.model(role)
    stage = StageRunner(
        "export" if role == "aligned" else f"export {role}",
        str(target),
        config,
        settings=[config.model.path, model_fingerprint(config.model.path)],
        inputs=[str(run.align(role))],
    )
    finished = stage.finished()
    if finished is not None and (target / "merged" / "config.json").is_file():
        return finished
    source = run.align(role) / WEIGHTS
    is_whole = source.is_dir()
    if not is_whole:
        source = run.align(role) / ADAPTER
        _check_adapter(source)
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target / ADAPTER, ignore_errors=True)
    if not is_whole and not _trains_more(source):
        with _replaced(target / ADAPTER) as folder:
            copy_adapter(source, folder, base=config.model.path)
    figures = {}
    with _replaced(target / "merged") as folder:
        if is_whole:
            put_weights(config.model.path, source, folder)
        else:
            figures["merge_rounding"] = round(merge(config.model.path, source, folder), 4)
    _warn_of_rounding(figures.get("merge_rounding", 0.0), target)
    size = sum(file.stat().st_size for file in (target / "merged").iterdir())
    return stage.finish(extra={"merged_mib": round(size / 2**20, 1), **figures})


def merge(base: str, adapter: Path, folder: Path) -> float:
    """Saves the base model with the adapter's weights added, in the base's precision.

    Args:
        base: as ``model.path``.
        adapter: peft folder, trained on the whole ``LlavaForConditionalGeneration``.
        folder: where to save.

    Returns:
        What rounding the sums to that precision did to the update: the norm of the difference over the norm of the update. 1
        means that it is as if nothing had been trained.

    Raises:
        UserError: the adapter is damaged, or its layers are not those of the base.
    """
    from peft import PeftModel

    # Before the model is loaded, which takes minutes.
    _adapter_settings(adapter)
    shapes = _adapter_shapes(adapter)
    dtype = _dtype_of(base)
    model = load_model(base, dtype)
    _check_layers(model, shapes, adapter, base)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    rounding = _rounding(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    # A trained projector comes in the precision it was stored in.
    save_for_serving(merged.to(dtype), load_processor(base), folder)
    return rounding


def _rounding(adapted: Any) -> float:
    """See :func:`merge`; one layer's update in float32 at a time."""
    import torch
    from peft.tuners.lora import LoraLayer

    lost, whole = 0.0, 0.0
    with torch.no_grad():
        layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            weight = layer.get_base_layer().weight
            for name in layer.lora_A:
                update = layer.get_delta_weight(name).float()
                stored = (weight.float() + update).to(weight.dtype).float() - weight.float()
                lost += float((stored - update).square().sum(dtype=torch.float64))
                whole += float(update.square().sum(dtype=torch.float64))
    return math.sqrt(lost / whole) if whole else 0.0


def _warn_of_rounding(rounding: float, target: Path) -> None:
    if rounding <= _MUCH_ROUNDING:
        return
    exact = target / ADAPTER
    log.warning(
        "export: the update is so small beside the base's weights that rounding the merged ones changes it by %.0f %%. %s",
        100 * rounding,
        f"The adapter in {exact} is exact, and `mmedpo serve` uses it: hand that on"
        if exact.is_dir()
        else "Raise align.learning_rate or train longer",
    )


def put_weights(base: str, weights: Path, folder: Path) -> None:
    """Saves the base model with the trained weights in the places of its own, in the base's precision.

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
            _check_shape(name, reader.shape(name), parameters, weights, base)
            parameters[name].copy_(reader.tensor(name))
    save_for_serving(model, load_processor(base), folder)


def save_for_serving(model: LlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Saves a LLaVA and its processor in the spelling that vLLM and transformers both load.

    A chat template that leaves the beginning token to the tokenizer gets it, as an endpoint adds none to a chat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.chat_template = template_with_bos(processor) or processor.chat_template
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
    settings = _adapter_settings(source)
    settings["base_model_name_or_path"] = base
    (folder / _ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _check_adapter(folder: Path) -> None:
    for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"there is no adapter in {folder} ({name} is missing). Run `mmedpo align` first.")
    # Before the copy that an endpoint would load.
    _adapter_settings(folder)
    _adapter_shapes(folder)


def _trains_more(adapter: Path) -> bool:
    """Whether it carries whole modules (a projector) besides LoRA, which an endpoint would not load."""
    return bool(_adapter_settings(adapter).get("modules_to_save"))


def _adapter_settings(folder: Path) -> dict[str, Any]:
    """What peft wrote beside the weights of an adapter.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    file = folder / _ADAPTER_CONFIG
    with _naming_damage(file):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "peft_type" not in settings:
            raise ValueError("not the settings of an adapter")
    return settings


def _adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of an adapter's tensors by their names.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    from safetensors import safe_open

    file = folder / _ADAPTER_WEIGHTS
    with _naming_damage(file), safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Reading ``path``, a file or folder of what `align` left, ends in a ``UserError`` that says what to do."""
    from safetensors import SafetensorError

    try:
        if path.is_file():
            # safetensors says of any file that it cannot open that it is missing.
            with path.open("rb"):
                pass
        yield
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        # Without the manifest `align` counts as unfinished.
        raise UserError(
            f"the trained weights cannot be exported: {path} is damaged ({type(error).__name__}). Delete "
            f"{path if path.is_dir() else path.parent} and {_manifest_beside(path)}, and run `mmedpo align` again: it trains anew."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}). Run `mmedpo export` again when it can be."
        ) from error


def _manifest_beside(path: Path) -> Path:
    """That of the stage which wrote ``adapter/<file>`` or ``weights/``."""
    return (path.parent if path.is_dir() else path.parent.parent) / MANIFEST


def _check_layers(
    model: LlavaForConditionalGeneration, shapes: dict[str, list[int]], adapter: Path, base: str
) -> None:
    """peft only warns about adapter weights that find no layer, and then merges nothing."""
    layers: dict[str, Any] = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        if ".lora_" not in name:
            _check_shape(name.removeprefix(_PEFT_PREFIX), shape, parameters, adapter, base)
            continue
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


def _check_shape(name: str, shape: list[int], parameters: dict[str, Any], source: Path, base: str) -> None:
    expected = list(parameters[name].shape) if name in parameters else "no such weight"
    if shape != expected:
        raise UserError(
            f"the weights in {source} do not belong to {base}: {name} has the shape {shape}, there {expected}. Set "
            "model.path to the model they were trained from."
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
