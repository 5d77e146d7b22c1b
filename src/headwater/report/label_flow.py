"""The figure of where labels went: bands from pool to stage to arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from headwater.report.figures import Drawn, colour, finish
from headwater.report.svg import QUIET, STYLE, TEXT, printable, spread


@dataclass(frozen=True, slots=True)
class Flow:
    """A stage that looked at labels: from which pool, how many, and the arms that rest on it."""

    pool: str
    stage: str
    labels: float
    arms: tuple[str, ...]


def flow(name: str, title: str, flows: Sequence[Flow], arms: Sequence[str]) -> Drawn:
    """Labels from pool to stage to arm: the wider a band, the more labels; arms without a band spent none."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(arms), len(flows))
        height = 0.3 * rows + 0.75
        figure = Figure(figsize=(7.4, height))
        axes = figure.add_axes((0.01, 0.02, 0.98, 1 - 0.62 / height))
        axes.set_axis_off()
        axes.set_xlim(0, 10)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_title(printable(title), loc="left", y=1.0, pad=16)
        pools = list(dict.fromkeys(one.pool for one in flows))
        at_arm = {arm: (place + 0.5) * rows / len(arms) - 0.5 for place, arm in enumerate(arms)}
        middle = [sum(at_arm[arm] for arm in one.arms) / max(1, len(one.arms)) for one in flows]
        at_stage = spread(middle, 1.1, 0, rows - 1)
        at_pool = _at_pools(pools, flows, at_stage, rows)
        widest = max(one.labels for one in flows) or 1.0
        for one, y in zip(flows, at_stage, strict=True):
            shade, width = colour(pools.index(one.pool)), max(1.0, 13.0 * one.labels / widest)
            _band(axes, (1.9, at_pool[one.pool]), (3.7, y), shade, width)
            for arm in one.arms:
                _band(axes, (6.55, y), (8.0, at_arm[arm]), shade, max(0.8, width / 2.6))
            axes.text(3.8, y, printable(f"{one.stage}: {_count(one.labels)} labels"), va="center")
        spent = {arm: sum(one.labels for one in flows if arm in one.arms) for arm in arms}
        for pool, y in at_pool.items():
            axes.text(1.8, y, printable(pool), va="center", ha="right")
        for arm, y in at_arm.items():
            axes.text(
                8.1,
                y,
                printable(f"{arm}" if spent[arm] else f"{arm}: none"),
                va="center",
                color=TEXT if spent[arm] else QUIET,
            )
        for x, head, side in ((1.8, "pool", "right"), (3.8, "stage", "left"), (8.1, "arm", "left")):
            axes.text(x, 1.0, head, transform=axes.get_xaxis_transform(), va="bottom", ha=side, color=QUIET, size=8)
        table: list[tuple[Any, ...]] = [("pool", "stage", "labels", "arm")]
        table += [(one.pool, one.stage, one.labels, arm) for one in flows for arm in one.arms]
        said = [f"{one.pool} to {one.stage}, {_count(one.labels)} labels, to {', '.join(one.arms)}" for one in flows]
        idle = [arm for arm in arms if not spent[arm]]
        said += [f"no labels in {', '.join(idle)}"] if idle else []
        return finish(figure, name, f"{title}: {'; '.join(said)}", table)


def _at_pools(pools: list[str], flows: Sequence[Flow], at_stage: Sequence[float], rows: int) -> dict[str, float]:
    held = [[y for one, y in zip(flows, at_stage, strict=True) if one.pool == pool] for pool in pools]
    return dict(zip(pools, spread([sum(ys) / len(ys) for ys in held], 1.2, 0, rows - 1), strict=True))


def _band(axes: Axes, start: tuple[float, float], end: tuple[float, float], shade: str, width: float) -> None:
    half = (start[0] + end[0]) / 2
    way = Path([start, (half, start[1]), (half, end[1]), end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(PathPatch(way, facecolor="none", edgecolor=shade, linewidth=width, alpha=0.5, capstyle="butt"))


def _count(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"
