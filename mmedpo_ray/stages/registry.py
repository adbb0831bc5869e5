"""The stages of the pipeline, one row per stage: the only place where a stage is listed.

Another package adds a stage by an entry point of the group ``mmedpo_ray.stages`` that names a :class:`Stage`;
it runs after the stage that it needs. Nothing slow is imported here: a stage's code is loaded when it runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedpo_ray.config.tree import Config
    from mmedpo_ray.tables.run_folder import RunFolder

GROUP = "mmedpo_ray.stages"


def _always(_: Config) -> bool:
    return True


def _never(_: Config) -> bool:
    return False


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its command and its name in messages.
        summary: what it does, in a line of the help.
        reads: its input, for the help.
        writes: its output, for the help.
        function: ``module:function``, called with the settings.
        needs: the stage that writes its input; that one must be finished.
        folder: folder of its table in a run; None: it has no table.
        rows: what the rows of its table are, in the plural.
        per_role: whether the function is called with "aligned", and with "control" where the control is on.
        enabled: whether the stage is part of `mmedpo run` with these settings.
        needs_model: whether it loads the model under alignment with these settings.
        in_pipeline: whether `mmedpo run` runs it at all.
    """

    name: str
    summary: str
    reads: str
    writes: str
    function: str
    needs: str | None = None
    folder: Callable[[RunFolder], str] | None = None
    rows: str = ""
    per_role: bool = False
    enabled: Callable[[Config], bool] = _always
    needs_model: Callable[[Config], bool] = _never
    in_pipeline: bool = True

    def run(self, config: Config) -> None:
        """Runs the stage."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        if not self.per_role:
            function(config)
            return
        function(config, "aligned")
        if config.control.enabled:
            function(config, "control")


def _samples_a_model(config: Config) -> bool:
    return config.curate.text.method == "on_policy" or config.curate.visual.tool == "self_attention"


_BUILTIN = (
    Stage(
        "ingest",
        "raw data set → samples: one row per question, images checked, unusable rows dropped with a reason",
        reads="data.root (or nothing, for data.format=phantom)",
        writes="samples/ (released/ where pairs come with the data)",
        function="mmedpo_ray.ingest.stage:ingest",
        folder=lambda run: run.samples,
        rows="samples",
    ),
    Stage(
        "curate",
        "samples → preference pairs: hallucinated answers and images with noise in the lesion",
        reads="samples/",
        writes="candidates/, visual/, pairs/, noised/",
        function="mmedpo_ray.curate.stage:curate",
        needs="ingest",
        folder=lambda run: run.pairs,
        rows="preference pairs",
        needs_model=_samples_a_model,
    ),
    Stage(
        "score",
        "pairs → scored pairs: judges debate the clinical relevance, scores become weights",
        reads="pairs/",
        writes="scored/",
        function="mmedpo_ray.judge.stage:score",
        needs="curate",
        folder=lambda run: run.scored,
        rows="scored pairs",
    ),
    Stage(
        "audit",
        "preference pairs → shortcuts and faults that would teach the wrong thing, with their remedies",
        reads="a table of pairs (a run's scored/ unless given)",
        writes="audit.json; with --fix a cleaned table",
        function="mmedpo_ray.audit.stage:audit",
        enabled=lambda config: config.audit.enabled,
    ),
    Stage(
        "align",
        "scored pairs → trained weights: weighted DPO (Ray Train, DeepSpeed ZeRO-3), and the SFT control",
        reads="scored/",
        writes="prepared/, align/ and control/align/",
        function="mmedpo_ray.align.stage:align",
        needs="score",
        folder=lambda run: str(run.align()),
        rows="trained weights",
        per_role=True,
        needs_model=_always,
    ),
    Stage(
        "export",
        "trained weights → model/merged (transformers, vLLM), and model/adapter (peft) where LoRA is all",
        reads="align/",
        writes="model/ and control/model/",
        function="mmedpo_ray.export.stage:export",
        needs="align",
        folder=lambda run: str(run.model()),
        rows="models",
        per_role=True,
        needs_model=_always,
    ),
    Stage(
        "evaluate",
        "endpoint + test samples → answers, metrics with confidence intervals",
        reads="samples/ (split test) and the models, or evaluate.endpoint; with --answers that file alone",
        writes="evaluate/ (answers), evaluate/summary.json; with --answers what --json and --rows name",
        function="mmedpo_ray.evaluate.stage:evaluate",
        needs="ingest",
        folder=lambda run: run.evaluate,
        rows="answers",
        needs_model=lambda config: config.evaluate.endpoint is None,
    ),
    Stage(
        "report",
        "everything above → one self-contained report.html",
        reads="every table and metric of the run",
        writes="report.html",
        function="mmedpo_ray.report.stage:report",
    ),
    Stage(
        "serve",
        "OpenAI-compatible endpoint for the base and the aligned model (Ray Serve, vLLM)",
        reads="the base model and model/",
        writes="nothing; answers on serve.host:serve.port until interrupted",
        function="mmedpo_ray.serve.command:serve",
        needs_model=_always,
        in_pipeline=False,
    ),
)


@cache
def stages() -> dict[str, Stage]:
    """Every stage by name, in pipeline order; added ones follow the stage that they need."""
    ordered = list(_BUILTIN)
    for entry in entry_points(group=GROUP):
        stage = entry.load()
        names = [known.name for known in ordered]
        ordered.insert(names.index(stage.needs) + 1 if stage.needs in names else 0, stage)
    return {stage.name: stage for stage in ordered}


def pipeline_stages(config: Config) -> list[Stage]:
    """The stages that `mmedpo run` runs with these settings, in order."""
    return [stage for stage in stages().values() if stage.in_pipeline and stage.enabled(config)]


def next_stage(name: str) -> Stage | None:
    """The stage that follows; ``None`` after the last one."""
    names = list(stages())
    following = names[names.index(name) + 1 :]
    return stages()[following[0]] if following else None


def command_line(name: str, config: Config) -> str:
    """The command that runs a stage of this run; its settings are in the run folder by then."""
    return f"mmedpo {name} run.folder={shlex.quote(config.run.folder)}"
