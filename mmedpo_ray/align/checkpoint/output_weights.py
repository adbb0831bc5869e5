"""The result of a training run: an adapter in peft's format, or the trained weights of a whole model.

    <folder>/adapter/   LoRA (and the projector with ``align.train_projector``): adapter_config.json,
                        adapter_model.safetensors
    <folder>/weights/   ``align.train=full``: shards and their index (:mod:`mmedpo_ray.models.shards`)

Names under ``weights/`` are those of the model's ``named_parameters()``, values have the
precision of training; what was not trained is in the base model. `export` makes a whole model of either.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint
from mmedpo_ray.io import storage
from mmedpo_ray.models.shards import INDEX, ShardWriter
from mmedpo_ray.tables.run_folder import ADAPTER, WEIGHTS

_ADAPTER_FILE = "adapter_model.safetensors"


def write_output(model: Any, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> Path:
    """Writes the parameters of a checkpoint as the run's result; whole or not at all.

    Args:
        model: the policy's model, for names and LoRA settings; its values are not read.
        checkpoint: whose parameters are written.
        folder: of the run.
        dtype: of ``weights/``.

    Returns:
        The folder written.
    """
    target = folder / (ADAPTER if hasattr(model, "peft_config") else WEIGHTS)
    temporary = target.with_name(f".{target.name}.tmp")
    storage.remove(str(temporary))
    temporary.mkdir(parents=True)
    if target.name == ADAPTER:
        _write_adapter(model, checkpoint, temporary)
    else:
        with ThreadPoolExecutor(1) as pool:
            writer = ShardWriter(temporary, pool)
            for name in checkpoint.names:
                writer.add(name, checkpoint.parameter(name).to(dtype))
            writer.finish().result()
    storage.move(str(temporary), str(target))
    return target


def find_output(folder: Path) -> Path | None:
    """The folder that :func:`write_output` wrote; ``None`` if there is none."""
    files = (folder / ADAPTER / _ADAPTER_FILE, folder / WEIGHTS / INDEX)
    return next((file.parent for file in files if file.is_file()), None)


def _write_adapter(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    parameters = {name: checkpoint.parameter(name) for name in checkpoint.names}
    tensors = get_peft_model_state_dict(model, state_dict=parameters)
    save_file(tensors, folder / _ADAPTER_FILE, metadata={"format": "pt"})
    settings = model.peft_config["default"]
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
