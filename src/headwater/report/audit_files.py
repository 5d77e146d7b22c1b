"""The files of a run directory for the audit, each node next to the node that the recipe plans in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from headwater.config.arms import ARMS, arm_of
from headwater.config.recipe import Recipe, parse_recipe
from headwater.errors import UserError
from headwater.runs.plan import Node as PlannedNode
from headwater.runs.plan import nodes_of
from headwater.storage.run_dir import NodeDir, RunDir, read_checked, read_json, read_jsonl
from headwater.storage.untrusted import NODE

BASE_MODELS: dict[str, Literal["student", "teacher"]] = {"base_student": "student", "base_teacher": "teacher"}


@dataclass(frozen=True)
class NodeFiles:
    """One node's files. `planned` is the node that the recipe puts at its place in the plan."""

    dir: NodeDir
    planned: PlannedNode

    @cached_property
    def info(self) -> dict[str, Any]:
        return read_json(self.dir.info) if self.dir.info.exists() else {}

    @cached_property
    def ledger_rows(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.ledger))

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def trains(self) -> bool:
        return self.planned.kind == "train"

    @property
    def needs_labels(self) -> bool:
        return self.trains and self.planned.settings is not None and self.planned.settings.needs_labels

    @property
    def labels_allowed(self) -> int | None:
        return (self.info.get("labels") or {}).get("distinct_allowed")

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.ledger_rows if row["purpose"] == "train"]

    @cached_property
    def labels_used(self) -> set[str]:
        return {label for row in self.train_rows for label in row["labels"]}

    @cached_property
    def rollouts(self) -> dict[int, list[dict[str, Any]]]:
        """Rollouts by training step; step 0 holds a teacher's cache."""
        folder = self.dir.path / "rollouts"
        rollouts = {int(path.stem): list(read_jsonl(path)) for path in sorted(folder.glob("*.jsonl"))}
        cached = self.dir.cache / "rollouts.jsonl"
        return {0: list(read_jsonl(cached))} | rollouts if cached.exists() else rollouts

    @cached_property
    def problems_sampled(self) -> set[str]:
        return {row["problem_id"] for rows in self.rollouts.values() for row in rows}

    def evaluations(self) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Yield (when, evaluation name, graded rows) in the order of the ledger."""
        for path in sorted((self.dir.path / "evals").glob("*/*.jsonl")):
            yield path.parent.name, path.stem, list(read_jsonl(path))


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory. `plan_faults` are the arms whose nodes differ from the recipe's."""

    out: RunDir
    recipe: Recipe
    plan: dict[str, Any]
    nodes: dict[str, NodeFiles]
    plan_faults: tuple[str, ...]

    @cached_property
    def eval_ids(self) -> set[str]:
        ids: set[str] = set()
        for node in self.nodes.values():
            ids.update(row["problem_id"] for _, _, rows in node.evaluations() for row in rows)
            ids.update(label for row in node.ledger_rows if row["purpose"] == "eval" for label in row["labels"])
        return ids


def read_files(out: RunDir) -> RunFiles:
    """Raises UserError for a folder that holds no run, or whose recipe or plan cannot be read."""
    if not out.plan.exists() or not out.recipe.exists():
        raise UserError(f"{out.path}: holds no run of ours (no {out.plan.name} and {out.recipe.name} in it)")
    recipe = parse_recipe(read_json(out.recipe), str(out.recipe))
    plan = read_checked(out.plan)
    nodes: dict[str, NodeFiles] = {}
    faults: list[str] = []
    try:
        for arm, by_seed in plan["arms"].items():
            for seed, names in by_seed.items():
                planned = _planned_nodes(arm, recipe, int(seed))
                if len(planned) != len(names):
                    faults.append(
                        f"plan.json: arm {arm}, seed {seed}: {len(names)} nodes are not what the recipe asks for"
                    )
                    continue
                for name, node in zip(names, planned, strict=True):
                    if not NODE.fullmatch(name):
                        raise ValueError(f"no node is called {name!r:.80}")
                    nodes.setdefault(str(name), NodeFiles(out.node(str(name)), node))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out.plan}: is not a plan ({type(error).__name__}: {error})") from None
    return RunFiles(out, recipe, plan, nodes, tuple(faults))


def _planned_nodes(arm: str, recipe: Recipe, seed: int) -> list[PlannedNode]:
    """The nodes that the recipe gives an arm, parents first; empty for an unknown arm."""
    if arm in BASE_MODELS:
        return [PlannedNode("evaluate", arm, BASE_MODELS[arm], seed, BASE_MODELS[arm])]
    return list(nodes_of(arm_of(arm, recipe), recipe, seed).lineage()) if arm in ARMS else []
