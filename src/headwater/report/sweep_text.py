"""A sweep in words: which arm is better at which values, where the order turns; the terminal's tables. Needs only sweep.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from headwater.report.contrasts import NAMED_PAIRS, interval_note, reading
from headwater.report.format import count, join_and, p_text, percent, points, units
from headwater.runs.sweep import Value, text_of

BASES = ("base_student", "base_teacher")
WORDS = {"holds": "better", "undecided": "undecided", "does not hold": "worse"}
"""How a comparison of a with b reads in a table, and in a sentence: "better" and "worse" where interval and p agree."""
VERBS = {"holds": "is better than", "does not hold": "is worse than", "undecided": "cannot be told from"}


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The paper's comparisons among these arms; where none of them is there, each against the first."""
    named = [(a, b) for a, b in NAMED_PAIRS if a in arms and b in arms]
    return named or [(arm, arms[0]) for arm in arms[1:]]


def contrast_at(point: dict[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    wanted = (a, b, eval_name)
    return next((one for one in point["contrasts"] if (one["a"], one["b"], one["eval"]) == wanted), None)


def names(values: Sequence[Value]) -> list[str]:
    """Values as people read them; folders and prefixes of models' names go where the names still differ.

    Example: `names(["pocket:a", "models/b", 0.5])` is `["a", "b", "0.5"]`.
    """
    texts = [text_of(value) for value in values]
    short = [re.split(r"[:/]", text.rstrip("/"))[-1] for text in texts]
    return short if len(set(short)) == len(short) else texts


def name_of(found: dict[str, Any], value: Value) -> str:
    return names(found["values"])[found["values"].index(value)]


def sentences(found: dict[str, Any]) -> list[str]:
    """What the numbers say, each value judged by itself: which arm is better where, where the order turns, what failed."""
    said = []
    for eval_name in found["evals"]:
        for a, b in pairs(found["arms"]):
            held = [(point["value"], contrast_at(point, a, b, eval_name)) for point in found["points"]]
            judged = [(value, reading(one)) for value, one in held if one is not None]
            if judged:
                said.append(f"On {eval_name}, {_where(found, judged, a, b)}.{_turn(found, judged)}")
        if len(found["arms"]) == 1:
            said += _one_arm(found, found["arms"][0], eval_name)
    for point in found["points"]:
        if point["failed"]:
            said.append(f"{_at(found, [point['value']])} failed: {point['failed'].rstrip('.')}.")
        elif not point["arms"]:
            said.append(f"{_at(found, [point['value']])} has not run yet.")
    return said


def _where(found: dict[str, Any], judged: Sequence[tuple[Any, str]], a: str, b: str) -> str:
    """Example: `at labels 64 and 128 bridge is better than direct_grpo; at labels 256 bridge cannot be told from
    direct_grpo`."""
    at = {read: [value for value, one in judged if one == read] for read in VERBS}
    return "; ".join(f"at {_at(found, at[read])} {a} {verb} {b}" for read, verb in VERBS.items() if at[read])


def _turn(found: dict[str, Any], judged: Sequence[tuple[Any, str]]) -> str:
    """Where the order of two arms is the other way round than at the value before, undecided values passed over."""
    decided = [(value, read) for value, read in judged if read != "undecided"]
    return "".join(
        f" The order turns between {_at(found, [one[0]])} and {name_of(found, two[0])}."
        for one, two in pairwise(decided)
        if one[1] != two[1]
    )


def _one_arm(found: dict[str, Any], arm: str, eval_name: str) -> list[str]:
    """With nothing to compare at one value, the values are compared with the first."""
    held = [one for one in found["across"] if (one["arm"], one["eval"]) == (arm, eval_name)]
    if not held:
        return []
    judged = [(one["a"], reading(one)) for one in held]
    reference = f"{arm} at {_at(found, [held[0]['b']])}"
    scored = [
        (point["arms"][arm]["accuracy"][eval_name]["mean"], point["value"])
        for point in found["points"]
        if eval_name in point["arms"].get(arm, {}).get("accuracy", {})
    ]
    mean, value = max(scored, key=lambda one: one[0])
    return [
        f"On {eval_name}, {_where(found, judged, arm, reference)}. "
        f"Highest at {_at(found, [value])}, {percent(mean)} %; as the highest of several it overstates what new runs would give."
    ]


def _at(found: dict[str, Any], values: Sequence[Any]) -> str:
    """Example: `labels 64, 128 and 256`."""
    return f"{found['vary']} {join_and([name_of(found, value) for value in values])}"


def note(found: dict[str, Any]) -> str:
    """What the intervals speak of, and what they leave out."""
    many = "each value is judged by itself, without a correction for their number" if len(found["values"]) > 1 else ""
    return "; ".join(part for part in (interval_note(found), many) if part)


# For a console ---------------------------------------------------------------------------------------------------------


def terminal_table(found: dict[str, Any]) -> Group:
    """Accuracies by value and arm, differences, and the sentences, for a console of 100 columns or more."""
    parts: list[Table | Text] = []
    for eval_name in found["evals"]:
        parts.append(_accuracies(found, eval_name))
        rows = list(differences(found, eval_name))
        if rows:
            parts.append(_differences(found, eval_name, rows))
    parts += [Text(one) for one in found["said"]]
    return Group(*[item for part in parts for item in (part, Text(""))])


def _plain(title: str, heads: Sequence[str]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if place == 0 else "right", overflow="fold")
    return table


def shown_arms(found: dict[str, Any]) -> list[str]:
    """The base models, then the arms of the sweep, without those that no point has."""
    held = {name for point in found["points"] for name in point["arms"]}
    return [name for name in (*BASES, *found["arms"]) if name in held]


def cell(point: dict[str, Any], arm: str, eval_name: str) -> str:
    """Example: `67.5 [64.2, 70.7]`; in the place of a number, why there is none."""
    scored = point["arms"].get(arm, {}).get("accuracy", {}).get(eval_name)
    if scored is None:
        return "failed" if point["failed"] else "–"
    return f"{percent(scored['mean'])} [{percent(scored['low']):>4}, {percent(scored['high']):>4}]"


def _accuracies(found: dict[str, Any], eval_name: str) -> Table:
    arms = shown_arms(found)
    seeds = f"seed{'s' * (len(found['seeds']) != 1)} {', '.join(map(str, found['seeds']))}"
    table = _plain(f"{found['recipe']} · {seeds} · accuracy on {eval_name}, % [95 %]", [found["vary"], *arms])
    for point in found["points"]:
        table.add_row(name_of(found, point["value"]), *(cell(point, arm, eval_name) for arm in arms))
    return table


def differences(found: dict[str, Any], eval_name: str) -> list[tuple[str, str, str, str, str]]:
    """(value, what, difference with interval, p, reading) for each compared pair; for one arm, each value against the first."""
    rows = []
    for point in found["points"]:
        for a, b in pairs(found["arms"]):
            one = contrast_at(point, a, b, eval_name)
            if one is not None:
                rows.append((name_of(found, point["value"]), f"{a} − {b}", *_said(one)))
    if len(found["arms"]) == 1:
        for one in found["across"]:
            if one["eval"] == eval_name:
                here, there = name_of(found, one["a"]), name_of(found, one["b"])
                rows.append((here, f"{one['arm']} at {here} − at {there}", *_said(one)))
    return rows


def _said(one: dict[str, Any]) -> tuple[str, str, str]:
    interval = f"[{points(one['low']):>5}, {points(one['high']):>5}]"
    return f"{points(one['difference'])} {interval}", p_text(one["p"]), WORDS[reading(one)]


def _differences(found: dict[str, Any], eval_name: str, rows: Sequence[Sequence[str]]) -> Table:
    heads = [found["vary"], "a − b", "difference [95 %]", "p", "a is"]
    table = _plain(f"differences on {eval_name} in points, 95 % interval, two-sided p", heads)
    for row in rows:
        table.add_row(*row)
    table.caption = note(found)
    return table


def costs(point: dict[str, Any], arm: str) -> tuple[str, str]:
    """(labels, FLOPs) of an arm at a value, means per seed; dashes for a model that was not trained."""
    held = point["arms"].get(arm)
    if held is None or not held["flops"]:
        return "–", "–"
    return count(held["labels"]["distinct"]), units(held["flops"], "F").replace(" ", "")


def dry_run_table(vary: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What `sweep_run.dry_run` found, for a console."""
    heads = [vary, "nodes", "shared", "labels", "steps", "tokens ≤", "teacher tokens ≤", "FLOPs ≤", "memory"]
    table = _plain("what would run", heads)
    for row in rows:
        tokens = [units(row[key]) for key in ("tokens_sampled_at_most", "tokens_teacher_scored_at_most")]
        counts = [count(row[key]) for key in ("nodes", "shared", "labels", "steps")]
        table.add_row(
            text_of(row["value"]), *counts, *tokens, units(row["flops_at_most"]), units(row["memory_bytes"], "B")
        )
    table.caption = "shared: nodes that a value further up has, which run once; labels: distinct problems, of one node"
    return table
