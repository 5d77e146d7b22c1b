"""Format numbers, lists and rich tables for the terminal and the report page."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.printing import PrintableConsole


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Difference of accuracies in percentage points with a sign. Example: `points(-0.012)` is `−1.2`."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def accuracy_text(accuracy: dict[str, Any]) -> str:
    """Example: `67.5 [64.2, 70.7]`."""
    return f"{percent(accuracy['mean'])} [{percent(accuracy['low']):>4}, {percent(accuracy['high']):>4}]"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def units(number: float, base_unit: str = "") -> str:
    """Three digits and an SI prefix. Example: `units(1234567)` is `1.23M`, `units(3.4e13, "FLOPs")` is `34.0 TFLOPs`."""
    space = " " if base_unit else ""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f}{space}{prefix}{base_unit}"
    return f"{number:.0f}{space}{base_unit}"


def duration(seconds: float) -> str:
    """Example: `duration(83)` is `83 s`, `duration(600)` is `10.0 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """Count with thousands separators; one decimal if it is a fractional mean over seeds."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def counted(number: float, noun: str) -> str:
    """Example: `counted(2, "label")` is `2 labels`."""
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def training_costs(arm: dict[str, Any]) -> str:
    """Costs of an arm of report.json. Example: `256 labels, 1.46 TFLOPs and 38 s of training`; empty for an untrained model."""
    if not arm["flops"]:
        return ""
    labels, flops = counted(arm["labels"]["distinct"], "label"), units(arm["flops"], "FLOPs")
    time = duration(arm["seconds"]).replace(" ", "\u00a0")
    return f"{labels}, {flops} and {time} of training"


def join_and(names: Sequence[str]) -> str:
    """Example: `join_and(["a", "b", "c"])` is `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """The rows, with their header, as the text of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def non_training_notes(report: dict[str, Any]) -> list[str]:
    """Notes on costs outside training: labels of the validation set, FLOPs of evaluation and measurement."""
    notes = []
    costs: dict[str, Any] = {name: arm["apart"] for name, arm in report["arms"].items()}
    validated = {name: cost["validation"]["labels"]["distinct"] for name, cost in costs.items()}
    validated = {name: labels for name, labels in validated.items() if labels}
    if validated:
        labels = count(max(validated.values()))
        notes.append(f"and {labels} validation labels, which decided when stages end, in {join_and([*validated])}")
    purposes = {"eval": "evaluation", "validation": "validation", "measure": "measuring the conditions (no labels)"}
    most = {text: max(cost[purpose]["flops"] for cost in costs.values()) for purpose, text in purposes.items()}
    parts = [f"{text} {units(flops, 'FLOPs')}" for text, flops in most.items() if flops]
    return [*notes, f"not included, at most per arm: {', '.join(parts)}"] if parts else notes


def seeds_text(report: dict[str, Any]) -> str:
    """Example: `seeds 0, 1, 2`."""
    return f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"


def plain_table(title: str) -> Table:
    """An empty rich table in the style of every command: title at the left, a line under the column heads."""
    return Table(
        title=Text(title),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def console(file: IO[str] | None = None) -> Console:
    """Rich console with the terminal's width, or 110 columns if the output is a file or a pipe."""
    target = file or sys.stdout
    width = None if target.isatty() or "COLUMNS" in os.environ else 110
    return PrintableConsole(file=target, width=width)
