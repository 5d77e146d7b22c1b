"""A report's numbers in words: units that people read, what a comparison says, in which terms it is a fair one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.config.arms import CONTRASTS

Reading = Literal["holds", "does not hold", "undecided"]

GROUPS: tuple[tuple[str, list[str]], ...] = (
    ("Equal labels and compute", ["labels", "compute"]),
    ("Equal labels", ["labels"]),
    ("Equal compute", ["compute"]),
    ("Neither equal", []),
)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, signed. Example: `points(-0.012)` is `−1.2`."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def units(number: float, base_unit: str = "") -> str:
    """Three digits and a prefix. Example: `units(1234567)` is `1.23M`, `units(3.4e13, "FLOPs")` is `34.0 TFLOPs`."""
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
    """A count that is whole in one run and may be a mean over several."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def listed(names: Sequence[str]) -> str:
    """Example: `listed(["a", "b", "c"])` is `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def reading(contrast: dict[str, Any]) -> Reading:
    """Does `a` do better than `b`? Only when both the interval and p say so; "does not hold" is the reverse, shown."""
    if contrast["p"] < 0.05 and contrast["low"] > 0:
        return "holds"
    return "does not hold" if contrast["p"] < 0.05 and contrast["high"] < 0 else "undecided"


def find_contrast(report: dict[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    wanted = (a, b, eval_name)
    return next((c for c in report["contrasts"] if (c["a"], c["b"], c["eval"]) == wanted), None)


def named_contrasts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons of CONTRASTS; where none of them is there, every arm against the student before."""
    named = [c for c in report["contrasts"] if (c["a"], c["b"]) in CONTRASTS]
    return named or list(report["contrasts"])


def grouped(contrasts: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Comparisons by what is equal in them, in the order of GROUPS; groups without any are left out."""
    groups = [(title, [c for c in contrasts if c["equal"] == equal]) for title, equal in GROUPS]
    return [(title, held) for title, held in groups if held]


def difference(c: dict[str, Any]) -> str:
    """Example: `bridge − replay +3.6 points, 95 % +1.0 to +6.3, p 0.009`."""
    return (
        f"{c['a']} − {c['b']} {points(c['difference'])} points, 95 % {points(c['low'])} to {points(c['high'])}, "
        f"p {p_text(c['p'])}"
    )


def extent(c: dict[str, Any]) -> str:
    return f"{c['seeds']} seed{'s' * (c['seeds'] != 1)} × {c['problems']} problems"


def ratio(c: dict[str, Any]) -> str:
    """FLOPs of a as a multiple of those of b. Example: `3.2×`; `–` where one of them took none."""
    a, b = c["flops"]["a"], c["flops"]["b"]
    return f"{a / b:.2f}×" if a and b else "–"


def interval_note(report: dict[str, Any]) -> str:
    """What the intervals and p speak of: one seed says nothing about training again."""
    if len(report["seeds"]) > 1:
        return "the interval is for new problems and training again, p for new problems and these models"
    return "one seed: interval and p are for new problems and these very models; training again would vary more"


def apart(report: dict[str, Any]) -> list[str]:
    """Sentences on what was spent beside training: labels of the validation set, FLOPs of evaluating and measuring."""
    found = []
    arms: dict[str, Any] = {name: arm["apart"] for name, arm in report["arms"].items()}
    looked = {name: spent["validation"]["labels"]["distinct"] for name, spent in arms.items()}
    looked = {name: number for name, number in looked.items() if number}
    if looked:
        number = count(max(looked.values()))
        found.append(f"and {number} validation labels, which decided when stages end, in {listed([*looked])}")
    texts = {"eval": "evaluating", "validation": "validating", "measure": "measuring the conditions (without labels)"}
    most = {text: max(spent[purpose]["flops"] for spent in arms.values()) for purpose, text in texts.items()}
    said = [f"{text} {units(flops, 'FLOPs')}" for text, flops in most.items() if flops]
    return [*found, f"not in these figures, at most an arm: {', '.join(said)}"] if said else found


def plain_table(title: str) -> Table:
    """A table without columns yet, as every verb prints it: a title at the left, a line under the heads."""
    return Table(
        title=Text(title),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def console(file: IO[str] | None = None) -> Console:
    """As wide as the terminal, and 110 columns where the output is a file or a pipe."""
    target = file or sys.stdout
    return Console(file=target) if target.isatty() or "COLUMNS" in os.environ else Console(file=target, width=110)
