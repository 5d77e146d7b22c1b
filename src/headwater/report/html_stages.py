"""Sections of the page about the stages: results stage by stage, and the paper's two conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from headwater.report import figures
from headwater.report.figures import Interval, Plot, Series, ValueAxis, file_stem
from headwater.report.format import percent
from headwater.report.html_arms import has_several_samples
from headwater.report.html_curves import HELD_OUT_METRICS, TITLES, panels_by_stage, shortened
from headwater.report.stages import C2_MEASURES, accuracy_paths, accuracy_steps, stage_name
from headwater.report.study import POOL_TEXT, Study
from headwater.report.view import Column, Section, Table

PLACES = ("before", "SFT", "warm-up", "OPD", "RL")
"""Positions on the axis of the figure of all arms. A stage that replaces OPD has OPD's position."""


def stages(report: dict[str, Any]) -> Section | None:
    """Accuracy and pass@k of the students before, between and after the stages, and the measures of every stage."""
    if not any(accuracy_paths(report, name) for name in report["evals"]):
        return None
    plots = list(_stage_plots(report))
    ended_early = [
        f"{stage_name(row['stage'], row['objective'])} of {', '.join(row['arms'])} ended on seed {seed} after "
        f"{ended['step']} of {ended['of']} steps: {ended['why']}."
        for row in report["stages"]
        for seed, ended in row["ended"].items()
    ]
    view = {
        "plots": plots,
        "table": _stage_table(report),
        "ended_early": ended_early,
    }
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
    values = {"Accuracy": _accuracy}
    if has_several_samples(report):
        values["pass@k at the largest k"] = _pass_at_largest_k
    for title, value in values.items():
        series = []
        for style, (arm, stages) in enumerate(steps.items()):
            by_place = {places.index(place): value(stage, eval_name) for place, stage in stages}
            points = [(place, share) for place, share in sorted(by_place.items()) if share is not None]
            if points:
                series.append(Series(arm, style, [x for x, _ in points], [y for _, y in points]))
        if any(len(line.x) > 1 for line in series):
            rows: list[tuple[Any, ...]] = [("series", "place", "value")]
            rows += [
                (line.label, axis.text(x), str(100 * y)) for line in series for x, y in zip(line.x, line.y, strict=True)
            ]
            panels = {f"{title} on {eval_name} through the stages, %": series}
            yield figures.line_plot(file_stem("stages", title.split()[0], eval_name), panels, axis, rows)


def _accuracy(stage: dict[str, Any], eval_name: str) -> float | None:
    accuracy = stage.get("accuracy", {}).get(eval_name)
    return None if accuracy is None else float(accuracy["mean"])


def _pass_at_largest_k(stage: dict[str, Any], eval_name: str) -> float | None:
    by_k = stage.get("pass_at_k", {}).get(eval_name)
    if not by_k:
        return None
    last = [*by_k.values()][-1]  # of a stage a number, of an untrained model a mean with its interval
    return float(last["mean"] if isinstance(last, dict) else last)


def _stage_table(report: dict[str, Any]) -> Table:
    """Every stage once: its result, and its measures at the first and the last step of training."""
    name, several = report["evals"][0], has_several_samples(report)
    columns = [
        *_stage_columns(),
        Column(
            "accuracy, %", lambda row: row["accuracy"].get(name) and percent(row["accuracy"][name]["mean"]), "right"
        ),
        *([Column("pass@k, %", lambda row: _largest_k(row["pass_at_k"].get(name)), "right")] if several else []),
        *_ends_columns("ends", ("reward", "best_of_group", "informative", "entropy")),
        Column("informative, all steps", _informative, "right"),
        Column("completions, all steps", _outcomes),
    ]
    rows = [row for row in report["stages"] if row["ends"] or name in row["accuracy"]]
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
    return (
        ", ".join(f"{100 * share:.0f} % {name.replace('_', ' ')}" for name, share in shares if share >= 0.005) or None
    )


def _informative(row: dict[str, Any]) -> str | None:
    return None if row["informative"] is None else f"{row['informative']:.2f}"


def _largest_k(by_k: dict[str, float] | None) -> str | None:
    return f"{percent([*by_k.values()][-1])} (k={[*by_k][-1]})" if by_k else None


