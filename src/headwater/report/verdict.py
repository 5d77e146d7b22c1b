"""The report's first paragraph: what the study's numbers say about the paper's claims."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from headwater.config.arms import ARMS
from headwater.errors import TrainingStoppedError
from headwater.report.contrasts import COMPARISON, difference_text, find_contrast, reading, sample_size
from headwater.report.format import count, counted, join_and, percent, units
from headwater.report.predictions import reading_text
from headwater.report.stages import accuracies

P1_ARMS = ("raw_teacher", "direct_grpo", "bridge")
P2_ARMS = ("bridge", "warmup_only", "opd_only")
P3_ARMS = ("bridge_1h", "bridge_rl", "replay")
"""Arms of each prediction in the order in which their accuracies are listed."""
TRAINING_SIGNALS = {
    "reward": "The mean reward",
    "kl_student_teacher": "KL(student‖teacher)",
    "kl_teacher_student": "KL(teacher‖student)",
}
"""Columns of metrics.jsonl that say what a stage reached, the most telling first."""


def verdict(report: dict[str, Any]) -> str:
    """A few sentences: the paper's ordering (P1), its two stages (P2), unused labels (P3), equal compute, failures.

    Uses the recipe's first evaluation. "Holds" and "does not hold" require that the interval excludes zero and p < 0.05;
    everything else is "undecided".
    """
    incomplete = _failed(report) + _unfinished(report)
    if not report["evals"]:
        nothing = ["Nothing can be said yet: no arm is finished and evaluated."]
        return " ".join([*(measured_in_training(report) or nothing), *incomplete])
    eval_name = report["evals"][0]
    claims = _claims(report, eval_name) or [_best_arm(report, eval_name)]
    return " ".join([*claims, *uninformative(report), *incomplete])


def measured_in_training(report: dict[str, Any]) -> list[str]:
    """Sentences about the last stage of each finished arm, measured on its own prompts: for a recipe without evaluations."""
    finished = [name for name, arm in report["arms"].items() if not arm["failed"] and not arm["unfinished"]]
    if not finished:
        return []
    sentences = ["No accuracy was measured: the recipe has no data.evals."]
    for name in finished:
        stage = report["arms"][name]["stages"][-1]
        measure = next((key for key in TRAINING_SIGNALS if key in stage["ends"]), None)
        if measure is not None:
            first, last = (stage["ends"][measure][end] for end in ("first", "last"))
            sentences.append(
                f"{TRAINING_SIGNALS[measure]} went from {first:.3g} in the first step of {stage['stage']} to {last:.3g} in its last "
                f"({name})."
            )
    return sentences


def _claims(report: dict[str, Any], eval_name: str) -> list[str]:
    sentences = [
        _ordering(report, eval_name),
        _prediction(report, "P2", "the bridge needs both its warm-up and OPD", P2_ARMS, eval_name),
        _prediction(report, "P3", "unused labels after the bridge help and matched replay does not", P3_ARMS, eval_name)
        or _fresh_labels(report, eval_name),
        _equal_compute(report, eval_name),
    ]
    claims = [sentence for sentence in sentences if sentence]
    if claims and not claims[0].startswith("On "):
        first = next(c for c in report["contrasts"] if c["eval"] == eval_name)
        start = claims[0] if claims[0].startswith("P") else claims[0][0].lower() + claims[0][1:]
        claims[0] = f"On {eval_name} ({sample_size(first)}) {start}"
    return claims


def _ordering(report: dict[str, Any], eval_name: str) -> str | None:
    """P1, also if only one of its two contrasts was measured."""
    pairs = [find_contrast(report, b, a, eval_name) for a, b in pairwise(P1_ARMS)]
    contrasts = [c for c in pairs if c is not None]
    if not contrasts:
        return None
    finished = _finished(report, P1_ARMS, eval_name)
    result = _row(report, "P1", eval_name)["reading"]
    if result == "not measured":
        missing = [name for name in P1_ARMS if name not in finished]
        result = f"cannot be judged, since {join_and(missing) or 'a pair on the same seeds'} is missing"
    return (
        f"On {eval_name} ({sample_size(contrasts[0])}) the paper's ordering {' < '.join(P1_ARMS)} "
        f"{reading_text(result)}: {_numbers(report, finished, contrasts, eval_name)}."
    )


def _prediction(report: dict[str, Any], name: str, claim: str, arms: Sequence[str], eval_name: str) -> str | None:
    """P2 or P3, if it was measured."""
    row = _row(report, name, eval_name)
    if row["reading"] == "not measured":
        return None
    numbers = _numbers(report, _finished(report, arms, eval_name), row["rests_on"], eval_name)
    return f"{name}, that {claim}, {reading_text(row['reading'])}: {numbers}."


def _fresh_labels(report: dict[str, Any], eval_name: str) -> str | None:
    """Unused labels against replay, for studies in which P3 was not measured."""
    c = find_contrast(report, "bridge_rl", "replay", eval_name)
    if c is None:
        return None
    claim = {
        "holds": "Unused labels after the bridge do better than replaying the used ones",
        "does not hold": "Unused labels after the bridge do worse than replaying the used ones, against the paper",
        "undecided": "Whether unused labels after the bridge beat replaying the used ones is undecided",
    }[reading(c)]
    return f"{claim}: {_numbers(report, ('bridge_rl', 'replay'), [c], eval_name)}."


def _equal_compute(report: dict[str, Any], eval_name: str) -> str | None:
    """The bridge against the arms that were given its FLOPs. Says so if the measured FLOPs are not equal."""
    parts = []
    for name in [name for name, arm in ARMS.items() if arm.same_compute and arm.same_compute[1] == "bridge"]:
        c = find_contrast(report, "bridge", name, eval_name)
        if c is not None:
            a, b = units(c["flops"]["a"], "FLOPs"), units(c["flops"]["b"], "FLOPs")
            unequal = "" if "compute" in c["equal"] else ", not equal after all"
            parts.append(f"{COMPARISON[reading(c)]} {name} ({difference_text(c)}; {a} and {b}{unequal})")
    return f"At equal compute the bridge {join_and(parts)}." if parts else None


def _best_arm(report: dict[str, Any], eval_name: str) -> str:
    """For studies without the paper's pairs: the best arm against the untrained student."""
    contrasts = [c for c in report["contrasts"] if c["eval"] == eval_name and c["a"] != "base_teacher"]
    if not contrasts:
        accuracies = _accuracies(report, _finished(report, [*report["arms"]], eval_name), eval_name)
        return f"On {eval_name}: {accuracies}; no two arms to compare."
    best = max(contrasts, key=lambda c: float(c["difference"]))
    return (
        f"On {eval_name} ({sample_size(best)}) {best['a']} {COMPARISON[reading(best)]} {best['b']}: "
        f"{_accuracies(report, (best['a'], best['b']), eval_name)} ({difference_text(best)}); "
        "the arms that the paper compares are not in this run."
    )


