"""Read run directories into one Study: the nodes of each arm, their graded evaluations and their costs.

The report uses only what this module reads from files. Run directories of the same recipe with different seeds merge
into one study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headwater import stats
from headwater.config.arms import DESCRIPTIONS
from headwater.errors import UserError
from headwater.storage import ledger
from headwater.storage.files import first_difference, read_json, read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import FREE, RunDir
from headwater.storage.untrusted import read_plan
from headwater.tasks.registry import TASKS

OUTCOME_STEPS = 50
"""Steps of a stage whose completions are read for their outcomes; a long stage has gigabytes of them."""
POOL_TEXT = {"all": "all labels", "first_half": "first half (1H)", "second_half": "second half (2H)"}


@dataclass(frozen=True)
class EvalCounts:
    """Per-problem counts of one evaluation of one node: (P,) arrays in the order of `ids`."""

    ids: tuple[str, ...]
    correct: np.ndarray
    sampled: np.ndarray
    majority: np.ndarray | None
    """maj@k per problem; None if the grader extracted no answer from any completion."""
    truncated: float
    """Share of the completions that reached the token limit."""

    @property
    def samples(self) -> int:
        """Smallest number of samples of any problem: the largest k for which pass@k is defined."""
        return int(self.sampled.min())

    def at(self, ids: Sequence[str], values_P: np.ndarray) -> np.ndarray:
        """Select and reorder `values_P`, given in the order of `self.ids`, to the order of `ids`."""
        if tuple(ids) == self.ids:
            return values_P
        index_of = {name: index for index, name in enumerate(self.ids)}
        return values_P[[index_of[name] for name in ids]]


@dataclass(frozen=True)
class Node:
    """One node on disk. A node that has not started has no files and an empty `info`.

    one_answer  whether correct answers to one problem are the same answer (`Task.one_answer`), for maj@k
    """

    name: str
    dir: NodeDir
    done: bool
    info: dict[str, Any]
    one_answer: bool = True

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
        """Labelled pool that the node may use; None if it uses no labels."""
        labels = self.info.get("labels")
        return labels["pool"] if labels else None

    @property
    def labels_allowed(self) -> int | None:
        """How many distinct labels the node may use; None for a node that does not train."""
        return (self.info.get("labels") or {}).get("distinct_allowed")

    @cached_property
    def evals(self) -> dict[str, EvalCounts]:
        """Final evaluations by name; empty until the node is done."""
        files = sorted((self.dir.path / "evals" / "final").glob("*.jsonl")) if self.done else []
        counts = {path.stem: _count(path, self.one_answer) for path in files}
        return {name: value for name, value in counts.items() if value is not None}

    @cached_property
    def evals_by_step(self) -> dict[int, dict[str, EvalCounts]]:
        """Evaluations during training: step -> evaluation -> counts."""
        evals: dict[int, dict[str, EvalCounts]] = {}
        for path in sorted((self.dir.path / "evals").glob("step-*/*.jsonl")):
            step = path.parent.name.removeprefix("step-")
            if step.isdecimal() and (counts := _count(path, self.one_answer)) is not None:
                evals.setdefault(int(step), {})[path.stem] = counts
        return evals

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.metrics))

    @cached_property
    def conditions(self) -> list[dict[str, Any]]:
        """KL and top-k overlap of student and teacher on held-out prompts, one row per measurement."""
        return list(read_jsonl(self.dir.conditions))

    @cached_property
    def warnings(self) -> list[dict[str, Any]]:
        """Rows written when a training guard started to warn."""
        return list(read_jsonl(self.dir.warnings))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """{"worker", "started", "ended"} of each time the node ran, in seconds since 1970; none of an earlier version's run."""
        return list(read_json(self.dir.attempts)) if self.dir.attempts.exists() else []

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        """{"sentence", "code"} of a failed node, else None."""
        return None if self.done or not self.dir.failed.exists() else dict(read_json(self.dir.failed))

    @cached_property
    def ended(self) -> dict[str, Any] | None:
        """{"step", "of", "why"} of a stage that stopped early, for example on a plateau."""
        return read_json(self.dir.done).get("ended") if self.done else None

    @property
    def objective(self) -> str:
        return str((self.info.get("settings") or {}).get("objective") or "")

    @cached_property
    def ledger_rows(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.ledger))

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.ledger_rows if row["purpose"] == "train"]

    @cached_property
    def labels_used(self) -> set[str]:
        """Ids of the problems whose labels were used in training."""
        return {label for row in self.train_rows for label in row["labels"]}

    @cached_property
    def rollouts(self) -> dict[int, list[dict[str, Any]]]:
        """All rollout rows by training step; step 0 holds a teacher's cache."""
        cached = self.dir.cache / "rollouts.jsonl"
        files = {0: cached} if cached.exists() else {}
        files |= dict(self.rollout_files())
        return {step: list(read_jsonl(path)) for step, path in files.items()}

    def rollout_files(self) -> list[tuple[int, Path]]:
        """(step, file) of each step's rollouts, in order."""
        files = sorted(self.dir.rollouts(0).parent.glob("[0-9]*.jsonl"))
        return [(int(path.stem), path) for path in files if path.stem.isdecimal()]

    def training_rows(self) -> Iterator[dict[str, Any]]:
        """Rollout rows of at most OUTCOME_STEPS steps, spread evenly from the first to the last."""
        files = self.rollout_files()
        count = min(len(files), OUTCOME_STEPS)
        for index in range(count):
            yield from read_jsonl(files[round(index * (len(files) - 1) / max(1, count - 1))][1])

    def eval_rows(self, eval_name: str) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.dir.evaluation("final", eval_name))


