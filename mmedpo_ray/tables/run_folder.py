"""The layout of a run's folder: the one list of stages, their folders, their commands and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from mmedpo_ray.io.storage import join, local_path

Role = Literal["aligned", "control"]

# What training writes, one or the other. An exported model may have an adapter too.
ADAPTER = "adapter"
WEIGHTS = "weights"


class StageFolder(NamedTuple):
    """Where a stage of the pipeline writes its manifest.

    Attributes:
        stage: its name in reports.
        folder: in the run's folder.
        command: the `mmedpo` command that runs it.
        sections: the sections of the settings that it introduces.
    """

    stage: str
    folder: str
    command: str
    sections: tuple[str, ...] = ()


# In the order of the pipeline.
STAGES = (
    StageFolder("ingest", "samples", "ingest", ("data",)),
    StageFolder("ingest, released pairs", "released", "ingest"),
    StageFolder("curate, sampled answers", "candidates", "curate"),
    StageFolder("curate, chosen answers", "choices", "curate"),
    StageFolder("curate, rewrites", "rewrites", "curate"),
    StageFolder("curate, visual pairs", "visual", "curate"),
    StageFolder("curate", "pairs", "curate", ("curate",)),
    StageFolder("score", "scored", "score", ("score",)),
    StageFolder("prepare", "prepared", "align"),
    StageFolder("align", "align", "align", ("model", "align")),
    StageFolder("align, control", "control/align", "align", ("control",)),
    StageFolder("export", "model", "export"),
    StageFolder("export, control", "control/model", "export"),
    StageFolder("evaluate", "evaluate", "evaluate", ("evaluate",)),
)


def command_of(folder: str) -> str:
    """The command that writes a folder, given by its name in the run; ``run`` if it is unknown."""
    inside = (item.command for item in STAGES if f"{folder}/".startswith(f"{item.folder}/"))
    return next(inside, "run")


class RunFolder:
    """The addresses of everything in a run's folder. Creates nothing.

    Attributes:
        root: the folder.
        config: settings of the last command.
        raw: images that ingest itself writes (phantoms, images of Parquet files, side-by-side views).
        samples: table of questions with reference answers.
        released: pairs that came with the data, in the `pairs` schema.
        candidates: answers sampled from the target model.
        choices: what a judge behind an endpoint picked among the candidates.
        rewrites: counterfactual edits that a model behind an endpoint wrote.
        visual: the visual half of `pairs`, in the same schema.
        pairs: preference pairs.
        noised: noised images and heat maps, in folders by the first two digits of their names.
        scored: pairs with relevance scores and weights.
        audit: findings about the scored pairs.
        prepared: tokenised pairs with their reference log-probabilities, as training reads them.
        evaluate: answers and their scores.
        report: the report, one HTML file.
        stages: stage → folder of its manifest, in the order of the pipeline.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.config = join(root, "config.yaml")
        self.raw = join(root, "raw")
        self.samples = join(root, "samples")
        self.released = join(root, "released")
        self.candidates = join(root, "candidates")
        self.choices = join(root, "choices")
        self.rewrites = join(root, "rewrites")
        self.visual = join(root, "visual")
        self.pairs = join(root, "pairs")
        self.noised = join(root, "noised")
        self.scored = join(root, "scored")
        self.audit = join(root, "audit.json")
        self.prepared = join(root, "prepared")
        self.evaluate = join(root, "evaluate")
        self.report = join(root, "report.html")
        self.stages = {item.stage: join(root, item.folder) for item in STAGES}

    def align(self, role: Role = "aligned") -> Path:
        """Checkpoints, metrics and the result of a training run: ``adapter/`` or ``weights/``."""
        return local_path(join(self._of(role), "align"), "training")

    def model(self, role: Role = "aligned") -> Path:
        """The exported model: ``merged/`` (transformers, vLLM), and ``adapter/`` (peft) if there is one."""
        return local_path(join(self._of(role), "model"), "export")

    def versions(self) -> Path:
        """Copies of the adapters that an endpoint of this run has served."""
        return local_path(join(self.root, "versions"), "serving")

    def _of(self, role: Role) -> str:
        """The control run: supervised fine-tuning with as many updates, in ``control/``."""
        return self.root if role == "aligned" else join(self.root, "control")
