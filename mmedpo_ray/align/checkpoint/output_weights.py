"""What a training run ends with: an adapter as peft reads it, or the trained weights of a whole model.

    <folder>/adapter/   LoRA (and, with ``align.train_projector``, the projector): adapter_config.json, adapter_model.safetensors
    <folder>/weights/   ``align.train=full``: shards and their index (:mod:`mmedpo_ray.models.shards`)

Names under ``weights/`` are those of ``LlavaForConditionalGeneration.named_parameters()``, values in the precision of training;
what was not trained is in the base model. `export` makes a whole model of either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint
from mmedpo_ray.io import storage
from mmedpo_ray.models.shards import INDEX, ShardWriter
from mmedpo_ray.tables.run_folder import ADAPTER, WEIGHTS


def write_trained(model: Any, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> Path:
    """Writes what a checkpoint holds in the form that is handed on; whole or not at all.

    Args:
        model: the policy's model, for names and LoRA settings; its values are not read.
        checkpoint: whose parameters are written.
        folder: of the run.
        dtype: of ``weights/``.

    Returns:
        The folder written.
    """
    if hasattr(model, "peft_config"):
        with _replaced(folder / ADAPTER) as temporary:
            _write_adapter(model, checkpoint, temporary)
        return folder / ADAPTER
    with _replaced(folder / WEIGHTS) as temporary, ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(temporary, pool)
        for name in checkpoint.names:
            writer.add(name, checkpoint.parameter(name).to(dtype))
        writer.finish().result()
    return folder / WEIGHTS


def find_trained(folder: Path) -> Path | None:
    """The folder that :func:`write_trained` wrote; ``None`` if there is none."""
    for name, file in ((ADAPTER, "adapter_model.safetensors"), (WEIGHTS, INDEX)):
        if (folder / name / file).is_file():
            return folder / name
    return None


def _write_adapter(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    parameters = {name: checkpoint.parameter(name) for name in checkpoint.names}
    save_file(
        get_peft_model_state_dict(model, state_dict=parameters),
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    settings = model.peft_config["default"]
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``folder`` once it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    storage.remove(str(temporary))
    temporary.mkdir(parents=True)
    yield temporary
    storage.move(str(temporary), str(folder))
