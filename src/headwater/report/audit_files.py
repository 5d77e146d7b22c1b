"""A run directory as the audit reads it: each node's files beside what the recipe's own plan makes of the node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headwater.config.arms import ARMS, arm_of
from headwater.config.recipe import Recipe, parse_recipe
from headwater.errors import UserError
from headwater.runs.plan import Node as Planned
from headwater.runs.plan import last_node
from headwater.storage.run_dir import NodeDir, RunDir, read_checked, read_json, read_jsonl
from headwater.storage.untrusted import NODE

HALVES = {"first_half": 0, "second_half": 1}


@dataclass(frozen=True)
class NodeFiles:
    """One node's files, read once. `planned` is what the recipe makes of the node's place in the plan."""

    dir: NodeDir
    planned: Planned

    @cached_property
    def info(self) -> dict[str, Any]:
        return read_json(self.dir.info) if self.dir.info.exists() else {}

    @cached_property
    def spends(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.dir.ledger))

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def sparse(self) -> bool:
        return self.planned.kind == "train" and self.planned.settings is not None and self.planned.settings.needs_labels

    @property
    def half(self) -> int | None:
        """The half that its labels must come from, None for all or none."""
        return HALVES.get(self.planned.pool or "")

    @property
    def train_spends(self) -> list[dict[str, Any]]:
        return [row for row in self.spends if row["purpose"] == "train"]

    @property
    def blind_spends(self) -> list[dict[str, Any]]:
        """What a dense stage may do without any label: training, and the measurements beside it."""
        return [row for row in self.spends if row["purpose"] in ("train", "measure")]

    @cached_property
    def looked_at(self) -> set[str]:
        return {label for row in self.train_spends for label in row["labels"]}

    @cached_property
    def rollouts(self) -> dict[int, list[dict[str, Any]]]:
        """Step -> what was sampled and trained on; step 0 for a teacher's cache."""
        folder = self.dir.path / "rollouts"
        found = {int(path.stem): list(read_jsonl(path)) for path in sorted(folder.glob("*.jsonl"))}
        cached = self.dir.cache / "rollouts.jsonl"
        return {0: list(read_jsonl(cached))} | found if cached.exists() else found

    @cached_property
    def trained_on(self) -> set[str]:
        return {row["problem_id"] for rows in self.rollouts.values() for row in rows}

    def evaluations(self) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """(when, evaluation, rows), in the order in which the ledger has them."""
        for path in sorted((self.dir.path / "evals").glob("*/*.jsonl")):
            yield path.parent.name, path.stem, list(read_jsonl(path))


@dataclass(frozen=True)
class Files:
    """A run directory as it stands."""

    out: RunDir
    recipe: Recipe
    plan: dict[str, Any]
    nodes: dict[str, NodeFiles]
    strange: tuple[str, ...]

    @cached_property
    def eval_ids(self) -> set[str]:
        held: set[str] = set()
        for node in self.nodes.values():
            for _, _, rows in node.evaluations():
                held |= {row["problem_id"] for row in rows}
            held |= {label for row in node.spends if row["purpose"] == "eval" for label in row["labels"]}
        return held


def read(out: RunDir) -> Files:
    """Raises UserError for a folder that holds no run, or one whose recipe or plan cannot be read."""
    if not out.plan.exists() or not out.recipe.exists():
        raise UserError(f"{out.path}: holds no run of ours (no {out.plan.name} and {out.recipe.name} in it)")
    recipe = parse_recipe(read_json(out.recipe), str(out.recipe))
    plan = read_checked(out.plan)
    nodes: dict[str, NodeFiles] = {}
    strange: list[str] = []
    try:
        for arm, by_seed in plan["arms"].items():
            for seed, names in by_seed.items():
                planned = _planned(arm, recipe, int(seed))
                if planned is None or len(planned) != len(names):
                    strange.append(
                        f"plan.json: arm {arm}, seed {seed}: {len(names)} nodes are not what the recipe asks for"
                    )
                    continue
                for name, one in zip(names, planned, strict=True):
                    if not NODE.fullmatch(name):
                        raise ValueError(f"no node is called {name!r:.80}")
                    nodes.setdefault(str(name), NodeFiles(out.node(str(name)), one))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out.plan}: is not a plan ({type(error).__name__}: {error})") from None
    return Files(out, recipe, plan, nodes, tuple(strange))


def _planned(arm: str, recipe: Recipe, seed: int) -> list[Planned] | None:
    """The nodes of an arm as the recipe lays them out, parents first; None for an arm that there is none of."""
    bases = {"base_student": "student", "base_teacher": "teacher"}
    if arm in bases:
        role: Any = bases[arm]
        return [Planned("evaluate", arm, role, seed, role)]
    return list(last_node(arm_of(arm, recipe), recipe, seed).lineage()) if arm in ARMS else None
