"""Summarize a sweep's run directories: contents of sweep.json and sweep.csv, sentences, tables. Never imports torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from headwater import stats
from headwater.config.arms import BASE_MODELS, CONTRASTS
from headwater.report import contrasts
from headwater.report.contrasts import COMPARISON, find_contrast, interval_note, reading
from headwater.report.format import count, join_and, p_text, percent, plain_table, points, units
from headwater.report.study import EvalCounts, read_study
from headwater.report.view import Column, Table
from headwater.runs.sweep import Sweep, Value, text_of
from headwater.storage.run_dir import RunDir, read_json

WORDS = {"holds": "better", "undecided": "undecided", "does not hold": "worse"}
Results = Mapping[int, EvalCounts]
"""seed -> graded completions of one arm on one evaluation"""
CSV_HEAD = ("arm", "eval", "accuracy", "low", "high", "seeds", "labels", "checks", "flops", "failed")


def build(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The contents of sweep.json.

    failed  folder name of a point -> its error message; a point without a report that is not in here has not run yet
    """
    names = {*sweep.arms, *BASE_MODELS}
    rows: list[dict[str, Any]] = []
    results: list[tuple[Value, str, str, Results]] = []
    for point in sweep.points:
        run = RunDir(out / point.name)
        finished = run.report_json.exists()
        report = read_json(run.report_json) if finished else {"seeds": [], "evals": [], "arms": {}, "contrasts": []}
        by_arm: dict[tuple[str, str], Results] = {}
        if finished:
            study = read_study([run.path])
            by_arm = {(arm, name): study.results(arm, name) for arm in study.arms for name in study.evals}
        results += [(point.value, *key, graded) for key, graded in by_arm.items() if graded]
        known = [contrast for contrast in report["contrasts"] if {contrast["a"], contrast["b"]} <= names]
        # The report makes the paper's comparisons; the sweep adds its own where the report lacks them.
        for a, b in pairs(sweep.arms):
            for name in report["evals"]:
                if find_contrast({"contrasts": known}, a, b, name) is None:
                    head = {"a": a, "b": b, "eval": name}
                    known += _contrast(head, by_arm.get((a, name), {}), by_arm.get((b, name), {}))
        arms = {name: arm for name, arm in report["arms"].items() if name in names and arm["accuracy"]}
        rows.append(
            {
                "value": point.value,
                "failed": failed.get(point.name),
                "command": sweep.study_command(point, out),
                "report": str(run.report_json.relative_to(out)) if finished else None,
                "page": str(run.report_html.relative_to(out)) if finished else None,
                "seeds": report["seeds"],
                "evals": report["evals"],
                "arms": {
                    name: {key: arm[key] for key in ("accuracy", "labels", "flops")} for name, arm in arms.items()
                },
                "contrasts": known,
            }
        )
    summary: dict[str, Any] = {
        "recipe": sweep.title,
        "vary": sweep.vary,
        "field": sweep.field,
        "values": [point.value for point in sweep.points],
        "seeds": list(sweep.seeds),
        "arms": list(sweep.arms),
        "evals": list(dict.fromkeys(name for row in rows for name in row["evals"])),
        "command": sweep.command(out),
        "points": rows,
        "across": [],
    }
    # Each arm at each value against itself at the first value where it finished.
    for arm in sweep.arms:
        for name in summary["evals"]:
            by_value = [(value, graded) for value, *key, graded in results if key == [arm, name]]
            for value, graded in by_value[1:]:
                head = {"arm": arm, "a": value, "b": by_value[0][0], "eval": name}
                summary["across"] += _contrast(head, graded, by_value[0][1])
    return {**summary, "said": sentences(summary)}


def _contrast(head: Mapping[str, Any], first: Results, second: Results) -> list[dict[str, Any]]:
    """First minus second, paired over the seeds and problems that both have; empty where there are none."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return []
    graded = [by_seed[seed] for by_seed in (first, second) for seed in seeds]
    values_SP, ids = contrasts.seed_matrix(graded, contrasts.accuracy)
    if not ids:
        return []
    found = stats.contrast(values_SP[: len(seeds)], values_SP[len(seeds) :])
    numbers = {key: contrasts.rounded(getattr(found, key)) for key in ("difference", "low", "high", "p")}
    return [{**head, **numbers, "seeds": len(seeds), "problems": len(ids)}]


def as_csv(summary: dict[str, Any]) -> str:
    """A row for each value, arm (base models included) and evaluation; one row for a point without results."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow((summary["vary"], *CSV_HEAD))
    for point in summary["points"]:
        value, failed = text_of(point["value"]), point["failed"] or ""
        for name, arm in point["arms"].items():
            costs = (arm["labels"]["distinct"], arm["labels"]["checks"], arm["flops"])
            for eval_name, scored in arm["accuracy"].items():
                interval = (scored["mean"], scored["low"], scored["high"])
                writer.writerow((value, name, eval_name, *interval, len(scored["per_seed"]), *costs, failed))
        if not point["arms"]:
            writer.writerow((value, *[""] * 9, failed or "not run yet"))
    return sink.getvalue()


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The paper's comparisons among these arms; where there are none, each arm against the first."""
    named = [(a, b) for a, b in CONTRASTS if a in arms and b in arms]
    return named or [(arm, arms[0]) for arm in arms[1:]]


