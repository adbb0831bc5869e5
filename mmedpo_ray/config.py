"""The whole run as one tree of settings: the only home of defaults.

A YAML file holds what differs from the defaults, ``section.key=value`` on the command line holds what
differs from the file. ``mmedpo config show`` prints the result with every default filled in.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmedpo_ray.errors import UserError

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the tree; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class RunConfig(Section):
    """Where a run lives and what it repeats."""

    folder: str = Field(
        "runs/default", description="folder of the run; every node must see it under this path"
    )
    seed: int = Field(
        0, ge=0, description="seeds sampling, noise, LoRA initialisation and the training order"
    )
    max_dropped_share: Share = Field(0.9, description="a station that drops a larger share of its rows fails")


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
        512, ge=1, description="rows a station writes (and can lose in a crash) at a time"
    )


class PhantomDataConfig(Section):
    """The embedded synthetic radiograph world."""

    images: int = Field(
        700, ge=1, description="images to make pairs from (disjoint from the pre-training images)"
    )
    test_images: int = Field(200, ge=1, description="images of the test set, which has no text priors")
    prior: Literal["biased", "uniform"] = Field(
        "uniform", description="text priors of the images to align on"
    )


class DataConfig(Section):
    """Raw data into `samples`."""

    format: Literal["phantom", "mmedpo_json", "llava_json"] = "phantom"
    name: str | None = Field(None, description="name of the data set in the tables; null: the format's own")
    root: str | None = Field(None, description="folder of the data set (path, s3://, gs://)")
    train_file: str | None = Field(None, description="annotation file under root for making pairs")
    test_file: str | None = Field(None, description="annotation file under root for evaluation")
    image_folder: str = Field("images", description="folder of the images under root")
    test_share: Share = Field(
        0.2, description="share of images held out for evaluation when there is no test_file"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are dropped undecoded")
    phantom: PhantomDataConfig = PhantomDataConfig()


class EngineConfig(Section):
    """vLLM, for sampling, judging and serving. CPU or GPU is found out unless set."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: str = Field("auto", description="auto: float32 on CPU, bfloat16 on GPU")
    max_model_len: int = Field(
        4096, ge=64, description="longest prompt + answer in tokens, image tokens included"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences decoded together")
    tensor_parallel_size: int = Field(1, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0, description="CPU only: memory for the KV cache")
    gpu_memory_utilization: Share = 0.9
    enforce_eager: bool | None = Field(None, description="null: true on CPU, false on GPU")
    replicas: int = Field(1, ge=1, description="engines in parallel when mapping over a table")
    batch_rows: int = Field(64, ge=1, description="rows handed to an engine at a time")
    extra: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments")


class ModelConfig(Section):
    """The model to align, which is also the reference and the target of sampling."""

    path: str = Field("phantom", description="'phantom' (embedded), a local folder, or a hub name")
    name: str = Field("base", description="name under which the unaligned model is served")
    engine: EngineConfig = EngineConfig()


class TextCurationConfig(Section):
    """Dispreferred answers."""

    method: Literal["on_policy", "rule_edit", "released", "none"] = Field(
        "on_policy", description="released: the pairs that came with the data"
    )
    num_candidates: int = Field(3, ge=1, description="answers sampled per question")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(64, ge=1, description="longest sampled answer")
    fill_with_rule_edit: bool = Field(
        True, description="where no sampled answer is wrong, edit one fact of the reference answer"
    )
    max_length_ratio: float = Field(
        4.0,
        gt=1,
        description="drop a rejected answer that is longer than chosen by this factor (and by 8 words)",
    )


class NoiseConfig(Section):
    """Noise in the lesion region."""

    mode: Literal["diffusion", "released"] = Field(
        "diffusion", description="the paper's formula, or the authors' script"
    )
    steps: int = Field(500, ge=1, le=1000, description="diffusion steps k of 1000; sets the signal share")
    schedule: Literal["sigmoid", "linear", "cosine"] = "sigmoid"
    mask: Literal["hard", "soft"] = "hard"
    area_share: Share = Field(0.15, description="largest share of the image that a tool's heat map may cover")


class VisualCurationConfig(Section):
    """Dispreferred images."""

    tool: Literal["dataset_mask", "self_attention", "none"] = "dataset_mask"
    min_confidence: Share = Field(0.05, description="below this the tool found nothing: no pair is made")
    per_image: int = Field(1, ge=1, description="visual pairs per image (of its questions, drawn by seed)")
    noise: NoiseConfig = NoiseConfig()


class CurateConfig(Section):
    """samples → pairs."""

    text: TextCurationConfig = TextCurationConfig()
    visual: VisualCurationConfig = VisualCurationConfig()


class RulesAgentConfig(Section):
    """A judge made of a radiology lexicon."""

    kind: Literal["rules"] = "rules"
    name: str = "rules"
    focus: Literal["findings", "laterality", "polarity", "all"] = "all"


class VllmAgentConfig(Section):
    """A judge that is any chat model, run by vLLM with structured output."""

    kind: Literal["vllm"] = "vllm"
    name: str = "judge"
    model: str = Field(description="local folder or hub name of a chat model")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(160, ge=16)
    engine: EngineConfig = EngineConfig()


AgentConfig = Annotated[RulesAgentConfig | VllmAgentConfig, Field(discriminator="kind")]


def _default_agents() -> list[AgentConfig]:
    return [
        RulesAgentConfig(name="findings", focus="findings"),
        RulesAgentConfig(name="laterality", focus="laterality"),
        RulesAgentConfig(name="polarity", focus="polarity"),
    ]


class WeightConfig(Section):
    """Scores → weights."""

    mode: Literal["match_moments", "literal", "raw", "none"] = Field(
        "match_moments",
        description="match_moments: mean 1, variance as given, clipped; literal: the paper's formula; raw: the score; none: 1",
    )
    variance: float = Field(0.1, ge=0)
    clip: tuple[float, float] = Field((0.75, 1.25), description="[low, high]; mode match_moments and literal")
    per: Literal["kind", "dataset", "global"] = Field(
        "kind", description="rows that are normalised together (kind: text and visual scores differ in scale)"
    )


class ScoreConfig(Section):
    """pairs → scored pairs."""

    agents: list[AgentConfig] = Field(default_factory=_default_agents, min_length=1)
    max_rounds: int = Field(5, ge=1, description="debate rounds; then the mean of the history counts")
    keep_source_scores: bool = Field(
        True, description="a score that came with the data is kept, not judged again"
    )
    weights: WeightConfig = WeightConfig()


class LoraConfig(Section):
    """Low-rank adaptation of the language model."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    dropout: Share = 0.0
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="linear layers of the language model (vision tower and projector stay frozen)",
    )


class AlignConfig(Section):
    """scored pairs → adapter: weighted DPO with LoRA under Ray Train and DeepSpeed ZeRO-3."""

    objective: Literal["dpo", "sft"] = Field("dpo", description="sft: likelihood of the chosen answers only")
    beta: float = Field(0.1, gt=0, description="inverse temperature of the DPO loss")
    nll_coefficient: float = Field(
        0.0, ge=0, description="weight of the negative log-likelihood per chosen token"
    )
    visual_coefficient: float = Field(
        1.0, ge=0, description="weight of a visual pair's loss beside a text pair's"
    )
    learning_rate: float = Field(1e-7, gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(3, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    images_per_step: int = Field(
        8, ge=1, description="images (with all their pairs) in one optimizer step, over all ranks"
    )
    pairs_per_forward: int = Field(16, ge=1, description="pairs a rank runs through the model at once")
    max_length: int = Field(2048, ge=64, description="tokens of prompt + response, image tokens included")
    lora: LoraConfig = LoraConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = True
    zero_stage: Literal[2, 3] = Field(3, description="DeepSpeed ZeRO stage")
    num_workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a worker's tensor operations")
    use_gpu: bool | None = Field(None, description="null: if the cluster has GPUs")
    checkpoint_every: int = Field(50, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    max_failures: int = Field(2, ge=0, description="restarts of the worker group from the last checkpoint")


class ControlConfig(Section):
    """A supervised fine-tuning control with as many updates, trained and evaluated beside the aligned model."""

    enabled: bool = True
    name: str = Field("sft_control", description="name under which it is served")
    learning_rate: float | None = Field(None, gt=0, description="null: align.learning_rate")


class ServeConfig(Section):
    """The OpenAI-compatible endpoint (Ray Serve + vLLM)."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(
        32, ge=1, description="requests in flight per replica before another is started"
    )
    max_ongoing_requests: int = Field(128, ge=1)
    start_timeout_s: float = Field(600, gt=0)


