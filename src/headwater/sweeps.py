"""Run a sweep: check every point, run one study per point with shared nodes run once, then plot and tabulate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.doctor.checks import preflight
from headwater.errors import HeadwaterError, UserError
from headwater.report import sweep_page
from headwater.runs.display import ProgressDisplay
from headwater.runs.estimate import estimates
from headwater.runs.node_estimate import Estimate
from headwater.runs.setup import prepared
from headwater.runs.sweep import Point, Sweep, text_of
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import refuse_links


@dataclass(frozen=True)
class PlannedPoint:
    """A checked point with cost estimates of its nodes; `new` are those that no point before it has."""

    point: Point
    nodes: tuple[Estimate, ...]
    new: tuple[Estimate, ...]


def plan_points(sweep: Sweep, say: Callable[[str], None]) -> list[PlannedPoint]:
    """Read the data and plan the nodes of every point; nothing is written.

    A default value that the data do not allow, such as a budget beyond the labelled problems, is left out with a message.
    Raises UserError naming any other value that the data do not allow.
    """
    planned: list[PlannedPoint] = []
    errors: list[UserError] = []
    seen: set[str] = set()  # a node's name is a hash of its content, so equal names are the same work
    for point in sweep.points:
        try:
            with prepared(point.recipe, sweep.arms, sweep.seeds, date.today()) as (plan, inputs):
                preflight(plan, inputs)
                nodes = tuple(estimates(plan, inputs))
        except UserError as error:
            errors.append(UserError(f"--vary {sweep.vary}, value {text_of(point.value)}: {error}"))
            continue
        planned.append(PlannedPoint(point, nodes, tuple(node for node in nodes if node.name not in seen)))
        seen |= {node.name for node in nodes}
    if errors and (not sweep.derived or not planned):
        raise errors[0]
    for refused in errors:
        say(f"left out: {refused}")
    return planned


def dry_run(sweep: Sweep, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Upper bounds of what every point would run, without the nodes that it shares with a point before it.

    Example: `[{"value": 64, "nodes": 9, "shared": 0, "steps": 240, "tokens_sampled_at_most": 96000, …}, …]`.
    """
    return [
        {
            "value": planned.point.value,
            "nodes": len(planned.new),
            "shared": len(planned.nodes) - len(planned.new),
            "labels": max((node.labels for node in planned.nodes), default=0),
            "steps": sum(node.steps for node in planned.new),
            "tokens_sampled_at_most": sum(node.tokens_sampled for node in planned.new),
            "tokens_teacher_scored_at_most": sum(node.tokens_teacher_scored for node in planned.new),
            "flops_at_most": sum(node.flops for node in planned.new),
            "memory_bytes": max((node.bytes for node in planned.nodes), default=0.0),
        }
        for planned in plan_points(sweep, say)
    ]


def run(
    sweep: Sweep, out: Path, progress_display: ProgressDisplay, reuse: Sequence[Path] = ()
) -> tuple[dict[str, Any], dict[str, HeadwaterError]]:
    """Run every point into `out/NAME` and rewrite the sweep's own files in `out` after each; resumable.

    reuse  other run directories whose finished nodes are copied where their fingerprints match

    Returns the contents of sweep.json and the error of each failed point by the name of its folder; a failure does not stop
    the other points. Raises UserError before anything is written where a point cannot run, KeyboardInterrupt when asked to
    stop.
    """
    say = progress_display.say
    planned_points = plan_points(sweep, say)
    sweep = replace(sweep, points=tuple(planned.point for planned in planned_points))
    refuse_links(out, "--out")
    folders = {point.name: RunDir(out / point.name) for point in sweep.points}
    for point in sweep.points:
        folders[point.name].refuse_other(point.recipe.model_dump(mode="json"))
    summary: dict[str, Any] = {}
    errors: dict[str, HeadwaterError] = {}
    for number, planned in enumerate(planned_points, 1):
        point, folder = planned.point, folders[planned.point.name]
        title = f"{sweep.vary} = {text_of(point.value)} (point {number} of {len(sweep.points)})"
        say(f"{title}: {len(planned.new)} nodes of its own, in {folder.path}")
        finished = [other.path for other in folders.values() if other is not folder and other.plan.exists()]
        try:
            pipeline.run(
                point.recipe, sweep.arms, sweep.seeds, folder.path, progress_display, reuse=[*reuse, *finished]
            )
        except HeadwaterError as error:
            errors[point.name] = error
            say(f"{title}: failed: {error}")
        # One line per point in tables, however many nodes failed.
        summary = sweep_page.write(sweep, out, {name: " ".join(str(error).split()) for name, error in errors.items()})
    return summary, errors
