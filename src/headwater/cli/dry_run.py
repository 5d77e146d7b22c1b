"""`--dry-run`: nodes and estimated costs as a table or JSON. Nothing is loaded, fetched or written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from headwater.cli.options import DryRunOptions
from headwater.config.recipe import Recipe
from headwater.doctor.checks import preflight
from headwater.models.shape import Shape
from headwater.report.format import console, units
from headwater.runs.estimate import Assumptions, Estimate, estimates, model_shapes
from headwater.runs.hardware import BANDWIDTH_SHARE, DEVICES, UTILISATION
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import make_plan


def print_dry_run(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], options: DryRunOptions, as_json: bool
) -> None:
    """Print an estimate for every node. Raises UserError."""
    with RunInputs.for_estimate(recipe) as inputs:
        plan = make_plan(recipe, arms, seeds, inputs.content())
        if not inputs.missing:
            preflight(plan, inputs)
    nodes = estimates(plan, inputs, Assumptions(options.mean_tokens, options.count))
    if as_json:
        print(json.dumps([json_row(estimate, options) for estimate in nodes]))
        return
    console().print(cost_table(nodes, options))
    for message in inputs.missing or ():
        print(message)
    for role, shape in model_shapes(inputs).items():
        if shape.experts_per_token:
            print(experts_note(f"models.{role}", shape))
    print("\n".join(notes(nodes, options)))


def json_row(estimate: Estimate, options: DryRunOptions) -> dict[str, Any]:
    """The estimate as JSON, with hours where a device is named."""
    if options.device is None:
        return estimate.row()
    seconds = estimate.seconds(DEVICES[options.device], options.count)
    return {**estimate.row(), "hours": seconds / 3600, "gpu_hours": options.count * seconds / 3600}


def cost_table(nodes: Sequence[Estimate], options: DryRunOptions) -> Table:
    at_most = "" if options.mean_tokens is not None else " ≤"
    columns = ["labels", "steps", f"tokens{at_most}", f"scored{at_most}", f"FLOPs{at_most}", "weights", "peak"]
    if options.device is not None:
        columns.append("GPU-hours")
    table = Table(Column("node", no_wrap=True), *columns, title="what would run", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for node in nodes:
        cells = [
            node.name.rsplit(".", 1)[0], str(node.labels), str(node.steps), units(node.tokens_sampled),
            units(node.tokens_teacher_scored), units(node.flops), units(node.bytes, "B"), units(node.peak, "B"),
        ]  # fmt: skip
        if options.device is not None:
            cells.append(hours(options.count * node.seconds(DEVICES[options.device], options.count)))
        table.add_row(*cells)
    return table


def experts_note(field: str, shape: Shape) -> str:
    """Example: "models.teacher: 30.5B parameters, of which a token uses 3.4B (8 experts of a layer)"."""
    if not shape.experts_known:
        return f"{field}: {units(shape.parameters)} parameters; how many experts a token uses is not known, so FLOPs count all of them"
    return (
        f"{field}: {units(shape.parameters)} parameters, of which a token uses {units(shape.active_parameters)} "
        f"({shape.experts_per_token:g} experts of a layer)"
    )


def notes(nodes: Sequence[Estimate], options: DryRunOptions) -> list[str]:
    """Explain the columns, and give the totals."""
    lines = [
        "labels: distinct problems whose answers a node may use; tokens: sampled; scored: by the teacher; "
        "weights: memory with gradients and optimizer state, summed over devices; peak: per device, with activations and caches"
    ]
    length = "at full length" if options.mean_tokens is None else f"of {options.mean_tokens:g} tokens on average"
    lines.append(f"in all {units(sum(node.flops for node in nodes), 'FLOPs')}, with completions {length}")
    measuring = [
        f"{node.name.rsplit('.', 1)[0]} {node.condition_share:.0%}" for node in nodes if node.condition_share > 0.01
    ]
    if measuring:
        lines.append(
            f"measuring condition C2 takes, of a stage's FLOPs, at most: {', '.join(measuring)} (conditions.problems: 0 turns it off)"
        )
    if options.device is None:
        return lines
    device = DEVICES[options.device]
    seconds = sum(node.seconds(device, options.count) for node in nodes)
    largest = max(node.peak for node in nodes)
    fits = "which fits" if largest <= device.memory else "which does not fit"
    lines += [
        f"on {options.count} × {options.device}: {hours(options.count * seconds)} GPU-hours, {hours(seconds)} hours if nodes run "
        f"one after the other; at most {units(largest, 'B')} on a device of {units(device.memory, 'B')}, {fits}",
        f"assumed: {UTILISATION:.0%} of {units(device.flops, 'FLOP')}/s in bfloat16 and, while decoding, {BANDWIDTH_SHARE:.0%} of "
        f"{units(device.bandwidth, 'B')}/s ({device.source}); the work divided evenly",
    ]
    return lines


def hours(seconds: float) -> str:
    """Example: `hours(5400)` is `"1.5"`."""
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
