"""The page's section about time: seconds by part of the work, and which worker ran which node when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from headwater.report.figures import Plot, as_plot, colour, titled_figure
from headwater.report.format import duration
from headwater.report.stages import STAGE_NAMES, UNTRAINED_NAMES, stage_name
from headwater.report.study import Node, Study, finite_values
from headwater.report.svg import COLOURS, STYLE, printable
from headwater.report.view import Section
from headwater.storage import ledger

TRAINING_PARTS = ("sample", "score", "update", "other training")
"""Parts of the training time, which the headline and the table of arms give; `score` is grading and the teacher's passes."""
PARTS = (*TRAINING_PARTS, "evaluate", "measure", "load and save")
"""What a node's time is spent on; `measure` is measuring the conditions, `load and save` the rest of its recorded attempts."""
LEGEND_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Attempt:
    """One uninterrupted attempt at a node by one worker, in seconds since the first attempt of the study."""

    node: Node
    worker: str
    start: float
    end: float


def time(study: Study) -> Section | None:
    """Where the time of all nodes went, and a timeline of the attempts that the run recorded."""
    nodes = list(study.nodes.values())
    by_stage = seconds_by_stage(nodes)
    plots = [parts_figure(by_stage)] if by_stage else []
    recorded = attempts(nodes)
    plots += [timeline(recorded)] if recorded else []
    return Section("Time", "time", {"plots": plots, "timeline": bool(recorded)}, tuple(plots)) if plots else None


def seconds_by_stage(nodes: Iterable[Node]) -> dict[str, dict[str, float]]:
    """Seconds of each of PARTS over all nodes of a stage, in the order of the stages; stages without time are left out."""
    totals: dict[str, dict[str, float]] = {}
    for node in nodes:
        total = totals.setdefault(node.stage, dict.fromkeys(PARTS, 0.0))
        for part, seconds in node_seconds(node).items():
            total[part] += seconds
    order = [*UNTRAINED_NAMES, *STAGE_NAMES]
    stages = sorted(totals, key=lambda stage: order.index(stage) if stage in order else len(order))
    return {stage: totals[stage] for stage in stages if sum(totals[stage].values()) > 0.0}


def node_seconds(node: Node) -> dict[str, float]:
    """Seconds of each of PARTS: of steps from metrics.jsonl, of the rest of training, evaluating and measuring from the ledger."""
    spent = {name: ledger.totals(node.ledger_rows, name).seconds for name in ("train", "eval", "validation", "measure")}
    seconds = dict.fromkeys(PARTS, 0.0)
    for part in ("sample", "score", "update"):
        seconds[part] = sum(finite_values(node.metrics, f"seconds_{part}"), start=0.0)
    if node.info.get("kind") == "rollouts":  # a teacher's cache is sampled
        seconds["sample"] += spent["train"]
    else:
        seconds["other training"] = max(0.0, spent["train"] - sum(seconds.values()))
    seconds |= {"evaluate": spent["eval"] + spent["validation"], "measure": spent["measure"]}
    attempted = sum(row["ended"] - row["started"] for row in node.attempts)
    return {**seconds, "load and save": max(0.0, attempted - sum(seconds.values()))}


def attempts(nodes: Sequence[Node]) -> list[Attempt]:
    """All recorded attempts in the order of their starts. Runs of an earlier version recorded none."""
    rows = [(node, row) for node in nodes for row in node.attempts]
    if not rows:
        return []
    first = min(row["started"] for _, row in rows)
    made = [Attempt(node, str(row["worker"]), row["started"] - first, row["ended"] - first) for node, row in rows]
    return sorted(made, key=lambda attempt: (attempt.start, attempt.node.name))


# Figures --------------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def parts_figure(by_stage: Mapping[str, Mapping[str, float]]) -> Plot:
    """Stacked horizontal bars, one per stage."""
    used = [part for part in PARTS if any(parts[part] for parts in by_stage.values())]
    figure, axes = _bars(len(by_stage), "Seconds by part of the work, all nodes", len(used))
    scale, unit = _time_unit(max(sum(parts.values()) for parts in by_stage.values()))
    for y, parts in enumerate(by_stage.values()):
        left = 0.0
        for place, seconds in enumerate(parts.values()):
            axes.barh(y, seconds / scale, left=left / scale, height=0.62, **_look(place))
            left += seconds
        place_right: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(duration(left), (left / scale, y), fontsize=8, **place_right)
    axes.set_yticks(range(len(by_stage)), [stage_name(stage) for stage in by_stage])
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    _legend(figure, {part: PARTS.index(part) for part in used})
    text = "; ".join(
        f"{stage_name(stage)} {', '.join(f'{part} {duration(s)}' for part, s in parts.items() if s)}"
        for stage, parts in by_stage.items()
    )
    rows = [(stage, part, f"{s:.6g}") for stage, parts in by_stage.items() for part, s in parts.items() if s]
    return as_plot(figure, "seconds", f"Seconds by part of the work: {text}", [("stage", "part", "seconds"), *rows])


@matplotlib.rc_context(STYLE)
def timeline(recorded: Sequence[Attempt]) -> Plot:
    """One row per worker in the order of their first starts, with a bar per node in the colour of its stage."""
    workers = list(dict.fromkeys(attempt.worker for attempt in recorded))
    stages = list(dict.fromkeys(attempt.node.stage for attempt in recorded))
    figure, axes = _bars(len(workers), "Nodes over time, by worker", len(stages))
    scale, unit = _time_unit(max(attempt.end for attempt in recorded))
    for attempt in recorded:
        y, width = workers.index(attempt.worker), (attempt.end - attempt.start) / scale
        axes.barh(y, width, left=attempt.start / scale, height=0.62, **_look(stages.index(attempt.node.stage)))
    axes.set_yticks(range(len(workers)), [printable(worker) for worker in workers])
    axes.set_xlabel(f"{unit} since the first start")
    _legend(figure, {stage_name(stage): place for place, stage in enumerate(stages)})
    listed = [f"{a.node.name} from {duration(a.start)} to {duration(a.end)} on {a.worker}" for a in recorded[:40]]
    more = f"; and {len(recorded) - len(listed)} more" if len(recorded) > len(listed) else ""
    header = ("node", "worker", "start", "end")
    rows = [(a.node.name, a.worker, f"{a.start:.3f}", f"{a.end:.3f}") for a in recorded]
    return as_plot(figure, "timeline", f"Nodes over time, by worker: {'; '.join(listed)}{more}", [header, *rows])


def _bars(rows: int, title: str, legend_entries: int) -> tuple[Figure, Axes]:
    figure, axes = titled_figure(title, 0.26 * rows + 0.85 + 0.17 * math.ceil(legend_entries / LEGEND_COLUMNS))
    axes.set_ylim(rows - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _look(place: int) -> dict[str, Any]:
    """Colours and hatch of the entry at this place of a legend: with the seventh entry the colours begin again, hatched."""
    return {"facecolor": colour(place), "edgecolor": "#ffffff", "hatch": "//" if place >= len(COLOURS) else None}


def _time_unit(seconds: float) -> tuple[float, str]:
    """Seconds per unit, and the unit's name."""
    return (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 4 * 3600 else (3600.0, "hours")


def _legend(figure: Figure, names: Mapping[str, int]) -> None:
    handles = [Patch(label=printable(name), **_look(place)) for name, place in names.items()]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8, ncols=LEGEND_COLUMNS)
