"""The whole run as one tree of settings: the only home of defaults.

A YAML file holds what differs from the defaults, ``section.key=value`` on the command line holds what
differs from the file. ``mmedpo config show`` prints the result with every default filled in.

On the command line the value of a setting that holds a text (a path, a name, a choice) is that text as it is; the value of
any other is YAML.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mmedpo_ray.config_messages import in_words, line_of
from mmedpo_ray.errors import UserError
from mmedpo_ray.settings.align import AlignConfig, ControlConfig, LoraConfig
from mmedpo_ray.settings.base import Section, Share
from mmedpo_ray.settings.curate import (
    CurateConfig,
    MedklipConfig,
    NoiseConfig,
    TextCurationConfig,
    TextPromptedConfig,
    VisualCurationConfig,
)
from mmedpo_ray.settings.data import DataConfig, ParquetColumnsConfig, PhantomDataConfig
from mmedpo_ray.settings.endpoint import EndpointConfig
from mmedpo_ray.settings.judge import (
    AgentConfig,
    AuditConfig,
    OpenAIAgentConfig,
    RulesAgentConfig,
    ScoreConfig,
    VllmAgentConfig,
    WeightConfig,
)
from mmedpo_ray.settings.model import EngineConfig, ModelConfig
from mmedpo_ray.settings.serve import EvaluateConfig, ReportConfig, ServeConfig

__all__ = [
    "AgentConfig",
    "AlignConfig",
    "AuditConfig",
    "Config",
    "ControlConfig",
    "CurateConfig",
    "DataConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MedklipConfig",
    "ModelConfig",
    "NoiseConfig",
    "OpenAIAgentConfig",
    "ParquetColumnsConfig",
    "PhantomDataConfig",
    "RayConfig",
    "ReportConfig",
    "RulesAgentConfig",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "ServeConfig",
    "Share",
    "TextCurationConfig",
    "TextPromptedConfig",
    "VisualCurationConfig",
    "VllmAgentConfig",
    "WeightConfig",
    "dump",
    "known_keys",
    "load",
    "resolve_run_folder",
]


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
        if self.data.format != "phantom" and self.data.root is None:
            raise ValueError(f"data.root is required with data.format={self.data.format}")
        if self.data.format == "phantom" and self.data.root is not None:
            formats = [
                name
                for name in typing.get_args(DataConfig.model_fields["format"].annotation)
                if name != "phantom"
            ]
            raise ValueError(
                f"data.root={self.data.root} would be ignored with data.format=phantom, which makes its own images: set "
                f"data.format (--format) to that of your data ({', '.join(formats)}), or data.root=null for phantoms"
            )
        brings_pairs = self.data.format in ("mmedpo_json", "trl", "llama_factory", "swift")
        if (brings_pairs or self.data.format == "llava_json") and self.data.train_file is None:
            raise ValueError(f"data.train_file is required with data.format={self.data.format}")
        visual = self.curate.visual
        if visual.tool == "medklip" and visual.medklip.checkpoint is None:
            raise ValueError("curate.visual.tool=medklip needs curate.visual.medklip.checkpoint")
        if visual.tool == "text_prompted" and visual.text_prompted.model is None:
            raise ValueError("curate.visual.tool=text_prompted needs curate.visual.text_prompted.model")
        if self.curate.text.method == "rewrite" and self.curate.text.fallback == "rewrite":
            raise ValueError(
                "curate.text.fallback=rewrite cannot follow curate.text.method=rewrite; use rule_edit or none"
            )
        if self.curate.text.method == "none" and self.curate.visual.tool == "none":
            raise ValueError(
                "curate.text.method and curate.visual.tool are both none: there would be no pair"
            )
        if self.curate.text.method == "released" and not brings_pairs:
            raise ValueError(
                "curate.text.method=released needs data that bring pairs: data.format=mmedpo_json, trl, llama_factory or swift"
            )
        if self.align.loss in ("cdpo", "robust") and self.align.label_smoothing == 0:
            raise ValueError(
                f"align.loss={self.align.loss} needs align.label_smoothing > 0; at 0 it is sigmoid"
            )
        if self.align.loss not in ("cdpo", "robust") and self.align.label_smoothing > 0:
            raise ValueError(
                f"align.label_smoothing has no effect with align.loss={self.align.loss}; use cdpo or robust, or 0"
            )
        if self.align.train == "full" and self.align.reference == "online":
            raise ValueError(
                "align.reference=online needs an adapter to switch off, which align.train=full has not; use precomputed"
            )
        if self.align.train == "full" and self.align.kl_coefficient > 0:
            raise ValueError(
                "align.kl_coefficient needs an adapter to switch off, which align.train=full has not; set it to 0 "
                "(align.anchor_coefficient and align.nll_coefficient work), or use align.train=lora"
            )
        if self.align.keep == "best" and self.align.validation_share == 0:
            raise ValueError(
                "align.keep=best needs held-out images that tell which is best; set align.validation_share above 0"
            )
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


def load(
    path: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Builds the settings from a YAML file and dotted overrides such as ``align.beta=0.2``.

    Args:
        path: the file; None: the defaults.
        overrides: what differs from the file. Where the setting holds a text the value is taken as it is, but for ``null`` and
            the empty one, which stand for null where the setting may be null; else it is YAML.
        values: values by dotted key, taken as they are; they beat the overrides.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown (the nearest known one is named) or a value
            does not fit.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    for key, value in (values or {}).items():
        _set(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        given = [*(override.partition("=")[0] for override in overrides), *(values or {})]
        raise UserError(_explain(error, path, given)) from None


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


_TYPE = re.compile(r"int|float|str|bool|(?:tuple|list|dict)\[.*\]")


class _OncePerKey(yaml.SafeLoader):
    """YAML as the standard has it: a key that occurs twice is an error. PyYAML itself drops the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, getattr(key, "value", None)
            if isinstance(name, str) and name in lines:
                raise yaml.YAMLError(
                    f"the key {name!r} occurs twice in one section, in line {lines[name]} and in line {line}. The first would "
                    "be ignored: make one of the two."
                )
            lines[name if isinstance(name, str) else id(key)] = line
        return node


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _OncePerKey)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"no configuration file {path}. Give an existing YAML with --config; configs/ has examples."
        )
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date that there is not, or bytes that are no UTF-8.
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
    _set(tree, key, _value(key, text))