@dataclass(frozen=True)
class Study:
    """Runs of one recipe over arms and seeds. `arms[arm][seed]` lists the nodes in execution order."""

    recipe: dict[str, Any]
    env: dict[str, Any]
    arms: dict[str, dict[int, tuple[Node, ...]]]
    runs: tuple[RunDir, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for runs in self.arms.values() for seed in runs})

    @property
    def evals(self) -> list[str]:
        """Evaluation names in the recipe's order. The verdict uses the first one."""
        declared = list(self.recipe.get("data", {}).get("evals", {}))
        measured = {name for runs in self.arms.values() for nodes in runs.values() for name in nodes[-1].evals}
        return [name for name in declared if name in measured] + sorted(measured - set(declared))

    @property
    def nodes(self) -> dict[str, Node]:
        """Every node once, by name."""
        return {node.name: node for runs in self.arms.values() for nodes in runs.values() for node in nodes}

    def finished(self, arm: str) -> dict[int, tuple[Node, ...]]:
        """Nodes of the seeds for which every node of the arm is done."""
        return {seed: nodes for seed, nodes in self.arms.get(arm, {}).items() if all(node.done for node in nodes)}

    def results(self, arm: str, eval_name: str) -> dict[int, EvalCounts]:
        """Final evaluations of an arm by seed, finished seeds only."""
        counts = {seed: nodes[-1].evals.get(eval_name) for seed, nodes in sorted(self.finished(arm).items())}
        return {seed: value for seed, value in counts.items() if value is not None}

    def stage_groups(self) -> Iterator[tuple[list[str], dict[int, Node]]]:
        """Yield each distinct stage once as (the arms that share it, its node by seed)."""
        groups: dict[tuple[str, ...], tuple[list[str], dict[int, Node]]] = {}
        for arm, runs in self.arms.items():
            for index in range(max(len(nodes) for nodes in runs.values())):
                by_seed = nodes_at(runs, index)
                names = tuple(node.name for node in by_seed.values())
                groups.setdefault(names, ([], by_seed))[0].append(arm)
        yield from groups.values()


def nodes_at(runs: Mapping[int, Sequence[Node]], index: int) -> dict[int, Node]:
    """The node at position `index` of each seed's run, in the order of the seeds."""
    return {seed: nodes[index] for seed, nodes in sorted(runs.items()) if index < len(nodes)}


def read_study(outs: Sequence[Path]) -> Study:
    """Read one or more run directories as one study.

    Raises UserError for a folder that holds no run and for folders of different recipes.
    """
    if not outs:
        raise UserError("report: name at least one run directory")
    runs = [RunDir(Path(out)) for out in outs]
    for run in runs:
        require_run(run)
    recipes = [read_json(run.recipe) for run in runs]
    for run, recipe in zip(runs[1:], recipes[1:], strict=True):
        field = first_difference(recipes[0] | FREE, recipe | FREE)
        if field is not None:
            raise UserError(
                f"{run.path}: holds a run of another recipe than {runs[0].path} (they differ in {field}); "
                "a report can merge runs of one recipe only (seed, compute and guards may differ)"
            )
    env = read_json(runs[0].env) if runs[0].env.exists() else {}
    task = TASKS.get(recipes[0].get("task", ""))
    return Study(recipes[0], env, _arms(runs, task is None or task.one_answer), tuple(runs))


def require_run(run: RunDir) -> None:
    """Raise UserError unless the folder has a plan and a recipe."""
    for file in (run.plan, run.recipe):
        if not file.exists():
            raise UserError(f"{run.path}: holds no run ({file.name} is missing)")