def uninformative(report: dict[str, Any]) -> list[str]:
    """Arms that spent labels although the rewards never differed within any group, and why."""
    arms: dict[str, list[str]] = {}
    for name, arm in report["arms"].items():
        rows = [row for row in arm["stages"] if row.get("informative") is not None]
        if rows and not any(row["informative"] for row in rows):
            # The sentence of a stage that stopped for it says why already.
            silent = [] if arm["failed"] else [row for row in rows if row["no_signal"]]
            causes = " ".join(dict.fromkeys(f"In {row['stage']} {row['no_signal']}." for row in silent))
            arms.setdefault(causes, []).append(f"{name} ({counted(arm['labels']['distinct'], 'label')})")
    sentences = [
        f"Labels had no effect in {', '.join(names)}: rewards were equal within every group. {causes}".rstrip()
        for causes, names in arms.items()
    ]
    return [*sentences, *_unchanged_teachers(report)]


def _unchanged_teachers(report: dict[str, Any]) -> list[str]:
    """Arms whose student was distilled from a teacher that its own stage had not changed."""
    arms: dict[str, list[str]] = {}
    for name, arm in report["arms"].items():
        rows = arm["stages"]
        stage = next((row["stage"] for row in rows if row["role"] == "teacher" and row["informative"] == 0.0), None)
        if stage is not None and any(row["role"] == "student" for row in rows):
            arms.setdefault(stage, []).append(name)
    return [
        f"In {', '.join(names)} the student was distilled from the teacher as it was before {stage}, which had no gradient; "
        "--arm direct_grpo spends the labels on the student."
        for stage, names in arms.items()
    ]


