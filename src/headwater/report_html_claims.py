"""Sections of the report's page on what the arms say: the predictions, the comparisons, accuracy against its costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from headwater import figures
from headwater.html_parts import escaped, framed, noted, section, table, td
from headwater.report_words import (
    count,
    grouped,
    interval_note,
    named_contrasts,
    p_text,
    points,
    reading,
    units,
)

MARKS = {"holds": "▲", "does not hold": "▼", "undecided": "○", "not measured": "–"}


def predictions(report: dict[str, Any]) -> str:
    """The paper's three predictions with the rule of each and the numbers it rests on."""
    rows = report["predictions"]
    if all(row["reading"] == "not measured" for row in rows):
        return ""
    several = len(report["evals"]) > 1
    lines = []
    for row in rows:
        cells = [f"<td>{escaped(row['eval'])}</td>"] if several else []
        cells.append(f'<td class="said">{MARKS[row["reading"]]} {escaped(row["reading"])}</td>')
        why = "".join(f"<li>{escaped(part)}</li>" for part in row["why"].split("; "))
        cells.append(f'<td><ul class="why">{why}</ul></td>')
        head = f'{escaped(row["name"])}<span class="text">{escaped(row["claim"])}</span>'
        head += f'<span class="text">{escaped(row["rule"])}</span>'
        lines.append(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>')
    heads = ["prediction", *(["evaluation"] if several else []), "reading", "why"]
    note = (
        "A prediction holds only if every part of its rule holds: the 95 % interval of the paired difference above zero and "
        "p < 0.05. It does not hold if any part is reversed, shown by interval and p; else it is undecided. “Not above” "
        "holds as long as no gain is shown."
    )
    return section("The paper's predictions", table("P1 to P3", heads, lines) + noted(note))


def comparisons(report: dict[str, Any]) -> str:
    """Every named contrast, by whether labels, compute or both are equal in it; the rest folded."""
    if not report["contrasts"]:
        return ""
    several = len(report["evals"]) > 1
    heads = ["a − b", *(["evaluation"] if several else []), "points", "95 %", "p", "labels a / b", "FLOPs a / b"]
    heads += ["seeds × problems", "a better than b"]
    named = named_contrasts(report)
    rest = [one for one in report["contrasts"] if one not in named]
    tables = "".join(
        table(title, heads, [_contrast_row(one, several) for one in held]) for title, held in grouped(named)
    )
    if rest:
        against = table("Every arm against the student before", heads, [_contrast_row(one, several) for one in rest])
        tables += f"<details><summary>Every arm against the student before</summary>{against}</details>"
    note = (
        "Paired on the same problems and seeds; a bootstrap gives the interval, a sign-flip permutation test p: "
        f"{interval_note(report)}. Labels are the distinct ones that training looked at, FLOPs those of training, both as "
        "means per seed; compute counts as equal where the smaller is at "
        "least 90 % of the larger. Not corrected for the number of comparisons. “Holds”: "
        "interval above zero and p < 0.05; “does not hold”: the reverse is shown; else undecided."
    )
    forests = []
    for eval_name in report["evals"]:
        lines = [
            figures.Row(f"{c['a']} − {c['b']}", c["difference"], c["low"], c["high"])
            for _, held in grouped(named)
            for c in held
            if c["eval"] == eval_name
        ]
        if lines:
            forests.append(figures.forest(f"Differences on {eval_name}", lines, 0.0, "percentage points"))
    return section("Comparisons", tables + noted(note) + framed(forests, ""))


def _contrast_row(c: dict[str, Any], several: bool) -> str:
    says = reading(c)
    cells = [
        *([c["eval"]] if several else []),
        points(c["difference"]),
        f"{points(c['low'])} to {points(c['high'])}",
        p_text(c["p"]),
        f"{count(c['labels']['a'])} / {count(c['labels']['b'])}",
        f"{units(c['flops']['a'])} / {units(c['flops']['b'])}",
        f"{c['seeds']} × {c['problems']}",
    ]
    last = f'<td class="said">{MARKS[says]} {says}</td>'
    return f'<tr><th scope="row">{escaped(c["a"])} − {escaped(c["b"])}</th>{"".join(map(td, cells))}{last}</tr>'


def forests(report: dict[str, Any]) -> list[str]:
    """Each evaluation's arms, one below the other."""
    drawn = []
    for eval_name in report["evals"]:
        held = [(name, a["accuracy"][eval_name]) for name, a in report["arms"].items() if eval_name in a["accuracy"]]
        lines = [figures.Row(n, a["mean"], a["low"], a["high"], tuple(a["per_seed"].values())) for n, a in held]
        base = dict(held).get("base_student")
        if lines:
            drawn.append(figures.forest(f"Accuracy on {eval_name}", lines, base["mean"] if base else None, "%"))
    return drawn


def costs(report: dict[str, Any]) -> list[str]:
    """Accuracy against labels and against training FLOPs, on the recipe's first evaluation."""
    if not report["evals"]:
        return []
    eval_name = report["evals"][0]
    return [
        *_against(report, eval_name, lambda arm: arm["labels"]["distinct"], "distinct labels, mean per seed", count),
        *_against(report, eval_name, lambda arm: arm["flops"], "training FLOPs, mean per seed", _round, log=True),
    ]


def _round(flops: float) -> str:
    """Example: `_round(2e9)` is `2G`, where `units` says `2.00G`."""
    return re.sub(r"\.0+(?=\D|$)", "", units(flops))


def _against(
    report: dict[str, Any],
    eval_name: str,
    cost: Callable[[dict[str, Any]], float],
    axis: str,
    said: Callable[[float], str],
    log: bool = False,
) -> list[str]:
    held = {name: arm for name, arm in report["arms"].items() if eval_name in arm["accuracy"]}
    levels = [(name, held[name]["accuracy"][eval_name]["mean"]) for name in held if name.startswith("base_")]
    shown = [
        figures.Point(name, cost(arm), *(arm["accuracy"][eval_name][key] for key in ("mean", "low", "high")))
        for name, arm in held.items()
        if not name.startswith("base_") and (cost(arm) > 0 or not log)
    ]
    if not shown or not any(one.cost for one in shown):
        return []
    title = f"Accuracy on {eval_name} against {axis.split(',')[0]}"
    return [figures.against(title, shown, levels, axis, said, log)]
