"""`--dry-run`: nodes and estimated costs as a table or JSON. Nothing is loaded, fetched or written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from headwater.cli.options import DryRunOptions
from headwater.config.recipe import Recipe
from headwater.doctor.checks import preflight
from headwater.doctor.fit import device_here
from headwater.models.shape import Shape
from headwater.report.format import console, duration, units
from headwater.runs.estimate import Assumptions, estimates, model_shapes
from headwater.runs.hardware import BANDWIDTH_SHARE, DEVICES, UTILISATION, Device
from headwater.runs.inputs import RunInputs
from headwater.runs.node_estimate import Estimate, total_seconds
from headwater.runs.plan import make_plan
from headwater.runs.setup import set_up


def print_dry_run(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], options: DryRunOptions, as_json: bool
) -> None:
    """Print an estimate for every node. Raises UserError."""
    set_up(recipe.compute)  # the rates of this machine are measured with the recipe's threads
    with RunInputs.for_estimate(recipe) as inputs:
        plan = make_plan(recipe, arms, seeds, inputs.content())
        if not inputs.missing:
            preflight(plan, inputs)
    device = None if options.device is None else DEVICES[options.device]
    nodes = estimates(
        plan, inputs, Assumptions(options.mean_tokens, options.count, None if device is None else device.memory)
    )
    arms_of = plan.arms_by_node()
    if as_json:
        print(json.dumps([{**json_row(node, options), "arms": arms_of[node.name]} for node in nodes]))
        return
    if device is None and not inputs.missing:  # models that are not here will hardly train here
        device = device_here(inputs.device, getattr(torch, recipe.models.dtype))
    console().print(cost_table(nodes, options, device, arms_of if len(arms) > 1 else None))
    if options.device is not None:
        console().print(memory_table(nodes, f"memory of each of {options.count} × {options.device}"))
    for message in inputs.missing or ():
        print(message)
    for role, shape in model_shapes(inputs).items():
        if shape.experts_per_token:
            print(experts_note(f"models.{role}", shape))
    print("\n".join(notes(nodes, options, device)))
    if device is not None and (advice := memory_advice(nodes, recipe, device.memory, options)):
        print(advice)


def json_row(estimate: Estimate, options: DryRunOptions) -> dict[str, Any]:
    """The estimate as JSON, with hours where a device is named."""
    row = estimate.row()
    if options.device is None:
        return row
    device = DEVICES[options.device]
    seconds = estimate.seconds(device, options.count)
    times = {"hours": seconds / 3600, "gpu_hours": options.count * seconds / 3600}
    return {**row, **times, "scoring_share_of_hours": estimate.scoring_share(device)}


def cost_table(
    nodes: Sequence[Estimate],
    options: DryRunOptions,
    device: Device | None,
    arms_of: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """One row per node.

    device   the one that `options` names, else this machine's; None for no times
    arms_of  name of a node -> its arms, for a column; with it the columns are narrower, so that 100 characters hold them
    """
    bound = options.mean_tokens is None
    at_most = " ≤" if bound and arms_of is None else ""
    names = ["node", "labels", "steps", f"tokens{at_most}", f"scored{at_most}", f"FLOPs{at_most}", "weights", "peak"]
    if device is not None:
        names.append("time here" if options.device is None else "GPU-hours")
    columns, title = [Column(name, no_wrap=True) for name in names], "what would run"
    if arms_of is not None:
        columns.append(Column("arms", overflow="ellipsis"))
        title += "; tokens, scored and FLOPs are at most" if bound else ""
    table = Table(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1 if arms_of is None else 0, 0, 0))
    for node in nodes:
        cells = [
            name_of(node), str(node.labels), str(node.steps), units(node.tokens_sampled),
            units(node.tokens_teacher_scored), units(node.flops), units(node.bytes, "B"), units(node.peak, "B"),
        ]  # fmt: skip
        if device is not None:
            seconds = options.count * node.seconds(device, options.count)
            cells.append(duration(seconds) if options.device is None else hours(seconds))
        if arms_of is not None:
            cells.append(short_list(arms_of[node.name]))
        table.add_row(*cells)
    return table


def short_list(names: Sequence[str]) -> str:
    """Example: `exopd +3` for four arms."""
    return f"{names[0]} +{len(names) - 1}" if len(names) > 1 else "".join(names)


def shares(of_nodes: Sequence[tuple[str, float]]) -> str:
    """Shares by name, with the range where nodes of several arms share a name.

    Example: `shares([("opd.s0", 0.5), ("opd.s0", 0.25), ("opd.s1", 0.5)])` is `"opd.s0 25–50%, opd.s1 50%"`.
    """
    by_name: dict[str, list[float]] = {}
    for name, share in of_nodes:
        by_name.setdefault(name, []).append(share)
    ranges = {name: (f"{min(given):.0%}", f"{max(given):.0%}") for name, given in by_name.items()}
    return ", ".join(f"{name} {high if low == high else f'{low[:-1]}–{high}'}" for name, (low, high) in ranges.items())


def name_of(node: Estimate) -> str:
    """A node's name without its hash."""
    return node.name.rsplit(".", 1)[0]


PARTS = ("weights", "optimizer", "teachers", "sampler", "cache", "gathered", "activations")
"""Columns of the parts of a device's memory, in the order of `DeviceMemory.row`."""


