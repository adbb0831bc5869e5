"""The audit as a stage of `mmedpo run` and as a command; it prints ids, counts and figures only."""

from __future__ import annotations

import json
import posixpath
import time
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from mmedpo_ray.audit.check import SEVERITIES, Count
from mmedpo_ray.audit.extract import extract
from mmedpo_ray.audit.fix import CHANGES, Fixed, check_folder, write_fixed
from mmedpo_ray.audit.run_checks import audit_key, examine
from mmedpo_ray.audit.samples import open_samples
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import lineage
from mmedpo_ray.tables.run_folder import RunFolder

# From so many rows on the command starts a cluster of its own, which takes seconds.
_CLUSTER_ROWS = 2_000_000
_SCORED = posixpath.basename(RunFolder("").scored)
# Table of a run → the stage that reads it.
_NEXT = {"pairs": "score", _SCORED: "align"}
_COLOURS = {"high": "bold red", "medium": "yellow", "low": "cyan", "info": "dim"}


def audit(config: Config) -> dict[str, Any]:
    """Audits the scored pairs of a run and writes ``audit.json``; an audit of the same tables is reused.

    Args:
        config: all settings.

    Returns:
        The content of ``audit.json``.

    Raises:
        UserError: the run has no scored pairs, or a finding reaches ``audit.fail_on``.
    """
    run = RunFolder(config.run.folder)
    pairs = open_pairs(run.scored)
    samples = open_samples(run.samples) if storage.list_files(run.samples, ".parquet") else None
    result = _read(run.audit)
    if result is None or result.get("key") != audit_key(config, pairs, samples):
        result = examine(config, pairs, extract(pairs, samples, num_cpus=config.ray.data_cpus), samples)
        result["inputs"] = lineage.identities(run.root, [run.samples, run.scored])
        _write(run.audit, result)
    show(result, run.audit)
    if reached(result, config.audit.fail_on):
        raise UserError(
            f"audit: there are findings of severity {config.audit.fail_on} or above (audit.fail_on). "
            f"{run.audit} names the pairs and the remedies; `mmedpo audit --fix DIR` repairs some of them."
        )
    return result


def audit_command(
    config: Config, table: str | None, samples: str | None, out: str | None, fix: str | None
) -> int:
    """Audits any table of pairs.

    Args:
        config: all settings.
        table: folder of Parquet files, a Parquet file, or a released MMedPO JSON; the run's scored/ where
            None.
        samples: samples table; where None, a folder ``samples`` beside the table is used if there is one.
        out: file of the findings; where None, ``audit.json`` beside a folder ``scored``,
            ``<name>.audit.json`` beside any other table.
        fix: folder of a cleaned table, or None.

    Returns:
        1 where a finding of the table reaches ``audit.fail_on`` (whether or not ``fix`` repairs it), else 0.

    Raises:
        UserError: a table cannot be read, the run's own is stale, or a result cannot be written.
    """
    started = time.monotonic()
    run = RunFolder(config.run.folder)
    if table is None:
        lineage.refuse_stale("audit", run.root, run.scored)
    path = (table or run.scored).rstrip("/")
    pairs = open_pairs(path)
    if fix is not None:
        check_folder(fix, pairs)
    beside = storage.join(posixpath.dirname(storage.absolute(path)), "samples")
    if samples is None and storage.list_files(beside, ".parquet"):
        samples = beside
    known = open_samples(samples, with_questions="sample_id" not in pairs.columns) if samples else None
    if pairs.num_rows >= _CLUSTER_ROWS or cluster.address_of(config.ray):
        cluster.start(config.ray)
    features = extract(pairs, known, num_cpus=config.ray.data_cpus)
    result = examine(config, pairs, features, known)
    if table is None:
        result["inputs"] = lineage.identities(run.root, [run.samples, run.scored])
    place = out or _beside(path)
    _write(place, result)
    show(result, place, fix_offered=fix is None)
    if fix is not None:
        _show_fixed(write_fixed(pairs, features, known, fix, started=started), path)
    return int(reached(result, config.audit.fail_on))


def reached(result: dict[str, Any], fail_on: str) -> bool:
    """Whether a finding is of this severity or above; never for "never"."""
    levels: list[str] = list(SEVERITIES)
    return fail_on in levels and any(result["counts"][level] for level in levels[: levels.index(fail_on) + 1])


