"""Plan arms × seeds as a DAG of content-addressed nodes, so that work that arms share is one node and runs once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from headwater.config.arm import Arm, Pool, Step
from headwater.config.arms import arm_of, stage_of
from headwater.config.dense import TeacherWeights
from headwater.config.lora import Lora
from headwater.config.recipe import Recipe, canonical_json
from headwater.config.samplers import SAMPLERS
from headwater.config.stage import Stage
from headwater.errors import UserError
from headwater.plugins import code_fingerprint
from headwater.storage.run_dir import RunDir

Role = Literal["student", "teacher", "expert"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Node:
    """One unit of work: train a model, cache a teacher's rollouts, or evaluate a base model.

    start    initial weights: a base model of the recipe, or the node that trained them
    teacher  scores the rollouts of a dense on-policy stage
    cache    the teacher rollouts that an off-policy stage reads
    compute  (like, match): take as many steps as the FLOPs of `match` and its lineage pay for, at the cost per step of `like`
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
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose weights or rollouts it uses."""
        return tuple(source for source in (self.start, self.teacher, self.cache) if isinstance(source, Node))

    @property
    def parents(self) -> tuple[Node, ...]:
        """The nodes that must be done before it starts: its inputs, and those that determine its number of steps."""
        return self.inputs + (self.compute or ())

    @property
    def learner(self) -> Role:
        """The role whose token ids its rollouts are in: its own, or of a teacher's cached rollouts that of their reader."""
        if self.kind != "rollouts":
            return self.role
        return "student" if self.role == "teacher" else "teacher"

    @property
    def aligns_tokenizers(self) -> bool:
        """Whether its teacher may have another tokenizer than its learner."""
        return self.settings is not None and self.settings.needs_teacher and self.settings.dense.tokenizers != "same"

    def lora(self, recipe: Recipe) -> Lora | None:
        """The LoRA settings of this node, its stage's own or its role's; None where it trains all weights, or none."""
        if self.kind != "train" or self.settings is None:
            return None
        lora = self.settings.lora or recipe.models.lora
        return lora if lora is not None and self.role in lora.roles else None

    def matched_steps(self, steps: int, flops: Callable[[Node], float]) -> int:
        """`steps`; with `compute`, as many as the FLOPs of the matched arm pay for, if it takes any step."""
        if self.compute is None or steps == 0:
            return steps
        unmatched, match = self.compute
        matched = sum(flops(node) for node in match.lineage())
        spent = sum(flops(node) for node in self.lineage() if node != self)
        return max(1, round((matched - spent) / (flops(unmatched) / steps)))

    def ancestry(self) -> Iterator[Node]:
        """Itself and all nodes that it waits for, each once, in topological order."""
        yield from _post_order(self, lambda node: node.parents)

    def lineage(self) -> Iterator[Node]:
        """Itself, its inputs and theirs, in topological order: the nodes, and so the cost, of an arm that ends here."""
        yield from _post_order(self, lambda node: node.inputs)


def _post_order(node: Node, parents: Callable[[Node], tuple[Node, ...]]) -> Iterator[Node]:
    seen: set[Node] = set()

    def visit(node: Node) -> Iterator[Node]:
        if node not in seen:
            for parent in parents(node):
                yield from visit(parent)
            seen.add(node)
            yield node

    yield from visit(node)


def base_of(source: Role | Node) -> Role:
    """The base model whose shape a node's weights have."""
    while isinstance(source, Node):
        source = source.start
    return source


def supervisor(node: Node) -> Role | Node | None:
    """The teacher of a student's stage, live or as cached rollouts."""
    if node.role != "student":
        return None
    return node.teacher if node.cache is None else node.cache.start


def scorers(node: Node) -> dict[Role | Node, float]:
    """The frozen models that score the rollouts of an on-policy stage, and the weight of each (`dense.teacher_weights`).

    Models of weight 0 are left out, and a model that two names mean counts once. So λ = 1, and a reference that is the teacher
    itself, are plain distillation. With `dense.gain_over`, the teacher and −1 for the model that it is compared with. Empty for a
    stage without a teacher.

    Raises UserError where `gain_over` names the teacher itself.
    """
    if node.settings is None or node.teacher is None:
        return {}
    if (over := node.settings.dense.gain_over) is not None:
        base = "teacher" if over == "base_teacher" else node.start
        if base == node.teacher:
            raise UserError(
                f"stages.{node.stage}.dense.gain_over: {over} is the teacher itself, which has no gain over itself; run an arm "
                "that trains the teacher, or leave it out"
            )
        return {node.teacher: 1.0, base: -1.0}
    given = node.settings.dense.teacher_weights or TeacherWeights(teacher=1.0)
    weights: dict[Role | Node, float] = {}
    for source, weight in ((node.teacher, given.teacher), ("teacher", given.base_teacher), (node.start, given.start)):
        weights[source] = weights.get(source, 0.0) + weight
    return {source: weight for source, weight in weights.items() if weight}


