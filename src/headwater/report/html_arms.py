"""Sections of the page about the arms: the table of results and costs, and accuracy against cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from headwater.config.arms import DESCRIPTIONS
from headwater.report import figures
from headwater.report.figures import CostAxis, Plot
from headwater.report.format import count, duration, non_training_notes, percent, units
from headwater.report.view import Column, Interval, RowHeader, Section, Table, interval_axis, number_columns


def arms(report: dict[str, Any]) -> Section:
    """One row per arm and evaluation: accuracy with its interval, pass@k, maj@k, and the arm's costs."""
    evals = report["evals"] or [""]
    largest = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()}
    k = largest.pop() if len(largest) == 1 else "k"
    scores = [score for arm in report["arms"].values() for score in arm["accuracy"].values()]
    axis = interval_axis(scores, lambda value: f"{percent(max(0.0, value))} %")
    columns = [
        Column("arm", spans=True),
        *([Column("evaluation")] if len(evals) > 1 else []),
        *number_columns("accuracy, %", "95 %"),
        Column("", axis=axis),
        *number_columns(f"pass@{k}, %", f"maj@{k}, %"),
        *number_columns("labels", "checks", "sampled", "trained", "scored", "FLOPs", "time", spans=True),
    ]
    rows = [
        [
            _header(name, arm),
            *([eval_name] if len(evals) > 1 else []),
            *_scores(report, arm, eval_name, k),
            *_costs(arm),
        ]
        for name, arm in report["arms"].items()
        for eval_name in evals
    ]
    # Labels of the validation set are labels too, so the caption gives their number.
    validation = max((arm["apart"]["validation"]["labels"]["distinct"] for arm in report["arms"].values()), default=0)
    caption = f"Accuracy{f' on {evals[0]}' if len(evals) == 1 else ''} and costs"
    caption += f" (and {count(validation)} validation labels)" if validation else ""
    notes = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in non_training_notes(report)]
    table = Table(caption, columns, rows, rows_per_entry=len(evals))
    return Section("Arms", "arms", {"table": table, "notes": notes}, tuple(_forests(report)))


def _header(name: str, arm: dict[str, Any]) -> RowHeader:
    warnings = [f"unfinished: seed {seed} waits for {node}" for seed, node in arm["unfinished"].items()]
    for seed, failure in arm["failed"].items():
        stage = "" if failure["state"] == "failed" else f"{failure['stage']} failed: "
        warnings.append(f"{failure['state']} on seed {seed}: {stage}{failure['sentence']}")
    return RowHeader(name, (DESCRIPTIONS.get(name, ""),), tuple(warnings))


def _scores(report: dict[str, Any], arm: dict[str, Any], eval_name: str, common_k: str) -> list[str | Interval | None]:
    """Accuracy, its interval as text and drawn, pass@k, maj@k. A k that is not in the column's title is in the cell."""
    accuracy = arm["accuracy"].get(eval_name)
    if accuracy is None:
        return ["–", "–", None, "–", "–"]
    mean, low, high = accuracy["mean"], accuracy["low"], accuracy["high"]
    seeds = tuple(accuracy["per_seed"].values())
    before = report["arms"].get("base_student", {}).get("accuracy", {}).get(eval_name)
    level = before["mean"] if before else None
    k, best = list(arm["pass_at_k"][eval_name].items())[-1]
    majority = arm["maj_at_k"][eval_name]
    suffix = "" if common_k == k else f" (k={k})"
    return [
        percent(mean),
        f"{percent(low)} to {percent(high)}",
        Interval(mean, low, high, level, seeds if len(seeds) > 1 else ()),
        f"{percent(best['mean'])}{suffix}",
        f"{percent(majority['mean'])}{suffix}" if majority else "–",
    ]


def _costs(arm: dict[str, Any]) -> list[str]:
    tokens = [units(arm["tokens"][key]) for key in ("sampled", "trained", "teacher_scored")]
    labels = [count(arm["labels"]["distinct"]), count(arm["labels"]["checks"])]
    return [*labels, *tokens, units(arm["flops"]), duration(arm["seconds"])]


def _forests(report: dict[str, Any]) -> Iterator[Plot]:
    """A forest plot of the arms per evaluation, for figures/ only: the page shows the same in its table."""
    for eval_name in report["evals"]:
        scores = {name: arm["accuracy"].get(eval_name) for name, arm in report["arms"].items()}
        rows = [
            figures.Estimate(name, score["mean"], score["low"], score["high"], tuple(score["per_seed"].values()))
            for name, score in scores.items()
            if score is not None
        ]
        base = scores.get("base_student")
        if rows:
            name, level = figures.file_stem("accuracy", eval_name), base["mean"] if base else None
            yield figures.forest(name, f"Accuracy on {eval_name}", rows, level, "%")


def costs(report: dict[str, Any]) -> Section | None:
    """Accuracy against labels and against training FLOPs, on the first evaluation of the recipe."""
    labels = CostAxis("distinct labels, mean per seed", count)
    flops = CostAxis("training FLOPs, mean per seed", _short_units, log=True)
    plots = [
        *_accuracy_by_cost(report, labels, lambda arm: arm["labels"]["distinct"]),
        *_accuracy_by_cost(report, flops, lambda arm: arm["flops"]),
    ]
    return Section("Labels and compute", "costs", {"plots": plots}, tuple(plots)) if plots else None


def _short_units(flops: float) -> str:
    """Units without trailing zeros. Example: `_short_units(2e9)` is `2G`, where `units` gives `2.00G`."""
    return re.sub(r"\.0+(?=\D|$)", "", units(flops))


def _accuracy_by_cost(
    report: dict[str, Any], axis: CostAxis, cost: Callable[[dict[str, Any]], float]
) -> Iterator[Plot]:
    for eval_name in report["evals"][:1]:
        scores = {name: arm["accuracy"].get(eval_name) for name, arm in report["arms"].items()}
        levels = [(name, score["mean"]) for name, score in scores.items() if score and name.startswith("base_")]
        points = [
            figures.Point(name, cost(report["arms"][name]), score["mean"], score["low"], score["high"])
            for name, score in scores.items()
            if score and not name.startswith("base_")
        ]
        points = [point for point in points if point.cost > 0 or not axis.log]
        if any(point.cost for point in points):
            quantity = axis.label.split(",")[0]
            name = figures.file_stem("cost", quantity.replace(" ", "_"), eval_name)
            yield figures.accuracy_by_cost(name, f"Accuracy on {eval_name} against {quantity}", points, levels, axis)
