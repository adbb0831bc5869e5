"""Damaging a copy of a tiny LLaVA-Med checkpoint, and what converting it must do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava_med import (
    Original,
)
from transformers import LlamaTokenizer

from mmedpo_ray.convert.checkpoint import convert
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter

QUESTION = "Is there a nodule in the left lung?"


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def logits(folder: Path, image: Image.Image) -> torch.Tensor:
    model = load_model(str(folder), torch.float32)
    writer = PromptWriter(load_processor(str(folder)))
    ids = torch.tensor([writer.prompt(QUESTION)])
    with torch.inference_mode():
        return model(input_ids=ids, **writer.pixels([image])).logits[0]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def copied(original: Original, folder: Path, *, weights: bool = True, **config: object) -> Path:
    """A copy of the checkpoint to damage, with some settings changed."""
    target = folder / "original"
    ignore = None if weights else shutil.ignore_patterns("model*.safetensors*")
    shutil.copytree(original.folder, target, ignore=ignore)
    (target / "config.json").write_text(json.dumps(original.config | config))
    return target


def fails(source: Path, folder: Path, message: str, *, tower: str | None = None, **options: object) -> None:
    """Converting ends with a UserError and leaves nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        convert(
            source,
            folder / "out",
            vision_tower=folder / tower if tower else None,
            **options,  # type: ignore[arg-type]
        )
    assert sorted(folder.iterdir()) == before


def fast_tokenizer(folder: Path) -> dict:
    """What `tokenizer.json` of the checkpoint in a folder would hold."""
    return json.loads(LlamaTokenizer.from_pretrained(str(folder)).backend_tokenizer.to_str())
