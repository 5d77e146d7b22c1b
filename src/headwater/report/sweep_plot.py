"""Plot a sweep: accuracy with its 95 % interval against the value, one line per arm, one panel per evaluation."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwater.config.arms import BASE_MODELS
from headwater.report.svg import COLOURS, DASHES, MARKERS, QUIET, STYLE, TEXT, as_file, printable, spanning
from headwater.report.sweep import accuracy, names, seeds_text, shown_arms
from headwater.runs.sweep import variation

LOG_FROM = 8.0
"""Positive numbers that span this factor are drawn on a logarithmic axis."""
STYLES = {"direct_grpo": 0, "bridge": 1, "raw_teacher": 2}
"""Arms that most sweeps compare have the same style in all of them; the others take the next styles in order."""


def draw(summary: dict[str, Any]) -> tuple[str, bytes]:
    """The plot as an SVG file with text kept as text, and as a PNG. The same values give the same SVG."""
    with matplotlib.rc_context(STYLE):
        evals = summary["evals"]
        figure = Figure(figsize=(7.2, 3.8 * len(evals)), layout="constrained")
        for axes, eval_name in zip(figure.subplots(len(evals), squeeze=False).flat, evals, strict=True):
            _panel(axes, summary, eval_name)
        svg, png = as_file(figure, "sweep"), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return svg, png.getvalue()


def axis_kind(summary: dict[str, Any]) -> str:
    """`category` for names, `log` for numbers of labels and other positive numbers far apart, else `linear`.

    Example: learning rates 1e-4 and 1e-3 are on a `log` axis, λ of 0 and 1 on a `linear` one.
    """
    values = summary["values"]
    if any(isinstance(value, (str, bool)) for value in values):
        return "category"
    if min(values) <= 0:
        return "linear"
    return "log" if summary["vary"] == "labels" or max(values) / min(values) >= LOG_FROM else "linear"


def style_of(arm: str, arms: list[str]) -> int:
    """Example: `style_of("mixed", ["direct_grpo", "mixed"])` is 3."""
    return STYLES[arm] if arm in STYLES else 3 + [one for one in arms if one not in STYLES].index(arm)


def scored(summary: dict[str, Any], arm: str, eval_name: str) -> list[tuple[int, dict[str, Any]]]:
    """(index of the value, accuracy) of an arm at the values where it has a result."""
    found = [accuracy(point, arm, eval_name) for point in summary["points"]]
    return [(place, one) for place, one in enumerate(found) if one is not None]


def _panel(axes: Axes, summary: dict[str, Any], eval_name: str) -> None:
    kind, values, texts = axis_kind(summary), summary["values"], [printable(text) for text in names(summary["values"])]
    xs = list(range(len(values))) if kind == "category" else [math.log(v) if kind == "log" else v for v in values]
    left, right = spanning(xs, 0.15 if kind == "category" else 0.08)
    axes.set_xlim(left, right)
    axes.set_xticks(xs, texts)
    if sum(map(len, texts)) > 60:
        axes.tick_params(axis="x", labelsize=7, labelrotation=12)
    axes.grid(visible=False, axis="x")
    ends: list[tuple[float, Any, str]] = []  # last mean, line, name
    for name in shown_arms(summary):
        points = scored(summary, name, eval_name)
        if not points:
            continue
        places, means = [xs[place] for place, _ in points], [100 * one["mean"] for _, one in points]
        line: Any
        if name in BASE_MODELS:
            if max(means) - min(means) < 1e-9:  # the same model at every value: a level across the plot
                places, means = [left, right], means[:1] * 2
            dash = "--" if name == "base_student" else ":"
            (line,) = axes.plot(places, means, color=QUIET, linestyle=dash, linewidth=1.1)
        else:
            style = style_of(name, summary["arms"])
            # Arms are drawn slightly beside each other so that intervals at one value do not overlap.
            aside = 0.012 * (right - left) * (summary["arms"].index(name) - (len(summary["arms"]) - 1) / 2)
            below = [100 * (one["mean"] - one["low"]) for _, one in points]
            above = [100 * (one["high"] - one["mean"]) for _, one in points]
            dash = DASHES[style // len(COLOURS) % len(DASHES)]
            colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
            line = axes.errorbar(
                [place + aside for place in places], means, yerr=[below, above],
                color=colour, marker=marker, linestyle=dash, linewidth=1.6, markersize=5, elinewidth=1.1, capsize=2.5,
            )  # fmt: skip
        ends.append((means[-1], line, BASE_MODELS.get(name, name)))
    for x, point in zip(xs, summary["points"], strict=True):
        if point["failed"]:
            top = axes.get_xaxis_transform()
            axes.text(x, 1, "failed", transform=top, ha="center", va="top", rotation=90, size=8, color=TEXT)
    ends.sort(key=lambda end: -end[0])  # the legend has the order of the lines' last points, and their values
    labels = [f"{printable(name)} {last:.1f}" for last, _, name in ends]
    axes.legend([line for _, line, _ in ends], labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    title = f"{summary['recipe']}: accuracy on {eval_name}, %, with 95 % interval; {seeds_text(summary)}"
    axes.set_title(printable(title), loc="left")
    axes.set_xlabel(f"{variation(summary['vary']).axis}{', log scale' if kind == 'log' else ''}")


def description(summary: dict[str, Any]) -> str:
    """Text alternative of the plot: every mean."""
    values, parts = names(summary["values"]), []
    for eval_name in summary["evals"]:
        for arm in shown_arms(summary):
            points = scored(summary, arm, eval_name)
            means = ", ".join(f"{values[place]}: {100 * one['mean']:.1f}" for place, one in points)
            parts.append(f"{arm} on {eval_name} by {summary['vary']} {means}")
    return f"Accuracy in per cent. {'; '.join(parts)}"
