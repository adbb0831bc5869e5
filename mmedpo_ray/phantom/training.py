"""The two training phases of the embedded model: the tower on lesion maps, then the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.phantom.findings import KINDS
from mmedpo_ray.phantom.render import render
from mmedpo_ray.phantom.world import Phantom, generate

if TYPE_CHECKING:
    from mmedpo_ray.phantom.build_model import PhantomBuildConfig

Report = Callable[[str, int, int], None]
"""Called as report(what, done, total)."""

_LESION_SHARE = 0.25  # a patch with this much of a lesion counts as lesion
_POSITIVE_WEIGHT = 4.0  # lesion patches are rare


def pixel_values(processor: LlavaProcessor, phantoms: Sequence[Phantom]) -> Tensor:
    """Processed images, shape (B, 3, H, W)."""
    images = [Image.fromarray(phantom.image).convert("RGB") for phantom in phantoms]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def lesion_map(phantom: Phantom, patch_size: int) -> np.ndarray:
    """Share of each patch that each kind of finding covers, shape (P, len(KINDS)), values in [0, 1]."""
    size = phantom.image.shape[0]
    grid = size // patch_size
    shares = np.zeros((grid * grid, len(KINDS)), dtype=np.float32)
    for finding in phantom.findings:
        _, mask = render(phantom.seed, (finding,), size)
        patches = mask.reshape(grid, patch_size, grid, patch_size).mean(axis=(1, 3))
        shares[:, KINDS.index(finding.kind)] = patches.ravel()
    return shares


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    config: PhantomBuildConfig,
    report: Report,
) -> dict:
    """Train the tower to say for every patch which lesions it shows, then freeze it.

    The images come from the uniform world: what the tower sees carries no prior.

    Returns:
        {"patch_auc": area under the ROC curve over the held-out patches, mean over the kinds}.
    """
    phantoms = list(generate("tower", config.tower_images, config.seed, size=config.image_size))
    pixels = pixel_values(processor, phantoms)
    shares = np.stack([lesion_map(p, config.patch_size) for p in phantoms])
    labels = torch.from_numpy(shares > _LESION_SHARE).float()
    held_out = max(len(phantoms) // 10, 1)
    tower = model.model.vision_tower
    head = nn.Linear(config.vision_width, len(KINDS))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.tower_rate, weight_decay=0.05)
    weight = torch.tensor(_POSITIVE_WEIGHT)
    tower.train()
    plan = _batches(len(phantoms) - held_out, config.tower_steps, config.tower_batch, config.seed)
    for step, rows in enumerate(plan):
        _set_rate(optimizer, config.tower_rate, step, config.tower_steps)
        logits = head(_patch_features(model, pixels[rows]))
        loss = F.binary_cross_entropy_with_logits(logits, labels[rows], pos_weight=weight)
        _update(optimizer, loss, parameters)
        report("tower", step + 1, config.tower_steps)
    tower.eval().requires_grad_(False)
    with torch.no_grad():
        logits = head(_patch_features(model, pixels[-held_out:])).flatten(0, 1)
    truth = labels[-held_out:].flatten(0, 1)
    return {"patch_auc": float(np.mean([_auc(logits[:, k], truth[:, k]) for k in range(len(KINDS))]))}


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    phantoms: Sequence[Phantom],
    config: PhantomBuildConfig,
    report: Report,
) -> None:
    """Teach projector and language model to answer all questions of the given images, the tower frozen.

    One row is one image with all its questions: the image prefix is computed once, and a block mask lets
    every question see it but not the other questions. Loss = cross-entropy of the answer tokens, each answer
    counting equally whatever its length.
    """
    pixels = pixel_values(processor, phantoms)
    with torch.no_grad():
        features = torch.cat([_patch_features(model, chunk) for chunk in pixels.split(64)])
    writer = PromptWriter(processor)
    trees = [_tree(writer, phantom) for phantom in phantoms]
    trained = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    parameters = [parameter for module in trained for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.train_rate, weight_decay=0.05, betas=(0.9, 0.98))
    model.train()
    plan = _batches(len(phantoms), config.train_steps, config.train_batch, config.seed + 1)
    for step, rows in enumerate(plan):
        _set_rate(optimizer, config.train_rate, step, config.train_steps)
        loss = _tree_loss(model, features[rows], [trees[row] for row in rows])
        _update(optimizer, loss, parameters)
        report("language model", step + 1, config.train_steps)
    model.eval()


def _patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Last layer of the tower without the class token, shape (B, P, C); what the projector reads."""
    outputs = model.model.vision_tower(pixels, output_hidden_states=True)
    return outputs.hidden_states[model.config.vision_feature_layer][:, 1:]


def _tree(writer: PromptWriter, phantom: Phantom) -> dict[str, Tensor]:
    """All questions of one image behind one image prefix.

    Returns:
        Tensors of shape (T,): `ids`, `positions`, `branch` (0 for the prefix, the question's number from 1
        after it), `target` (the next token where an answer token follows, else -100) and `weight` (1 / answer
        length).
    """
    turns = [(writer.prompt(q.question), writer.response(q.question, q.answer)) for q in phantom.questions]
    first = turns[0][0]
    assert first is not None
    num_shared = first.index(writer.image_token_id) + writer.count_image_tokens(None)
    ids, positions, branch = first[:num_shared], list(range(num_shared)), [0] * num_shared
    target, weight = [-100] * num_shared, [0.0] * num_shared
    for number, (prompt, answer) in enumerate(turns, start=1):
        assert prompt is not None
        assert answer is not None
        question = prompt[num_shared:]
        length = len(question) + len(answer) - 1
        ids += (question + answer)[:-1]
        positions += range(num_shared, num_shared + length)
        branch += [number] * length
        target += [-100] * (len(question) - 1) + answer
        weight += [0.0] * (len(question) - 1) + [1 / len(answer)] * len(answer)
    columns = {"ids": ids, "positions": positions, "branch": branch, "target": target, "weight": weight}
    return {name: torch.tensor(values) for name, values in columns.items()}


def _tree_loss(
    model: LlavaForConditionalGeneration, features: Tensor, trees: list[dict[str, Tensor]]
) -> Tensor:
    padding = {"ids": 0, "positions": 0, "branch": -1, "target": -100, "weight": 0}
    ids, positions, branch, target, weight = (
        nn.utils.rnn.pad_sequence([tree[name] for tree in trees], batch_first=True, padding_value=value)
        for name, value in padding.items()
    )
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    embeddings = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_index).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(image, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=(causal & same).unsqueeze(1),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    answers = target != -100
    losses = F.cross_entropy(model.lm_head(hidden[answers]), target[answers], reduction="none")
    return (losses * weight[answers]).sum() / weight[answers].sum()


def _batches(count: int, steps: int, size: int, seed: int) -> list[list[int]]:
    """Row numbers of every step: shuffled passes over the rows, one after the other."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(count) for _ in range(math.ceil(steps * size / count))]
    return np.concatenate(passes)[: steps * size].reshape(steps, size).tolist()


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero."""
    warm = max(steps // 20, 1)
    share = (
        (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    )
    for group in optimizer.param_groups:
        group["lr"] = peak * share


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _auc(scores: Tensor, truth: Tensor) -> float:
    """Probability that a lesion patch scores above another one; 0.5 if only one of the two kinds occurs."""
    positives = int(truth.sum())
    negatives = truth.numel() - positives
    if not positives or not negatives:
        return 0.5
    ranks = torch.empty_like(scores)
    ranks[scores.argsort()] = torch.arange(1, scores.numel() + 1, dtype=scores.dtype)
    return float((ranks[truth > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))
