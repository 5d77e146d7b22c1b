"""Sections of the page about the arms: the table of results and costs, and accuracy against cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from headwater.config.arms import BASE_MODELS, DESCRIPTIONS
from headwater.report import figures
from headwater.report.figures import Interval, Plot, Series, ValueAxis, file_stem
from headwater.report.format import count, duration, non_training_notes, percent, units
from headwater.report.stages import accuracies, accuracy_and_best, largest_k
from headwater.report.verdict import failure_state
from headwater.report.view import Column, RowHeader, Section, Table, evaluation_column, interval_axis


def arms(report: dict[str, Any]) -> Section:
    """One row per arm and evaluation: accuracy with its interval, the arm's costs, and pass@k and maj@k where k is above 1."""
    evals = report["evals"] or [""]
    k = largest_k(report)
    rows = [_row(report, name, eval_name, k) for name in report["arms"] for eval_name in evals]
    scores = [row["accuracy"] for row in rows if row["accuracy"]]
    axis = interval_axis(scores, lambda value: f"{percent(max(0.0, value))}\u00a0%")
    accuracy = [
        Column("accuracy\n%\u00a0[95\u00a0%]", itemgetter("mean"), "right"),
        Column("", itemgetter("interval"), axis=axis),
    ]
    columns = [
        Column("arm", itemgetter("header"), spans=True),
        *evaluation_column(evals),
        *(accuracy if report["evals"] else []),
        Column("labels", lambda row: count(row["costs"]["labels"]["distinct"]), "right", spans=True),
        Column("FLOPs", lambda row: units(row["costs"]["flops"]), "right", spans=True),
        Column("time", lambda row: duration(row["costs"]["seconds"]), "right", spans=True),
        *([Column(f"pass@{k},\u00a0%", itemgetter("pass"), "right")] if k != "1" else []),
        *([Column(f"maj@{k},\u00a0%", itemgetter("maj"), "right")] if any(row["maj"] for row in rows) else []),
        Column("checks", lambda row: count(row["costs"]["labels"]["checks"]), "right", spans=True),
        Column("sampled", lambda row: units(row["costs"]["tokens"]["sampled"]), "right", spans=True),
        Column("trained", lambda row: units(row["costs"]["tokens"]["trained"]), "right", spans=True),
        Column("scored", lambda row: units(row["costs"]["tokens"]["teacher_scored"]), "right", spans=True),
    ]
    # Labels of the validation set are labels too, so the caption gives their number.
    validation = max((arm["apart"]["validation"]["labels"]["distinct"] for arm in report["arms"].values()), default=0)
    caption = f"Accuracy{f' on {evals[0]}' if len(evals) == 1 else ''} and costs" if report["evals"] else "Costs"
    caption += f" (and {count(validation)} validation labels)" if validation else ""
    notes = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in non_training_notes(report)]
    table = Table(caption, columns, rows, rows_per_entry=len(evals))
    view = {"table": table, "notes": notes, "accuracy": bool(report["evals"])}
    return Section("Arms", "arms", view, tuple(_forests(report)))


def _row(report: dict[str, Any], name: str, eval_name: str, common_k: str) -> dict[str, Any]:
    """Values of one arm and evaluation. A k that is not in the column's title is in the cell."""
    arm = report["arms"][name]
    # The top of the page has the sentences of the failures: a column of names is too narrow for them.
    warnings = [f"unfinished on seed {seed}" for seed in arm["unfinished"]]
    warnings += [f"{failure_state(failure)} on seed {seed}" for seed, failure in arm["failed"].items()]
    row = dict.fromkeys(("accuracy", "mean", "interval", "pass", "maj"))
    row |= {"header": RowHeader(name, (DESCRIPTIONS.get(name, ""),), tuple(warnings)), "eval": eval_name, "costs": arm}
    measured = accuracy_and_best(arm, eval_name)
    if measured is not None:
        accuracy, majority = arm["accuracy"][eval_name], arm["maj_at_k"][eval_name]
        suffix = "" if common_k == str(measured["k"]) else f" (k={measured['k']})"
        row |= {
            "accuracy": accuracy,
            "mean": f"{percent(accuracy['mean'])}\n[{percent(accuracy['low'])}, {percent(accuracy['high'])}]",
            "interval": _interval(report, name, eval_name),
            "pass": f"{percent(measured['best_of_k'])}{suffix}",
            "maj": f"{percent(majority['mean'])}{suffix}" if majority and majority["k"] > 1 else None,
        }
    return row


def _interval(report: dict[str, Any], arm: str, eval_name: str) -> Interval:
    before = report["arms"].get("base_student", {}).get("accuracy", {}).get(eval_name)
    return Interval.of(report["arms"][arm]["accuracy"][eval_name], before and before["mean"])


def _forests(report: dict[str, Any]) -> Iterator[Plot]:
    """A forest plot of the arms per evaluation, for figures/ only: the page shows the same in its table."""
    for eval_name in report["evals"]:
        estimates = [(name, _interval(report, name, eval_name)) for name in accuracies(report["arms"], eval_name)]
        yield figures.forest(file_stem("accuracy", eval_name), f"Accuracy on {eval_name}", estimates, "%")


def costs(report: dict[str, Any]) -> Section | None:
    """Accuracy against labels and against training FLOPs, on the first evaluation, where arms differ in that cost."""
    labels = ValueAxis("distinct labels, mean per seed", format=count)
    flops = ValueAxis("training FLOPs, mean per seed", format=_short_units, log=True)
    arms = report["arms"].items()
    plots = [
        *_accuracy_by_cost(report, labels, {name: arm["labels"]["distinct"] for name, arm in arms}),
        *_accuracy_by_cost(report, flops, {name: arm["flops"] for name, arm in arms}),
    ]
    return Section("Labels and compute", "costs", {"plots": plots}, tuple(plots)) if plots else None


def _short_units(flops: float) -> str:
    """Units without trailing zeros. Example: `_short_units(2e9)` is `2G`, where `units` gives `2.00G`."""
    return re.sub(r"\.0+(?=\D|$)", "", units(flops))


def _accuracy_by_cost(report: dict[str, Any], axis: ValueAxis, costs: Mapping[str, float]) -> Iterator[Plot]:
    for eval_name in report["evals"][:1]:
        measured = accuracies(report["arms"], eval_name)
        points = [name for name in measured if name not in BASE_MODELS and (costs[name] > 0 or not axis.log)]
        rows: list[tuple[Any, ...]] = [("arm", "cost", "mean", "low", "high")]
        series = []
        for style, name in enumerate(points):
            mean, low, high = (measured[name][key] for key in ("mean", "low", "high"))
            series.append(Series(name, style, [costs[name]], [mean], [low], [high]))
            rows.append((name, costs[name], mean, low, high))
        for name in [name for name in BASE_MODELS if name in measured]:
            level = measured[name]["mean"]
            series.append(Series(name, None, (), [level]))
            rows.append((name, "", level, "", ""))
        if len({costs[name] for name in points}) > 1:
            quantity = axis.label.split(",")[0]
            stem = file_stem("cost", quantity.replace(" ", "_"), eval_name)
            panels = {f"Accuracy on {eval_name} against {quantity}, %": series}
            yield figures.line_plot(stem, panels, axis, rows)
