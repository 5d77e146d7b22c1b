"""Write a sweep's files: values, one plot of accuracy against the value, and one HTML page; and its tables for a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from headwater.config.arms import BASE_MODELS, DESCRIPTIONS
from headwater.report.contrasts import interval_note, reading
from headwater.report.figures import Plot, Series, ValueAxis, as_plot, line_description, line_figure
from headwater.report.format import accuracy_text, count, p_text, seeds_text, units
from headwater.report.render import render
from headwater.report.stages import accuracies
from headwater.report.sweep import as_csv, build, comparisons, names
from headwater.report.terminal import interval_text, rich_table
from headwater.report.view import Column, RowHeader, Table
from headwater.runs.sweep import Sweep, text_of, variation
from headwater.storage.files import write_atomic, write_json

LOG_FROM = 8.0
"""Positive numbers that span this factor are drawn on a logarithmic axis."""
STYLES = {"direct_grpo": 0, "bridge": 1, "raw_teacher": 2}
"""Arms that most sweeps compare have the same style in all of them; the others take the next styles in order."""
WORDS = {"holds": "better", "undecided": "undecided", "does not hold": "worse"}


def write(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """Write sweep.json, sweep.csv, sweep.svg, sweep.png and sweep.html into `out`. Returns the contents of sweep.json.

    failed  folder name of a point -> its error message
    """
    summary = build(sweep, out, failed)
    write_json(out / "sweep.json", summary)
    write_atomic(out / "sweep.csv", as_csv(summary))
    drawn = None
    if summary["evals"]:
        drawn, png = plot(summary)
        write_atomic(out / "sweep.svg", drawn.svg)
        write_atomic(out / "sweep.png", png)
    write_atomic(out / "sweep.html", page(summary, drawn))
    return summary


def page(summary: dict[str, Any], drawn: Plot | None) -> str:
    """The page: plot, sentences, tables, costs and commands."""
    values = {
        "summary": summary,
        "settings": f"{summary['field']} = {', '.join(map(text_of, summary['values']))}; {seeds_text(summary)}",
        "plot": drawn and drawn.element,
        "arms": "; ".join(f"{arm}: {DESCRIPTIONS[arm]}" for arm in _trained_arms(summary) if arm in DESCRIPTIONS),
        "note": note(summary),
        "tables": tables(summary),
        "costs": [cost_table(summary)] if _trained_arms(summary) else [],
        "commands": "\n".join([summary["command"], "", *(point["command"] for point in summary["points"])]),
    }
    return render("sweep.html.j2", values)


def terminal_table(summary: dict[str, Any]) -> Group:
    """Tables and sentences for a console of 100 columns or more."""
    parts: list[RichTable | Text] = [*map(rich_table, tables(summary)), *map(Text, [*summary["said"], note(summary)])]
    return Group(*[item for part in parts for item in (part, Text(""))])


def note(summary: dict[str, Any]) -> str:
    """What the intervals cover, and that values are not corrected for multiple comparisons."""
    several = "each value is judged by itself, without a correction for their number"
    return "; ".join([interval_note(summary), *[several] * (len(summary["values"]) > 1)])


def _trained_arms(summary: dict[str, Any]) -> list[str]:
    return [arm for arm in summary["arms"] if any(arm in point["arms"] for point in summary["points"])]


def _shown_arms(summary: dict[str, Any]) -> list[str]:
    """The base models, then the arms of the sweep, without those that no point has."""
    bases = [name for name in BASE_MODELS if any(name in point["arms"] for point in summary["points"])]
    return [*bases, *_trained_arms(summary)]


# Plot -----------------------------------------------------------------------------------------------------------------


def plot(summary: dict[str, Any]) -> tuple[Plot, bytes]:
    """One panel per evaluation with a line per arm, and the same as a PNG. The same values give the same files."""
    values, kind, text = summary["values"], axis_kind(summary), names(summary)
    xs = list(range(len(values))) if kind == "category" else [math.log(v) if kind == "log" else v for v in values]
    labels = [text[point["value"]] + (" (failed)" if point["failed"] else "") for point in summary["points"]]
    axis_label = f"{variation(summary['vary']).axis}{', log scale' if kind == 'log' else ''}"
    axis = ValueAxis(axis_label, dict(zip(xs, labels, strict=True)))
    panels: dict[str, list[Series]] = {}
    for eval_name in summary["evals"]:
        title = f"{summary['recipe']}: accuracy on {eval_name}, %, with 95 % interval; {seeds_text(summary)}"
        panels[title] = []
        for arm in _shown_arms(summary):
            scores = [accuracies(point["arms"], eval_name).get(arm) for point in summary["points"]]
            rows = [(x, row["mean"], row["low"], row["high"]) for x, row in zip(xs, scores, strict=True) if row]
            if rows:
                x, mean, low, high = zip(*rows, strict=True)
                if arm in BASE_MODELS:
                    panels[title].append(Series(BASE_MODELS[arm], None, x, mean))
                else:
                    panels[title].append(Series(arm, style_of(arm, summary["arms"]), x, mean, low, high))
    figure, png = line_figure(panels, axis, 7.2, 3.8), io.BytesIO()
    drawn = as_plot(figure, "sweep", line_description(panels, axis), ())
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return drawn, png.getvalue()


def axis_kind(summary: dict[str, Any]) -> str:
    """`category` for names, `log` for numbers of labels and other positive numbers far apart, else `linear`.

    Example: learning rates 1e-4 and 1e-3 are on a `log` axis, λ of 0 and 1 on a `linear` one.
    """
    values = summary["values"]
    if any(isinstance(value, (str, bool)) for value in values):
        return "category"
    if min(values) <= 0:
        return "linear"
    return "log" if summary["vary"] == "labels" or max(values) / min(values) >= LOG_FROM else "linear"


def style_of(arm: str, arms: list[str]) -> int:
    """Example: `style_of("mixed", ["direct_grpo", "mixed"])` is 3."""
    return STYLES[arm] if arm in STYLES else 3 + [other for other in arms if other not in STYLES].index(arm)


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(summary: dict[str, Any]) -> list[Table]:
    """Accuracy by value and arm, and the differences of compared arms, for each evaluation."""
    arms, headers, result = _shown_arms(summary), _headers(summary), []
    for eval_name in summary["evals"]:
        rows = [[header, *(cell(point, arm, eval_name) for arm in arms)] for header, point in headers]
        title = f"{summary['recipe']} · {seeds_text(summary)} · accuracy on {eval_name}, % [95 %]"
        result.append(Table(title, columns(summary["vary"], *arms), rows))
        rows = [
            [header, f"{a} − {b}", interval_text(c), p_text(c["p"]), WORDS[reading(c)]]
            for header, point in headers
            for a, b, by_value in comparisons(summary, eval_name)
            if (c := by_value.get(point["value"]))
        ]
        if rows:
            title = f"differences on {eval_name} in points, 95 % interval, two-sided p, paired"
            result.append(Table(title, columns(summary["vary"], "a − b", "difference [95 %]", "p", "a is"), rows))
    return result


def cell(point: dict[str, Any], arm: str, eval_name: str) -> str:
    """Accuracy with interval, such as `67.5 [64.2, 70.7]`; without a result, `failed` or a dash."""
    scored = accuracies(point["arms"], eval_name).get(arm)
    if scored is None:
        return "failed" if point["failed"] else "–"
    return accuracy_text(scored)


def cost_table(summary: dict[str, Any]) -> Table:
    """Labels and FLOPs of each trained arm at each value, means per seed."""
    arms, rows = _trained_arms(summary), []
    for header, point in _headers(summary):
        cells: list[str] = []
        for arm in arms:
            spent = point["arms"].get(arm)
            trained = spent and spent["flops"]
            cells += [count(spent["labels"]["distinct"]), f"{units(spent['flops'])}F"] if trained else ["–", "–"]
        rows.append([header, *cells])
    heads = [head for arm in arms for head in (f"labels, {arm}", f"FLOPs, {arm}")]
    return Table("cost of each arm", columns(summary["vary"], *heads), rows)


def dry_run_table(vary: str, rows: Sequence[dict[str, Any]]) -> RichTable:
    """The rows of `sweeps.dry_run` for a console."""
    counts = ("nodes", "shared", "labels", "steps")
    bounds = ("tokens_sampled_at_most", "tokens_teacher_scored_at_most", "flops_at_most")
    cells = []
    for row in rows:
        numbers = [*(count(row[key]) for key in counts), *(units(row[key]) for key in bounds)]
        cells.append([text_of(row["value"]), *numbers, units(row["memory_bytes"], "B")])
    heads = columns(vary, *counts, "tokens ≤", "teacher tokens ≤", "FLOPs ≤", "memory")
    table = rich_table(Table("what would run", heads, cells))
    table.caption = "shared: nodes of an earlier value, which run once; labels: distinct problems, of one node"
    return table


def _headers(summary: dict[str, Any]) -> list[tuple[RowHeader, dict[str, Any]]]:
    """The row header of each point: the value as a link to its report, with the error of a failed point."""
    return [
        (RowHeader(text, (), (f"failed: {point['failed']}",) if point["failed"] else (), point["page"]), point)
        for text, point in zip(names(summary).values(), summary["points"], strict=True)
    ]


def columns(*titles: str) -> list[Column]:
    """Columns of rows that are lists of texts; all but the first one are aligned to the right."""
    return [Column(title, itemgetter(index), "right" if index else "left") for index, title in enumerate(titles)]
