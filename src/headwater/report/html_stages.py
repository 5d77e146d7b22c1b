"""Sections of the page about the stages: results stage by stage, and the paper's two conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from headwater.errors import shortened
from headwater.report import figures
from headwater.report.conditions import distance
from headwater.report.figures import Interval, Plot, Series, ValueAxis, file_stem
from headwater.report.format import percent
from headwater.report.html_curves import HELD_OUT_METRICS, TITLES, panels_by_stage
from headwater.report.stages import C2_MEASURES, accuracy_and_best, accuracy_steps, largest_k, stage_name
from headwater.report.study import POOL_TEXT, Study
from headwater.report.view import Column, Section, Table

PLACES = ("before", "SFT", "warm-up", "OPD", "RL")
"""Positions on the axis of the figure of all arms. A stage that replaces OPD has OPD's position."""


def stages(report: dict[str, Any]) -> Section | None:
    """Accuracy and pass@k of the students before, between and after the stages, and the measures of every stage."""
    if not report["evals"] or all(name.startswith("base_") for name in report["arms"]):
        return None
    plots = list(_stage_plots(report))
    ended_early = [
        f"{stage_name(row['stage'], row['objective'])} of {', '.join(row['arms'])} ended on seed {seed} after "
        f"{ended['step']} of {ended['of']} steps: {ended['why']}."
        for row in report["stages"]
        for seed, ended in row["ended"].items()
    ]
    view = {"plots": plots, "table": _stage_table(report), "ended_early": ended_early}
    return Section("Stage by stage", "stages", view, tuple(plots))


def _stage_plots(report: dict[str, Any]) -> Iterator[Plot]:
    """Accuracy and pass@k of every arm's student over its stages, on the first evaluation, as means over seeds."""
    eval_name = report["evals"][0]
    steps = {
        name: [(short if short in PLACES else "OPD", stage) for short, stage in accuracy_steps(report, arm, "student")]
        for name, arm in report["arms"].items()
        if not name.startswith("base_")
    }
    used = {place for stages in steps.values() for place, _ in stages}
    places = [place for place in PLACES if place in used]
    axis = ValueAxis(ticks=dict(enumerate(places)))
    measures = {"Accuracy": "accuracy"}
    if largest_k(report) != "1":
        measures["pass@k at the largest k"] = "best_of_k"
    for title, measure in measures.items():
        series = []
        for style, (arm, stages) in enumerate(steps.items()):
            by_place = {places.index(place): accuracy_and_best(stage, eval_name) for place, stage in stages}
            values = {place: measured[measure] for place, measured in sorted(by_place.items()) if measured}
            if values:
                series.append(Series(arm, style, [*values], [*values.values()]))
        if any(len(line.x) > 1 for line in series):
            points = [(line.label, x, y) for line in series for x, y in zip(line.x, line.y, strict=True)]
            rows = [("series", "place", "value"), *((label, axis.text(x), str(100 * y)) for label, x, y in points)]
            panels = {f"{title} on {eval_name} through the stages, %": series}
            yield figures.line_plot(file_stem("stages", title.split()[0], eval_name), panels, axis, rows)


def _stage_table(report: dict[str, Any]) -> Table:
    """Every stage once: its result, and its measures at the first and the last step of training."""
    name = report["evals"][0]
    best = Column("pass@k, %", lambda row: row["measured"] and _best_of_k(row["measured"]), "right")
    columns = [
        *_stage_columns(),
        Column("accuracy, %", lambda row: row["measured"] and percent(row["measured"]["accuracy"]), "right"),
        *([best] if largest_k(report) != "1" else []),
        *_ends_columns("ends", ("reward", "best_of_group", "informative", "entropy")),
        Column("informative, all steps", _informative, "right"),
        Column("completions, all steps", _outcomes),
    ]
    rows = [{**row, "measured": accuracy_and_best(row, name)} for row in report["stages"]]
    rows = [row for row in rows if row["ends"] or row["measured"]]
    measured = [column for column in columns if any(column.cell(row) is not None for row in rows)]
    return Table(f"Every stage once: on {name}, and first → last step of training", measured, rows)


def _stage_columns() -> list[Column]:
    return [
        Column("stage", lambda row: stage_name(row["stage"], row["objective"], row["role"])),
        Column("pool", lambda row: POOL_TEXT.get(row["pool"] or "", "none")),
        Column("arms", lambda row: shortened(row["arms"])),
    ]


def _ends_columns(key: str, measures: Sequence[str]) -> list[Column]:
    """First and last value of each measure of `row[key]`."""
    return [Column(TITLES[measure], partial(_first_to_last, key=key, measure=measure), "right") for measure in measures]


def _first_to_last(row: dict[str, Any], key: str, measure: str) -> str | None:
    """Example: `0.1 → 0.5`."""
    ends = row[key].get(measure)
    return ends and f"{ends['first']:.3g} → {ends['last']:.3g}".replace("-", "−")