def _value(key: str, text: str) -> Any:
    """What a text on the command line means as the value of a setting.

    Raises:
        UserError: the setting holds no text, and this is no YAML.
    """
    declared = _declared(key)
    if _is_text(declared):
        is_null = not text or (text == "null" and type(None) in declared)
        return None if is_null else text
    try:
        value = _load_yaml(text) if text else None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"cannot read the value of {f'{key}={text}'!r}: {error}") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-6 as text; numbers are meant.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _declared(key: str) -> list[Any]:
    """The types that the setting of this dotted key may have, a union's apart; empty where there is no such setting."""
    kinds: list[Any] = [Config]
    for name in key.split("."):
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        kinds = [kind for field in fields for kind in _alternatives(field.annotation)]
    return kinds


def _alternatives(annotation: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _alternatives(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [annotation]


def _is_text(kinds: list[Any]) -> bool:
    """Whether values of these types, null aside, are texts: strings, paths, or one of some words."""

    def is_text(kind: Any) -> bool:
        if typing.get_origin(kind) is typing.Literal:
            return all(isinstance(word, str) for word in typing.get_args(kind))
        return isinstance(kind, type) and issubclass(kind, str | Path)

    values = [kind for kind in kinds if kind is not type(None)]
    return bool(values) and all(map(is_text, values))


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"cannot set {key}: {parent} is a value, not a section.")
        node = child
    node[last] = value


def _explain(error: ValidationError, path: str | Path | None, given: list[str]) -> str:
    """The errors, a line a key, with the line of the file unless the key was given on the command line."""
    wrong: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for item in error.errors(include_url=False):
        location = _keys_of(item["loc"])
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            name, words = f"unknown key {key}{_nearest(key)}", ""
        elif not key:
            name, words = item["msg"].removeprefix("Value error, "), ""
        else:
            name, words = key, in_words(item)
        # Of a setting that may be of several types each has its own error.
        wrong.setdefault(name, []).append(words)
        line = None if any(f"{key}.".startswith(f"{one}.") for one in given) else line_of(path, location)
        places[name] = f" (line {line})" if line else ""
    lines = [
        f"{name}{': ' if any(words) else ''}{', or '.join(words)}{places[name]}"
        for name, words in wrong.items()
    ]
    return f"configuration ({path or 'command line'}):\n  " + "\n  ".join(lines)


def _keys_of(location: Sequence[str | int]) -> list[str | int]:
    """The part of an error's location that is keys of a file: unions add the tag or the type that was tried."""
    keys = [part for part in location if part not in ("rules", "vllm", "openai")]
    types = [index for index, part in enumerate(keys) if _TYPE.fullmatch(str(part))]
    return keys[: types[0]] if types else keys


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
    if judge := re.match(r"score\.agents\.\d+\.", key):
        kinds = (RulesAgentConfig, VllmAgentConfig, OpenAIAgentConfig)
        known += sorted({name for kind in kinds for name in known_keys(kind, judge.group())})
    sections = {
        known_key.rsplit(".", depth)[0] for known_key in known for depth in (1, 2) if "." in known_key
    }
    matches = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.6)
    if not matches:
        last = key.rsplit(".", 1)[-1]
        by_leaf = {known_key.rsplit(".", 1)[-1]: known_key for known_key in reversed(known)}
        matches = [by_leaf[leaf] for leaf in difflib.get_close_matches(last, by_leaf, n=1, cutoff=0.75)]
    return f"; did you mean {matches[0]}?" if matches else "; `mmedpo config show` lists the known ones"
