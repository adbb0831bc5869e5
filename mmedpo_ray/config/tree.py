"""The whole run as one tree of settings: the only home of defaults.

A YAML file holds what differs from the defaults, ``section.key=value`` on the command line holds what
differs from the file. ``mmedpo config show`` prints the result with every default filled in.

On the command line the value of a setting that holds a text (a path, a name, a choice) is that text as it is;
the value of any other is YAML.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from mmedpo_ray.align.settings import AlignConfig, ControlConfig
from mmedpo_ray.audit.settings import AuditConfig
from mmedpo_ray.config.base import Section, Share
from mmedpo_ray.curate.settings import CurateConfig
from mmedpo_ray.evaluate.settings import EvaluateConfig
from mmedpo_ray.ingest.settings import DataConfig
from mmedpo_ray.judge.settings import ScoreConfig
from mmedpo_ray.models.settings import ModelConfig
from mmedpo_ray.report.settings import ReportConfig
from mmedpo_ray.serve.settings import ServeConfig


class RunConfig(Section):
    """Where a run lives and what it repeats."""

    folder: str = Field(
        "runs/default", description="folder of the run; every node must see it under this path"
    )
    seed: int = Field(
        0, ge=0, description="seeds sampling, noise, LoRA initialisation and the training order"
    )
    max_dropped_share: Share = Field(0.9, description="a stage that drops a larger share of its rows fails")


class RayConfig(Section):
    """The Ray cluster."""

    address: str | None = Field(
        None, description="cluster to join; null: RAY_ADDRESS, else a local one is started"
    )
    local_cpus: int | None = Field(
        None,
        ge=2,
        description="logical CPUs of a cluster started here; null: the machine's cores, at least 4",
    )
    data_cpus: float = Field(1.0, gt=0, description="CPUs a Ray Data map task asks for")
    rows_per_part: int = Field(
        512, ge=1, description="most rows of a part file; a crash costs the blocks in work"
    )


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    ray: RayConfig = RayConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    curate: CurateConfig = CurateConfig()
    score: ScoreConfig = ScoreConfig()
    audit: AuditConfig = AuditConfig()
    align: AlignConfig = AlignConfig()
    control: ControlConfig = ControlConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        self.data.check_format(needs_pairs=self.curate.text.method == "released")
        served = [self.model.name, self.evaluate.aligned_name, self.control.name]
        if len(set(served)) != len(served):
            raise ValueError(f"model.name, evaluate.aligned_name and control.name must differ, not {served}")
        return self
