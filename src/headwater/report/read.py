"""Run directories -> one Study: which nodes each arm rests on, how their texts were graded, what they cost.

Everything that the report says is read here, from files alone. Several directories merge into one study when they
hold the same recipe, apart from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headwater import stats
from headwater.config.arms import DESCRIPTIONS
from headwater.errors import UserError
from headwater.storage import ledger
from headwater.storage.run_dir import FREE, NodeDir, RunDir, first_difference, read_json, read_jsonl
from headwater.storage.untrusted import read_plan

POOL_TEXT = {"all": "all labels", "first_half": "first half (1H)", "second_half": "second half (2H)"}


@dataclass(frozen=True)
class Graded:
    """One evaluation of one node, counted up by problem: (P,) arrays in the order of `ids`."""

    ids: tuple[str, ...]
    correct: np.ndarray
    sampled: np.ndarray
    majority: np.ndarray | None
    """None where no completion has an extracted answer to vote for."""
    truncated: float
    tokens: float
    """Mean completion length."""

    @property
    def samples(self) -> int:
        """Samples that every problem has: the largest k of pass@k."""
        return int(self.sampled.min())

    def at(self, ids: Sequence[str], values_P: np.ndarray) -> np.ndarray:
        """`values_P`, which go with `self.ids`, in the order of `ids`."""
        if tuple(ids) == self.ids:
            return values_P
        place = {name: index for index, name in enumerate(self.ids)}
        return values_P[[place[name] for name in ids]]


@dataclass(frozen=True)
class Node:
    """One node as it stands on disk; a node not begun is one without files."""

    name: str
    dir: NodeDir
    done: bool
    info: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.info.get("stage") or self.name.split(".")[0])

    @property
    def role(self) -> str:
        return str(self.info.get("role") or "")

    @property
    def trained(self) -> bool:
        return self.info.get("kind") == "train"

    @property
    def pool(self) -> str | None:
        """The labelled pool that the node was allowed to look at, None for none."""
        labels = self.info.get("labels")
        return labels["pool"] if labels else None

    @cached_property
    def evals(self) -> dict[str, Graded]:
        """The final evaluations, by name; none of a node that is not done."""
        files = sorted((self.dir.path / "evals" / "final").glob("*.jsonl")) if self.done else []
        graded = {path.stem: _count(path) for path in files}
        return {name: value for name, value in graded.items() if value is not None}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.metrics))

    @cached_property
    def conditions(self) -> list[dict[str, Any]]:
        """How far student and teacher stood apart on held-out prompts; a row a measurement."""
        return list(read_jsonl(self.dir.conditions))

    @cached_property
    def warnings(self) -> list[dict[str, Any]]:
        """When a guard of training began to warn."""
        return list(read_jsonl(self.dir.warnings))

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        """{"sentence", "code"} of a node that stopped itself or could not run; None of every other."""
        return None if self.done or not self.dir.failed.exists() else dict(read_json(self.dir.failed))

    @cached_property
    def ended(self) -> dict[str, Any] | None:
        """{"step", "of", "why"} of a stage that ended before its last step, as on a plateau."""
        return read_json(self.dir.done).get("ended") if self.done else None

    @property
    def objective(self) -> str:
        return str((self.info.get("settings") or {}).get("objective") or "")

    @cached_property
    def spends(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.ledger))

    def rollout_files(self) -> list[tuple[int, Path]]:
        """(step, file) of what each step sampled, in order."""
        files = sorted(self.dir.rollouts(0).parent.glob("[0-9]*.jsonl"))
        return [(int(path.stem), path) for path in files if path.stem.isdecimal()]

    def eval_rows(self, eval_name: str) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.dir.evaluation("final", eval_name))


@dataclass(frozen=True)
class Study:
    """What one recipe did, over seeds and arms. `arms[arm][seed]` are its nodes in the order in which they run."""

    recipe: dict[str, Any]
    env: dict[str, Any]
    arms: dict[str, dict[int, tuple[Node, ...]]]
    runs: tuple[RunDir, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for runs in self.arms.values() for seed in runs})

    @property
    def evals(self) -> list[str]:
        """Evaluations in the recipe's order; the first is the one that the verdict speaks of."""
        named = list(self.recipe.get("data", {}).get("evals", {}))
        held = {name for runs in self.arms.values() for nodes in runs.values() for name in nodes[-1].evals}
        return [name for name in named if name in held] + sorted(held - set(named))

    def finished(self, arm: str) -> dict[int, tuple[Node, ...]]:
        """The seeds of an arm that ran to its end: all its nodes are done."""
        return {seed: nodes for seed, nodes in self.arms[arm].items() if all(node.done for node in nodes)}

    def results(self, arm: str, eval_name: str) -> dict[int, Graded]:
        """An arm's final evaluations by seed, finished seeds only."""
        held = {seed: nodes[-1].evals.get(eval_name) for seed, nodes in sorted(self.finished(arm).items())}
        return {seed: graded for seed, graded in held.items() if graded is not None}

    def groups(self) -> Iterator[tuple[list[str], int, dict[int, Node]]]:
        """Each place in the arms' plans once: (the arms that share it, its place, its node by seed)."""
        seen: dict[tuple[str, ...], tuple[list[str], int, dict[int, Node]]] = {}
        for arm, runs in self.arms.items():
            for place in range(max(len(nodes) for nodes in runs.values())):
                by_seed = {seed: nodes[place] for seed, nodes in sorted(runs.items()) if place < len(nodes)}
                key = tuple(node.name for node in by_seed.values())
                seen.setdefault(key, ([], place, by_seed))[0].append(arm)
        yield from seen.values()


