"""With all weights 1 the objective is plain DPO: TRL's own trainer, collator and loss on the same pairs.

Nothing of TRL is copied here. Its vision collator tokenises the same rows, so equal losses also say that
prompts, responses, end tokens and images reach the model alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from align_world import write_scored
from pairs_in_memory import prepare_pairs
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.data.batch import ImageLoader, Pair, pack_pairs, pair_batch
from mmedpo_ray.align.losses import Normaliser, preference_objective
from mmedpo_ray.align.packing.logps import response_logps
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

BETA = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two different models, six text pairs of weight 1 as our pairs and as TRL's batch."""
    folder = tmp_path_factory.mktemp("trl")
    policy_folder, reference_folder = (
        build_tiny_llava(folder / "policy"),
        build_tiny_llava(folder / "reference", seed=1),
    )
    rows = [row | {"weight": 1.0} for row in write_scored(folder, num_images=2) if row["kind"] == "text"]
    processor = load_processor(str(policy_folder))
    writer = PromptWriter(processor)
    reference = load_model(str(reference_folder), torch.float32)
    pairs, dropped = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED), writer, max_length=256, visual_coefficient=1.0
    )
    assert not dropped
    return {
        "folder": folder,
        "policy": load_model(str(policy_folder), torch.float32).requires_grad_(True),
        "reference": reference,
        "processor": processor,
        "writer": writer,
        "pairs": pairs,
        "rows": rows,
    }


def trl_loss(world: dict[str, Any], folder: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """TRL's loss, the gradient of ``lm_head`` it gives, and the batch it was computed on."""
    rows = [
        {
            "images": [Image.open(row["image_uri"])],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": row["chosen"]}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": row["rejected"]}]}],
        }
        for row in world["rows"]
    ]
    trainer = trl.DPOTrainer(
        model=world["policy"],
        ref_model=world["reference"],
        args=trl.DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=world["processor"],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    return loss.detach(), _gradient(world, loss), batch


def our_loss(world: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our loss and the gradient of ``lm_head``."""
    pairs: list[Pair] = world["pairs"]
    count = len(pairs)
    batch = pack_pairs(pairs, ImageLoader(world["writer"]), world["writer"].pad_token_id, both_sides=True)
    with torch.no_grad():
        ref = response_logps(world["reference"], batch).logps
    policy = response_logps(world["policy"], batch)
    known = pair_batch(pairs)
    known = type(known)(known.weight, ref[:count], ref[count:], known.is_visual, known.counts_nll)
    total = Normaliser(float(count), sum(len(pair.chosen) for pair in pairs))
    loss, _ = preference_objective(
        *policy.sides(count), known, total, AlignConfig(**{"beta": BETA, **settings})
    )
    return loss.detach(), _gradient(world, loss)


def test_weights_of_one_are_plain_dpo(world: dict[str, Any], tmp_path: Path) -> None:
    theirs, their_gradient, batch = trl_loss(world, tmp_path)
    ours, our_gradient = our_loss(world)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-3, atol=1e-6)
    # TRL's loader shuffles, so rows are compared as a set.
    sequences = {
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert sequences == {
        tuple(pair.prompt + side) for pair in world["pairs"] for side in (pair.chosen, pair.rejected)
    }


def test_the_likelihood_term_is_trl_s_sft_loss(world: dict[str, Any], tmp_path: Path) -> None:
    theirs, their_gradient, _ = trl_loss(
        world, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7]
    )
    ours, our_gradient = our_loss(world, nll_coefficient=0.7)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": ["hinge"]}, {"loss": "hinge"}),
        ({"loss_type": ["ipo"]}, {"loss": "ipo"}),
        ({"loss_type": ["robust"], "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
        ({"loss_type": ["sigmoid_norm"]}, {"loss": "sigmoid", "length_normalised": True}),
    ],
    ids=["hinge", "ipo", "robust", "sigmoid per token"],
)
def test_other_losses_are_trl_s(
    world: dict[str, Any], tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    their_loss, their_gradient, _ = trl_loss(world, tmp_path, **theirs)
    our_loss_, our_gradient = our_loss(world, **ours)
    # Differences of logps of tens of nats in float32.
    assert our_loss_.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-5)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-3, atol=1e-5)


def _gradient(world: dict[str, Any], loss: torch.Tensor) -> torch.Tensor:
    policy = world["policy"]
    policy.zero_grad()
    loss.backward()
    return policy.lm_head.weight.grad.clone()