def conditions(study: Study, report: dict[str, Any]) -> Section | None:
    """C1 (the teacher is near its optimum) as a figure, C2 (the student is near the teacher) as curves, both with their values."""
    c1, c2 = _c1_table(report), _c2_table(report)
    one_sample = c1 is None and _evaluated_teacher_once(report)
    figures_c1 = [c1_figure(eval_name, teachers) for eval_name, teachers in _trained_teachers(report)]
    panels = panels_by_stage(study, HELD_OUT_METRICS, lambda node: node.conditions, held_out=True)
    if not (c1 or c2 or panels or one_sample):
        return None
    measured = any(row["conditions"] for row in report["stages"] if row["role"] == "student")
    view = {
        "c1": c1,
        "c1_plots": figures_c1,
        "one_sample": one_sample,
        "c2": c2,
        "panels": panels,
        "held_out": measured,
    }
    plots = (*figures_c1, *(plot for stage in panels for plot in stage["plots"]))
    return Section("Conditions", "conditions", view, plots)


def _trained_teachers(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(evaluation, C1) where the teacher was evaluated before and after training with several samples a problem."""
    for eval_name, teachers in (report["conditions"]["C1"] or {}).items():
        if teachers["before"] and teachers["after"] and teachers["before"]["k"] > 1:
            yield eval_name, teachers


def _evaluated_teacher_once(report: dict[str, Any]) -> bool:
    """Whether a trained teacher was evaluated with one sample a problem: its best-of-k is then its accuracy, and C1 unknown."""
    after = [state for teachers in (report["conditions"]["C1"] or {}).values() for state in teachers["after"]]
    return any(state["k"] == 1 for state in after)


def c1_figure(eval_name: str, teachers: dict[str, Any]) -> Plot:
    """A row per state of the teacher: a dot at its accuracy, a line from there to its best-of-k, and the best-of-k before as
    the dashed line that C1 asks the accuracy to reach."""
    states = [("before training", teachers["before"])]
    states += [
        (f"after {stage_name(row['stage'])}, {POOL_TEXT.get(row['pool'], row['pool'] or 'no labels')}", row)
        for row in teachers["after"]
    ]
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


def _c1_table(report: dict[str, Any]) -> Table | None:
    rows = []
    for eval_name, teachers in (report["conditions"]["C1"] or {}).items():
        after = [state for state in teachers["after"] if state["k"] > 1]
        if teachers["before"] and after:
            rows.append({"eval": eval_name, "when": "before", "arms": [], "training": {}, **teachers["before"]})
        for state in after:
            pool = POOL_TEXT.get(state["pool"], state["pool"] or "no labels")
            rows.append({"eval": eval_name, "when": f"after {stage_name(state['stage'])}, {pool}", **state})
    columns = [
        Column("evaluation", itemgetter("eval")),
        Column("teacher", itemgetter("when")),
        Column("arms", lambda row: shortened(row["arms"])),
        Column("accuracy, %", lambda row: percent(row["accuracy"]), "right"),
        Column("best-of-k, %", lambda row: f"{percent(row['best_of_k'])} (k={row['k']})", "right"),
        Column("accuracy / best-of-k before", _reached, "right"),
        *_ends_columns("training", ("reward", "best_of_group")),
    ]
    return Table("C1: the teacher compared with its own best-of-k", columns, rows) if rows else None


def _reached(row: dict[str, Any]) -> str | None:
    return None if row.get("reached") is None else f"{percent(row['reached'])} %"


def _c2_table(report: dict[str, Any]) -> Table | None:
    rows = []
    for row in report["stages"] if report["conditions"]["C2"] else ():
        ends = row["conditions"] or {key: row["ends"][key] for key in C2_MEASURES[:2] if key in row["ends"]}
        if row["role"] == "student" and ends:
            rows.append({**row, "prompts": "held out" if row["conditions"] else "training", "values": ends})
    columns = [*_stage_columns(), Column("prompts", itemgetter("prompts")), *_ends_columns("values", C2_MEASURES)]
    return Table("C2: the student's distance from its teacher", columns, rows) if rows else None
