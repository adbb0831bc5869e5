"""MedKLIP with made-up weights, laid out as the official files: the real network, no knowledge.

    folder = build_tiny_medklip(tmp_path / "medklip")

`medklip.pth`, the observation texts beside it, and in `bert` a text model of one layer.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from mmedpo_ray.curate.visual.tools.medklip_network import MedklipNetwork
from mmedpo_ray.radiology.finding_prompts import OBSERVATIONS


def build_tiny_medklip(folder: Path) -> Path:
    """Saves checkpoint, texts and text model under ``folder`` and returns it; the weights are the same every
    time."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"module.{name}": value for name, value in made_up_state().items()}
    torch.save({"model": weights}, folder / "medklip.pth")
    names = ["eumonia" if name == "pneumonia" else name for name in OBSERVATIONS]
    texts = {name: f"It Means {name} {'very ' * i}" for i, name in enumerate(names)}
    (folder / "observation explanation.json").write_text(json.dumps(texts))
    build_bert(folder / "bert")
    return folder


def build_bert(folder: Path, width: int = 768) -> None:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "means", "very", "It", "Means"]
    words += [*"abcdefghijklmnopqrstuvwxyz_", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz_")]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        # Far from flat, so that a wrong text shows.
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    # Some copies of the clinical BERT say so; the official reader never did.
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))


def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on a name alone (NumPy promises this stream for ever)."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(state.standard_normal(shape), dtype=np.float32))


def made_up_weights(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights for parameters of these names and shapes, of a size that keeps activations near 1."""
    weights = {}
    for name, shape in shapes.items():
        values = normal(name, tuple(shape))
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = 0.5 + values.abs()
        elif values.ndim == 4:
            weights[name] = values * (2 / values[0].numel()) ** 0.5
        elif values.ndim == 2:
            weights[name] = values * (4 / values.shape[1]) ** 0.5
        elif "norm" in name or ".bn" in name or "downsample.1" in name or "res_features.1." in name:
            weights[name] = 0.1 * values + (0.6 if name.endswith("weight") else 0.0)
        else:
            weights[name] = 0.1 * values
    return weights


def made_up_state() -> dict[str, torch.Tensor]:
    return made_up_weights({name: value.shape for name, value in MedklipNetwork().state_dict().items()})
