"""MedKLIP's network (Wu et al., ICCV 2023, arXiv 2301.02228), for inference with the official weights.

A ResNet-50 without its last stage turns an image into 14×14 patches; a decoder asks them 75 questions, one an
observation ("effusion", "disease", …), each given as the clinical BERT's embedding of a text about it. Every
question gets two logits (absent, present), and the attention it pays to the patches is where it looked. No
positional encoding anywhere. The modules have the names and shapes of the official checkpoint.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mmedpo_ray.errors import UserError

IMAGE_SIZE = 224
GRID_SIZE = 14
TEXT_SIZE = 768
_WIDTH = 256
_HEADS = 4
_LAYERS = 4
_HIDDEN = 1024
_PATCH_WIDTH = 1024
_NAMED_KEYS = 5


class MedklipNetwork(nn.Module):
    """Images and observation embeddings → logits and attention. B images, Q observations, P = 196 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.disease_embedding_layer = nn.Linear(TEXT_SIZE, _WIDTH)
        # Serves a training loss only; here so that the official state dict fits as it is.
        self.cl_fc = nn.Linear(_WIDTH, TEXT_SIZE)
        self.res_features = _trunk()
        self.res_l1 = nn.Linear(_PATCH_WIDTH, _PATCH_WIDTH)
        self.res_l2 = nn.Linear(_PATCH_WIDTH, _WIDTH)
        self.decoder = _Decoder()
        self.classifier = nn.Linear(_WIDTH, 2)

    def forward(self, images: torch.Tensor, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass.

        Args:
            images: (B, 3, 224, 224), normalised with ImageNet's mean and standard deviation.
            observations: (Q, 768), the embeddings of the observations' texts.

        Returns:
            Logits (B, Q, 2) of absent and present, and the attention (4, B, Q, P) of each decoder layer to
            the patches, row by row from the top, averaged over heads: each of sum 1 over P.
        """
        patches = self.res_features(images).flatten(2).permute(2, 0, 1)
        patches = self.res_l2(F.relu(self.res_l1(patches)))
        queries = self.disease_embedding_layer(observations)[:, None].expand(-1, images.shape[0], -1)
        answers, attention = self.decoder(queries, patches)
        return self.classifier(answers).transpose(0, 1), attention


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the stride is at the 3×3 one (ResNet v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _trunk() -> nn.Sequential:
    """ResNet-50 up to its third stage: (B, 3, 224, 224) → (B, 1024, 14, 14)."""
    stages: list[nn.Module] = []
    inputs = 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2)):
        stage = [_Bottleneck(inputs, width, stride)]
        inputs = 4 * width
        stage += [_Bottleneck(inputs, width, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(*stage))
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stages)


class _DecoderLayer(nn.Module):
    """Pre-norm: queries look at each other, then at the patches, then think. (Q, B, 256) and (P, B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(_WIDTH, _HEADS)
        self.multihead_attn = nn.MultiheadAttention(_WIDTH, _HEADS)
        self.linear1 = nn.Linear(_WIDTH, _HIDDEN)
        self.linear2 = nn.Linear(_HIDDEN, _WIDTH)
        self.norm1 = nn.LayerNorm(_WIDTH)
        self.norm2 = nn.LayerNorm(_WIDTH)
        self.norm3 = nn.LayerNorm(_WIDTH)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm1(queries)
        queries = queries + self.self_attn(x, x, x, need_weights=False)[0]
        seen, attention = self.multihead_attn(self.norm2(queries), patches, patches)
        queries = queries + seen
        queries = queries + self.linear2(F.relu(self.linear1(self.norm3(queries))))
        return queries, attention


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_DecoderLayer() for _ in range(_LAYERS)])
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = []
        for layer in self.layers:
            queries, seen = layer(queries, patches)
            attention.append(seen)
        return self.norm(queries), torch.stack(attention)


def load_network(path: Path) -> MedklipNetwork:
    """Builds the network with the weights of a checkpoint, for evaluation.

    Args:
        path: what MedKLIP's training saved: the weights under ``model``, or the weights alone; their names
            may begin with ``module.``.

    Raises:
        UserError: it is no such file, or its weights have other names or shapes.
    """
    weights = _read_weights(path)
    network = MedklipNetwork()
    expected = network.state_dict()
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED_KEYS])}{', …' if len(names) > _NAMED_KEYS else ''})"
        for what, names in (
            ("missing", sorted(expected.keys() - weights.keys())),
            ("unexpected", sorted(weights.keys() - expected.keys())),
            ("of another shape", sorted(_misshapen(expected, weights))),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{path} is not a MedKLIP checkpoint; its weights: {', '.join(problems)}. Set "
            "curate.visual.medklip.checkpoint to the official pre-trained one, not to a fine-tuned "
            "classifier."
        )
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval()


def _misshapen(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    remedy = "Set curate.visual.medklip.checkpoint to the official pre-trained .pth file."
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no MedKLIP checkpoint {path}. {remedy}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be opened as a checkpoint that holds weights only ({type(error).__name__}). "
            f"{remedy}"
        ) from error
    weights = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise UserError(f"{path} holds no table of weights, neither as a whole nor under 'model'. {remedy}")
    return {str(name).removeprefix("module."): value for name, value in weights.items()}
