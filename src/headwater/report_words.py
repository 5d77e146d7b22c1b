"""A report in words: units that people read, the verdict, the terminal's tables. Needs only report.json's values."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any, Literal

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from headwater.report_stages import paths

Reading = Literal["holds", "does not hold", "undecided"]

NAMED_PAIRS = (
    ("bridge", "direct_grpo"),
    ("direct_grpo", "raw_teacher"),
    ("bridge", "raw_teacher"),
    ("bridge", "warmup_only"),
    ("bridge", "opd_only"),
    ("bridge", "teacher_sft"),
    ("bridge_rl", "replay"),
    ("bridge_rl", "direct_grpo"),
    ("teacher_2h", "bridge_rl"),
)
"""The comparisons that the paper makes or that its claims need: a minus b."""


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


def reading(contrast: dict[str, Any]) -> Reading:
    """Does `a` do better than `b`? Only when both the interval and p say so; "does not hold" is the reverse, shown."""
    if contrast["p"] < 0.05 and contrast["low"] > 0:
        return "holds"
    return "does not hold" if contrast["p"] < 0.05 and contrast["high"] < 0 else "undecided"


def find_contrast(report: dict[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    wanted = (a, b, eval_name)
    return next((c for c in report["contrasts"] if (c["a"], c["b"], c["eval"]) == wanted), None)


def named_contrasts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons of the paper; where none of them is there, every arm against the student before."""
    named = [c for c in report["contrasts"] if (c["a"], c["b"]) in NAMED_PAIRS]
    return named or list(report["contrasts"])


def verdict(report: dict[str, Any]) -> str:
    """One or two sentences: the paper's ordering, and fresh labels against replay, as the numbers have it.

    It speaks of the recipe's first evaluation. "Holds" and "does not hold" are said only where the interval excludes
    zero and p < 0.05; everything else is "undecided".
    """
    if not report["evals"]:
        return "Nothing can be said yet: no arm is finished and evaluated."
    eval_name = report["evals"][0]
    parts = [_ordering(report, eval_name), _fresh_labels(report, eval_name)]
    said = [part for part in parts if part] or [_fallback(report, eval_name)]
    said += [part for part in [_wasted(report)] if part]
    waiting = [name for name, arm in report["arms"].items() if arm["unfinished"]]
    return " ".join([*said, f"Not finished: {', '.join(waiting)}."] if waiting else said)


def _wasted(report: dict[str, Any]) -> str | None:
    """Labels that were looked at in arms where no group ever had rewards that differ."""
    silent = []
    for name, arm in report["arms"].items():
        shares = [row["informative"] for row in arm["stages"] if row.get("informative") is not None]
        if shares and not any(shares):
            silent.append(f"{name} ({count(arm['labels']['distinct'])} labels)")
    if not silent:
        return None
    return f"No label bought anything in {', '.join(silent)}: in no group did the rewards differ."


def _ordering(report: dict[str, Any], eval_name: str) -> str | None:
    """P1: raw_teacher < direct_grpo < bridge."""
    names = ("raw_teacher", "direct_grpo", "bridge")
    missing = [name for name in names if not _finished(report, name, eval_name)]
    upper = find_contrast(report, "bridge", "direct_grpo", eval_name)
    lower = find_contrast(report, "direct_grpo", "raw_teacher", eval_name)
    if upper is None and lower is None:
        return None
    found = [c for c in (lower, upper) if c is not None]
    readings = [reading(c) for c in found]
    where = f"On {eval_name} ({_extent(found[0])})"
    numbers = "; ".join(_difference(c) for c in found)
    shown = ", ".join(_accuracy(report, name, eval_name) for name in names if name not in missing)
    labels = _labels(report, [name for name in names if name not in missing])
    if upper is None or lower is None:
        return (
            f"{where} the paper's ordering raw_teacher < direct_grpo < bridge cannot be judged, since "
            f"{' and '.join(missing) or 'a pair on the same seeds'} is missing: {shown} ({numbers}; {labels})."
        )
    if readings == ["holds", "holds"]:
        says = "holds"
    else:
        says = "does not hold" if "does not hold" in readings else "is undecided"
    return f"{where} the paper's ordering raw_teacher < direct_grpo < bridge {says}: {shown} ({numbers}; {labels})."


def _fresh_labels(report: dict[str, Any], eval_name: str) -> str | None:
    """P3: what fresh labels add after the bridge, replay of used ones does not."""
    contrast = find_contrast(report, "bridge_rl", "replay", eval_name)
    if contrast is None:
        return None
    says = {
        "holds": "Fresh labels after the bridge do better than replaying the used ones",
        "does not hold": "Fresh labels after the bridge do worse than replaying the used ones, against the paper",
        "undecided": "Whether fresh labels after the bridge beat replaying the used ones is undecided",
    }[reading(contrast)]
    names = ("bridge_rl", "replay")
    shown = ", ".join(_accuracy(report, name, eval_name) for name in names)
    return f"{says}: {shown} ({_difference(contrast)}; {_labels(report, names)})."