def _arms(runs: Sequence[RunDir], one_answer: bool) -> dict[str, dict[int, tuple[Node, ...]]]:
    nodes: dict[str, Node] = {}
    arms: dict[str, dict[int, tuple[Node, ...]]] = {}
    for run in runs:
        plan = read_plan(run.plan)
        for arm, by_seed in plan["arms"].items():
            for seed, names in by_seed.items():
                for name in names:
                    if name not in nodes:
                        nodes[name] = _node(name, runs, one_answer)
                known = arms.setdefault(arm, {}).get(int(seed))
                new = tuple(nodes[name] for name in names)
                # If two directories plan the same seed, prefer the one that finished it.
                if new and (known is None or (not all(n.done for n in known) and all(n.done for n in new))):
                    arms[arm][int(seed)] = new
    order = {arm: index for index, arm in enumerate(DESCRIPTIONS)}
    names = sorted((arm for arm in arms if arms[arm]), key=lambda arm: (order.get(arm, len(order)), arm))
    return {arm: dict(sorted(arms[arm].items())) for arm in names}


def _node(name: str, runs: Sequence[RunDir], one_answer: bool) -> Node:
    """The node from the directory that finished it, else from the first one that started it."""
    started: list[Node] = []
    for run in runs:
        folder = run.node(name)
        if folder.info.exists():
            _refuse_damage(folder)
            info = read_json(folder.info)
            node = Node(name, folder, folder.is_done(info["fingerprint"]), info, one_answer)
            if node.done:
                return node
            started.append(node)
    return started[0] if started else Node(name, runs[0].node(name), False, {}, one_answer)


def _refuse_damage(folder: NodeDir) -> None:
    """Raise UserError if a file of a finished node that the report reads does not match its checksum."""
    names = (folder.info.name, *(path.name for path in folder.logs), "evals/")
    damaged = folder.damage(*names) if folder.done.exists() else None
    if damaged is not None:
        raise UserError(f"{damaged}: is damaged (its checksum differs); run the study again to repair it")


def _count(path: Path, one_answer: bool) -> EvalCounts | None:
    """Count a graded evaluation file row by row; None for a file without rows."""
    answers: dict[str, list[tuple[str | None, bool]]] = {}
    rows = truncated = 0
    for row in read_jsonl(path):
        answers.setdefault(row["problem_id"], []).append((row.get("extracted"), bool(row["correct"])))
        rows += 1
        truncated += row.get("finish") == "length"
    if not rows:
        return None
    ids = tuple(sorted(answers))
    votes = [stats.maj_at_k(answers[name], one_answer) for name in ids]
    return EvalCounts(
        ids=ids,
        correct=np.array([sum(correct for _, correct in answers[name]) for name in ids]),
        sampled=np.array([len(answers[name]) for name in ids]),
        # A problem without any answer counts as a wrong majority, unless the grader never extracts answers.
        majority=None if all(vote is None for vote in votes) else np.array([vote or 0.0 for vote in votes]),
        truncated=truncated / rows,
    )


NON_TRAINING: tuple[ledger.Purpose, ...] = ("eval", "validation", "measure")
"""Purposes in the ledger that are reported apart from the training costs."""


def costs(nodes: Sequence[Node]) -> dict[str, Any]:
    """Training costs of these nodes in the layout of report.json; `apart` holds the costs of NON_TRAINING.

    A label that several nodes use counts once.
    """
    rows = [row for node in nodes for row in node.ledger_rows]
    apart = {purpose: _costs(rows, purpose, ("sampled", "teacher_scored")) for purpose in NON_TRAINING}
    return {**_costs(rows, "train", ("sampled", "trained", "teacher_scored")), "apart": apart}


def _costs(rows: Sequence[dict[str, Any]], purpose: ledger.Purpose, tokens: Sequence[str]) -> dict[str, Any]:
    total = ledger.totals(rows, purpose)
    return {
        "labels": {"distinct": total.distinct, "checks": total.checks},
        "tokens": {kind: getattr(total, f"tokens_{kind}") for kind in tokens},
        "flops": total.flops,
        "seconds": total.seconds,
    }


def mean_costs(each: Sequence[Any]) -> Any:
    """Mean of several `costs` over seeds, field by field, with 9 significant digits; an int if it is whole."""
    if isinstance(each[0], dict):
        return {key: mean_costs([value[key] for value in each]) for key in each[0]}
    mean = sum(each) / len(each)
    return int(mean) if float(mean).is_integer() else float(f"{mean:.9g}")


def finite_values(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The finite numbers in a column of these rows."""
    return [row[key] for row in rows if is_finite_number(row.get(key))]


def is_finite_number(value: Any) -> bool:
    """Whether a metric can be plotted: a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
