"""Where each stage of a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmedpo_ray.io.storage import join, local_path

Role = Literal["aligned", "control"]

# What training leaves behind, the one or the other; the first also of an exported model.
ADAPTER = "adapter"
WEIGHTS = "weights"


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run; every stage finds its inputs and outputs here.

    The control run (supervised fine-tuning with as many updates) mirrors the aligned one under ``control/``.
    """

    root: str

    @property
    def config(self) -> str:
        return join(self.root, "config.yaml")

    @property
    def raw(self) -> str:
        """Images that ingest itself writes (phantoms, images of Parquet files, side-by-side views)."""
        return join(self.root, "raw")

    @property
    def samples(self) -> str:
        return join(self.root, "samples")

    @property
    def released(self) -> str:
        """Pairs that came with the data, in the `pairs` schema."""
        return join(self.root, "released")

    @property
    def candidates(self) -> str:
        return join(self.root, "candidates")

    @property
    def choices(self) -> str:
        """What a judge behind an endpoint picked among the candidates."""
        return join(self.root, "choices")

    @property
    def rewrites(self) -> str:
        """Counterfactual edits that a model behind an endpoint wrote."""
        return join(self.root, "rewrites")

    @property
    def visual(self) -> str:
        """The visual half of `pairs`, in the same schema."""
        return join(self.root, "visual")

    @property
    def pairs(self) -> str:
        return join(self.root, "pairs")

    @property
    def noised(self) -> str:
        """Noised images and heat maps, in folders by the first two digits of their names."""
        return join(self.root, "noised")

    @property
    def scored(self) -> str:
        return join(self.root, "scored")

    @property
    def audit(self) -> str:
        """Findings about the scored pairs."""
        return join(self.root, "audit.json")

    @property
    def prepared(self) -> str:
        """Tokenised pairs with their reference log-probabilities, as training reads them."""
        return join(self.root, "prepared")

    @property
    def evaluate(self) -> str:
        return join(self.root, "evaluate")

    @property
    def report(self) -> str:
        return join(self.root, "report.html")

    @property
    def stages(self) -> dict[str, str]:
        """Stage → folder of its manifest, in the order of the road. Asking creates no folder."""
        control = join(self.root, "control")
        return {
            "ingest": self.samples,
            "ingest, released pairs": self.released,
            "curate, sampled answers": self.candidates,
            "curate, chosen answers": self.choices,
            "curate, rewrites": self.rewrites,
            "curate, visual pairs": self.visual,
            "curate": self.pairs,
            "score": self.scored,
            "prepare": self.prepared,
            "align": join(self.root, "align"),
            "align, control": join(control, "align"),
            "export": join(self.root, "model"),
            "export, control": join(control, "model"),
            "evaluate": self.evaluate,
        }

    def _of(self, role: Role) -> str:
        return self.root if role == "aligned" else join(self.root, "control")

    def align(self, role: Role = "aligned") -> Path:
        """Checkpoints, metrics and what came out of a training run: ``adapter/`` or ``weights/``."""
        return local_path(join(self._of(role), "align"), "training")

    def model(self, role: Role = "aligned") -> Path:
        """The exported model: ``merged/`` (transformers and vLLM) and, where it is all that was trained, ``adapter/`` (peft)."""
        return local_path(join(self._of(role), "model"), "export")
