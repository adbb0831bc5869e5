"""Saving a model under weight names that vLLM and transformers both load, as whole folders or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import architecture_of
from mmedpo_ray.models.prompts import template_with_bos

INDEX = "model.safetensors.index.json"


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Saves a model and its processor under names that vLLM loads.

    If the chat template leaves the beginning token to the tokenizer, it is added, because an endpoint adds
    none to a chat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.chat_template = template_with_bos(processor) or processor.chat_template
    processor.save_pretrained(folder)
    rename_weights(folder, architecture_of(model).saved_name)


def rename_weights(folder: Path, new_name: Callable[[str], str]) -> None:
    """Renames the weights in a saved model, which is one file or shards."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if all(new_name(name) == name for name in opened.keys()):  # noqa: SIM118 - no dictionary
                continue
        renamed = {new_name(name): tensor for name, tensor in load_file(file).items()}
        temporary = file.with_suffix(".tmp")
        save_file(renamed, temporary, {"format": "pt"})
        # safetensors makes files that only their owner can read.
        temporary.chmod(0o644)
        temporary.replace(file)
    index = folder / INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {new_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces ``folder`` once the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Checks the folder that a command is to write (``--out``).

    Raises:
        UserError: it is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder. Name a new folder with --out.")
