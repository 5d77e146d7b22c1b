"""The one plot of a sweep: accuracy with its 95 % interval against the value, a line an arm, a panel an evaluation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from headwater.report.svg import COLOURS, DASHES, MARKERS, STYLE, TEXT, as_file, spanning, spread
from headwater.report.svg import QUIET as BASE
from headwater.report.sweep_text import BASES, names, shown_arms
from headwater.runs.sweep import variation

WIDTH, HEIGHT, LEFT, RIGHT = 7.2, 3.8, 0.5, 1.75
"""Inches: a panel, and the room beside its axes for numbers and for the lines' names."""
LOG_FROM = 8.0
"""Positive numbers that span this factor stand on a logarithmic axis."""


def draw(found: dict[str, Any]) -> tuple[str, bytes]:
    """The plot as an SVG file, whose text stays text, and as a PNG. The same values give the same SVG."""
    with matplotlib.rc_context(STYLE):
        evals = found["evals"]
        figure = Figure(figsize=(WIDTH, HEIGHT * len(evals)))
        for place, eval_name in enumerate(evals):
            low = (len(evals) - 1 - place) / len(evals)
            room = 1 / (HEIGHT * len(evals))
            box = (LEFT / WIDTH, low + 0.55 * room, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - 0.93) * room)
            _panel(figure.add_axes(box), found, eval_name)
        svg, png = as_file(figure, "sweep"), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return svg, png.getvalue()


def axis_kind(found: dict[str, Any]) -> str:
    """`category` for names, `log2` for labels, `log` for positive numbers far apart, else `linear`.

    Example: learning rates 1e-4 and 1e-3 stand on a `log` axis, λ of 0 and 1 on a `linear` one.
    """
    values = found["values"]
    if any(isinstance(value, (str, bool)) for value in values):
        return "category"
    if min(values) <= 0:
        return "linear"
    if found["vary"] == "labels":
        return "log2"
    return "log" if max(values) / min(values) >= LOG_FROM else "linear"


def _panel(axes: Axes, found: dict[str, Any], eval_name: str) -> None:
    kind = axis_kind(found)
    places = list(range(len(found["values"]))) if kind == "category" else list(found["values"])
    if kind in ("log2", "log"):
        axes.set_xscale("log", base=2 if kind == "log2" else 10)
    texts = names(found["values"])
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places, texts)
    if sum(map(len, texts)) > 60:
        axes.tick_params(axis="x", labelsize=7, labelrotation=12)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(*_room(places, kind))
    reach = [one[key] for arm in shown_arms(found) for _, one in _scored(found, arm, eval_name, places) for key in ENDS]
    axes.set_ylim(*spanning([100 * value for value in reach]))
    ends = [_levels(axes, found, base, eval_name, places) for base in BASES]
    ends += [_arm(axes, found, arm, eval_name, places) for arm in found["arms"]]
    for place, point in zip(places, found["points"], strict=True):
        if point["failed"]:
            axes.annotate(
                "failed",
                (place, 1),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                rotation=90,
                size=8,
                color=TEXT,
            )
    _name_lines(axes, [end for end in ends if end is not None])
    seeds = f"{len(found['seeds'])} seed{'s' * (len(found['seeds']) != 1)}"
    axes.set_title(f"{found['recipe']}: accuracy on {eval_name}, %, with 95 % interval; {seeds}", loc="left")
    scale = ", log scale" if kind in ("log2", "log") else ""
    axes.set_xlabel(f"{variation(found['vary']).axis}{scale}", labelpad=4)


def _room(places: Sequence[float], kind: str) -> tuple[float, float]:
    """The ends of the horizontal axis: the values, and a little room for what stands beside the outermost."""
    low, high = min(places), max(places)
    if kind == "category":
        return low - 0.4, high + 0.4
    if kind == "linear":
        return spanning(places, 0.08)
    factor = (high / low) ** 0.08 if high > low else 2.0
    return low / factor, high * factor


ENDS = ("low", "mean", "high")
End = tuple[str, float, float, str]
"""A line's name, its last point, its colour."""