def _outcomes(row: dict[str, Any]) -> str | None:
    """Example: `58 % right, 30 % wrong, 12 % cut`."""
    shares = sorted((row["outcomes"] or {}).items(), key=lambda item: -item[1])
    parts = [f"{100 * share:.0f} % {name.replace('_', ' ')}" for name, share in shares if share >= 0.005]
    return ", ".join(parts) or None


def _informative(row: dict[str, Any]) -> str | None:
    return None if row["informative"] is None else f"{row['informative']:.2f}"


def _best_of_k(measured: dict[str, Any]) -> str:
    """Example: `71.2 (k=4)`."""
    return f"{percent(measured['best_of_k'])} (k={measured['k']})"


def conditions(study: Study, report: dict[str, Any]) -> Section | None:
    """C1 (the teacher is near its optimum) as a figure, C2 (the student is near the teacher) as curves, both with their values."""
    by_eval: dict[str, Any] = report["conditions"]["C1"] or {}
    c1, c2 = _c1_table(by_eval), _c2_table(report["stages"])
    # With one sample a problem, the teacher's best-of-k is its accuracy: C1 is then unknown.
    one_sample = c1 is None and any(teachers["after"] for teachers in by_eval.values())
    c1_plots = [
        c1_figure(eval_name, teachers)
        for eval_name, teachers in by_eval.items()
        if teachers["before"] and teachers["after"] and teachers["before"]["k"] > 1
    ]
    panels = panels_by_stage(study, HELD_OUT_METRICS, lambda node: node.conditions, held_out=True)
    if not (c1 or c2 or panels or one_sample):
        return None
    measured = any(row["conditions"] for row in report["stages"] if row["role"] == "student")
    view = {"c1": c1, "c1_plots": c1_plots, "one_sample": one_sample, "c2": c2, "panels": panels, "held_out": measured}
    plots = (*c1_plots, *(plot for stage in panels for plot in stage["plots"]))
    return Section("Conditions", "conditions", view, plots)


def c1_figure(eval_name: str, teachers: dict[str, Any]) -> Plot:
    """A row per state of the teacher: a dot at its accuracy, a line from there to its best-of-k, and the best-of-k before as
    the dashed line that C1 asks the accuracy to reach."""
    states = [("before training", teachers["before"]), *((_after(row), row) for row in teachers["after"])]
    goal = teachers["before"]["best_of_k"]
    rows = [
        (label, Interval(row["accuracy"], row["accuracy"], max(row["accuracy"], row["best_of_k"]), goal))
        for label, row in states
    ]
    title = f"The teacher's accuracy and best-of-k on {eval_name}"
    values = [(label, row["accuracy"], row["best_of_k"], row["k"]) for label, row in states]
    texts = [f"{label} {percent(mean)} and {percent(best)} (k={k})" for label, mean, best, k in values]
    figure = figures.forest_figure(title, rows, "%")
    header = ("teacher", "accuracy", "best_of_k", "k")
    return figures.as_plot(figure, file_stem("c1", eval_name), f"{title}, %: {'; '.join(texts)}", [header, *values])


def _after(state: dict[str, Any]) -> str:
    """Example: `after Teacher RL, all labels`."""
    return f"after {stage_name(state['stage'])}, {POOL_TEXT.get(state['pool'], state['pool'] or 'no labels')}"


def _c1_table(by_eval: dict[str, Any]) -> Table | None:
    rows = []
    for eval_name, teachers in by_eval.items():
        after = [state for state in teachers["after"] if state["k"] > 1]
        if teachers["before"] and after:
            rows.append({"eval": eval_name, "when": "before", "arms": [], "training": {}, **teachers["before"]})
        rows += [{"eval": eval_name, "when": _after(state), **state} for state in after]
    columns = [
        Column("evaluation", itemgetter("eval")),
        Column("teacher", itemgetter("when")),
        Column("arms", lambda row: shortened(row["arms"])),
        Column("accuracy, %", lambda row: percent(row["accuracy"]), "right"),
        Column("best-of-k, %", _best_of_k, "right"),
        Column("accuracy / best-of-k before", _reached, "right"),
        *_ends_columns("training", ("reward", "best_of_group")),
    ]
    return Table("C1: the teacher compared with its own best-of-k", columns, rows) if rows else None


def _reached(row: dict[str, Any]) -> str | None:
    return None if row.get("reached") is None else f"{percent(row['reached'])} %"


def _c2_table(stages: Sequence[dict[str, Any]]) -> Table | None:
    rows = [{**row, "distance": measures} for row in stages if (measures := distance(row))]
    prompts = Column("prompts", lambda row: row["distance"]["prompts"])
    columns = [*_stage_columns(), prompts, *_ends_columns("distance", C2_MEASURES)]
    return Table("C2: the student's distance from its teacher", columns, rows) if rows else None
