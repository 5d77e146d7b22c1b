"""Result files of `headwater eval`: write, print as a table, and compare two, paired by problem."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater import stats
from headwater.errors import UserError
from headwater.evaluation import Evaluation
from headwater.storage.files import write_atomic


@dataclass(frozen=True)
class Comparison:
    """Second evaluation minus the first on one data set: share of correct completions, 95 % interval, two-sided p-value.

    reading   `lenient` (what the grader finds) or `strict` (only the form that the prompt asks for)
    problems  that both evaluated
    """

    data: str
    reading: str
    first_model: str
    second_model: str
    problems: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


def to_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What `headwater eval --json` prints: one evaluation, or `{"evaluations": [...]}` for several."""
    values = [evaluation.to_json() for evaluation in evaluations]
    return values[0] if len(values) == 1 else {"evaluations": values}


def write(path: Path, evaluations: Sequence[Evaluation]) -> None:
    write_atomic(path, json.dumps(to_json(evaluations), ensure_ascii=False) + "\n")


def text(evaluations: Sequence[Evaluation]) -> str:
    """Lines for a terminal: one evaluation in full, or a table with a row for each."""
    if len(evaluations) == 1:
        return evaluations[0].text()
    header = [
        "model",
        "data",
        "problems",
        *dict.fromkeys(name for each in evaluations for name in each.measures),
        "cut",
    ]
    rows = [
        [
            each.model,
            each.data,
            str(each.problems),
            *(_cell(each.measures.get(name)) for name in header[3:-1]),
            f"{each.truncated:.1%}",
        ]
        for each in evaluations
    ]
    return _table([header, *rows])


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compare two result files on the data sets that both hold; several models on one data set are paired in their order.

    Raises UserError for a file that is no result file, and where no problem is in both.
    """
    sets = [_by_data(path) for path in (first, second)]
    shared = [name for name in sets[0] if name in sets[1]]
    comparisons = []
    for name in shared:
        pair = [each[name] for each in sets]
        if len(pair[0]) != len(pair[1]):
            raise UserError(
                f"eval --compare: {first} holds {len(pair[0])} models on {name} and {second} {len(pair[1])}"
            )
        for a, b in zip(*pair, strict=True):
            comparisons += _compare_pair(name, a, b)
    if not comparisons:
        raise UserError(f"eval --compare: no problem is in both {first} and {second}")
    return comparisons


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """A table of comparisons for a terminal."""
    header = ["data", "reading", "first", "second", "problems", "difference", "95% interval", "p"]
    rows = [
        [
            row.data, row.reading, f"{row.first_model} {row.first:.1%}", f"{row.second_model} {row.second:.1%}", str(row.problems),
            f"{100 * row.difference:+.1f} points", f"{100 * row.low:+.1f} to {100 * row.high:+.1f}", f"{row.p:.2g}",
        ]
        for row in comparisons
    ]  # fmt: skip
    return _table([header, *rows])


def _compare_pair(data: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Comparison]:
    problems = sorted(a["by_problem"].keys() & b["by_problem"].keys())
    comparisons = []
    for reading, key in (("lenient", "correct"), ("strict", "strict")):
        if not problems or not all(key in each["by_problem"][problem] for each in (a, b) for problem in problems):
            continue
        a_1P, b_1P = (np.array([[each["by_problem"][problem][key] for problem in problems]]) for each in (a, b))
        contrast = stats.contrast(b_1P, a_1P)
        comparisons.append(
            Comparison(
                data, reading, a["model"], b["model"], len(problems), float(a_1P.mean()), float(b_1P.mean()),
                contrast.difference, contrast.low, contrast.high, contrast.p,
            )
        )  # fmt: skip
    return comparisons


def _by_data(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The evaluations of a result file by the name of their data set's file, so that it may lie elsewhere."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        evaluations = values.get("evaluations", [values])
        by_data: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for evaluation in evaluations:
            shares = [float(share) for problem in evaluation["by_problem"].values() for share in problem.values()]
            if not all(0.0 <= share <= 1.0 for share in shares):
                raise ValueError("a share outside 0 to 1")
            by_data[Path(str(evaluation["data"])).name].append({**evaluation, "model": str(evaluation["model"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"eval --compare: {path} is not a result of `headwater eval --save` ({type(error).__name__}: {error})"
        ) from None
    return dict(by_data)


def _cell(interval: stats.Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.1%} ({interval.low:.1%} – {interval.high:.1%})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
