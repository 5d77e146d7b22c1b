"""Arms × seeds -> a DAG of nodes named by content, so that what arms share is one node and runs once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from headwater.config.arms import Arm, Pool, Step, arm_of, stage_of
from headwater.config.recipe import Lora, Recipe, canonical_json
from headwater.config.stage import Stage

Role = Literal["student", "teacher", "expert"]


@dataclass(frozen=True)
class Node:
    """One piece of work: train a model, cache a teacher, or evaluate a base model.

    start    the weights it begins from: a base model of the recipe, or the node that trained them
    teacher  who supervises a dense on-policy stage
    cache    the teacher's rollouts that a teacher-sampled stage reads
    compute  (like, as): take as many steps as cost what `as` and all it stands on did, at the rate of `like`
    """

    kind: Literal["train", "rollouts", "evaluate"]
    stage: str
    role: Role
    seed: int
    start: Role | Node
    pool: Pool | None = None
    settings: Stage | None = None
    teacher: Role | Node | None = None
    cache: Node | None = None
    compute: tuple[Node, Node] | None = None

    @property
    def made_of(self) -> tuple[Node, ...]:
        """The nodes whose weights or rollouts it uses."""
        return tuple(one for one in (self.start, self.teacher, self.cache) if isinstance(one, Node))

    @property
    def parents(self) -> tuple[Node, ...]:
        """The nodes that must be done before it can run: what it is made of, and those that its length is taken from."""
        return self.made_of + (self.compute or ())

    @property
    def weights(self) -> Role | Node:
        """Whose weights it works with: its own when it trains."""
        return self if self.kind == "train" else self.start

    def lora(self, recipe: Recipe) -> Lora | None:
        """The adapter that this node trains; None where it trains all weights, or none."""
        asked = recipe.models.lora
        return asked if asked is not None and self.kind == "train" and self.role in asked.roles else None

    def ancestry(self) -> Iterator[Node]:
        """Itself and all it waits for, each once, in an order in which they can run."""
        yield from _above(self, lambda node: node.parents)

    def lineage(self) -> Iterator[Node]:
        """Itself and all it is made of, in the same order: what an arm with this last node consists of, and costs."""
        yield from _above(self, lambda node: node.made_of)


def _above(node: Node, parents: Callable[[Node], tuple[Node, ...]]) -> Iterator[Node]:
    seen: set[Node] = set()

    def visit(one: Node) -> Iterator[Node]:
        if one in seen:
            return
        for parent in parents(one):
            yield from visit(parent)
        seen.add(one)
        yield one

    yield from visit(node)


def supervisor(node: Node) -> Role | Node | None:
    """The teacher of a student's stage, whether it is there to be asked or only its cached rollouts are."""
    if node.role != "student":
        return None
    return node.teacher if node.teacher is not None else None if node.cache is None else node.cache.start


def nodes_of(arm: Arm, recipe: Recipe, seed: int) -> Node:
    """The last node of an arm; the others are its ancestry."""
    teacher: Role | Node = "teacher"
    for step in arm.teacher:
        teacher = train_node(recipe, step, "teacher", seed, teacher, supervisor="expert")
    student: Role | Node = "student"
    for step in arm.student:
        student = train_node(recipe, step, "student", seed, student, supervisor=teacher)
    assert isinstance(student, Node)
    if arm.same_compute is not None:
        like, as_ = (nodes_of(arm_of(name, recipe), recipe, seed) for name in arm.same_compute)
        student = replace(student, compute=(like, as_))
    return student


def train_node(recipe: Recipe, step: Step, role: Role, seed: int, start: Role | Node, supervisor: Role | Node) -> Node:
    settings = stage_of(recipe, step)
    cache = None
    if not settings.on_policy:
        cache = Node(
            "rollouts",
            "teacher_rollouts",
            "teacher" if role == "student" else "expert",
            seed,
            supervisor,
            step.pool,
            settings,
        )
    return Node(
        kind="train",
        stage=step.stage,
        role=role,
        seed=seed,
        start=start,
        pool=step.pool,
        settings=settings,
        teacher=supervisor if settings.on_policy and settings.needs_teacher else None,
        cache=cache,
    )


@dataclass(frozen=True)
class Plan:
    """arms: arm -> seed -> last node; ids: node -> its name, which is a folder's name too."""

    recipe: Recipe
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[int, Node]]
    names: Mapping[Node, str]
    fingerprints: Mapping[Node, str]

    def order(self) -> list[Node]:
        """Every piece of work once, parents first; nodes of one name are the same work, such as a cache with several readers."""
        first: dict[str, Node] = {}
        for node, name in self.names.items():
            first.setdefault(name, node)
        return list(first.values())

    def to_json(self) -> dict[str, Any]:
        """Contents of plan.json."""
        return {
            "recipe": self.recipe.name,
            "seeds": list(self.seeds),
            "arms": {
                arm: {str(seed): [self.names[node] for node in last.lineage()] for seed, last in by_seed.items()}
                for arm, by_seed in self.arms.items()
            },
        }