def _failed(report: dict[str, Any]) -> list[str]:
    """One sentence per failed node, with the arms that were not run because of it."""
    failures: dict[str, dict[str, Any]] = {}
    skipped: dict[str, list[str]] = {}
    for name, arm in report["arms"].items():
        for seed, failure in arm["failed"].items():
            failures[failure["node"]] = {"seed": seed, **failure}
            if failure["state"] == "not run" and name not in skipped.setdefault(failure["node"], []):
                skipped[failure["node"]].append(name)
    sentences = []
    for node, failure in failures.items():
        because = f" Not run because of it: {', '.join(skipped[node])}." if skipped.get(node) else ""
        sentence = failure["sentence"].rstrip(".")
        sentences.append(f"{failure_word(failure)}: {failure['stage']} (seed {failure['seed']}): {sentence}.{because}")
    return sentences


def failure_word(failure: dict[str, Any]) -> str:
    """`Stopped` for training that a guard or the loop stopped at a step, which can go on from there; else `Failed`."""
    at_step = re.match(r"\w+, step \d+ of \d+: ", failure["sentence"])
    return "Stopped" if failure["code"] == TrainingStoppedError.exit_code and at_step else "Failed"


def failure_state(failure: dict[str, Any]) -> str:
    """State of an arm: `stopped`, `failed`, or `not run` where a node before its last one failed."""
    return failure_word(failure).lower() if failure["state"] == "failed" else str(failure["state"])


def _unfinished(report: dict[str, Any]) -> list[str]:
    arms = [name for name, arm in report["arms"].items() if arm["unfinished"]]
    return [f"Not finished: {', '.join(arms)}."] if arms else []


# Parts of sentences ---------------------------------------------------------------------------------------------------


def _row(report: dict[str, Any], name: str, eval_name: str) -> dict[str, Any]:
    return next(row for row in report["predictions"] if (row["name"], row["eval"]) == (name, eval_name))


def _finished(report: dict[str, Any], arms: Sequence[str], eval_name: str) -> list[str]:
    measured = accuracies(report["arms"], eval_name)
    return [arm for arm in arms if arm in measured]


def _numbers(report: dict[str, Any], arms: Sequence[str], contrasts: Sequence[dict[str, Any]], eval_name: str) -> str:
    """Example: `bridge 66.8 %, replay 60.8 % (bridge − replay +6.0 points, …; equal labels, 256 each)`."""
    differences = "; ".join(map(difference_text, contrasts))
    return f"{_accuracies(report, arms, eval_name)} ({differences}; {_labels(report, arms)})"


def _accuracies(report: dict[str, Any], arms: Sequence[str], eval_name: str) -> str:
    return ", ".join(f"{arm} {percent(report['arms'][arm]['accuracy'][eval_name]['mean'])} %" for arm in arms)


def _labels(report: dict[str, Any], arms: Sequence[str]) -> str:
    """Example: `equal labels, 96 each, none on raw_teacher`."""
    labels = {arm: report["arms"][arm]["labels"]["distinct"] for arm in arms}
    used = {arm: number for arm, number in labels.items() if number}
    if not used:
        return "no labels used"
    unlabelled = [arm for arm in arms if arm not in used]
    none = f", none on {' and '.join(unlabelled)}" if unlabelled else ""
    if len(set(used.values())) == 1:
        number = count(next(iter(used.values())))
        return f"equal labels, {number} each{none}" if len(used) > 1 else f"{number} labels on {next(iter(used))}{none}"
    return f"labels not equal: {', '.join(f'{arm} {count(number)}' for arm, number in used.items())}{none}"
