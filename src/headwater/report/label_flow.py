"""The figure of label use: bands from pool to stage to arm, as wide as the number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from headwater.report.figures import Plot, as_plot, colour
from headwater.report.format import count
from headwater.report.svg import QUIET, STYLE, TEXT, printable

POOL_X, STAGE_X, ARM_X = (2.0, 2.1), (2.9, 3.0, 6.6), (7.4, 7.5)
"""Horizontal positions: text and band start of pools; band end, text and band start of stages; band end and text of arms."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A stage that used labels: the pool, how many labels, and the arms that depend on the stage."""

    pool: str
    stage: str
    labels: float
    arms: tuple[str, ...]


def label_flow(name: str, title: str, flows: Sequence[Flow], arms: Sequence[str]) -> Plot:
    """Draw the labels from pool to stage to arm. Arms without a band used none."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(arms), len(flows))
        height = 0.3 * rows + 0.75
        figure = Figure(figsize=(5.2, height))
        axes = figure.add_axes((0.01, 0.02, 0.98, 1 - 0.62 / height))
        axes.set_axis_off()
        axes.set_xlim(0, 10)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_title(printable(title), loc="left", y=1.0, pad=16)
        pools = list(dict.fromkeys(flow.pool for flow in flows))
        arm_y = dict(zip(arms, evenly_spaced(range(len(arms)), rows), strict=True))
        stage_y = evenly_spaced([fmean(arm_y[arm] for arm in flow.arms) for flow in flows], rows)
        by_pool = [[y for flow, y in zip(flows, stage_y, strict=True) if flow.pool == pool] for pool in pools]
        pool_y = dict(zip(pools, evenly_spaced([fmean(ys) for ys in by_pool], rows), strict=True))
        widest = max(flow.labels for flow in flows) or 1.0
        for flow, y in zip(flows, stage_y, strict=True):
            shade, width = colour(pools.index(flow.pool)), max(1.0, 13.0 * flow.labels / widest)
            _band(axes, (POOL_X[1], pool_y[flow.pool]), (STAGE_X[0], y), shade, width)
            for arm in flow.arms:
                _band(axes, (STAGE_X[2], y), (ARM_X[0], arm_y[arm]), shade, max(0.8, width / 2.6))
            axes.text(STAGE_X[1], y, printable(f"{flow.stage}: {count(flow.labels)} labels"), va="center")
        for pool, y in pool_y.items():
            axes.text(POOL_X[0], y, printable(pool), va="center", ha="right")
        unused = [arm for arm in arms if not sum(flow.labels for flow in flows if arm in flow.arms)]
        for arm, y in arm_y.items():
            text, shade = (f"{arm}: none", QUIET) if arm in unused else (arm, TEXT)
            axes.text(ARM_X[1], y, printable(text), va="center", color=shade)
        for x, head, side in ((POOL_X[0], "pool", "right"), (STAGE_X[1], "stage", "left"), (ARM_X[1], "arm", "left")):
            axes.text(x, 1.0, head, transform=axes.get_xaxis_transform(), va="bottom", ha=side, color=QUIET, size=8)
        table: list[tuple[Any, ...]] = [("pool", "stage", "labels", "arm")]
        table += [(flow.pool, flow.stage, flow.labels, arm) for flow in flows for arm in flow.arms]
        texts = [
            f"{flow.pool} to {flow.stage}, {count(flow.labels)} labels, to {', '.join(flow.arms)}" for flow in flows
        ]
        texts += [f"no labels in {', '.join(unused)}"] if unused else []
        return as_plot(figure, name, f"{title}: {'; '.join(texts)}", table)


def evenly_spaced(wanted: Sequence[float], rows: int) -> list[float]:
    """Positions on an axis of `rows` rows at equal distances, in the order of the wanted ones.

    Example: `evenly_spaced([7, 0], 4)` is `[2.5, 0.5]`.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    return [(order.index(index) + 0.5) * rows / len(wanted) - 0.5 for index in range(len(wanted))]


def _band(axes: Axes, start: tuple[float, float], end: tuple[float, float], shade: str, width: float) -> None:
    half = (start[0] + end[0]) / 2
    curve = Path([start, (half, start[1]), (half, end[1]), end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=shade, linewidth=width, alpha=0.5, capstyle="butt"))