def _scored(found: dict[str, Any], arm: str, eval_name: str, places: Sequence[float]) -> list[tuple[float, Any]]:
    held = [point["arms"].get(arm, {}).get("accuracy", {}).get(eval_name) for point in found["points"]]
    return [(place, one) for place, one in zip(places, held, strict=True) if one is not None]


STYLES = {"direct_grpo": 0, "bridge": 1, "raw_teacher": 2}
"""The arms that most sweeps compare look the same in all of them; others take what follows, in their order."""


def style_of(arm: str, arms: Sequence[str]) -> int:
    """Example: `style_of("mixed", ["direct_grpo", "mixed"])` is 3."""
    return STYLES[arm] if arm in STYLES else 3 + [one for one in arms if one not in STYLES].index(arm)


def _arm(axes: Axes, found: dict[str, Any], arm: str, eval_name: str, places: Sequence[float]) -> End | None:
    held = _scored(found, arm, eval_name, places)
    if not held:
        return None
    style = style_of(arm, found["arms"])
    colour = COLOURS[style % len(COLOURS)]
    # Intervals at one value would cover each other: every arm stands a few points beside the value.
    aside = 4.5 * (found["arms"].index(arm) - (len(found["arms"]) - 1) / 2)
    assert axes.figure is not None
    shifted = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    means = [100 * one["mean"] for _, one in held]
    axes.errorbar(
        [place for place, _ in held],
        means,
        yerr=[
            [mean - 100 * one["low"] for mean, (_, one) in zip(means, held, strict=True)],
            [100 * one["high"] - mean for mean, (_, one) in zip(means, held, strict=True)],
        ],
        color=colour,
        marker=MARKERS[style % len(MARKERS)],
        linestyle=DASHES[style // len(COLOURS) % len(DASHES)],
        linewidth=1.6,
        markersize=5,
        elinewidth=1.1,
        capsize=2.5,
        transform=shifted,
    )
    return arm, held[-1][0], means[-1], colour


def _levels(axes: Axes, found: dict[str, Any], base: str, eval_name: str, places: Sequence[float]) -> End | None:
    """A base model: a level across the plot, or points on a dashed line where it is another at every value."""
    held = _scored(found, base, eval_name, places)
    if not held:
        return None
    means = [100 * one["mean"] for _, one in held]
    dash = "--" if base == "base_student" else ":"
    said = "student before" if base == "base_student" else "teacher before"
    if max(means) - min(means) < 1e-9:
        axes.axhline(means[0], color=BASE, linewidth=1.1, linestyle=dash)
        return said, axes.get_xlim()[1], means[0], BASE
    axes.plot([place for place, _ in held], means, color=BASE, linewidth=1.1, linestyle=dash, marker=".")
    return said, held[-1][0], means[-1], BASE


def _name_lines(axes: Axes, ends: Sequence[End]) -> None:
    """Names and last values at the right, apart from each other, each led to by a thin line of its own colour."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.062
    heights = spread([y for _, _, y, _ in ends], gap, low - 3 * gap, high + 3 * gap)
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        within = x < axes.get_xlim()[1]
        if within or abs(height - y) > 1e-9:
            axes.annotate(
                "", xy=(x, y), xytext=(1.02, height), textcoords=axes.get_yaxis_transform(), annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 7 if within else 0
                },
            )  # fmt: skip
        axes.text(
            1.03, height, f"{name} {y:.1f}", transform=axes.get_yaxis_transform(), va="center", color=TEXT, size=8.5
        )


def described(found: dict[str, Any]) -> str:
    """What the plot shows, for those who cannot see it."""
    parts, values = [], names(found["values"])
    for eval_name in found["evals"]:
        for arm in shown_arms(found):
            held = _scored(found, arm, eval_name, range(len(values)))
            told = ", ".join(f"{values[int(place)]}: {100 * one['mean']:.1f}" for place, one in held)
            parts.append(f"{arm} on {eval_name} by {found['vary']} {told}")
    return f"Accuracy in per cent. {'; '.join(parts)}"
