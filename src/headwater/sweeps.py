"""Running a sweep: every point checked before the first starts, then one study after another, shared nodes once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.doctor.checks import check_plan
from headwater.errors import HeadwaterError, UserError
from headwater.report import sweep_build
from headwater.runs.estimate import Estimate, estimates
from headwater.runs.node_context import ProgressDisplay
from headwater.runs.setup import prepared
from headwater.runs.sweep import Point, Sweep, text_of
from headwater.storage.sweep_dir import SweepDir
from headwater.storage.untrusted import refuse_links


@dataclass(frozen=True)
class Layout:
    """A point whose data were read and whose plan was checked: its nodes, and what each would cost at most."""

    point: Point
    nodes: tuple[Estimate, ...]


def survey(sweep: Sweep, say: Callable[[str], None]) -> tuple[Sweep, list[Layout]]:
    """Read the data and lay out the nodes of every point; nothing is written.

    Returns the sweep and its layouts. A value that nobody named and that the data do not allow, such as a budget beyond
    the labelled problems, is left out, and said so. Raises UserError naming the value.
    """
    found: list[Layout] = []
    refused: list[UserError] = []
    for point in sweep.points:
        try:
            found.append(_layout(sweep, point))
        except UserError as error:
            refused.append(UserError(f"--vary {sweep.vary}, value {text_of(point.value)}: {error}"))
    if refused and (not sweep.derived or not found):
        raise refused[0]
    for one in refused:
        say(f"left out: {one}")
    return replace(sweep, points=tuple(one.point for one in found)), found


def _layout(sweep: Sweep, point: Point) -> Layout:
    with prepared(point.recipe, sweep.arms, sweep.seeds) as (plan, inputs):
        check_plan(plan, inputs)
        return Layout(point, tuple(estimates(plan, inputs)))


def fresh(layouts: Sequence[Layout]) -> list[tuple[Estimate, ...]]:
    """For every point the nodes that no point before it has: what it runs itself, when nothing is there yet.

    A node's name says its content, so two of one name are the same work.
    """
    seen: set[str] = set()
    found = []
    for layout in layouts:
        found.append(tuple(node for node in layout.nodes if node.name not in seen))
        seen |= {node.name for node in layout.nodes}
    return found


def dry_run(sweep: Sweep, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What every point would run at most, nodes that a point before it has left out.

    Example: `[{"value": 64, "nodes": 9, "shared": 0, "steps": 240, "tokens_sampled_at_most": 96000, …}, …]`.
    """
    sweep, layouts = survey(sweep, say)
    rows = []
    for layout, own in zip(layouts, fresh(layouts), strict=True):
        rows.append(
            {
                "value": layout.point.value,
                "nodes": len(own),
                "shared": len(layout.nodes) - len(own),
                "labels": max((node.labels for node in layout.nodes), default=0),
                "steps": sum(node.steps for node in own),
                "tokens_sampled_at_most": sum(node.tokens_sampled for node in own),
                "tokens_teacher_scored_at_most": sum(node.tokens_teacher_scored for node in own),
                "flops_at_most": sum(node.flops for node in own),
                "memory_bytes": max((node.bytes for node in layout.nodes), default=0.0),
            }
        )
    return rows


def run(
    sweep: Sweep, out: Path, progress_display: ProgressDisplay, reuse: Sequence[Path] = ()
) -> tuple[dict[str, Any], dict[str, HeadwaterError]]:
    """Run every point into its folder below `out`, and write the sweep's own files there after each.

    reuse  other run directories, whose finished nodes are taken over where they are the same work

    Run again with the same folder, and only what is missing runs. Returns the values of sweep.json, and for each point
    that failed, by the name of its folder, why; the others have run all the same. Raises UserError before anything is
    written where a point could not be run, KeyboardInterrupt when asked to stop (resumable).
    """
    folder = SweepDir(out)
    sweep, layouts = survey(sweep, progress_display.say)
    refuse_links(out, "--out")
    for point in sweep.points:
        folder.point(point.name).refuse_other(point.recipe.model_dump(mode="json"))
    found: dict[str, Any] = {}
    failed: dict[str, HeadwaterError] = {}
    said: dict[str, str] = {}
    for place, (point, own) in enumerate(zip(sweep.points, fresh(layouts), strict=True), 1):
        where = folder.point(point.name).path
        others = [folder.point(one.name) for one in sweep.points if one is not point]
        told = f"{sweep.vary} = {text_of(point.value)} (point {place} of {len(sweep.points)})"
        progress_display.say(f"{told}: {len(own)} nodes of its own, in {where}")
        try:
            pipeline.run(
                point.recipe,
                sweep.arms,
                sweep.seeds,
                where,
                progress_display,
                reuse=[*reuse, *(one.path for one in others if one.plan.exists())],
            )
        except HeadwaterError as error:
            failed[point.name] = error
            said[point.name] = " ".join(str(error).split())  # one line in a table, however many nodes failed
            progress_display.say(f"{told}: failed: {error}")
        found = sweep_build.write(sweep, out, said)
    return found, failed