class EvaluateConfig(Section):
    """endpoint + samples → answers and scores."""

    endpoint: str | None = Field(
        None, description="base URL (…/v1) of a running endpoint; null: one is started for the run"
    )
    aligned_name: str = Field("aligned", description="name under which the aligned model is served")
    max_samples: int | None = Field(
        None, ge=1, description="evaluate a seeded sample of the test images' questions"
    )
    concurrency: int = Field(32, ge=1, description="requests in flight")
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(3, ge=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of images for the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1)


class ReportConfig(Section):
    """report.html."""

    gallery: int = Field(6, ge=0, description="examples shown of each kind of pair")
    show_text: bool = Field(
        True, description="show questions, answers and images; set false for identifiable data"
    )


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    ray: RayConfig = RayConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    curate: CurateConfig = CurateConfig()
    score: ScoreConfig = ScoreConfig()
    align: AlignConfig = AlignConfig()
    control: ControlConfig = ControlConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.data.format != "phantom":
            for key in ("root", "train_file"):
                if getattr(self.data, key) is None:
                    raise ValueError(f"data.{key} is required with data.format={self.data.format}")
        if self.curate.text.method == "none" and self.curate.visual.tool == "none":
            raise ValueError(
                "curate.text.method and curate.visual.tool are both none: there would be no pair"
            )
        if self.curate.text.method == "released" and self.data.format != "mmedpo_json":
            raise ValueError("curate.text.method=released needs data.format=mmedpo_json")
        names = [agent.name for agent in self.score.agents]
        if len(set(names)) != len(names):
            raise ValueError(f"score.agents must have different names, not {names}")
        served = [self.model.name, self.evaluate.aligned_name, self.control.name]
        if len(set(served)) != len(served):
            raise ValueError(f"model.name, evaluate.aligned_name and control.name must differ, not {served}")
        if self.serve.max_replicas < self.serve.min_replicas:
            raise ValueError("serve.max_replicas is below serve.min_replicas")
        if not 0 <= self.score.weights.clip[0] < self.score.weights.clip[1]:
            raise ValueError("score.weights.clip must be 0 <= low < high")
        return self


