"""`--dry-run`: what would run and what it would cost, as a table or as JSON. Nothing is loaded, fetched or written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from headwater.cli.options import Sized
from headwater.config.recipe import Recipe
from headwater.doctor.checks import check_plan
from headwater.report.format import console, units
from headwater.runs.estimate import Asked, Estimate, estimates
from headwater.runs.hardware import BANDWIDTH_SHARE, DEVICES, UTILISATION
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import make_plan


def dry_run(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], asked: Sized, as_json: bool) -> None:
    """Print an estimate for every node. Raises UserError."""
    with RunInputs.for_estimate(recipe) as inputs:
        plan = make_plan(recipe, arms, seeds, inputs.content())
        if not inputs.missing:
            check_plan(plan, inputs)
    found = estimates(plan, inputs, Asked(asked.mean_tokens, asked.count))
    if as_json:
        print(json.dumps([row(one, asked) for one in found]))
        return
    console().print(table(found, asked))
    for said in inputs.missing:
        print(said)
    print("\n".join(notes(found, asked)))


def row(one: Estimate, asked: Sized) -> dict[str, Any]:
    """An estimate as JSON has it; hours where a device is named."""
    if asked.device is None:
        return one.row()
    seconds = one.seconds(DEVICES[asked.device], asked.count)
    return {**one.row(), "hours": seconds / 3600, "gpu_hours": asked.count * seconds / 3600}


def table(found: Sequence[Estimate], asked: Sized) -> Table:
    at_most = "" if asked.mean_tokens is not None else " ≤"
    names = (
        Column("node", no_wrap=True),
        "labels",
        "steps",
        f"tokens{at_most}",
        f"scored{at_most}",
        f"FLOPs{at_most}",
        "weights",
        "peak",
    )
    more = ["GPU-hours"] if asked.device is not None else []
    made = Table(*names, *more, title="what would run", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for one in found:
        cells = [
            one.name.rsplit(".", 1)[0], str(one.labels), str(one.steps), units(one.tokens_sampled), units(one.tokens_teacher_scored),
            units(one.flops), units(one.bytes, "B"), units(one.peak, "B"),
        ]  # fmt: skip
        if asked.device is not None:
            cells.append(hours(asked.count * one.seconds(DEVICES[asked.device], asked.count)))
        made.add_row(*cells)
    return made


def notes(found: Sequence[Estimate], asked: Sized) -> list[str]:
    """What the columns mean, and the sum."""
    said = [
        "labels: distinct problems a node may look at; tokens: sampled; scored: by the teacher; "
        "weights: their memory with gradients and optimizer state, on all devices "
        "together; peak: on each device, with activations and caches"
    ]
    length = "at their longest" if asked.mean_tokens is None else f"{asked.mean_tokens:g} tokens on average"
    total = sum(one.flops for one in found)
    said.append(f"in all {units(total, 'FLOPs')}, with completions {length}")
    if asked.device is None:
        return said
    device = DEVICES[asked.device]
    spent = sum(one.seconds(device, asked.count) for one in found)
    largest = max(one.peak for one in found)
    fits = "which fits" if largest <= device.memory else "which does not fit"
    said += [
        f"on {asked.count} × {asked.device}: {hours(asked.count * spent)} GPU-hours, {hours(spent)} hours one node after the "
        f"other; {units(largest, 'B')} at most on one device of {units(device.memory, 'B')}, {fits}",
        f"taken: {UTILISATION:.0%} of {units(device.flops, 'FLOP')}/s in bfloat16 and, while decoding, {BANDWIDTH_SHARE:.0%} of "
        f"{units(device.bandwidth, 'B')}/s ({device.source}); the work divided evenly",
    ]
    return said


def hours(seconds: float) -> str:
    """Example: `hours(5400)` is `"1.5"`."""
    found = seconds / 3600
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"
