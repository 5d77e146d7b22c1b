"""Sections of the report's page on what the arms say: the predictions, the comparisons, accuracy against its costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from headwater.report import figures
from headwater.report.contrasts import (
    difference_text,
    find_contrast,
    group_by_equality,
    interval_note,
    named_contrasts,
    reading,
)
from headwater.report.format import count, p_text, percent, points, units
from headwater.report.html_parts import AXIS, escaped, framed, interval, noted, section, table, td
from headwater.report.svg import spanning

MARKS = {"holds": "▲", "does not hold": "▼", "undecided": "○", "not measured": "–"}


def headline(report: dict[str, Any]) -> str:
    """One sentence: the bridge beside direct GRPO where a study has both, else its best arm."""
    if not report["evals"]:
        return "No arm has a result yet."
    eval_name = report["evals"][0]
    found = find_contrast(report, "bridge", "direct_grpo", eval_name)
    if found is not None:
        verb = {"holds": "beats", "does not hold": "loses to", "undecided": "cannot be told apart from"}[reading(found)]
        labels = found["labels"]
        spent = f"{count(labels['a'])} labels each" if labels["a"] == labels["b"] else "labels not equal"
        return f"The bridge {verb} direct GRPO on {eval_name}: {difference_text(found).split('direct_grpo ', 1)[1]}; {spent}."
    held = {name: arm["accuracy"][eval_name] for name, arm in report["arms"].items() if eval_name in arm["accuracy"]}
    best = max(held, key=lambda name: held[name]["mean"])
    one = held[best]
    return f"Best on {eval_name}: {best} with {percent(one['mean'])} %, 95 % {percent(one['low'])} to {percent(one['high'])}."


def chips(report: dict[str, Any]) -> str:
    """The predictions' readings on the first evaluation, as short as they can be said."""
    first = report["evals"][:1]
    said = [
        f"<li>{MARKS[row['reading']]} <strong>{escaped(row['name'])}</strong> {escaped(row['reading'])}</li>"
        for row in report["predictions"]
        if row["reading"] != "not measured" and [row["eval"]] == first
    ]
    return f'<ul class="chips" aria-label="The paper\'s predictions">{"".join(said)}</ul>' if said else ""


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
    return section("The paper's predictions", table("P1 to P3", heads, lines, "told") + noted(note))


def comparisons(report: dict[str, Any], album: figures.Album) -> str:
    """Every named contrast, by whether labels, compute or both are equal in it; the rest folded."""
    if not report["contrasts"]:
        return ""
    several = len(report["evals"]) > 1
    named = named_contrasts(report)
    rest = [one for one in report["contrasts"] if one not in named]
    ends = extent(named)
    axis = axis_head(ends, points)
    heads = [
        "a − b",
        *(["evaluation"] if several else []),
        "a better than b",
        "points",
        "95 %",
        axis,
        "p",
        "labels a / b",
    ]
    heads += ["FLOPs a / b", "seeds × problems"]
    rows = []
    for title, held in group_by_equality(named):
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(heads)}">{escaped(title)}</th></tr>')
        rows += [_contrast_row(one, several, ends) for one in held]
    tables = table("Differences of accuracy, by what is equal in them", heads, rows)
    if rest:
        wide = extent(rest)
        heads[heads.index(axis)] = axis_head(wide, points)
        lines = [_contrast_row(one, several, wide) for one in rest]
        against = table("Every arm against the student before", heads, lines)
        tables += f"<details><summary>Every arm against the student before</summary>{against}</details>"
    note = (
        "Paired on the same problems and seeds; a bootstrap gives the interval, a sign-flip permutation test p: "
        f"{interval_note(report)}. Labels are the distinct ones that training looked at, FLOPs those of training, both as "
        "means per seed; compute counts as equal where the smaller is at "
        "least 90 % of the larger. Not corrected for the number of comparisons. “Holds”: "
        "interval above zero and p < 0.05; “does not hold”: the reverse is shown; else undecided."
    )
    for eval_name in report["evals"]:  # for papers; the page has them in its tables
        drawn = [
            figures.Row(f"{c['a']} − {c['b']}", c["difference"], c["low"], c["high"])
            for _, held in group_by_equality(named)
            for c in held
            if c["eval"] == eval_name
        ]
        if drawn:
            name = figures.named("contrasts", eval_name)
            album.add(figures.forest(name, f"Differences on {eval_name}", drawn, 0.0, "percentage points"))
    return section("Comparisons", tables + noted(note))


def extent(rows: Sequence[dict[str, Any]], keys: Sequence[str] = ("low", "high")) -> tuple[float, float]:
    """The ends of an axis on which all these intervals have room, and zero."""
    return spanning([0.0, *(row[key] for row in rows for key in keys)])


def axis_head(ends: tuple[float, float], said: Callable[[float], str]) -> str:
    """The head of a column of intervals: its ends. `table` marks it up."""
    return f"{AXIS}{said(ends[0])}{AXIS}{said(ends[1])}"


def _contrast_row(c: dict[str, Any], several: bool, ends: tuple[float, float]) -> str:
    says = reading(c)
    before = [*([c["eval"]] if several else [])]
    numbers = [points(c["difference"]), f"{points(c['low'])} to {points(c['high'])}"]
    after = [
        p_text(c["p"]),
        f"{count(c['labels']['a'])} / {count(c['labels']['b'])}",
        f"{units(c['flops']['a'])} / {units(c['flops']['b'])}",
        f"{c['seeds']} × {c['problems']}",
    ]
    cells = [*map(td, before), f'<td class="said">{MARKS[says]} {says}</td>', *map(td, numbers)]
    cells += [interval(c["difference"], c["low"], c["high"], ends, 0.0), *map(td, after)]
    return f'<tr><th scope="row">{escaped(c["a"])} − {escaped(c["b"])}</th>{"".join(cells)}</tr>'


def forests(report: dict[str, Any], album: figures.Album) -> None:
    """Each evaluation's arms, one below the other, for papers; the page has the same in its table."""
    for eval_name in report["evals"]:
        held = [(name, a["accuracy"][eval_name]) for name, a in report["arms"].items() if eval_name in a["accuracy"]]
        lines = [figures.Row(n, a["mean"], a["low"], a["high"], tuple(a["per_seed"].values())) for n, a in held]
        base = dict(held).get("base_student")
        if lines:
            name, level = figures.named("accuracy", eval_name), base["mean"] if base else None
            album.add(figures.forest(name, f"Accuracy on {eval_name}", lines, level, "%"))


def costs(report: dict[str, Any], album: figures.Album) -> str:
    """Accuracy against labels and against training FLOPs, on the recipe's first evaluation."""
    if not report["evals"]:
        return ""
    eval_name = report["evals"][0]
    drawn = [
        *_against(report, eval_name, lambda arm: arm["labels"]["distinct"], "distinct labels, mean per seed", count),
        *_against(report, eval_name, lambda arm: arm["flops"], "training FLOPs, mean per seed", _round, log=True),
    ]
    legend = "Points: means over seeds, with the 95 % interval. Arms of equal cost stand side by side. Dashed: the models before."
    return section("Labels and compute", framed([album.add(one) for one in drawn], legend, "pair")) if drawn else ""


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
) -> list[figures.Drawn]:
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
    name = figures.named("cost", axis.split(",")[0].replace(" ", "_"), eval_name)
    return [figures.against(name, title, shown, levels, axis, said, log)]
