"""Loading the settings: a YAML file, dotted overrides, and errors that name the key and the line."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from mmedpo_ray.config.base import Section
from mmedpo_ray.config.messages import in_words, line_of
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError


def load(
    path: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Builds the settings from a YAML file and dotted overrides such as ``align.beta=0.2``.

    Args:
        path: the file; None: the defaults.
        overrides: take precedence over the file. The value of a string setting is used exactly as given,
            except that ``null`` and the empty string mean null; any other value is YAML.
        values: values by dotted key, used as they are; they take precedence over the overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a
            value is invalid.
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

    Inside a submitted Ray job the working directory is a copy that Ray deletes, so there a relative folder is
    relative to ``MMEDPO_HOME`` (default: ``~/mmedpo_ray``).
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
    """YAML as the standard defines it: a repeated key is an error. PyYAML silently drops the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, getattr(key, "value", None)
            if isinstance(name, str) and name in lines:
                raise yaml.YAMLError(
                    f"the key {name!r} occurs twice in one section, in line {lines[name]} and in line "
                    f"{line}. The first would be ignored: remove one of them."
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
        # ValueError: an impossible date, or bytes that are not UTF-8.
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
    """The value that a text on the command line stands for.

    Raises:
        UserError: the setting is no string, and the text is not valid YAML.
    """
    types = _json_types(key)
    if types and types <= {"string", "null"}:
        is_null = not text or (text == "null" and "null" in types)
        return None if is_null else text
    try:
        value = _load_yaml(text) if text else None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"cannot read the value of {f'{key}={text}'!r}: {error}") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-6 as a string.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


@cache
def _json_types(key: str) -> frozenset[str]:
    """JSON types of a setting's values, such as {"string", "null"}; empty if there is no such setting."""
    kind: Any = Config
    for name in key.split("."):
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if name not in fields:
            return frozenset()
        kind = fields[name].annotation
    schema = TypeAdapter(kind).json_schema()
    return frozenset(choice.get("type", "object") for choice in schema.get("anyOf", [schema]))


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
    """One line per key, with the line of the file unless the key was given on the command line."""
    wrong: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for item in error.errors(include_url=False):
        location = _keys_of(item["loc"])
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            name, words = f"unknown key {key}{_nearest(key)}", ""
        elif item["msg"].removeprefix("Value error, ").startswith(key):
            # A rule over several settings names them itself.
            name, words = item["msg"].removeprefix("Value error, "), ""
        else:
            name, words = key, in_words(item)
        # A setting with several possible types has one error per type.
        wrong.setdefault(name, []).append(words)
        line = None if any(f"{key}.".startswith(f"{one}.") for one in given) else line_of(path, location)
        places[name] = f" (line {line})" if line else ""
    lines = [
        f"{name}{': ' if any(words) else ''}{', or '.join(words)}{places[name]}"
        for name, words in wrong.items()
    ]
    return f"configuration ({path or 'command line'}):\n  " + "\n  ".join(lines)


def _keys_of(location: Sequence[str | int]) -> list[str | int]:
    """The part of an error's location that is keys of a file: unions add the type that was tried."""
    types = [index for index, part in enumerate(location) if _TYPE.fullmatch(str(part))]
    return list(location[: types[0]] if types else location)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """The dotted keys of all settings, without sections."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _sections(kind: type[Section] = Section) -> list[type[Section]]:
    """Every class of settings that is loaded, those of list items included."""
    return [kind, *(found for below in kind.__subclasses__() for found in _sections(below))]


def _nearest(key: str) -> str:
    """A hint for an unknown key: the nearest known key, by its whole name or by its last part."""
    known = known_keys()
    if in_list := re.match(r".+\.\d+\.", key):
        known += sorted({in_list.group() + name for section in _sections() for name in section.model_fields})
    sections = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2) if "." in name}
    matches = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.6)
    if not matches:
        by_last_part = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        last = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.75)
        matches = [by_last_part[name] for name in last]
    return f"; did you mean {matches[0]}?" if matches else "; `mmedpo config show` lists the known ones"