def last_node(arm: Arm, recipe: Recipe, seed: int) -> Node:
    """The last node of an arm; the others are its ancestry."""
    teacher: Role | Node = "teacher"
    for step in arm.teacher:
        teacher = _training_node(recipe, step, "teacher", seed, teacher, supervisor="expert")
    student: Role | Node = "student"
    for step in arm.student:
        student = _training_node(recipe, step, "student", seed, student, supervisor=teacher)
    assert isinstance(student, Node)
    if arm.same_compute is not None:
        unmatched, match = (last_node(arm_of(name, recipe), recipe, seed) for name in arm.same_compute)
        student = replace(student, compute=(unmatched, match))
    return student


def _training_node(
    recipe: Recipe, step: Step, role: Role, seed: int, start: Role | Node, supervisor: Role | Node
) -> Node:
    settings = stage_of(recipe, step)
    cache = None
    if not settings.on_policy:
        sampled: Role = "teacher" if role == "student" else "expert"
        cache = Node("rollouts", "teacher_rollouts", sampled, seed, supervisor, step.pool, settings)
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
    """Nodes of arms × seeds.

    arms          arm -> seed -> last node
    names         node -> its name, which is also its folder's
    fingerprints  node -> hash of everything that determines its result
    reads         stage -> number of its teacher's cached rollouts that it reads
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[int, Node]]
    names: Mapping[Node, str]
    fingerprints: Mapping[Node, str]
    reads: Mapping[Node, int]

    def order(self) -> list[Node]:
        """Every node once in topological order; nodes of equal name are the same work, such as a cache with several readers."""
        first: dict[str, Node] = {}
        for node, name in self.names.items():
            first.setdefault(name, node)
        return list(first.values())

    def arms_by_node(self) -> dict[str, list[str]]:
        """Name of a node -> the arms that need it, in order; none for an evaluation of a base model.

        Example: {"warmup.s0.1f3a5c7e": ["bridge", "exopd"], "base_student.s0.90ab12cd": []}.
        """
        arms: dict[str, list[str]] = {name: [] for name in self.names.values()}
        for arm, by_seed in self.arms.items():
            needed = {self.names[node] for last in by_seed.values() for node in last.ancestry() if last.kind == "train"}
            for name in needed:
                arms[name].append(arm)
        return arms

    def is_done(self, node: Node, folder: RunDir) -> bool:
        """Whether the folder holds the node, finished and with this plan's fingerprint; a cache with all that is still to be read."""
        node_dir = folder.node(self.names[node])
        done = node_dir.is_done(self.fingerprints[node])
        return done and (node.kind != "rollouts" or node_dir.scored_rollouts >= self.cached_rollouts(node, folder))

    def cached_rollouts(self, cache: Node, unfinished_in: RunDir | None = None) -> int:
        """Number of rollouts of a cache that the plan's stages read, or those of its stages that a folder does not hold yet."""
        return max(
            (
                count
                for stage, count in self.reads.items()
                if stage.cache is not None and self.names[stage.cache] == self.names[cache]
                if unfinished_in is None or not self.is_done(stage, unfinished_in)
            ),
            default=0,
        )

    def unfinished(self, folder: RunDir) -> list[Node]:
        """Nodes in topological order that the folder does not hold yet."""
        return [node for node in self.order() if not self.is_done(node, folder)]

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
    """Plan arms × seeds, with the evaluations of the base models before them if the recipe has evaluations.

    content  what else determines a node's result: `models` (role -> fingerprint of its weights), `day` (role -> the date
             that its chat template reads, or None), problem ids of each pool and evaluation, and fingerprints of their answers;
             `reads` ((pool, stage) -> `RunInputs.cached_rollouts`)
    """
    roles: list[Role] = ["student"] if recipe.models.teacher is None else ["student", "teacher"]
    lasts: dict[str, dict[int, Node]] = {
        f"base_{role}": {seed: Node("evaluate", f"base_{role}", role, seed, role) for seed in seeds}
        for role in (roles if recipe.data.evals else [])
    }
    for arm in arms:
        lasts[arm] = {seed: last_node(arm_of(arm, recipe), recipe, seed) for seed in seeds}
    fingerprints: dict[Node, str] = {}
    for by_seed in lasts.values():
        for last in by_seed.values():
            for node in last.ancestry():
                if node not in fingerprints:
                    fingerprints[node] = fingerprint(node, recipe, content, fingerprints)
    names = {node: f"{node.stage}.s{node.seed}.{digest[:8]}" for node, digest in fingerprints.items()}
    reads = {
        node: content["reads"](node.pool, node.settings, node.compute is not None)
        for node in names
        if node.cache is not None
    }
    return Plan(recipe, tuple(seeds), lasts, names, fingerprints, reads)