def read(outs: Sequence[Path]) -> Study:
    """Read one or more run directories as one study.

    Raises UserError for a folder that holds no run and for folders of different recipes.
    """
    if not outs:
        raise UserError("report: name at least one run directory")
    runs = [RunDir(Path(out)) for out in outs]
    for run in runs:
        if not run.plan.exists() or not run.recipe.exists():
            raise UserError(f"{run.path}: holds no run of ours (no {run.plan.name} and {run.recipe.name} in it)")
    recipes = [read_json(run.recipe) for run in runs]
    for run, recipe in zip(runs[1:], recipes[1:], strict=True):
        field = first_difference(recipes[0] | FREE, recipe | FREE)
        if field is not None:
            raise UserError(
                f"{run.path}: holds a run of another recipe than {runs[0].path} (they differ in {field}); "
                "only runs that differ in nothing but the seed make one report"
            )
    env = read_json(runs[0].env) if runs[0].env.exists() else {}
    return Study(recipes[0], env, _arms(runs), tuple(runs))


def _arms(runs: Sequence[RunDir]) -> dict[str, dict[int, tuple[Node, ...]]]:
    nodes: dict[str, Node] = {}
    found: dict[str, dict[int, tuple[Node, ...]]] = {}
    for run in runs:
        plan = read_plan(run.plan)
        for arm, by_seed in plan["arms"].items():
            for seed, names in by_seed.items():
                for name in names:
                    if name not in nodes:
                        nodes[name] = _node(name, runs)
                held = found.setdefault(arm, {}).get(int(seed))
                new = tuple(nodes[name] for name in names)
                # Two directories may plan the same seed, one of them interrupted: the finished one counts.
                if new and (held is None or (not all(n.done for n in held) and all(n.done for n in new))):
                    found[arm][int(seed)] = new
    order = {arm: place for place, arm in enumerate(DESCRIPTIONS)}
    names = sorted((arm for arm in found if found[arm]), key=lambda arm: (order.get(arm, len(order)), arm))
    return {arm: dict(sorted(found[arm].items())) for arm in names}


def _node(name: str, runs: Sequence[RunDir]) -> Node:
    """The node from the directory in which it is done, else from the first that began it."""
    begun: list[Node] = []
    for run in runs:
        folder = run.node(name)
        if folder.info.exists():
            _refuse_damage(folder)
            info = read_json(folder.info)
            node = Node(name, folder, folder.is_done(info["fingerprint"]), info)
            if node.done:
                return node
            begun.append(node)
    return begun[0] if begun else Node(name, runs[0].node(name), False, {})


def _refuse_damage(folder: NodeDir) -> None:
    """Raise UserError that names a damaged file of a finished node, of those that are read here."""
    names = (folder.info.name, *(path.name for path in folder.logs), "evals/")
    broken = folder.damage(*names) if folder.done.exists() else None
    if broken is not None:
        raise UserError(f"{broken}: is damaged (it is not what was written); run the study again, which mends it")


def _count(path: Path) -> Graded | None:
    """Read a graded file row by row; only counts and answers are kept. None for a file without rows."""
    answers: dict[str, list[tuple[str | None, bool]]] = {}
    rows = truncated = tokens = 0
    for row in read_jsonl(path):
        answers.setdefault(row["problem_id"], []).append((row.get("extracted"), bool(row["correct"])))
        rows += 1
        truncated += row.get("finish") == "length"
        tokens += row.get("tokens") or 0
    if not rows:
        return None
    ids = tuple(sorted(answers))
    votes = [stats.maj_at_k(answers[name]) for name in ids]
    return Graded(
        ids=ids,
        correct=np.array([sum(correct for _, correct in answers[name]) for name in ids]),
        sampled=np.array([len(answers[name]) for name in ids]),
        # A problem without any answer has a wrong majority, unless the grader extracts no answers at all.
        majority=None if all(vote is None for vote in votes) else np.array([vote or 0.0 for vote in votes]),
        truncated=truncated / rows,
        tokens=tokens / rows,
    )


APART: tuple[ledger.Purpose, ...] = ("eval", "validation", "measure")
"""What is spent beside training and never added to it."""


def costs(nodes: Sequence[Node]) -> dict[str, Any]:
    """What these nodes spent on training, in the contract's shape, and `apart` what on looking. A label counts once over all."""
    rows = [row for node in nodes for row in node.spends]
    train = ledger.totals(rows, "train")
    apart = {purpose: ledger.totals(rows, purpose) for purpose in APART}
    return {
        "labels": {"distinct": train.distinct, "checks": train.checks},
        "tokens": {
            "sampled": train.tokens_sampled,
            "trained": train.tokens_trained,
            "teacher_scored": train.tokens_teacher_scored,
        },
        "flops": train.flops,
        "seconds": train.seconds,
        "apart": {
            purpose: {
                "labels": {"distinct": spent.distinct, "checks": spent.checks},
                "tokens": {"sampled": spent.tokens_sampled, "teacher_scored": spent.tokens_teacher_scored},
                "flops": spent.flops,
                "seconds": spent.seconds,
            }
            for purpose, spent in apart.items()
        },
    }


def mean_costs(each: Sequence[Any]) -> Any:
    """The mean over seeds of several `costs`, field by field; a whole number stays one."""
    if isinstance(each[0], dict):
        return {key: mean_costs([one[key] for one in each]) for key in each[0]}
    mean = sum(each) / len(each)
    return int(mean) if float(mean).is_integer() else float(f"{mean:.9g}")


def is_number(value: Any) -> bool:
    """Whether a metric can be plotted: finite, and not a flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