def memory_table(nodes: Sequence[Estimate], title: str) -> Table:
    """What each node holds on one device, by part; nodes that hold the same are one row."""
    table = Table(Column("node", no_wrap=True), *PARTS, "peak", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names: dict[tuple[str, ...], list[str]] = {}
    for node in nodes:
        cells = (*(units(value, "B") if value else "" for value in node.memory.row().values()), units(node.peak, "B"))
        names.setdefault(cells, []).append(node.name.split(".")[0])
    for cells, sharing in names.items():
        table.add_row(short_list(tuple(dict.fromkeys(sharing))), *cells)
    return table


def experts_note(field: str, shape: Shape) -> str:
    """Example: "models.teacher: 30.5B parameters, of which a token uses 3.4B (8 experts of a layer)"."""
    if not shape.experts_known:
        return f"{field}: {units(shape.parameters)} parameters; how many experts a token uses is not known, so FLOPs count all of them"
    return (
        f"{field}: {units(shape.parameters)} parameters, of which a token uses {units(shape.active_parameters)} "
        f"({shape.experts_per_token:g} experts of a layer)"
    )


def notes(nodes: Sequence[Estimate], options: DryRunOptions, device: Device | None) -> list[str]:
    """Explain the columns, and give the totals."""
    lines = [
        "labels: distinct problems whose answers a node uses; tokens: sampled; scored: by the teacher; "
        "weights: memory with gradients and optimizer state, summed over devices; peak: per device, with activations and caches"
    ]
    length = "at full length" if options.mean_tokens is None else f"of {options.mean_tokens:g} tokens on average"
    lines.append(f"in all {units(sum(node.flops for node in nodes), 'FLOPs')}, with completions {length}")
    measuring = shares([(name_of(node), node.condition_share) for node in nodes if node.condition_share > 0.01])
    if measuring:
        lines.append(
            f"measuring condition C2 takes, of a stage's FLOPs, at most: {measuring} (conditions.problems: 0 turns it off)"
        )
    scoring = shares([(name_of(node), node.scoring_share(device)) for node in nodes if node.scoring])
    if scoring:
        unit = "FLOPs" if device is None else "time"
        lines.append(
            f"the teacher's scoring takes, of the {unit} of a step: {scoring} "
            "(compute.score_ahead overlaps it with sampling)"
        )
    if device is None:
        return lines
    seconds, largest = total_seconds(nodes, device, options.count), max(node.peak for node in nodes)
    fits = "which fits" if largest <= device.memory else "which does not fit"
    work = f"{UTILISATION:.0%} of {units(device.flops, 'FLOP')}/s"
    decoding = f"while decoding, {BANDWIDTH_SHARE:.0%} of {units(device.bandwidth, 'B')}/s"
    if options.device is None:
        lines += [
            f"here: about {duration(seconds)} if nodes run one after the other; at most {units(largest, 'B')} at once of "
            f"{units(device.memory, 'B')} that are free, {fits}",
            f"an estimate from {work} as measured just now in a matrix product and, {decoding} in a copy; loading, grading and the "
            "overhead of small models come on top",
        ]
        return lines
    both = any(node.memory.both for node in nodes)
    at_once = ", or with compute.overlap or without vllm.sleep go on at once" if both else ""
    lines += [
        "memory: weights with gradients and moments (optimizer) and teachers are divided over the devices; sampling (sampler, "
        f"cache) and a training pass (gathered weights, activations) take turns{at_once}",
        f"on {options.count} × {options.device}: {hours(options.count * seconds)} GPU-hours, {hours(seconds)} hours if nodes run "
        f"one after the other; at most {units(largest, 'B')} on a device of {units(device.memory, 'B')}, {fits}",
        f"assumed: {work} in bfloat16 and, {decoding} ({device.source}); the work divided evenly",
    ]
    return lines


def memory_advice(nodes: Sequence[Estimate], recipe: Recipe, memory: float, options: DryRunOptions) -> str | None:
    """What to change where the largest node needs more memory than there is; None where all fit."""
    largest = max(nodes, key=lambda node: node.peak)
    if largest.peak <= memory:
        return None
    models, compute = recipe.models, recipe.compute
    weights = largest.bytes / options.count
    changes = []
    if weights > memory / 2:  # weights, gradients and optimizer state
        if models.lora is None:
            changes.append("train adapters (models.lora={r: 32})")
        elif models.lora.quantize is None:
            changes.append("hold the frozen weights in four bits (models.lora.quantize=nf4)")
        if models.dtype != "bfloat16":
            changes.append("set models.dtype=bfloat16")
    if largest.peak - weights > memory / 2:  # activations and the KV cache
        if not models.gradient_checkpointing:
            changes.append("set models.gradient_checkpointing=true")
        changes += [
            f"lower compute.microbatch_tokens (now {compute.microbatch_tokens})",
            f"compute.sample_batch (now {compute.sample_batch})",
        ]
    if options.device is None:
        more, available = "a larger device", f"{units(memory, 'B')} are free here"
    else:
        more, available = "a larger device or more of them", f"{options.device} has {units(memory, 'B')}"
    changes.append(f"name {more} with --on")
    return f"memory: {name_of(largest)} needs {units(largest.peak, 'B')} and {available}: {', '.join(changes)}"


def hours(seconds: float) -> str:
    """Example: `hours(5400)` is `"1.5"`."""
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