def load(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Builds the settings from a YAML file and dotted overrides such as ``align.beta=0.2``.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown (the nearest known one is named) or a value
            does not fit.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source=str(path) if path else "command line")) from None


def dump(config: Config) -> str:
    """The settings as YAML, every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_run_folder(config: Config) -> Config:
    """Makes ``run.folder`` absolute.

    Inside a submitted Ray job the working directory is a copy that Ray deletes, so a relative folder
    counts from ``MMEDPO_HOME`` (default: ``~/mmedpo_ray``) there.
    """
    folder = config.run.folder
    if "://" in folder or Path(folder).expanduser().is_absolute():
        return config
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    base = os.environ.get("MMEDPO_HOME") or (str(Path.home() / "mmedpo_ray") if in_job else str(Path.cwd()))
    resolved = config.model_copy(deep=True)
    resolved.run.folder = str(Path(base).expanduser() / folder)
    return resolved


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"no configuration file {path}. Give an existing YAML with --config; configs/ has examples."
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (data:, align:, …), not a {type(tree).__name__}.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"cannot read {override!r}: write overrides as section.key=value, such as align.beta=0.2."
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the value of {override!r}: {error}") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-6 as text; numbers are meant.
        with contextlib.suppress(ValueError):
            value = float(value)
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"cannot set {key}: {parent} is a value, not a section.")
        node = child
    node[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors(include_url=False):
        # Discriminated unions add their tag to the location; it is no key of the file.
        location = [part for part in item["loc"] if part not in ("rules", "vllm")]
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}{_nearest(key)}")
        elif not key:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key}: {item['msg']} (got {item['input']!r})")
    return f"configuration ({source}):\n  " + "\n  ".join(lines)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, leaves only."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _nearest(key: str) -> str:
    known = known_keys()
    sections = {
        known_key.rsplit(".", depth)[0] for known_key in known for depth in (1, 2) if "." in known_key
    }
    matches = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.6)
    if not matches:
        last = key.rsplit(".", 1)[-1]
        by_leaf = {known_key.rsplit(".", 1)[-1]: known_key for known_key in reversed(known)}
        matches = [by_leaf[leaf] for leaf in difflib.get_close_matches(last, by_leaf, n=1, cutoff=0.75)]
    return f"; did you mean {matches[0]}?" if matches else "; `mmedpo config show` lists the known ones"
