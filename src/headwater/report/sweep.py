"""Summarize a sweep's run directories: contents of sweep.json and sweep.csv, and sentences. Never imports torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.config.arms import BASE_MODELS, CONTRASTS
from headwater.report.contrasts import COMPARISON, find_contrast, paired_difference, reading
from headwater.report.format import csv_text, join_and, percent
from headwater.report.stages import accuracies
from headwater.report.study import Study, read_study
from headwater.runs.sweep import Sweep, Value, text_of
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir

NO_REPORT: dict[str, Any] = {"seeds": [], "evals": [], "arms": {}, "contrasts": []}


def build(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The contents of sweep.json: values of the points' reports, and the comparisons that no report makes.

    failed  folder name of a point -> its error message; a point without a report that is not in here has not run yet
    """
    points, studies = [], []
    for point in sweep.points:
        run = RunDir(out / point.name)
        finished = run.report_json.exists()
        report = read_json(run.report_json) if finished else NO_REPORT
        study = read_study([run.path]) if finished else Study({}, {}, {})
        studies.append(study)
        compared = {*sweep.arms, *BASE_MODELS}
        arms = {arm: row for arm, row in report["arms"].items() if arm in compared and row["accuracy"]}
        contrasts = [row for row in report["contrasts"] if {row["a"], row["b"]} <= compared]
        contrasts += [
            {"a": a, "b": b, "eval": name, **row}
            for a, b in pairs(sweep.arms)
            for name in report["evals"]
            if (a, b) not in CONTRASTS
            if (row := paired_difference(study.results(a, name), study.results(b, name)))
        ]
        points.append(
            {
                "value": point.value,
                "failed": failed.get(point.name),
                "command": sweep.study_command(point, out),
                "report": str(run.report_json.relative_to(out)) if finished else None,
                "page": str(run.report_html.relative_to(out)) if finished else None,
                "seeds": report["seeds"],
                "evals": report["evals"],
                "arms": {arm: {key: row[key] for key in ("accuracy", "labels", "flops")} for arm, row in arms.items()},
                "contrasts": contrasts,
            }
        )
    values, across = [point.value for point in sweep.points], []
    shown = [arm for point in points for arm in point["arms"].values()]
    evals = list(dict.fromkeys(name for arm in shown for name in arm["accuracy"]))
    for arm, name in itertools.product(sweep.arms, evals):
        by_value = [(value, study.results(arm, name)) for value, study in zip(values, studies, strict=True)]
        measured = [(value, results) for value, results in by_value if results]
        for value, results in measured[1:]:
            if row := paired_difference(results, measured[0][1]):
                across.append({"arm": arm, "a": value, "b": measured[0][0], "eval": name, **row})
    summary: dict[str, Any] = {
        "recipe": sweep.title,
        "vary": sweep.vary,
        "field": sweep.field,
        "values": values,
        "seeds": list(sweep.seeds),
        "arms": list(sweep.arms),
        "evals": evals,
        "command": sweep.command(out),
        "points": points,
        "across": across,
    }
    return {**summary, "said": sentences(summary)}


def as_csv(summary: dict[str, Any]) -> str:
    """A row for each value, arm (base models included) and evaluation; one row for a point without results."""
    heads = ("arm", "eval", "accuracy", "low", "high", "seeds", "labels", "checks", "flops", "failed")
    rows: list[tuple[Any, ...]] = [(summary["vary"], *heads)]
    for point in summary["points"]:
        value, failed = text_of(point["value"]), point["failed"] or ""
        for name, arm in point["arms"].items():
            costs = (arm["labels"]["distinct"], arm["labels"]["checks"], arm["flops"], failed)
            for eval_name, scored in arm["accuracy"].items():
                interval = (scored["mean"], scored["low"], scored["high"], len(scored["per_seed"]))
                rows.append((value, name, eval_name, *interval, *costs))
        if not point["arms"]:
            rows.append((value, *[""] * 9, failed or "not run yet"))
    return csv_text(rows)


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The paper's comparisons among these arms; where there are none, each arm against the first."""
    named = [(a, b) for a, b in CONTRASTS if a in arms and b in arms]
    return named or [(arm, arms[0]) for arm in arms[1:]]


def comparisons(summary: dict[str, Any], eval_name: str) -> list[tuple[str, str, dict[Value, dict[str, Any]]]]:
    """(a, b, value -> contrast of a with b) for each pair of arms; of a single arm, each value against the first."""
    if len(summary["arms"]) > 1:
        rows = [
            (a, b, {point["value"]: find_contrast(point, a, b, eval_name) for point in summary["points"]})
            for a, b in pairs(summary["arms"])
        ]
    else:
        across = [row for row in summary["across"] if row["eval"] == eval_name]
        against = f" at {summary['vary']} {names(summary)[across[0]['b']]}" if across else ""
        rows = [(arm, f"{arm}{against}", {row["a"]: row for row in across}) for arm in summary["arms"]]
    measured = [(a, b, {value: row for value, row in by_value.items() if row is not None}) for a, b, by_value in rows]
    return [(a, b, by_value) for a, b, by_value in measured if by_value]


def names(summary: dict[str, Any]) -> dict[Value, str]:
    """Values as text, without the folders and prefixes of model names where the rest still differs.

    Example: the values `pocket:a`, `models/b` and 0.5 have the names `a`, `b` and `0.5`.
    """
    texts = [text_of(value) for value in summary["values"]]
    short = [re.split(r"[:/]", text.rstrip("/"))[-1] for text in texts]
    return dict(zip(summary["values"], short if len(set(short)) == len(short) else texts, strict=True))


def sentences(summary: dict[str, Any]) -> list[str]:
    """Where one arm is better than the other, where their order changes, and which points failed.

    Example: `On sums, at labels 64 bridge is better than direct_grpo; at labels 256 bridge is not shown to differ from direct_grpo.`
    """
    text, vary, result = names(summary), summary["vary"], []
    for eval_name in summary["evals"]:
        for a, b, by_value in comparisons(summary, eval_name):
            readings = {value: reading(contrast) for value, contrast in by_value.items()}
            groups = {word: [text[value] for value in readings if readings[value] == word] for word in COMPARISON}
            parts = [
                f"at {vary} {join_and(groups[word])} {a} {COMPARISON[word]} {b}" for word in groups if groups[word]
            ]
            result.append(f"On {eval_name}, {'; '.join(parts)}.")
            if len(summary["arms"]) == 1:
                result[-1] += _highest(summary, a, eval_name)
                continue
            decided = [value for value in readings if readings[value] != "undecided"]
            for value, next_value in itertools.pairwise(decided):
                if readings[value] != readings[next_value]:
                    result[-1] += f" The order reverses between {vary} {text[value]} and {text[next_value]}."
    for point in summary["points"]:
        if point["failed"]:
            result.append(f"{vary} {text[point['value']]} failed: {point['failed'].rstrip('.')}.")
        elif not point["arms"]:
            result.append(f"{vary} {text[point['value']]} has not run yet.")
    return result


def _highest(summary: dict[str, Any], arm: str, eval_name: str) -> str:
    scores = {point["value"]: accuracies(point["arms"], eval_name).get(arm) for point in summary["points"]}
    means = {value: row["mean"] for value, row in scores.items() if row}
    value = max(means, key=means.__getitem__)
    highest = f"Highest at {summary['vary']} {names(summary)[value]}, {percent(means[value])} %"
    return f" {highest}; as the highest of several it overstates what new runs would give."
