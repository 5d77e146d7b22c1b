"""A sweep's points -> sweep.json, sweep.csv, the drawing and the page. Reads files only; never imports torch.

build(sweep, out, failed)   the values of sweep.json
write(sweep, out, failed)   build, and all the files
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater import stats
from headwater.report import sweep_figure, sweep_page
from headwater.report.study import EvalCounts, Study, read_study
from headwater.report.sweep_text import BASES, contrast_at, pairs, sentences
from headwater.runs.sweep import Point, Sweep, text_of
from headwater.storage.run_dir import read_json, write_atomic, write_json
from headwater.storage.sweep_dir import SweepDir


def write(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """Read the points' reports and write the sweep's files into `out`. Returns the values of sweep.json."""
    found = build(sweep, out, failed)
    folder = SweepDir(out)
    write_json(folder.json, found)
    write_atomic(folder.csv, as_csv(found))
    svg = ""
    if found["evals"]:
        svg, png = sweep_figure.draw(found)
        write_atomic(folder.svg, svg)
        write_atomic(folder.png, png)
    write_atomic(folder.html, sweep_page.page(found, svg))
    return found


def build(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The values of sweep.json.

    failed   the name of a point -> the sentence that it ended with; a point without a report and not among these has not
             run yet
    """
    runs = [SweepDir(out).point(point.name) for point in sweep.points]
    studies = [read_study([run.path]) if run.report_json.exists() else None for run in runs]
    rows = [
        _point(sweep, point, study, out, failed.get(point.name))
        for point, study in zip(sweep.points, studies, strict=True)
    ]
    found: dict[str, Any] = {
        "recipe": sweep.title,
        "vary": sweep.vary,
        "field": sweep.field,
        "values": [point.value for point in sweep.points],
        "seeds": list(sweep.seeds),
        "arms": list(sweep.arms),
        "evals": list(dict.fromkeys(name for row in rows for name in row["evals"])),
        "command": sweep.command(out),
        "points": rows,
        "across": across(sweep, studies),
    }
    return {**found, "said": sentences(found)}


def _point(sweep: Sweep, point: Point, study: Study | None, out: Path, failed: str | None) -> dict[str, Any]:
    shown = {"value": point.value, "failed": failed, "command": sweep.study(point, out)}
    if study is None:
        return {**shown, "report": None, "page": None, "seeds": [], "evals": [], "arms": {}, "contrasts": []}
    run = SweepDir(out).point(point.name)
    report = read_json(run.report_json)
    wanted = {*sweep.arms, *BASES}
    held: dict[str, Any] = {
        **shown,
        "report": str(run.report_json.relative_to(out)),
        "page": str(run.report_html.relative_to(out)),
        "seeds": report["seeds"],
        "evals": report["evals"],
        "arms": {
            name: {key: arm[key] for key in ("accuracy", "labels", "flops")}
            for name, arm in report["arms"].items()
            if name in wanted and arm["accuracy"]
        },
        "contrasts": [one for one in report["contrasts"] if {one["a"], one["b"]} <= wanted],
    }
    return {**held, "contrasts": held["contrasts"] + list(_further(sweep, study, held))}


def _further(sweep: Sweep, study: Study, held: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sweep's own comparisons where the report, which makes the paper's, has them not."""
    for a, b in pairs(sweep.arms):
        for eval_name in held["evals"]:
            if a in study.arms and b in study.arms and contrast_at(held, a, b, eval_name) is None:
                one = _paired(study.results(a, eval_name), study.results(b, eval_name))
                if one is not None:
                    yield {"a": a, "b": b, "eval": eval_name, **one}


def across(sweep: Sweep, studies: Sequence[Study | None]) -> list[dict[str, Any]]:
    """Each arm at each value against the same arm at the first value where it finished: paired over problems and seeds."""
    found = []
    for arm in sweep.arms:
        held = [(p, study) for p, study in zip(sweep.points, studies, strict=True) if study and arm in study.arms]
        for eval_name in dict.fromkeys(name for _, study in held for name in study.evals):
            graded = [(point, study.results(arm, eval_name)) for point, study in held]
            graded = [(point, by_seed) for point, by_seed in graded if by_seed]
            for point, by_seed in graded[1:]:
                first, reference = graded[0]
                one = _paired(by_seed, reference)
                if one is not None:
                    found.append({"arm": arm, "a": point.value, "b": first.value, "eval": eval_name, **one})
    return found


def _paired(first: Mapping[int, EvalCounts], second: Mapping[int, EvalCounts]) -> dict[str, Any] | None:
    """First minus second on the seeds and problems that both have; None where there are none."""
    seeds = sorted(first.keys() & second.keys())
    both = [[by_seed[seed] for seed in seeds] for by_seed in (first, second)]
    ids = sorted(set[str]().union(*(one.ids for side in both for one in side)))
    ids = [name for name in ids if all(name in one.ids for side in both for one in side)]
    if not ids:
        return None
    a_SP, b_SP = (np.stack([one.at(ids, stats.avg_at_k(one.correct, one.sampled)) for one in side]) for side in both)
    held = stats.contrast(a_SP, b_SP)
    numbers = {"difference": held.difference, "low": held.low, "high": held.high, "p": held.p}
    return {key: round(float(value), 6) for key, value in numbers.items()} | {
        "seeds": len(seeds),
        "problems": len(ids),
    }


CSV_HEAD = ("value", "arm", "eval", "accuracy", "low", "high", "seeds", "labels", "checks", "flops", "failed")


def as_csv(found: dict[str, Any]) -> str:
    """A row for each value, arm and evaluation, the base models among the arms; one for a point that has none."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow((found["vary"], *CSV_HEAD[1:]))
    for point in found["points"]:
        failed = point["failed"] or ""
        for name, arm in point["arms"].items():
            for eval_name, scored in arm["accuracy"].items():
                where = (text_of(point["value"]), name, eval_name)
                spent = (arm["labels"]["distinct"], arm["labels"]["checks"], arm["flops"])
                writer.writerow(
                    (*where, scored["mean"], scored["low"], scored["high"], len(scored["per_seed"]), *spent, failed)
                )
        if not point["arms"]:
            writer.writerow((text_of(point["value"]), *[""] * 9, failed or "not run yet"))
    return sink.getvalue()