def make_plan(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], content: Mapping[str, Any]) -> Plan:
    """Lay out arms × seeds, with the base models' evaluations before them.

    content  what else decides a node's outcome: `models` (role -> fingerprint of its weights), problem ids of each pool
             and evaluation, and fingerprints of their answers
    """
    lasts: dict[str, dict[int, Node]] = {
        "base_student": {seed: Node("evaluate", "base_student", "student", seed, "student") for seed in seeds},
        "base_teacher": {seed: Node("evaluate", "base_teacher", "teacher", seed, "teacher") for seed in seeds},
    }
    for arm in arms:
        lasts[arm] = {seed: nodes_of(arm_of(arm, recipe), recipe, seed) for seed in seeds}
    fingerprints: dict[Node, str] = {}
    for by_seed in lasts.values():
        for last in by_seed.values():
            for node in last.ancestry():
                if node not in fingerprints:
                    fingerprints[node] = fingerprint(node, recipe, content, fingerprints)
    names: dict[Node, str] = {}
    merged: dict[Node, str] = {}
    for node, print_ in fingerprints.items():
        names[node] = f"{node.stage}.s{node.seed}.{print_[:8]}"
        merged[node] = print_
    return Plan(recipe, tuple(seeds), lasts, names, merged)


def fingerprint(node: Node, recipe: Recipe, content: Mapping[str, Any], known: Mapping[Node, str]) -> str:
    """sha256 of all that decides the node's outcome; how it is computed (device, microbatches) is not part of it."""

    def of(one: Role | Node | None) -> str | None:
        return known[one] if isinstance(one, Node) else None if one is None else content["models"](one)

    held = {
        "kind": node.kind,
        "stage": node.stage,
        "role": node.role,
        "seed": node.seed,
        "start": of(node.start),
        "teacher": of(node.teacher),
        "cache": of(node.cache),
        **({} if node.compute is None else {"compute": [of(one) for one in node.compute]}),
        "pool": None if node.pool is None else content["pools"][node.pool],
        # A stage on a half counts its epochs over the smaller half.
        "halves": [len(content["pools"][half]) for half in ("first_half", "second_half")]
        if node.pool not in (None, "all")
        else None,
        "labels": content["labels"][node.pool] if node.pool and node.settings and node.settings.needs_labels else None,
        "unlabeled": content["unlabeled"] if node.settings is not None and not node.settings.needs_labels else None,
        "settings": _what_counts(node),
        **(
            {"validation": content["validation"]}
            if node.kind == "train"
            and node.settings
            and node.settings.until
            and node.settings.until.metric == "validation"
            else {}
        ),
        "evals": None if node.kind == "rollouts" else content["evals"],
        "evaluate": None if node.kind == "rollouts" else recipe.evaluate.model_dump(mode="json"),
        "task": recipe.task,
        **({} if node.kind == "rollouts" or content.get("grader") is None else {"grader": content["grader"]}),
        "prompt": recipe.prompt.model_dump(mode="json"),
        "dtype": recipe.models.dtype,
        **_engine(recipe),
        **({} if node.lora(recipe) is None else {"lora": _adapter(node.lora(recipe))}),
    }
    return hashlib.sha256(canonical_json(held).encode()).hexdigest()[:16]


def _engine(recipe: Recipe) -> dict[str, Any]:
    """Another sampler than the embedded one draws other tokens, and the loss corrects for how it draws them."""
    if recipe.compute.sampler == "torch":
        return {}
    return {"sampler": recipe.compute.sampler, "importance_cap": recipe.compute.vllm.importance_cap}


def _adapter(asked: Lora | None) -> Any:
    return None if asked is None else asked.model_dump(mode="json", exclude={"roles"})


def _what_counts(node: Node) -> Any:
    """A cache depends on how its teacher is sampled and stored only, so that several students share it."""
    if node.settings is None:
        return None
    if node.kind == "train":
        unset = {"until"} if node.settings.until is None else set()
        return node.settings.model_dump(mode="json", exclude={"checkpoint_every", *unset})
    settings = node.settings
    return {"samples": settings.group_size, "sampling": settings.sampling.model_dump(), "top_k": settings.dense.top_k}