def _beside(path: str) -> str:
    """The file of a table's findings; ``audit.json`` is that of a run's scored pairs."""
    folder, name = posixpath.split(storage.absolute(path))
    return storage.join(folder, "audit.json" if name == _SCORED else f"{name}.audit.json")


def _read(uri: str) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.read_bytes(uri))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(uri: str, result: dict[str, Any]) -> None:
    try:
        storage.write_bytes(uri, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"cannot write {uri} ({type(error).__name__}). Name a file that can be written with --out FILE."
        ) from error


# ---------------------------------------------------------------------- the terminal


def show(result: dict[str, Any], out: str, *, fix_offered: bool = True) -> None:
    """Prints the findings, worst first, and the next step.

    Args:
        result: content of ``audit.json``.
        out: where it is.
        fix_offered: whether ``--fix`` is a next step.
    """
    samples = f"samples {result['samples']}" if result["samples"] else "no samples table"
    console.print(
        f"[bold]audit[/bold] {escape(result['table'])}: {Count(result['text_pairs']):text pair}, "
        f"{Count(result['visual_pairs']):visual pair}, {escape(samples)}",
        soft_wrap=True,
    )
    if result["findings"]:
        console.print(_table(result["findings"]))
    found = len(result["findings"])
    counts = ", ".join(f"{count} {level}" for level, count in result["counts"].items() if count)
    skipped = len(result["not_checked"])
    console.print(
        (f"{Count(found):finding}: {counts}" if found else "no finding")
        + f"; {Count(len(result['passed'])):check} passed"
        + (f", {skipped} not possible on this table" if skipped else "")
        + f"; next step: {_next_step(result, fix_offered)}. All figures: {escape(out)}",
        soft_wrap=True,
    )


def _table(findings: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("severity", no_wrap=True)
    table.add_column("pairs", justify="right", no_wrap=True)
    table.add_column("finding, examples, remedy", ratio=1, overflow="fold")
    for number, item in enumerate(findings, start=1):
        examples = f"\ne.g. [dim]{escape(', '.join(item['examples']))}[/dim]" if item["examples"] else ""
        table.add_row(
            f"[{_COLOURS[item['severity']]}]{item['severity']}[/]",
            f"{item['count']:,}",
            f"[bold]{item['check']}[/bold]: {escape(item['says'])}{examples}\n→ {escape(item['remedy'])}"
            + ("\n" if number < len(findings) else ""),
        )
    return table


def _next_step(result: dict[str, Any], fix_offered: bool) -> str:
    if not any(result["counts"][level] for level in ("high", "medium", "low")):
        return "none needed"
    fixable = sum(item["fixable"] for item in result["findings"])
    if fixable and fix_offered:
        given = f" --samples {escape(result['samples'])}" if result["samples"] else ""
        return (
            f"[bold]mmedpo audit {escape(result['table'])}{given} --fix DIR[/bold] repairs {fixable} of them"
        )
    return "the remedies above"


def _show_fixed(fixed: Fixed, source: str) -> None:
    reasons = ", ".join(f"{name} {count:,}" for name, count in fixed.removed.items())
    total = sum(fixed.removed.values())
    console.print(
        f"[bold]fixed[/bold] {escape(fixed.folder)}: {fixed.rows_in:,} in, {fixed.rows_out:,} out, {total:,} "
        "removed"
        + (f" ({reasons})" if reasons else "")
        + f"; {Count(fixed.trimmed):pair} trimmed. Every change: "
        f"{escape(storage.join(fixed.folder, CHANGES))}",
        soft_wrap=True,
    )
    if step := _step_after(fixed.folder, source):
        console.print(f"next step: {escape(step)}", soft_wrap=True)


def _step_after(fixed: str, source: str) -> str | None:
    """The command that continues with a fixed table of a run; None if the table is of no run."""
    run, name = posixpath.split(storage.absolute(source))
    settings = RunFolder(run).config
    if name not in _NEXT or not storage.exists(settings):
        return None
    folder, given = posixpath.split(storage.absolute(fixed).rstrip("/"))
    if given != name:
        return f"to continue with this table, write it into the folder of a new run: --fix NEW/{name}"
    return f"mmedpo {_NEXT[name]} --config {settings} run.folder={folder}"
