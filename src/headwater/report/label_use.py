"""Which problems' labels were used by which node, stage, seed and arms, from the nodes' ledgers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from headwater.data.labels import half_of
from headwater.report.format import csv_text
from headwater.report.study import Node, Study


def label_csv(study: Study) -> str:
    """The text of labels.csv: one row for each problem and node that used its label in training.

    half   1 or 2: the half of the labelled pool to which the problem belongs
    arms   all arms that share the node, separated by spaces
    steps  number of steps that used the label, from `first_step` to `last_step`

    Example: `9f8b…,1,teacher_rl,teacher,0,teacher_rl.s0.51c0d2aa,bridge bridge_rl,5,3,71`.
    """
    arms: dict[str, list[str]] = {}
    for arm, by_seed in study.arms.items():
        for name in dict.fromkeys(node.name for run in by_seed.values() for node in run):
            arms.setdefault(name, []).append(arm)
    uses: list[tuple[Any, ...]] = []
    for name, node in study.nodes.items():
        seed = int(node.info.get("seed", 0))
        for label, steps in _steps_by_label(node).items():
            where = (1 + half_of(label), node.stage, node.role, seed, name, " ".join(arms[name]))
            uses.append((label, *where, len(steps), min(steps), max(steps)))
    uses.sort(key=lambda use: (use[0], use[4], use[5]))
    head = ("problem_id", "half", "stage", "role", "seed", "node", "arms", "steps", "first_step", "last_step")
    return csv_text([head, *uses])


def _steps_by_label(node: Node) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for row in node.train_rows:
        for label in row["labels"]:
            steps.setdefault(label, []).append(row["step"])
    return steps


def label_paths(study: Study) -> list[dict[str, Any]]:
    """Number of labels of each arm by the sequence of stages that used them, mean over seeds.

    Example: `[{"arm": "bridge_rl", "half": 1, "stages": "teacher_rl", "labels": 128.0}, …]`. A label that two stages used,
    as in `replay`, has the stages `teacher_rl, student_rl`.
    """
    rows = []
    for arm, by_seed in study.arms.items():
        counts: Counter[tuple[int, str]] = Counter()
        for run in by_seed.values():
            stages: dict[str, list[str]] = {}
            for node in run:
                for label in _steps_by_label(node):
                    stages.setdefault(label, []).append(node.stage)
            counts.update((1 + half_of(label), ", ".join(names)) for label, names in stages.items())
        rows += [
            {"arm": arm, "half": half, "stages": names, "labels": count / len(by_seed)}
            for (half, names), count in sorted(counts.items())
        ]
    return rows


def labels_shown(rollouts: Mapping[int, list[dict[str, Any]]]) -> set[str]:
    """Problems whose gold answer the teacher read in its context."""
    return {row["problem_id"] for rows in rollouts.values() for row in rows if row.get("label_shown")}
