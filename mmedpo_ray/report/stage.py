"""Stage ``report``: what a run did and found, as one HTML file that needs nothing else.

Everything is read from the tables, manifests and figures of the run; what is missing is named in a plain
sentence instead. Data goes through Jinja's escaping; the page allows no script and loads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from mmedpo_ray.clients.untrusted_text import read_json
from mmedpo_ray.config.load import dump
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.metrics import verdict
from mmedpo_ray.report import gallery, plots
from mmedpo_ray.tables import lineage, schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.saved_settings import manifests_to_report, settings_of_tables
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, digest

log = logging.getLogger(__name__)

_TEMPLATE = "report.html.j2"
_STYLE = "report.css"


def report(config: Config) -> Manifest:
    """Writes ``report.html``, which names missing parts of the run and stale tables.

    The settings shown are those that the tables were made with. Scores of another model than the present one
    are left out.

    Returns:
        The manifest (in ``.report/``); ``extra`` holds the size of the page in bytes.

    Raises:
        UserError: there is nothing to report on.
    """
    run = RunFolder(config.run.folder)
    manifests = manifests_to_report(run)
    config = settings_of_tables(config, manifests)
    stale = {name: lineage.find_stale(run.root, run.stages[name]) for name in manifests}
    summary = {} if stale.get("evaluate") else _read_json(storage.join(run.evaluate, "summary.json")) or {}
    audit = _read_json(run.audit)
    audited = (audit or {}).get("inputs", {})
    audit_is_stale = bool(audited) and audited != lineage.identities(run.root, [run.samples, run.scored])
    stage = StageRunner(
        "report",
        storage.join(run.root, ".report"),
        config,
        settings=[
            config.report,
            {name: [item.key, item.finished_at] for name, item in manifests.items()},
            {name: str(reason) for name, reason in stale.items()},
            digest(summary),
            digest(None if audit_is_stale else audit),
            digest(dump(config)),
            digest(_load(_TEMPLATE), _load(_STYLE)),
        ],
    )
    if (manifest := stage.finished()) and storage.exists(run.report):
        return manifest
    content = _gather(config, run, manifests, summary) | {"stale": stale, "audit_is_stale": audit_is_stale}
    page = render(content | {"audit": None if audit_is_stale else audit})
    storage.write_bytes(run.report, page.encode("utf-8"))
    return stage.finish(extra={"bytes": len(page.encode("utf-8"))})


def render(content: dict[str, Any]) -> str:
    """Fills the template; values are escaped unless they are :class:`markupsafe.Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmedpo_ray.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "estimate": _percent,
        "points": partial(_percent, sign="+"),
        "label": verdict.label,
    }
    environment.tests["known"] = verdict.known
    return environment.get_template(_TEMPLATE).render(style=Markup(_load(_STYLE)), **content)


def _load(name: str) -> str:
    source, *_ = jinja2.PackageLoader("mmedpo_ray.report", ".").get_source(
        jinja2.Environment(autoescape=True), name
    )
    return source


# ---------------------------------------------------------------------- gathering


def _gather(
    config: Config, run: RunFolder, manifests: dict[str, Manifest], summary: dict[str, Any]
) -> dict[str, Any]:
    scored = _scored(run) if "score" in manifests else None
    pictures = gallery.Thumbnails()
    shown, count = scored if config.report.show_text else None, config.report.gallery
    latest = max(manifests.values(), key=lambda item: item.finished_at)
    weighted = manifests["score"].extra if "score" in manifests else {}
    weights = weighted.get("weights")
    return {
        "title": config.data.name or config.data.format,
        "folder": run.root,
        "finished_at": latest.finished_at,
        **_findings(config, summary),
        "stages": [(name, manifest, _adds_up(manifest)) for name, manifest in manifests.items()],
        "absent": [name for name in run.stages if name not in manifests and name in _REQUIRED_STAGES],
        "weights": weights,
        "debate": weighted.get("debate"),
        "weights_plot": plots.weights_histogram(weights["kinds"]) if weights else None,
        "curves": _curves(config, run),
        "show_text": config.report.show_text,
        "text_pairs": gallery.text_pairs(shown, count, pictures) if shown is not None else [],
        "visual_pairs": gallery.visual_pairs(shown, count, pictures) if shown is not None else [],
        "pictures_left_out": pictures.left_out,
        "config_yaml": dump(config),
        "versions": latest.versions,
        "seed": config.run.seed,
        "objective": config.align.objective,
    }


# A run without one of these is incomplete.
_REQUIRED_STAGES = ("ingest", "curate", "score", "align", "evaluate")


def _adds_up(manifest: Manifest) -> bool:
    return manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())


def _scored(run: RunFolder) -> pa.Table | None:
    try:
        return schemas.check(storage.dataset(run.scored).to_table(), schemas.SCORED, "scored")
    except UserError as error:
        log.warning("report: no gallery, %s", error)
        return None


def _read_json(uri: str) -> Any:
    try:
        return read_json(storage.read_bytes(uri))
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------- figures


def _findings(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """Verdict and metric table."""
    names = summary.get("names") or {
        "base": config.model.name,
        "aligned": config.evaluate.aligned_name,
        "control": config.control.name,
    }
    models = {role: summary.get("models", {}).get(name) for role, name in names.items()}
    confidence = summary.get("confidence", config.evaluate.confidence)
    to_base, to_control = summary.get("difference") or {}, summary.get("difference_to_control") or {}
    counts = summary.get("counts") or {}
    present = [role for role in ("base", "aligned", "control") if models.get(role)]
    measured = [
        metric
        for metric in dict.fromkeys(name for role in present for name in models[role])
        if any((models[role].get(metric) or {}).get("n") for role in present)
    ]
    own = [metric for metric in measured if not metric.endswith("_official")]
    judged = [metric for metric in own if verdict.takes_part(metric)]
    drawn = [m for m in judged if verdict.known(to_base.get(m)) or verdict.known(to_control.get(m))]
    groups = [
        (name, [item if verdict.known(item := found.get(metric)) else None for metric in drawn])
        for name, found in (("against base", to_base), ("against SFT control", to_control))
    ]
    base, control = names.get("base", config.model.name), names.get("control", config.control.name)
    compare = partial(verdict.compare, confidence=confidence)
    return {
        "against_base": compare(to_base, other=base, other_is="the base model"),
        "against_control": compare(to_control, other=control, other_is="the supervised fine-tuning control"),
        "control_enabled": config.control.enabled,
        "metrics": own + [metric for metric in measured if metric not in own],
        "any_official": len(own) < len(measured),
        "models": [(role, names[role], models[role]) for role in present],
        "to_base": to_base,
        "to_control": to_control,
        "confidence": confidence,
        "counts": [(names[role], found) for role in present if (found := counts.get(names[role]))],
        "left_out": summary.get("left_out") or {},
        "look": _look(summary),
        "findings": summary.get("findings") or {},
        "command": summary.get("command"),
        "questions": summary.get("questions"),
        "images": summary.get("images"),
        "differences_plot": plots.differences([verdict.label(m) for m in drawn], groups) if drawn else None,
    }


def _look(summary: dict[str, Any]) -> dict[str, Any] | None:
    """What ``evaluate.look`` found, a row per model and condition; None where it was off."""
    found = summary.get("look")
    if not found:
        return None
    rows = [
        (name, condition, kinds["all"], found["differences"].get(name, {}).get(condition))
        for name, conditions in found["models"].items()
        for condition, kinds in conditions.items()
    ]
    blank = [(name, figures["survive"]) for name, condition, figures, _ in rows if condition == "blank"]
    return {"rows": rows, "survive": [item for item in blank if verdict.known(item[1])]}


def _curves(config: Config, run: RunFolder) -> list[Markup]:
    """Plots of training, as far as there are figures."""
    aligned = _read_metrics(storage.join(run.root, "align", "metrics.jsonl"))
    control = _read_metrics(storage.join(run.root, "control", "align", "metrics.jsonl"))
    loss = [
        _line(f"aligned ({config.align.objective.upper()})", aligned, "loss", plots.BLUE),
        _line("aligned, held-out images", aligned, "validation_loss", plots.ORANGE),
        _line("control (SFT)", control, "loss", plots.GREY),
    ]
    margin = _line("reward margin", aligned, "reward_margin", plots.BLUE)
    accuracy = _line("reward accuracy", aligned, "reward_accuracy", plots.ORANGE)
    curves: list[tuple[str, list[plots.Line | None], dict[str, Any]]] = [
        ("Training loss", loss, {"unit": "loss"}),
        ("Reward margin", [margin], {"unit": "reward margin", "reference": 0.0}),
        ("Reward accuracy", [accuracy], {"unit": "reward accuracy", "limits": (0.0, 1.02), "reference": 0.5}),
    ]
    return [
        plots.curve(title, shown, **options)
        for title, lines, options in curves
        if (shown := [line for line in lines if line])
    ]


def _read_metrics(uri: str) -> list[dict[str, Any]]:
    try:
        lines = storage.read_bytes(uri).decode("utf-8").splitlines()
    except FileNotFoundError:
        return []
    # The last line of a run that was killed may be incomplete.
    return [row for row in map(read_json, lines) if isinstance(row, dict)]


def _line(name: str, rows: Sequence[dict[str, Any]], key: str, colour: str) -> plots.Line | None:
    shown = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    return (name, *map(list, zip(*shown, strict=True)), colour) if shown else None  # type: ignore[return-value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


# ---------------------------------------------------------------------- words


def _percent(item: dict[str, Any] | None, sign: str = "") -> str:
    """A score with its interval in percent; with ``sign="+"`` a difference in points."""
    if not item or not _is_number(item.get("value")):
        return "–"
    text = f"{100 * item['value']:{sign}.1f}"
    if verdict.known(item):
        text += f" [{100 * item['low']:{sign}.1f}, {100 * item['high']:{sign}.1f}]"
    return text.replace("-", "−") if sign else text
