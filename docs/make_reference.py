"""Writes the pages of docs/reference from the code: ``python docs/make_reference.py``."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel

from mmedpo_ray.commands.parser import build_parser
from mmedpo_ray.config.tree import Config
from mmedpo_ray.judge.agents import JUDGES
from mmedpo_ray.metrics import METRICS
from mmedpo_ray.stages.registry import next_stage, stages
from mmedpo_ray.tables import schemas

REFERENCE = Path(__file__).parent / "reference"
HEADER = "<!-- Written by docs/make_reference.py; do not edit. -->\n\n"


def settings() -> str:
    """The settings page."""
    lines = [
        HEADER + "# Settings\n",
        "One tree, in `mmedpo_ray/config/tree.py`. A YAML file given with `--config` holds what differs from "
        "these defaults;",
        "`section.key=value` on the command line holds what differs from the file. `mmedpo config show` "
        "prints the result,",
        "`mmedpo config validate` checks it without running anything.\n",
    ]
    lines += _section(Config, "", Config())
    for agent in (kind.settings_class for kind in JUDGES.values()):
        lines += [
            f"## score.agents: `kind: {agent.model_fields['kind'].default}`\n",
            (agent.__doc__ or "").strip() + "\n",
        ]
        lines += _rows(agent, "", None)
    return "\n".join(lines) + "\n"


def _section(model: type[BaseModel], prefix: str, value: BaseModel) -> list[str]:
    lines: list[str] = []
    if prefix:
        lines += [f"## {prefix[:-1]}\n", (model.__doc__ or "").strip() + "\n"]
        rows = _rows(model, prefix, value)
        lines += rows if len(rows) > 3 else []
    for name in model.model_fields:
        child = getattr(value, name)
        if isinstance(child, BaseModel):
            lines += _section(type(child), f"{prefix}{name}.", child)
    return lines


def _rows(model: type[BaseModel], prefix: str, value: BaseModel | None) -> list[str]:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        default = getattr(value, name) if value is not None else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            continue
        if isinstance(default, list) and default and isinstance(default[0], BaseModel):
            shown = "three rules agents: " + ", ".join(item.name for item in default)
        else:
            shown = "*required*" if field.is_required() else f"`{default}`".replace("None", "null")
        lines.append(
            f"| `{prefix}{name}` | {_kind(field.annotation)} | {shown} | {field.description or ''} |"
        )
    return [*lines, ""]


def _kind(annotation: object) -> str:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{item}`" for item in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join("null" if item is type(None) else _kind(item) for item in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (list, tuple, dict):
        inner = (
            "agent"
            if origin is list and "Agent" in str(arguments)
            else ", ".join(_kind(item) for item in arguments)
        )
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def table_pages() -> str:
    """The tables page."""
    lines = [
        HEADER + "# Tables\n",
        "The Parquet tables between the stages, from `mmedpo_ray/tables/schemas.py`. Every table folder also "
        "has `manifest.json`",
        "(key, the tables it was made of, settings, versions, rows in and out, dropped by reason, seconds) "
        "and, where rows were",
        "left out, `dropped/` with the same columns plus `drop_reason` and `drop_detail`. Rows in = rows "
        "out + dropped, always.\n",
    ]
    for name, schema in (
        ("samples", schemas.SAMPLES),
        ("candidates", schemas.CANDIDATES),
        ("pairs", schemas.PAIRS),
        ("scored", schemas.SCORED),
        ("prepared", schemas.PREPARED),
        ("answers", schemas.ANSWERS),
    ):
        lines += [f"## {name}\n", "| field | type | null | meaning |", "| --- | --- | --- | --- |"]
        fields = (
            schema
            if name != "scored"
            else [field for field in schema if field.name not in schemas.PAIRS.names]
        )
        if name == "scored":
            lines.insert(-2, "All fields of `pairs`, and:\n")
        lines += [_field_row(field) for field in fields] + [""]
    return "\n".join(lines + _summary_section())


def _summary_section() -> list[str]:
    return [
        "## evaluate/summary.json\n",
        "The scores of a run; `mmedpo evaluate --answers FILE --json OUT` writes the same with a list "
        "`differences`",
        "(`first`, `second`, `paired`, `unpaired`, `metrics`) in place of the two.\n",
        "| key | meaning |",
        "| --- | --- |",
        "| `names` | name of each role: base, aligned, control |",
        "| `models` | model → metric → `value`, `low`, `high` (interval), `n` (answers, failed ones "
        "included) |",
        "| `counts` | model → `answers`, `failed`, `empty`, `closed` (closed questions), `undecided` (of "
        "these), `undecided_share` |",
        "| `difference`, `difference_to_control` | metric → aligned minus base (control): `value`, `low`, "
        "`high`, `n`, `p` (paired test), `p_holm` (corrected for the metrics compared), `verdict`: better, "
        "worse, uncorrected (only before the correction), tiny (prints as 0.0) or open; both null for "
        "metrics that are not judged |",
        "| `left_out` | metric → why it could not be computed here |",
        "| `questions`, `images`, `bootstrap`, `confidence`, `command` | what was scored, and how |",
        "",
        "| metric | answers | label | role |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{name}` | {metric.answer_type} | {metric.label} | {metric.role} |"
            for name, metric in METRICS.items()
        ),
        "",
    ]


def _field_row(field: pa.Field) -> str:
    meaning = (field.metadata or {}).get(b"meaning", b"").decode()
    kind = str(field.type).replace("|", "\\|")
    return f"| `{field.name}` | {kind} | {'yes' if field.nullable else ''} | {meaning} |"


def command_page() -> str:
    """The commands page."""
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    assert isinstance(commands, argparse._SubParsersAction)
    known = stages()
    lines = [
        HEADER + "# Commands\n",
        "`mmedpo COMMAND --help` prints the same. Commands with settings take `--config FILE` and "
        "`key=value`; every",
        "command takes `--debug` (show the traceback of an error) and `--verbose`.\n",
        "| stage | reads | writes | next |",
        "| --- | --- | --- | --- |",
    ]
    for name, stage in known.items():
        following = next_stage(name)
        lines.append(
            f"| `{name}` | {stage.reads} | {stage.writes} | {f'`{following.name}`' if following else ''} |"
        )
    summaries = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, parser in commands.choices.items():
        lines += [f"\n## mmedpo {name}\n", f"{summaries[name]}.\n"]
        rows = [
            f"| `{' '.join([*(action.option_strings or [action.dest]), *_metavar(action)])}` | {action.help} "
            "|"
            for action in parser._actions
            if action.dest not in ("help", "config", "overrides", "debug", "verbose")
        ]
        if rows:
            lines += ["| option | meaning |", "| --- | --- |", *rows]
        if parser.epilog:
            lines += [*([""] if rows else []), "```", parser.epilog.strip(), "```"]
    return "\n".join(lines) + "\n"


def _metavar(action: argparse.Action) -> list[str]:
    if not action.option_strings or action.nargs == 0:
        return []
    return [str(action.metavar or ",".join(map(str, action.choices or [action.dest.upper()])))]


PAGES = {"commands.md": command_page, "settings.md": settings, "tables.md": table_pages}


def main() -> int:
    """Writes the pages; with ``--check`` only says whether they are current (exit 1 if not)."""
    stale = [name for name, page in PAGES.items() if _stored(name) != page()]
    if "--check" in sys.argv:
        sys.stdout.write(
            f"out of date: {', '.join(stale)}; run python docs/make_reference.py\n" if stale else "current\n"
        )
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
    return 0


def _stored(name: str) -> str:
    path = REFERENCE / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
