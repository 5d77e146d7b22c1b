"""The report's first paragraph: what the study says of the paper's claims, as its numbers have it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from headwater.config.arms import ARMS
from headwater.report.contrasts import difference_text, find_contrast, reading, sample_size
from headwater.report.format import count, join_and, percent, units


def verdict(report: dict[str, Any]) -> str:
    """A few sentences: the paper's ordering, its two stages, fresh labels against replay, equal compute, what failed.

    It speaks of the recipe's first evaluation. "Holds" and "does not hold" are said only where the interval excludes
    zero and p < 0.05; everything else is "undecided".
    """
    lost = _failed(report) + _unfinished(report)
    if not report["evals"]:
        return " ".join(["Nothing can be said yet: no arm is finished and evaluated.", *lost])
    eval_name = report["evals"][0]
    said = _claims(report, eval_name) or [_fallback(report, eval_name)]
    return " ".join([*said, *_wasted(report), *lost])


def _claims(report: dict[str, Any], eval_name: str) -> list[str]:
    parts = [part(report, eval_name) for part in (_ordering, _both_stages, _fresh_labels, _equal_compute)]
    said = [part for part in parts if part]
    if said and not said[0].startswith("On "):
        first = next(c for c in report["contrasts"] if c["eval"] == eval_name)
        start = said[0] if said[0].startswith("P") else said[0][0].lower() + said[0][1:]
        said[0] = f"On {eval_name} ({sample_size(first)}) {start}"
    return said


def _ordering(report: dict[str, Any], eval_name: str) -> str | None:
    """P1: raw_teacher < direct_grpo < bridge."""
    names = ("raw_teacher", "direct_grpo", "bridge")
    found = [find_contrast(report, b, a, eval_name) for a, b in pairwise(names)]
    held = [c for c in found if c is not None]
    if not held:
        return None
    there = [name for name in names if _finished(report, name, eval_name)]
    where = f"On {eval_name} ({sample_size(held[0])})"
    numbers = "; ".join(difference_text(c) for c in held)
    shown = ", ".join(_accuracy(report, name, eval_name) for name in there)
    if len(held) < 2 and _row(report, "P1", eval_name)["reading"] == "not measured":
        missing = [name for name in names if name not in there]
        says = f"cannot be judged, since {join_and(missing) or 'a pair on the same seeds'} is missing"
    else:
        says = _says(report, "P1", eval_name)
    return (
        f"{where} the paper's ordering raw_teacher < direct_grpo < bridge {says}: {shown} "
        f"({numbers}; {_labels(report, there)})."
    )


def _both_stages(report: dict[str, Any], eval_name: str) -> str | None:
    """P2, where it was measured."""
    if _row(report, "P2", eval_name)["reading"] == "not measured":
        return None
    names = [name for name in ("bridge", "warmup_only", "opd_only") if _finished(report, name, eval_name)]
    return f"P2, that the bridge needs both its warm-up and OPD, {_shown(report, 'P2', eval_name, names)}."


def _fresh_labels(report: dict[str, Any], eval_name: str) -> str | None:
    """P3, or without the state before stage 3 what fresh labels do against replay."""
    c = find_contrast(report, "bridge_rl", "replay", eval_name)
    if _row(report, "P3", eval_name)["reading"] != "not measured":
        names = [name for name in ("bridge_1h", "bridge_rl", "replay") if _finished(report, name, eval_name)]
        shown = _shown(report, "P3", eval_name, names)
        return f"P3, that fresh labels after the bridge help and matched replay does not, {shown}."
    if c is None:
        return None
    says = {
        "holds": "Fresh labels after the bridge do better than replaying the used ones",
        "does not hold": "Fresh labels after the bridge do worse than replaying the used ones, against the paper",
        "undecided": "Whether fresh labels after the bridge beat replaying the used ones is undecided",
    }[reading(c)]
    shown = ", ".join(_accuracy(report, name, eval_name) for name in ("bridge_rl", "replay"))
    return f"{says}: {shown} ({difference_text(c)}; {_labels(report, ('bridge_rl', 'replay'))})."


def _equal_compute(report: dict[str, Any], eval_name: str) -> str | None:
    """The bridge against the arms that were given its FLOPs; where they did not come out equal, it says so."""
    words = {"holds": "is better than", "does not hold": "is worse than", "undecided": "cannot be told from"}
    parts = []
    for name in [name for name, arm in ARMS.items() if arm.same_compute and arm.same_compute[1] == "bridge"]:
        c = find_contrast(report, "bridge", name, eval_name)
        if c is not None:
            a, b = units(c["flops"]["a"], "FLOPs"), units(c["flops"]["b"], "FLOPs")
            but = "" if "compute" in c["equal"] else ", not equal after all"
            parts.append(f"{words[reading(c)]} {name} ({difference_text(c)}; {a} and {b}{but})")
    return f"At equal compute the bridge {join_and(parts)}." if parts else None


def _wasted(report: dict[str, Any]) -> list[str]:
    """Labels that were looked at in arms where no group ever had rewards that differ."""
    silent = []
    for name, arm in report["arms"].items():
        shares = [row["informative"] for row in arm["stages"] if row.get("informative") is not None]
        if shares and not any(shares):
            silent.append(f"{name} ({count(arm['labels']['distinct'])} labels)")
    if not silent:
        return []
    return [f"No label bought anything in {', '.join(silent)}: in no group did the rewards differ."]


def _failed(report: dict[str, Any]) -> list[str]:
    """Each node that failed, once, with its sentence and the arms that were not run because of it."""
    nodes: dict[str, dict[str, Any]] = {}
    arms: dict[str, list[str]] = {}
    for name, arm in report["arms"].items():
        for seed, failure in arm["failed"].items():
            nodes[failure["node"]] = {"seed": seed, **failure}
            if failure["state"] == "not run" and name not in arms.setdefault(failure["node"], []):
                arms[failure["node"]].append(name)
    found = []
    for name, failure in nodes.items():
        because = f" Not run because of it: {', '.join(arms[name])}." if arms.get(name) else ""
        sentence = failure["sentence"].rstrip(".")
        found.append(f"Failed: {failure['stage']} (seed {failure['seed']}): {sentence}.{because}")
    return found


def _unfinished(report: dict[str, Any]) -> list[str]:
    waiting = [name for name, arm in report["arms"].items() if arm["unfinished"]]
    return [f"Not finished: {', '.join(waiting)}."] if waiting else []


def _fallback(report: dict[str, Any], eval_name: str) -> str:
    """No pair of the paper is there: the best arm against the student before."""
    held = [c for c in report["contrasts"] if c["eval"] == eval_name and c["a"] != "base_teacher"]
    if not held:
        shown = [_accuracy(report, a, eval_name) for a in report["arms"] if _finished(report, a, eval_name)]
        return f"On {eval_name}: {', '.join(shown)}; no two arms to compare."
    best = max(held, key=lambda c: float(c["difference"]))
    says = {"holds": "is better than", "does not hold": "is worse than", "undecided": "cannot be told from"}
    return (
        f"On {eval_name} ({sample_size(best)}) {best['a']} {says[reading(best)]} {best['b']}: "
        f"{_accuracy(report, best['a'], eval_name)}, {_accuracy(report, best['b'], eval_name)} ({difference_text(best)}); "
        "the arms that the paper compares are not in this run."
    )


def _row(report: dict[str, Any], name: str, eval_name: str) -> dict[str, Any]:
    return next(row for row in report["predictions"] if (row["name"], row["eval"]) == (name, eval_name))


def _says(report: dict[str, Any], name: str, eval_name: str) -> str:
    return str(_row(report, name, eval_name)["reading"]).replace("undecided", "is undecided")


def _shown(report: dict[str, Any], name: str, eval_name: str, arms: Sequence[str]) -> str:
    numbers = "; ".join(difference_text(c) for c in _row(report, name, eval_name)["rests_on"])
    accuracies = ", ".join(_accuracy(report, arm, eval_name) for arm in arms)
    return f"{_says(report, name, eval_name)}: {accuracies} ({numbers}; {_labels(report, arms)})"


def _finished(report: dict[str, Any], arm: str, eval_name: str) -> bool:
    return eval_name in report["arms"].get(arm, {}).get("accuracy", {})


def _accuracy(report: dict[str, Any], arm: str, eval_name: str) -> str:
    return f"{arm} {percent(report['arms'][arm]['accuracy'][eval_name]['mean'])} %"


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
