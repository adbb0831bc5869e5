"""Saving a LLaVA under weight names that vLLM and transformers both load, as whole folders or not at all.

LLaVA checkpoints on the hub call the tower's weights ``vision_tower.vision_model.…``. transformers 5 leaves
``vision_model`` out when it saves, and vLLM 0.32 does not load that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import template_with_bos

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

TOWER = "vision_tower.vision_model."
INDEX = "model.safetensors.index.json"
_SHORT_TOWER = "vision_tower."


def hub_name(name: str) -> str:
    """A saved weight's name as LLaVA checkpoints on the hub spell it."""
    if name.startswith(_SHORT_TOWER) and not name.startswith(TOWER):
        return TOWER + name.removeprefix(_SHORT_TOWER)
    return name


def saved_name(parameter: str) -> str:
    """The hub's name of a parameter of a built ``LlavaForConditionalGeneration`` (transformers 5)."""
    if parameter.startswith("lm_head."):
        return f"language_model.{parameter}"
    name = parameter.removeprefix("model.")
    if name.startswith("language_model."):
        return f"language_model.model.{name.removeprefix('language_model.')}"
    return hub_name(name)


def save_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Saves a LLaVA and its processor under the hub's names.

    If the chat template leaves the beginning token to the tokenizer, it is added, because an endpoint adds
    none to a chat.
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
        # safetensors makes files that only their owner can read.
        temporary.chmod(0o644)
        temporary.replace(file)
    index = folder / INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {hub_name(name): file for name, file in content["weight_map"].items()}
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
