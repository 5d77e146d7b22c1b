"""The top of the page: what stopped or interrupted the run, and one sentence with the main result and its costs."""

from __future__ import annotations

import re
from typing import Any

from headwater.report.contrasts import estimate_text, find_contrast, reading
from headwater.report.format import join_and, percent, training_costs
from headwater.report.stages import accuracies, stage_name
from headwater.report.study import Node, Study
from headwater.report.verdict import failure_word, measured_in_training, uninformative
from headwater.storage.files import is_locked

VERBS = {"holds": "beats", "does not hold": "loses to", "undecided": "is not shown to differ from"}


def headline(report: dict[str, Any]) -> str:
    """The main result in one sentence, and whether labels had no effect in an arm."""
    return " ".join([_main_result(report), *uninformative(report)])


def _main_result(report: dict[str, Any]) -> str:
    """One sentence with accuracy, labels, FLOPs and time: bridge against direct GRPO if the study has both, else the best
    trained arm against the untrained student."""
    if not report["evals"]:
        return " ".join(measured_in_training(report)) or "No arm has a result yet."
    eval_name = report["evals"][0]
    scores = accuracies(report["arms"], eval_name)
    accuracy = {name: f"{percent(score['mean'])}\u00a0%" for name, score in scores.items()}
    spent = {name: training_costs(report["arms"][name]) for name in scores}
    costs = {name: f"with {text}" if text else "without training" for name, text in spent.items()}
    contrast = find_contrast(report, "bridge", "direct_grpo", eval_name)
    subject, other = "The bridge", "direct GRPO"
    if contrast is None and (trained := [name for name in scores if spent[name]]):
        subject, other = max(trained, key=lambda name: float(scores[name]["mean"])), "the untrained student"
        contrast = find_contrast(report, subject, "base_student", eval_name)
    if contrast is not None:
        a, b = contrast["a"], contrast["b"]
        against = f"{accuracy[b]} {'before training' if b == 'base_student' else costs[b]}"
        return (
            f"{subject} {VERBS[reading(contrast)]} {other} on {eval_name}: {accuracy[a]} {costs[a]}, against {against}; "
            f"{estimate_text(contrast)}."
        )
    best = max(scores, key=lambda name: float(scores[name]["mean"]))
    low, high = (percent(scores[best][key]) for key in ("low", "high"))
    return f"Best on {eval_name}: {best} with {accuracy[best]} (95\u00a0% {low} to {high}) {costs[best]}."


def stops(study: Study, report: dict[str, Any]) -> list[str]:
    """One sentence per node that stopped, failed, was interrupted or is running, with its step.

    Example: `Stopped: Teacher RL at step 8 of 40 (seed 0; bridge): guard truncation: 62 % of the completions reached …`.
    """
    sentences = {}
    for failure, where in _by_node(report, "failed"):
        word, sentence = failure_word(failure), failure["sentence"]
        step = re.match(r"\w+, (step \d+ of \d+): ", sentence)
        at, why = (f" at {step[1]}", sentence[step.end() :]) if step else ("", sentence)
        why = re.sub(r" \((?:or )?set guards\.[^)]*\)", "", why).rstrip(".")
        sentences[failure["node"]] = f"{word}: {stage_name(failure['stage'])}{at} ({where}): {why}."
    working = "Running" if any(is_locked(run.lock) for run in study.runs) else "Interrupted"
    nodes = study.nodes
    waiting = []
    for name, where in _by_node(report, "unfinished"):
        node = nodes[name]
        if node.info:
            sentences[name] = f"{working}: {stage_name(node.stage, node.objective)}{_step(node)} ({where})."
        else:
            waiting.append(f"{stage_name(node.stage)} ({where})")
    return [*sentences.values(), *([f"Not started yet: {join_and(waiting)}."] if waiting else [])]


def _by_node(report: dict[str, Any], state: str) -> list[tuple[Any, str]]:
    """The distinct entries of every arm's `state`, a failure or the name of a node, each with its seed and arms."""
    entries: dict[str, tuple[Any, str, list[str]]] = {}
    for arm, values in report["arms"].items():
        for seed, entry in values[state].items():
            name = entry if isinstance(entry, str) else entry["node"]
            entries.setdefault(name, (entry, seed, []))[2].append(arm)
    return [(entry, f"seed {seed}; {', '.join(dict.fromkeys(arms))}") for entry, seed, arms in entries.values()]


def _step(node: Node) -> str:
    """Example: ` at step 12 of 40`."""
    if not node.metrics:
        return ""
    return f" at step {node.metrics[-1]['step']} of {node.info.get('steps') or '?'}"