def _fallback(report: dict[str, Any], eval_name: str) -> str:
    """No pair of the paper is there: the best arm against the student before."""
    held = [c for c in report["contrasts"] if c["eval"] == eval_name and c["a"] != "base_teacher"]
    if not held:
        shown = [_accuracy(report, a, eval_name) for a in report["arms"] if _finished(report, a, eval_name)]
        return f"On {eval_name}: {', '.join(shown)}; no two arms to compare."
    best = max(held, key=lambda c: c["difference"])
    says = {"holds": "is better than", "does not hold": "is worse than", "undecided": "cannot be told from"}
    return (
        f"On {eval_name} ({_extent(best)}) {best['a']} {says[reading(best)]} {best['b']}: "
        f"{_accuracy(report, best['a'], eval_name)}, {_accuracy(report, best['b'], eval_name)} ({_difference(best)}); "
        "the arms that the paper compares are not in this run."
    )


def _finished(report: dict[str, Any], arm: str, eval_name: str) -> bool:
    return eval_name in report["arms"].get(arm, {}).get("accuracy", {})


def _accuracy(report: dict[str, Any], arm: str, eval_name: str) -> str:
    return f"{arm} {percent(report['arms'][arm]['accuracy'][eval_name]['mean'])} %"


def _difference(c: dict[str, Any]) -> str:
    return (
        f"{c['a']} − {c['b']} {points(c['difference'])} points, 95 % {points(c['low'])} to {points(c['high'])}, "
        f"p {p_text(c['p'])}"
    )


def _extent(c: dict[str, Any]) -> str:
    return f"{c['seeds']} seed{'s' * (c['seeds'] != 1)} × {c['problems']} problems"


def _labels(report: dict[str, Any], arms: Sequence[str]) -> str:
    spent = {arm: report["arms"][arm]["labels"]["distinct"] for arm in arms}
    some = {arm: number for arm, number in spent.items() if number}
    if not some:
        return "no labels spent"
    none = [arm for arm in arms if arm not in some]
    free = f", none on {' and '.join(none)}" if none else ""
    if len(set(some.values())) == 1:
        number = count(next(iter(some.values())))
        return f"equal labels, {number} each{free}" if len(some) > 1 else f"{number} labels on {next(iter(some))}{free}"
    return f"labels not equal: {', '.join(f'{arm} {count(number)}' for arm, number in some.items())}{free}"


def terminal_table(report: dict[str, Any]) -> Group:
    """Arms, contrasts and the verdict for a console of 100 columns or more."""
    verdict_text = Text(report["verdict"])
    parts: list[Table | Text] = [*_arms_tables(report), *_path_tables(report), *_contrast_tables(report), verdict_text]
    return Group(*[item for part in parts for item in (part, Text(""))])


def console(file: IO[str] | None = None) -> Console:
    """As wide as the terminal, and 110 columns where the output is a file or a pipe."""
    target = file or sys.stdout
    return Console(file=target) if target.isatty() or "COLUMNS" in os.environ else Console(file=target, width=110)


def _arms_tables(report: dict[str, Any]) -> list[Table]:
    """One table where there is one evaluation; else the accuracies, three evaluations side by side, and the costs."""
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    title = f"{report['recipe']} · {seeds}"
    evals: list[str] = report["evals"]
    if len(evals) <= 1:
        return [_arms_table(report, f"{title}{''.join(f' · accuracy on {name}, %' for name in evals)}", evals, True)]
    parts = [evals[start : start + 3] for start in range(0, len(evals), 3)]
    scores = [_arms_table(report, f"{title} · accuracy on {', '.join(part)}, %", part, False) for part in parts]
    return [*scores, _arms_table(report, "costs", [], True)]


def _arms_table(report: dict[str, Any], title: str, evals: Sequence[str], costs: bool) -> Table:
    table = _plain_table(title)
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
        for name, arm in report["arms"].items():
            notes += [
                f"{name}: not finished on seed {seed} (waits for {node})" for seed, node in arm["unfinished"].items()
            ]
        table.caption = "\n".join(notes)
    return table


def _plain_table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _scores(arm: dict[str, Any], eval_name: str) -> list[str]:
    accuracy = arm["accuracy"].get(eval_name)
    if accuracy is None:
        return ["unfinished" if arm["unfinished"] else "–", "–"]
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
            table = _plain_table(f"accuracy on {eval_name} before, between and after the stages, %")
            for head in ("arm", "teacher", "student"):
                table.add_column(head, no_wrap=head == "arm")
            for row in rows:
                table.add_row(*row)
            tables.append(table)
    return tables


def interval_note(report: dict[str, Any]) -> str:
    """What the intervals and p speak of: one seed says nothing about training again."""
    if len(report["seeds"]) > 1:
        return "the interval is for new problems and training again, p for new problems and these models"
    return "one seed: interval and p are for new problems and these very models; training again would vary more"


def _contrast_tables(report: dict[str, Any]) -> list[Table]:
    rows = named_contrasts(report)
    if not rows:
        return []
    title = "differences in points, 95 % interval, two-sided p"
    table = _plain_table(title)
    table.add_column("a − b", no_wrap=True)
    if len(report["evals"]) > 1:
        table.add_column("eval", no_wrap=True, max_width=10)
    for head in ("difference [95 %]", "p", "labels a / b"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("a better than b", no_wrap=True)
    for c in rows:
        spent = f"{count(c['labels']['a'])} / {count(c['labels']['b'])}"
        table.add_row(
            f"{c['a']} − {c['b']}",
            *([c["eval"]] if len(report["evals"]) > 1 else []),
            f"{points(c['difference'])} [{points(c['low']):>5}, {points(c['high']):>5}]",
            p_text(c["p"]),
            spent,
            reading(c),
        )
    table.caption = f"{interval_note(report)}; holds: the interval is above zero and p < 0.05"
    return [table]
