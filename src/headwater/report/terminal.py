"""The report in a terminal of 100 columns or more: arms, predictions, comparisons, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headwater.report import guards
from headwater.report.stage_table import paths
from headwater.report.text import (
    apart,
    count,
    duration,
    grouped,
    interval_note,
    named_contrasts,
    p_text,
    percent,
    plain_table,
    points,
    ratio,
    reading,
    units,
)

LONG_NAME = 14
"""Arms with longer names leave no room for accuracies and costs in one table."""


def terminal_table(report: dict[str, Any]) -> Group:
    """Every table of the report that a terminal has room for, and the verdict below them."""
    parts: list[Table | Text] = [*_arms_tables(report), *_path_tables(report), *_contrast_tables(report)]
    parts += [*_prediction_tables(report), *(Text(f"warning: {one}") for one in guards.lines(report))]
    parts.append(Text(report["verdict"]))
    return Group(*[item for part in parts for item in (part, Text(""))])


def _arms_tables(report: dict[str, Any]) -> list[Table]:
    """One table where it fits; else the accuracies, two or three evaluations side by side, and the costs."""
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    title = f"{report['recipe']} · {seeds}"
    evals: list[str] = report["evals"]
    short = max(map(len, report["arms"])) <= LONG_NAME
    if len(evals) <= 1 and short:
        return [_arms_table(report, f"{title}{''.join(f' · accuracy on {name}, %' for name in evals)}", evals, True)]
    side = 3 if short else 2
    parts = [evals[start : start + side] for start in range(0, len(evals), side)]
    scores = [_arms_table(report, f"{title} · accuracy on {', '.join(part)}, %", part, False) for part in parts]
    return [*scores, _arms_table(report, "costs", [], True)]


def _arms_table(report: dict[str, Any], title: str, evals: Sequence[str], costs: bool) -> Table:
    table = plain_table(title)
    table.add_column("arm", no_wrap=True)
    best = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()}
    k = best.pop() if len(best) == 1 else "k"
    for name in evals:
        table.add_column("accuracy [95 %]" if len(evals) == 1 else name, justify="right", no_wrap=True)
        table.add_column(f"pass@{k}", justify="right", no_wrap=True)
    for head in ("labels", "checks", "sampled", "trained", "scored", "FLOPs", "time") if costs else ():
        table.add_column(head, justify="right", no_wrap=True)
    for name, arm in report["arms"].items():
        scores = [cell for eval_name in evals for cell in _scores(arm, eval_name)]
        table.add_row(name, *scores, *(_spent(arm) if costs else []), style=None if arm["accuracy"] else "dim")
    if costs:
        notes = ["labels, tokens (sampled, trained on, scored by the teacher), FLOPs and time: mean per seed"]
        table.caption = "\n".join([*notes, *apart(report), *_waiting(report)])
    return table


def _waiting(report: dict[str, Any]) -> list[str]:
    notes = []
    for name, arm in report["arms"].items():
        for seed, failure in arm["failed"].items():
            why = f"{failure['stage']} failed: {failure['sentence']}"
            notes.append(f"{name}: {failure['state']} on seed {seed} ({why})")
        notes += [f"{name}: not finished on seed {seed} (waits for {node})" for seed, node in arm["unfinished"].items()]
    return notes


def _scores(arm: dict[str, Any], eval_name: str) -> list[str]:
    accuracy = arm["accuracy"].get(eval_name)
    if accuracy is None:
        states = {failure["state"] for failure in arm["failed"].values()}
        return [min(states) if states else "unfinished" if arm["unfinished"] else "–", "–"]
    best = list(arm["pass_at_k"][eval_name].values())[-1]
    interval = f"[{percent(accuracy['low']):>4}, {percent(accuracy['high']):>4}]"
    return [f"{percent(accuracy['mean'])} {interval}", percent(best["mean"])]


def _spent(arm: dict[str, Any]) -> list[str]:
    tokens = [units(arm["tokens"][key]) for key in ("sampled", "trained", "teacher_scored")]
    flops = units(arm["flops"], "F").replace(" ", "")
    costs = [count(arm["labels"]["distinct"]), units(arm["labels"]["checks"]), *tokens, flops, duration(arm["seconds"])]
    return ["–" if cell in ("0", "0F", "0 s") else cell for cell in costs]


def _path_tables(report: dict[str, Any]) -> list[Table]:
    tables = []
    for eval_name in report["evals"]:
        rows = paths(report, eval_name)
        if rows:
            table = plain_table(f"accuracy on {eval_name} before, between and after the stages, %")
            for head in ("arm", "teacher", "student"):
                table.add_column(head, no_wrap=head == "arm")
            for row in rows:
                table.add_row(*row)
            tables.append(table)
    return tables


def _contrast_tables(report: dict[str, Any]) -> list[Table]:
    named, tables = named_contrasts(report), []
    for eval_name in report["evals"]:
        held = [c for c in named if c["eval"] == eval_name]
        if not held:
            continue
        where = f" on {eval_name}" if len(report["evals"]) > 1 else ""
        table = plain_table(f"differences{where} in points, 95 % interval, two-sided p")
        table.add_column("a − b", no_wrap=True)
        for head in ("difference [95 %]", "p", "labels a / b", "FLOPs a/b"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("a above b", no_wrap=True)
        for title, group in grouped(held):
            table.add_section()
            table.add_row(Text(title.lower(), style="italic"))
            for c in group:
                table.add_row(
                    f"{c['a']} − {c['b']}",
                    f"{points(c['difference'])} [{points(c['low']):>5}, {points(c['high']):>5}]",
                    p_text(c["p"]),
                    f"{count(c['labels']['a'])} / {count(c['labels']['b'])}",
                    ratio(c),
                    reading(c),
                )
        table.caption = (
            f"{interval_note(report)}; holds: the interval is above zero and p < 0.05; compute is equal: the smaller is at "
            "least 90 % of the larger"
        )
        tables.append(table)
    return tables


def _prediction_tables(report: dict[str, Any]) -> list[Table]:
    rows = [row for row in report["predictions"] if row["reading"] != "not measured"]
    if not rows:
        return []
    table, several = plain_table("the paper's predictions"), len(report["evals"]) > 1
    for head in ("", *(["eval"] if several else []), "claim", "reading"):
        table.add_column(head, no_wrap=head != "claim")
    for row in rows:
        table.add_row(row["name"], *([row["eval"]] if several else []), row["claim"], row["reading"])
    return [table]