def comparisons(summary: dict[str, Any], eval_name: str) -> list[tuple[str, str, list[tuple[Value, dict[str, Any]]]]]:
    """(a, b, [(value, contrast of a with b)]) for each pair of arms; of a single arm, each value against the first."""
    if len(summary["arms"]) == 1:
        arm = summary["arms"][0]
        across = [c for c in summary["across"] if (c["arm"], c["eval"]) == (arm, eval_name)]
        return [(arm, f"{arm} at {at(summary, [across[0]['b']])}", [(c["a"], c) for c in across])] if across else []
    found = []
    for a, b in pairs(summary["arms"]):
        by_value = [(point["value"], find_contrast(point, a, b, eval_name)) for point in summary["points"]]
        found.append((a, b, [(value, contrast) for value, contrast in by_value if contrast is not None]))
    return [one for one in found if one[2]]


# Sentences ------------------------------------------------------------------------------------------------------------


def names(values: Sequence[Value]) -> list[str]:
    """Values as text, without the folders and prefixes of model names where the rest still differs.

    Example: `names(["pocket:a", "models/b", 0.5])` is `["a", "b", "0.5"]`.
    """
    texts = [text_of(value) for value in values]
    short = [re.split(r"[:/]", text.rstrip("/"))[-1] for text in texts]
    return short if len(set(short)) == len(short) else texts


def at(summary: dict[str, Any], values: Sequence[Value]) -> str:
    """Example: `labels 64, 128 and 256`."""
    text = dict(zip(summary["values"], names(summary["values"]), strict=True))
    return f"{summary['vary']} {join_and([text[value] for value in values])}"


def sentences(summary: dict[str, Any]) -> list[str]:
    """Where one arm is better than the other, where their order changes, and which points failed.

    Example: `On sums, at labels 64 bridge is better than direct_grpo; at labels 256 bridge cannot be told from direct_grpo.`
    """
    found = []
    for eval_name in summary["evals"]:
        for a, b, by_value in comparisons(summary, eval_name):
            judged = [(value, reading(contrast)) for value, contrast in by_value]
            groups = {one: [value for value, verdict in judged if verdict == one] for one in COMPARISON}
            parts = [f"at {at(summary, groups[one])} {a} {COMPARISON[one]} {b}" for one in groups if groups[one]]
            found.append(f"On {eval_name}, {'; '.join(parts)}.")
            decided = [(value, verdict) for value, verdict in judged if verdict != "undecided"]
            for (one, before), (two, after) in pairwise(decided):
                if before != after and len(summary["arms"]) > 1:
                    end = at(summary, [two]).removeprefix(f"{summary['vary']} ")
                    found[-1] += f" The order turns between {at(summary, [one])} and {end}."
            if len(summary["arms"]) == 1:
                found[-1] += _highest(summary, a, eval_name)
    for point in summary["points"]:
        if point["failed"]:
            found.append(f"{at(summary, [point['value']])} failed: {point['failed'].rstrip('.')}.")
        elif not point["arms"]:
            found.append(f"{at(summary, [point['value']])} has not run yet.")
    return found


def _highest(summary: dict[str, Any], arm: str, eval_name: str) -> str:
    accuracies = [(accuracy(point, arm, eval_name), point["value"]) for point in summary["points"]]
    mean, value = max(((one["mean"], value) for one, value in accuracies if one), key=lambda pair: pair[0])
    highest = f"Highest at {at(summary, [value])}, {percent(mean)} %"
    return f" {highest}; as the highest of several it overstates what new runs would give."


def note(summary: dict[str, Any]) -> str:
    """What the intervals cover, and that values are not corrected for multiple comparisons."""
    several = "each value is judged by itself, without a correction for their number"
    return "; ".join([interval_note(summary), *[several] * (len(summary["values"]) > 1)])


# Tables ---------------------------------------------------------------------------------------------------------------


def shown_arms(summary: dict[str, Any]) -> list[str]:
    """The base models, then the arms of the sweep, without those that no point has."""
    present = {name for point in summary["points"] for name in point["arms"]}
    return [name for name in (*BASE_MODELS, *summary["arms"]) if name in present]


