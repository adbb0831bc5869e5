"""The training loop of one rank: plain torch.distributed and DeepSpeed, no Ray.

Every rank builds the same plan and runs its own micro-batches. The ranks meet in DeepSpeed's collectives, in
one all-reduce of the step's figures, and when a checkpoint is gathered. Rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmedpo_ray.align import losses
from mmedpo_ray.align.checkpoint.manager import CheckpointManager
from mmedpo_ray.align.checkpoint.run_lock import is_stop_requested
from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, pair_batch, read_ahead
from mmedpo_ray.align.data.pair_source import StoredPairs
from mmedpo_ray.align.engines import make_engine
from mmedpo_ray.align.engines.base import Engine
from mmedpo_ray.align.losses import SUMS, Normaliser, PairBatch, ResponseLogps
from mmedpo_ray.align.metrics import MetricsWriter
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.plan.plan import MicroBatch, Plan, effective_sample_size
from mmedpo_ray.align.policy import TrainingSpec, build_policy, learning_rate_factor
from mmedpo_ray.align.progress import PLAN_FILE
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables.provenance import check_prepared

log = logging.getLogger(__name__)

# All images of a small data set stay in memory; of large images only those of a few steps.
_IMAGE_CACHE_BYTES = 512 * 1024**2

# Differences between the untrained policy and its reference that count as rounding, by precision: nats per
# response token, the mean over sides and the largest of a side. In bf16 the order of sums alone moves a side
# of a model with 2 B parameters by 0.03 on average, and one in twenty by more than 0.1: a limit on each would
# refuse correct values. Another model differs by whole nats.
_REFERENCE_TOLERANCE = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 1.0)}

# Set by a signal: the machine is about to be taken away.
stop_requested = threading.Event()


class InterruptedTrainingError(Exception):
    """A rank was told to stop; the run can resume from the checkpoint that was written."""


# Beside the objective's sums: tokens computed, and whether a rank was told to stop.
_TOKENS, _STOP = len(SUMS), len(SUMS) + 1

# Figures of the held-out images, in the metrics as validation_<name>.
_VALIDATED = (
    *("loss", "nll", "reward_margin"),
    *("reward_accuracy", "reward_accuracy_text", "reward_accuracy_visual"),
)

Batches = list[tuple[MicroBatch, PackedTrees]]


class TrainingLoop:
    """One rank's part of a training run.

    Args:
        spec: the run. The default process group must be initialised.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.writer = PromptWriter(load_processor(spec.model))
        self.both_sides = spec.align.objective == "dpo"
        self.stored_reference = losses.reference_source(spec.align) == "precomputed"
        # Whether the policy in training mode differs from the one that is evaluated.
        self.has_dropout = spec.align.train == "lora" and spec.align.lora.dropout > 0
        self.images = ImageLoader(self.writer, _IMAGE_CACHE_BYTES, spec.align.image_threads)
        self.plan, self.held_out = self._make_plan()
        self.checkpoints = CheckpointManager(spec)
        self.engine, self.step = self._make_engine()
        self._disagreements: list[Tensor] = []
        self.metrics = MetricsWriter(spec.folder, self.step, spec.align.trackers) if self.rank == 0 else None

    def run(self) -> None:
        """Trains to the end of the plan and writes the result.

        Raises:
            UserError: the loss is not finite, an image is gone, or the prepared table is of another model.
            InterruptedTrainingError: a rank was told to stop; a checkpoint was written.
        """
        try:
            self._train()
        finally:
            # An interrupted run continues in the same trackers, which must have its last steps.
            if self.metrics is not None:
                self.metrics.close()

    def _train(self) -> None:
        align, validation_loss = self.spec.align, None
        steps = range(self.step, self.plan.total_steps)
        # One step is read ahead in a thread.
        read = read_ahead(lambda step: list(self._read(self.plan, step, self.images)), steps)
        for step, batches in zip(steps, read, strict=True):
            started = time.monotonic()
            if self._checks_reference and self.has_dropout:
                self._compare_without_dropout(batches)
            sums = self._forward_backward(step, batches)
            self._refuse_non_finite_loss(step, sums)
            if self._checks_reference:
                self._check_reference()
            learning_rate = align.learning_rate * learning_rate_factor(
                align.scheduler, step, self.plan.total_steps, align.warmup_ratio
            )
            grad_norm = self.engine.update(learning_rate)
            if not math.isfinite(grad_norm):
                # Before NaN weights become a checkpoint.
                raise self._not_finite("gradient", step, " though its loss is")
            self.step = step + 1
            seconds = time.monotonic() - started
            is_last = self.step == self.plan.total_steps
            stopping = bool(sums[_STOP]) and not is_last
            is_due = is_last or self.step % align.validate_every == 0
            # A machine that is about to be taken away has no time for validation.
            validation = self._validate() if is_due and not stopping else {}
            self._log(step, sums, grad_norm, learning_rate, seconds, validation)
            validation_loss = validation.get("validation_loss")
            is_best = self.checkpoints.is_best(validation_loss)
            if is_last:
                break
            if stopping or is_best or self.step % align.checkpoint_every == 0:
                self.checkpoints.save(self.engine, self.step, validation_loss)
            if stopping:
                self.checkpoints.wait()
                raise InterruptedTrainingError(
                    f"told to stop after step {self.step}; the checkpoint is written"
                )
        self.checkpoints.finish(self.engine, self.step, validation_loss)

    # ------------------------------------------------------------------ a step

    def _read(self, plan: Plan, step: int, images: ImageLoader) -> Iterator[tuple[MicroBatch, PackedTrees]]:
        """This rank's micro-batches of a step of a plan."""
        for micro in plan.micro_batches(step, self.rank, self.world_size):
            packed = pack_pairs(micro.pairs, images, self.writer.pad_token_id, both_sides=self.both_sides)
            yield micro, packed

    def _forward_backward(self, step: int, batches: Batches) -> Tensor:
        """Accumulates the step's gradients; returns its sums over all ranks (SUMS, tokens, stop)."""
        total = self.plan.normaliser(step)
        # Each step has its own dropout: the same in a run that resumes there, a different one on every rank.
        seeds = np.random.SeedSequence([self.spec.seed, step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        sums = torch.zeros(len(SUMS) + 2, dtype=torch.float64, device=self.engine.device)
        self._suspects: list[str] = []
        for number, (micro, batch) in enumerate(batches):
            batch = batch.to(self.engine.device)
            share, part, finite = self._objective(micro, batch, total)
            self._suspects += [
                pair.pair_id for pair, is_ok in zip(micro.pairs, finite, strict=True) if not is_ok
            ]
            self.engine.backward(share, is_last=number == len(batches) - 1)
            sums[: len(SUMS)] += part
            sums[_TOKENS] += 0 if micro.is_filler else batch.input_ids.numel()
        driver_ends = self.rank == 0 and is_stop_requested(self.spec.folder, self.spec.launch)
        sums[_STOP] = float(stop_requested.is_set() or driver_ends)
        dist.all_reduce(sums)
        return sums

    def _objective(
        self, micro: MicroBatch, batch: PackedTrees, total: Normaliser
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """A micro-batch's share of the loss, its sums, and which pairs have finite log-probabilities."""
        out = self.engine.logps(batch)
        pairs = pair_batch(micro.pairs, is_filler=micro.is_filler, device=self.engine.device)
        chosen, rejected = out.sides(len(micro.pairs))
        if not self.both_sides:
            share, sums = losses.sft_objective(chosen, pairs, total)
            return share, sums, torch.isfinite(chosen.likelihood).tolist()
        if chosen.ref_logps is not None and rejected.ref_logps is not None and not self.stored_reference:
            pairs = replace(pairs, ref_chosen=chosen.ref_logps, ref_rejected=rejected.ref_logps)
        if self._checks_reference and not self.has_dropout and not micro.is_filler:
            self._disagreements.append(_disagreements(chosen, rejected, pairs))
        share, sums = losses.preference_objective(chosen, rejected, pairs, total, self.spec.align)
        values = torch.stack([chosen.logps, rejected.logps, pairs.ref_chosen, pairs.ref_rejected])
        if chosen.kl is not None:
            values = torch.cat([values, chosen.kl[None]])
        return share, sums, torch.isfinite(values).all(dim=0).tolist()

    def _refuse_non_finite_loss(self, step: int, sums: Tensor) -> None:
        """Stops all ranks before an update with a loss that is not finite."""
        if sums[SUMS.index("non_finite")] == 0 and torch.isfinite(sums[SUMS.index("loss")]):
            return
        found: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(found, self._suspects)
        ids = sorted({pair_id for part in found for pair_id in part})
        named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        cause = f"; log-probabilities or their reference overflow for pairs {named}" if ids else ""
        raise self._not_finite("loss", step, cause)

    def _not_finite(self, what: str, step: int, cause: str) -> UserError:
        return UserError(
            f"align: the {what} of step {step + 1} is not finite{cause}. Lower align.learning_rate, use "
            "align.precision=fp32, or remove pairs that overflow. The last checkpoint is in "
            f"{self.spec.folder / 'checkpoints'}."
        )

    @property
    def _checks_reference(self) -> bool:
        """Whether nothing is trained yet, so that the table must have the policy's values."""
        return self.step == 0 and self.spec.check_reference and self.stored_reference

    def _compare_without_dropout(self, batches: Batches) -> None:
        """Compares the first micro-batch with the reference, in one forward on every rank."""
        micro, batch = batches[0]
        self.engine.train(False)
        with torch.no_grad():
            out = self.engine.logps(batch.to(self.engine.device))
        self.engine.train()
        if not micro.is_filler:
            pairs = pair_batch(micro.pairs, device=self.engine.device)
            self._disagreements.append(_disagreements(*out.sides(len(micro.pairs)), pairs))

    def _check_reference(self) -> None:
        """Refuses a `prepared` table whose reference values are not those of this model."""
        device = self.engine.device
        found = torch.cat([torch.zeros(0, device=device), *self._disagreements]).double()
        total = torch.stack([found.sum(), torch.tensor(float(found.numel()), device=device).double()])
        largest = found.max() if found.numel() else found.new_zeros(())
        dist.all_reduce(total)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        mean = float(total[0] / total[1].clamp(min=1))
        most_mean, most = _REFERENCE_TOLERANCE[self.spec.align.precision]
        # Written so that NaN is refused too.
        if not (mean <= most_mean and float(largest) <= most):
            raise UserError(
                f"align: the reference log-probabilities in {self.spec.prepared} differ from those of "
                f"{self.spec.model} by {mean:.3g} nats per token on average (at most {most_mean} is "
                f"rounding) and by up to {float(largest):.3g} (at most {most}): they were computed with "
                "another model, image processing or precision. Delete that folder and run align again."
            )

    # ------------------------------------------------------------------ figures

    def _validate(self) -> dict[str, float | None]:
        """The objective and its figures on the held-out images, if any; the same for any number of ranks."""
        if self.held_out is None:
            return {}
        total = self.held_out.whole
        # Not the loader of the training images, which a thread uses meanwhile.
        images = ImageLoader(self.writer, threads=self.spec.align.image_threads)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.engine.device)
        self.engine.train(False)
        with torch.no_grad():
            for step in range(self.held_out.total_steps):
                for micro, batch in self._read(self.held_out, step, images):
                    sums += self._objective(micro, batch.to(self.engine.device), total)[1]
        self.engine.train()
        dist.all_reduce(sums)
        figures = losses.summarise(sums)
        if not math.isfinite(float(sums[SUMS.index("loss")])):
            log.warning("align: the validation loss after step %d is not finite", self.step)
            figures["loss"] = None
        return {f"validation_{name}": figures[name] for name in _VALIDATED}

    def _log(
        self,
        step: int,
        sums: Tensor,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        validation: dict[str, float | None],
    ) -> None:
        if self.metrics is None:
            return
        weights = self.plan.step_weights(step)
        tokens, device = int(sums[_TOKENS]), self.engine.device
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        self.metrics.write(
            {
                "step": step + 1,
                "epoch": round((step + 1) / self.plan.steps_per_epoch, 4),
                **losses.summarise(sums[: len(SUMS)]),
                **validation,
                "grad_norm": grad_norm,
                "lr": learning_rate,
                "ess": effective_sample_size(weights),
                "ranks": self.world_size,
                "pairs_per_second": len(weights) / seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
                "gpu_memory_gib": None if memory is None else round(memory, 2),
            }
        )

    # ------------------------------------------------------------------ start

    def _make_plan(self) -> tuple[Plan, Plan | None]:
        """The order of training, and one pass over the held-out images if there are any."""
        spec, align = self.spec, self.spec.align
        manifest = check_prepared(spec.prepared, spec.prepared_key, spec.prepared_with)
        source = StoredPairs(spec.prepared, self.writer, align)
        trained_on, apart = source.hold_out(align.validation_share, spec.seed)
        plan = Plan(trained_on, align, spec.seed)
        held_out = None
        if apart is not None:
            held_out = Plan(apart, align.model_copy(update={"epochs": 1, "max_steps": None}), spec.seed)
        if self.rank == 0:
            figures = {
                "rows_in": manifest.rows_in,
                "dropped": manifest.dropped,
                **plan.summary(plan.forwards(self.world_size)),
                "validation_images": held_out.num_images if held_out else 0,
                "validation_pairs": held_out.num_pairs if held_out else 0,
            }
            storage.write_bytes(str(spec.folder / PLAN_FILE), json.dumps(figures, indent=2).encode())
        return plan, held_out

    def _make_engine(self) -> tuple[Engine, int]:
        """The engine in the state of the last checkpoint, if there is one, and the next step."""
        policy = build_policy(self.spec)
        found = self.checkpoints.resume()
        if found is None:
            return make_engine(policy, self.spec), 0
        policy.load_parameters(found.parameter)
        engine = make_engine(policy, self.spec)
        engine.restore(found)
        log.info("align: resuming after step %d of %d", found.step, self.plan.total_steps)
        return engine, found.step


def _disagreements(chosen: ResponseLogps, rejected: ResponseLogps, pairs: PairBatch) -> Tensor:
    """Differences between policy and reference on both sides of N pairs, nats per response token: (2N,)."""
    sides = ((chosen, pairs.ref_chosen), (rejected, pairs.ref_rejected))
    return torch.cat([(side.logps.detach() - reference).abs() / side.num_tokens for side, reference in sides])
