"""Print the report as rich tables for a terminal of at least 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headwater.report.contrasts import flops_ratio, group_by_equality, interval_note, named_contrasts, reading
from headwater.report.format import count, duration, non_training_notes, p_text, percent, plain_table, points, units
from headwater.report.stages import accuracy_paths

LONG_NAME = 14
"""If an arm's name is longer, accuracies and costs go into separate tables."""


def terminal_table(report: dict[str, Any]) -> Group:
    """All tables of the report, then the warnings and the verdict."""
    parts: list[Table | Text] = [*_arms_tables(report), *_path_tables(report), *_contrast_tables(report)]
    parts += [*_prediction_tables(report), *(Text(_warning(row)) for row in report["warnings"])]
    parts.append(Text(report["verdict"]))
    return Group(*[item for part in parts for item in (part, Text(""))])


def _warning(row: dict[str, Any]) -> str:
    """Example: `warning: opd, step 40, seed 0 (bridge): truncation: 0.62 of the completions …`."""
    return (
        f"warning: {row['stage']}, step {row['step']}, seed {row['seed']} ({', '.join(row['arms'])}): {row['sentence']}"
    )


def _arms_tables(report: dict[str, Any]) -> list[Table]:
    """One table if it fits; else tables of two or three evaluations each, and one of the costs."""
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    title = f"{report['recipe']} · {seeds}"
    evals: list[str] = report["evals"]
    short = max(map(len, report["arms"])) <= LONG_NAME
    if len(evals) <= 1 and short:
        return [_arms_table(report, f"{title}{''.join(f' · accuracy on {name}, %' for name in evals)}", evals, True)]
    width = 3 if short else 2
    chunks = [evals[start : start + width] for start in range(0, len(evals), width)]
    scores = [_arms_table(report, f"{title} · accuracy on {', '.join(chunk)}, %", chunk, False) for chunk in chunks]
    return [*scores, _arms_table(report, "costs", [], True)]


def _arms_table(report: dict[str, Any], title: str, evals: Sequence[str], costs: bool) -> Table:
    table = plain_table(title)
    table.add_column("arm", no_wrap=True)
    largest = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()}
    k = largest.pop() if len(largest) == 1 else "k"
    for name in evals:
        table.add_column("accuracy [95 %]" if len(evals) == 1 else name, justify="right", no_wrap=True)
        table.add_column(f"pass@{k}", justify="right", no_wrap=True)
    for head in ("labels", "checks", "sampled", "trained", "scored", "FLOPs", "time") if costs else ():
        table.add_column(head, justify="right", no_wrap=True)
    for name, arm in report["arms"].items():
        scores = [cell for eval_name in evals for cell in _score_cells(arm, eval_name)]
        table.add_row(name, *scores, *(_cost_cells(arm) if costs else []), style=None if arm["accuracy"] else "dim")
    if costs:
        notes = ["labels, tokens (sampled, trained on, scored by the teacher), FLOPs and time: mean per seed"]
        table.caption = "\n".join([*notes, *non_training_notes(report), *_unfinished_notes(report)])
    return table


def _unfinished_notes(report: dict[str, Any]) -> list[str]:
    notes = []
    for name, arm in report["arms"].items():
        for seed, failure in arm["failed"].items():
            cause = f"{failure['stage']} failed: {failure['sentence']}"
            notes.append(f"{name}: {failure['state']} on seed {seed} ({cause})")
        notes += [f"{name}: not finished on seed {seed} (waits for {node})" for seed, node in arm["unfinished"].items()]
    return notes


def _score_cells(arm: dict[str, Any], eval_name: str) -> list[str]:
    accuracy = arm["accuracy"].get(eval_name)
    if accuracy is None:
        states = {failure["state"] for failure in arm["failed"].values()}
        return [min(states) if states else "unfinished" if arm["unfinished"] else "–", "–"]
    best_of_k = list(arm["pass_at_k"][eval_name].values())[-1]
    interval = f"[{percent(accuracy['low']):>4}, {percent(accuracy['high']):>4}]"
    return [f"{percent(accuracy['mean'])} {interval}", percent(best_of_k["mean"])]


def _cost_cells(arm: dict[str, Any]) -> list[str]:
    tokens = [units(arm["tokens"][key]) for key in ("sampled", "trained", "teacher_scored")]
    flops = units(arm["flops"], "F").replace(" ", "")
    cells = [count(arm["labels"]["distinct"]), units(arm["labels"]["checks"]), *tokens, flops, duration(arm["seconds"])]
    return ["–" if cell in ("0", "0F", "0 s") else cell for cell in cells]


def _path_tables(report: dict[str, Any]) -> list[Table]:
    tables = []
    for eval_name in report["evals"]:
        rows = accuracy_paths(report, eval_name)
        if rows:
            table = plain_table(f"accuracy on {eval_name} before, between and after the stages, %")
            for head in ("arm", "teacher", "student"):
                table.add_column(head, no_wrap=head == "arm")
            for row in rows:
                table.add_row(*row)
            tables.append(table)
    return tables


def _contrast_tables(report: dict[str, Any]) -> list[Table]:
    tables = []
    for eval_name in report["evals"]:
        contrasts = [c for c in named_contrasts(report) if c["eval"] == eval_name]
        if not contrasts:
            continue
        where = f" on {eval_name}" if len(report["evals"]) > 1 else ""
        table = plain_table(f"differences{where} in points, 95 % interval, two-sided p")
        table.add_column("a − b", no_wrap=True)
        for head in ("difference [95 %]", "p", "labels a / b", "FLOPs a/b"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("a above b", no_wrap=True)
        for title, group in group_by_equality(contrasts):
            table.add_section()
            table.add_row(Text(title.lower(), style="italic"))
            for c in group:
                table.add_row(
                    f"{c['a']} − {c['b']}",
                    f"{points(c['difference'])} [{points(c['low']):>5}, {points(c['high']):>5}]",
                    p_text(c["p"]),
                    f"{count(c['labels']['a'])} / {count(c['labels']['b'])}",
                    flops_ratio(c),
                    reading(c),
                )
        table.caption = (
            f"{interval_note(report)}; holds: the interval is above zero and p < 0.05; equal compute: the smaller is at "
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
