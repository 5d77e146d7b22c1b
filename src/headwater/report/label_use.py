"""Which problems' labels were used by which node, stage, seed and arms, from the nodes' ledgers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from headwater.data.labels import half_of
from headwater.report.format import csv_text
from headwater.report.study import Node, Study


@dataclass(frozen=True)
class LabelUse:
    """Use of one problem's label by one node. A node that several arms share has one row with all of them.

    half   1 or 2: the half of the labelled pool to which the problem belongs
    steps  number of steps that used the label, from `first_step` to `last_step`

    Example: `LabelUse("9f8b…", 1, "teacher_rl", "teacher", 0, "teacher_rl.s0.51c0d2aa", "bridge bridge_rl", 5, 3, 71)`.
    """

    problem_id: str
    half: int
    stage: str
    role: str
    seed: int
    node: str
    arms: str
    steps: int
    first_step: int
    last_step: int


def label_uses(study: Study) -> list[LabelUse]:
    """Every use of a label in training, sorted by problem, seed and node."""
    arms: dict[str, dict[str, None]] = {}
    nodes: dict[str, Node] = {}
    for arm, by_seed in study.arms.items():
        for run in by_seed.values():
            for node in run:
                nodes[node.name] = node
                arms.setdefault(node.name, {})[arm] = None
    uses = [
        LabelUse(
            problem_id=label,
            half=1 + half_of(label),
            stage=node.stage,
            role=node.role,
            seed=int(node.info.get("seed", 0)),
            node=name,
            arms=" ".join(arms[name]),
            steps=len(steps),
            first_step=min(steps),
            last_step=max(steps),
        )
        for name, node in nodes.items()
        for label, steps in _steps_by_label(node).items()
    ]
    return sorted(uses, key=lambda use: (use.problem_id, use.seed, use.node))


def _steps_by_label(node: Node) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for row in node.train_rows:
        for label in row["labels"]:
            steps.setdefault(label, []).append(row["step"])
    return steps


def label_csv(uses: Sequence[LabelUse]) -> str:
    """The text of labels.csv: a header and one row per use."""
    return csv_text([[field.name for field in fields(LabelUse)], *map(astuple, uses)])


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