def seeds_text(summary: dict[str, Any]) -> str:
    return f"seed{'s' * (len(summary['seeds']) != 1)} {', '.join(map(str, summary['seeds']))}"


def accuracy(point: dict[str, Any], arm: str, eval_name: str) -> dict[str, Any] | None:
    """Mean and interval of an arm at a point; None without a result."""
    scored: dict[str, Any] | None = point["arms"].get(arm, {}).get("accuracy", {}).get(eval_name)
    return scored


def cell(point: dict[str, Any], arm: str, eval_name: str) -> str:
    """Accuracy with interval, such as `67.5 [64.2, 70.7]`; without a result, `failed` or a dash."""
    scored = accuracy(point, arm, eval_name)
    if scored is None:
        return "failed" if point["failed"] else "–"
    return f"{percent(scored['mean'])} [{percent(scored['low']):>4}, {percent(scored['high']):>4}]"


def tables(summary: dict[str, Any]) -> list[Table]:
    """Accuracy by value and arm, and the differences of compared arms, for each evaluation."""
    vary, arms, values, texts = summary["vary"], shown_arms(summary), summary["values"], names(summary["values"])
    found = []
    for eval_name in summary["evals"]:
        title = f"{summary['recipe']} · {seeds_text(summary)} · accuracy on {eval_name}, % [95 %]"
        cells = [[cell(point, arm, eval_name) for arm in arms] for point in summary["points"]]
        rows = [[text, *row] for text, row in zip(texts, cells, strict=True)]
        found.append(Table(title, columns(vary, *arms), rows))
        compared = [
            (values.index(value), f"{a} − {b}", contrast)
            for a, b, by_value in comparisons(summary, eval_name)
            for value, contrast in by_value
        ]
        rows = []
        for place, what, c in sorted(compared, key=lambda row: row[0]):
            interval = f"{points(c['difference'])} [{points(c['low']):>5}, {points(c['high']):>5}]"
            rows.append([texts[place], what, interval, p_text(c["p"]), WORDS[reading(c)]])
        if rows:
            title = f"differences on {eval_name} in points, 95 % interval, two-sided p, paired"
            found.append(Table(title, columns(vary, "a − b", "difference [95 %]", "p", "a is"), rows))
    return found


def cost_table(summary: dict[str, Any]) -> Table:
    """Labels and FLOPs of each trained arm at each value, means per seed."""
    arms = [arm for arm in shown_arms(summary) if arm not in BASE_MODELS]
    rows = []
    for text, point in zip(names(summary["values"]), summary["points"], strict=True):
        row = [text]
        for spent in (point["arms"].get(arm) for arm in arms):
            trained = spent is not None and spent["flops"]
            row.append(count(spent["labels"]["distinct"]) if trained else "–")
            row.append(units(spent["flops"], "F").replace(" ", "") if trained else "–")
        rows.append(row)
    heads = [head for arm in arms for head in (f"labels, {arm}", f"FLOPs, {arm}")]
    return Table("cost of each arm", columns(summary["vary"], *heads), rows)


def dry_run_table(vary: str, rows: Sequence[dict[str, Any]]) -> RichTable:
    """The rows of `sweeps.dry_run` for a console."""
    heads = [vary, "nodes", "shared", "labels", "steps", "tokens ≤", "teacher tokens ≤", "FLOPs ≤", "memory"]
    bounds = ("tokens_sampled_at_most", "tokens_teacher_scored_at_most", "flops_at_most")
    cells = []
    for row in rows:
        counts = [count(row[key]) for key in ("nodes", "shared", "labels", "steps")]
        cells.append(
            [text_of(row["value"]), *counts, *(units(row[key]) for key in bounds), units(row["memory_bytes"], "B")]
        )
    table = rich_table(Table("what would run", columns(*heads), cells))
    table.caption = "shared: nodes of an earlier value, which run once; labels: distinct problems, of one node"
    return table


def terminal_table(summary: dict[str, Any]) -> Group:
    """Tables and sentences for a console of 100 columns or more."""
    parts: list[RichTable | Text] = [*map(rich_table, tables(summary)), *map(Text, [*summary["said"], note(summary)])]
    return Group(*[item for part in parts for item in (part, Text(""))])


def columns(*titles: str) -> list[Column]:
    """Columns of rows that are lists of texts; all but the first one are aligned to the right."""
    return [Column(title, itemgetter(index), "right" if index else "left") for index, title in enumerate(titles)]


def rich_table(table: Table) -> RichTable:
    rich = plain_table(table.caption)
    for column in table.columns:
        rich.add_column(Text(column.title), justify=column.align, overflow="fold")
    for row in table.rows:
        rich.add_row(*row)
    return rich
