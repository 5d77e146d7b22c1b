"""Where every label went: which problem was looked at by which node, stage, seed and arms. From the nodes' ledgers alone."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from headwater.data.labels import half_of
from headwater.report.read import Study


@dataclass(frozen=True)
class Use:
    """One problem's label in one node; a node that several arms share stands here once, with all of them.

    half   1 or 2: the content half of the labelled pool that the problem belongs to
    steps  how many steps looked at it, from `first_step` to `last_step`

    Example: `Use("9f8b…", 1, "teacher_rl", "teacher", 0, "teacher_rl.s0.51c0d2aa", "bridge bridge_rl", 5, 3, 71)`.
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


def uses(study: Study) -> list[Use]:
    """Every look for training, by problem and node, in the order of problem, seed and stage. Raises nothing of its own."""
    arms_of: dict[str, list[str]] = {}
    nodes = {}
    for arm, by_seed in study.arms.items():
        for run in by_seed.values():
            for node in run:
                nodes[node.name] = node
                if arm not in arms_of.setdefault(node.name, []):
                    arms_of[node.name].append(arm)
    found = []
    for name, node in nodes.items():
        steps: dict[str, list[int]] = {}
        for row in node.spends:
            if row["purpose"] == "train":
                for label in row["labels"]:
                    steps.setdefault(label, []).append(row["step"])
        for label, at in steps.items():
            place = (node.stage, node.role, int(node.info.get("seed", 0)), name, " ".join(arms_of[name]))
            found.append(Use(label, 1 + half_of(label), *place, len(at), min(at), max(at)))
    return sorted(found, key=lambda use: (use.problem_id, use.seed, use.node))


def as_csv(found: Sequence[Use]) -> str:
    """The file `labels.csv`: a header, and a row for each use."""
    sink = io.StringIO()
    names = [field.name for field in fields(Use)]
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(tuple(getattr(use, name) for name in names) for use in found)
    return sink.getvalue()


def paths(study: Study) -> list[dict[str, Any]]:
    """How many of an arm's labels took which path through its stages, on average over its seeds.

    Example: `[{"arm": "bridge_rl", "half": 1, "stages": "teacher_rl", "labels": 128.0}, …]`; a label that two stages looked
    at, as in `replay`, has the path `teacher_rl, student_rl`.
    """
    by_node: dict[str, list[Use]] = {}
    for use in uses(study):
        by_node.setdefault(use.node, []).append(use)
    rows = []
    for arm, by_seed in study.arms.items():
        counts: Counter[tuple[int, str]] = Counter()
        for run in by_seed.values():
            taken: dict[str, list[str]] = {}
            for node in run:
                for use in by_node.get(node.name, ()):
                    taken.setdefault(use.problem_id, []).append(node.stage)
            counts.update((1 + half_of(label), ", ".join(stages)) for label, stages in taken.items())
        rows += [
            {"arm": arm, "half": half, "stages": stages, "labels": count / len(by_seed)}
            for (half, stages), count in sorted(counts.items())
        ]
    return rows
