"""Plots as SVG text for the page, in its text colour (light or dark), with an alt text."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Name, steps, values, colour.
Line = tuple[str, list[float], list[float], str]

# Colours that keep 3:1 contrast against both backgrounds (Okabe–Ito, slightly adapted): text pairs, visual
# pairs, control.
BLUE, ORANGE, GREY = "#2f81c4", "#d4760a", "#8a8f98"
# Stands for the page's text colour until the SVG is written.
_TEXT = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "grid.color": _TEXT,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}


def weights_histogram(kinds: dict[str, Any]) -> Markup:
    """Histogram of the weights, one panel a kind of pair.

    Args:
        kinds: ``{kind: {"n", "mean", "effective_share", "weights": {"edges": [K + 1], "counts": [K]}}}``.
    """
    with rc_context({**_STYLE, "svg.hashsalt": "weights"}):
        figure = Figure(figsize=(5.6, 1.0 + 1.7 * len(kinds)), layout="constrained")
        panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        told = []
        for panel, (kind, found), colour in zip(panels, kinds.items(), (BLUE, ORANGE, GREY), strict=False):
            edges, counts = found["weights"]["edges"], found["weights"]["counts"]
            widths = [right - left for left, right in itertools.pairwise(edges)]
            panel.bar(edges[:-1], counts, width=widths, align="edge", color=colour, linewidth=0)
            panel.set_ylabel("pairs")
            panel.set_title(f"{kind} pairs", fontsize=10, loc="left")
            panel.grid(axis="y")
            told.append(f"{kind}: {found['n']:,} pairs, mean weight {found['mean']:.2f}")
        panels[-1].set_xlabel("weight in the loss")
        return _svg(figure, "Histogram of the weights. " + "; ".join(told) + ".")


def curve(
    title: str,
    series: Sequence[Line],
    *,
    unit: str,
    limits: tuple[float, float] | None = None,
    reference: float | None = None,
) -> Markup:
    """Lines over optimizer steps, raw values faint and a running mean on top.

    Args:
        title: what the values are.
        series: (name, steps, values, colour); at least one with values.
        unit: label of the vertical axis.
        limits: of the vertical axis.
        reference: value at which a thin line is drawn.
    """
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes: Axes = figure.subplots()
        told = []
        for name, steps, values, colour in series:
            smooth = _running_mean(values)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
            told.append(f"{name} from {smooth[0]:.3g} to {smooth[-1]:.3g}")
        if reference is not None:
            axes.axhline(reference, color=_TEXT, linewidth=0.6, linestyle=":")
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        if len(series) > 1:
            axes.legend(fontsize=9)
        return _svg(
            figure, f"{title} over {max(max(steps) for _, steps, *_ in series):g} steps: {'; '.join(told)}."
        )


def differences(
    metrics: Sequence[str], groups: Sequence[tuple[str, Sequence[dict[str, float] | None]]]
) -> Markup:
    """Differences of the aligned model with their intervals, in points, around zero.

    Args:
        metrics: [M] names of the metrics.
        groups: what the aligned model is compared with, at most two, and [M] differences ``{"value", "low",
            "high"}``.
    """
    with rc_context({**_STYLE, "svg.hashsalt": "differences"}):
        figure = Figure(figsize=(5.6, 1.1 + 0.5 * len(metrics)), layout="constrained")
        axes: Axes = figure.subplots()
        for (name, items), colour, marker, offset in zip(
            groups, (BLUE, GREY), "os", (-0.14, 0.14), strict=False
        ):
            found = [(index, item) for index, item in enumerate(items) if item is not None]
            if not found:
                continue
            axes.errorbar(
                [100 * item["value"] for _, item in found],
                [index + offset for index, _ in found],
                xerr=[
                    [100 * max(item["value"] - item["low"], 0) for _, item in found],
                    [100 * max(item["high"] - item["value"], 0) for _, item in found],
                ],
                fmt=marker,
                color=colour,
                markersize=5,
                linewidth=1.8,
                label=name,
            )
        axes.axvline(0, color=_TEXT, linewidth=0.8)
        axes.set_yticks(range(len(metrics)), metrics)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_xlabel("points (0 = no difference, right = aligned better)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", fontsize=9, ncols=2)
        return _svg(
            figure,
            "Differences of the aligned model with intervals; the same figures are in the table below.",
        )


def _running_mean(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // 20)
    return [fmean(values[max(0, index - width) : index + width + 1]) for index in range(len(values))]


def _svg(figure: Figure, alt: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    # The page sizes it; the label makes it one image for a screen reader.
    head, rest = text.split(">", 1)
    head = " ".join(part for part in head.split(" ") if not part.startswith(("width=", "height=")))
    return Markup(f'{head} role="img" aria-label="{escape(alt)}">{rest}')