def fingerprint(node: Node, recipe: Recipe, content: Mapping[str, Any], known: Mapping[Node, str]) -> str:
    """sha256 of everything that determines the node's result; how it is computed (device, microbatches) is not part of it."""

    def of(source: Role | Node | None) -> str | None:
        return known[source] if isinstance(source, Node) else None if source is None else content["models"](source)

    stage, lora = node.settings, node.lora(recipe)
    graded = node.kind != "rollouts"
    fields = {
        "kind": node.kind,
        "stage": node.stage,
        "role": node.role,
        "seed": node.seed,
        "start": of(node.start),
        "teacher": of(node.teacher),
        "cache": of(node.cache),
        "pool": None if node.pool is None else content["pools"][node.pool],
        "halves": None,
        "labels": content["labels"][node.pool] if node.pool and stage and stage.needs_labels else None,
        "unlabeled": content["unlabeled"] if stage and not stage.needs_labels else None,
        "settings": _relevant_settings(node),
        "evals": content["evals"] if graded else None,
        "evaluate": recipe.evaluate.model_dump(mode="json") if graded else None,
        "task": recipe.task,
        "prompt": recipe.prompt.model_dump(mode="json"),
        "dtype": recipe.models.dtype,
    }
    if node.pool not in (None, "all"):  # a stage on a half counts its epochs over the smaller half
        fields["halves"] = [len(content["pools"][half]) for half in ("first_half", "second_half")]
    # Fields that came later are absent where they do not apply, so that earlier fingerprints stay valid.
    if stage and stage.prompts == "every":
        fields["every_prompt"] = content["every_prompt"]
    if node.compute is not None:
        fields["compute"] = [of(source) for source in node.compute]
    if node.kind == "train" and stage and stage.until and stage.until.metric == "validation":
        fields["validation"] = content["validation"]
    if graded and content.get("grader") is not None:
        fields["grader"] = content["grader"]
    if recipe.compute.sampler != "torch":  # draws other tokens, and the loss corrects for its distribution
        fields |= {"sampler": recipe.compute.sampler, "importance_cap": recipe.compute.vllm.importance_cap}
        if SAMPLERS[recipe.compute.sampler].of_user:
            fields["sampler_code"] = code_fingerprint(SAMPLERS[recipe.compute.sampler].module)
    if recipe.compute.overlap and node.kind == "train" and stage and stage.on_policy:
        fields |= {"overlap": recipe.compute.overlap, "importance_cap": recipe.compute.vllm.importance_cap}
    if node.kind == "train" and stage and stage.spec.loss is not None:
        fields["objective_code"] = code_fingerprint(stage.spec.loss.__module__)
    if stage and node.aligns_tokenizers:
        # The rollouts of a cache are in the ids of their reader, and the form decides what it holds.
        dense = stage.dense
        fields["aligned"] = [of(node.learner), dense.tokenizers, dense.divergence, recipe.models.teacher_tokenizer]
    if recipe.prompt.teacher is not None and recipe.prompt.teacher.privileged is not None and reads_contexts(node):
        fields["contexts"] = content["contexts"]
    if "day" in content and (day := content["day"](node.role)) is not None:
        fields["day"] = day
    if lora is not None:
        fields["lora"] = lora.model_dump(mode="json", exclude={"roles"})
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def reads_contexts(node: Node) -> bool:
    """Whether its teacher supervises the student, and so reads privileged contexts where there are some."""
    return node.learner == "student" and node.settings is not None and node.settings.needs_teacher


def _relevant_settings(node: Node) -> Any:
    """Settings that determine the result; of a cache only the teacher's sampling and storage, so that students share it."""
    if node.settings is None:
        return None
    if node.kind == "train":
        relevant = node.settings.model_dump(mode="json", exclude={"checkpoint_every"})
        if relevant["until"] is None:
            del relevant["until"]
        return relevant
    settings = node.settings
    return {"samples": settings.group_size, "sampling": settings.sampling.model_dump(), "top_k": settings.dense.top_k}
