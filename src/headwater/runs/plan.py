"""Plan arms × seeds as a DAG of content-addressed nodes, so that work that arms share is one node and runs once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.config.arm import Arm, Step
from headwater.config.arms import arm_of, stage_of
from headwater.config.recipe import Recipe, canonical_json
from headwater.config.samplers import SAMPLERS
from headwater.plugins import code_fingerprint
from headwater.runs.node import CacheNode, EvaluateNode, Node, Role, StageNode, TrainNode
from headwater.storage.run_dir import RunDir


def last_node(arm: Arm, recipe: Recipe, seed: int) -> TrainNode:
    """The last node of an arm; the others are its ancestry."""
    teacher: Role | TrainNode = "teacher"
    for step in arm.teacher:
        teacher = _train_node(recipe, step, "teacher", seed, teacher, supervisor="expert")
    student: Role | TrainNode = "student"
    for step in arm.student:
        student = _train_node(recipe, step, "student", seed, student, supervisor=teacher)
    assert isinstance(student, TrainNode)
    if arm.same_compute is not None:
        unmatched, match = (last_node(arm_of(name, recipe), recipe, seed) for name in arm.same_compute)
        student = replace(student, compute=(unmatched, match))
    return student


def _train_node(
    recipe: Recipe, step: Step, role: Role, seed: int, start: Role | TrainNode, supervisor: Role | TrainNode
) -> TrainNode:
    settings = stage_of(recipe, step)
    assert step.pool is not None  # `arm_of` has named it
    node = TrainNode(step.stage, role, seed, start, step.pool, settings)
    if settings.on_policy:
        return replace(node, teacher=supervisor if settings.needs_teacher else None)
    sampled: Role = "teacher" if role == "student" else "expert"
    return replace(node, cache=CacheNode("teacher_rollouts", sampled, seed, supervisor, step.pool, settings))


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
    reads: Mapping[TrainNode, int]

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
            trained = [last for last in by_seed.values() if isinstance(last, TrainNode)]
            needed = {self.names[node] for last in trained for node in last.ancestry()}
            for name in needed:
                arms[name].append(arm)
        return arms

    def is_done(self, node: Node, folder: RunDir) -> bool:
        """Whether the folder holds the node, finished and with this plan's fingerprint; a cache with all that is still to be read."""
        node_dir = folder.node(self.names[node])
        done = node_dir.is_done(self.fingerprints[node])
        return done and (
            not isinstance(node, CacheNode) or node_dir.scored_rollouts >= self.cached_rollouts(node, folder)
        )

    def cached_rollouts(self, cache: CacheNode, unfinished_in: RunDir | None = None) -> int:
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
        f"base_{role}": {seed: EvaluateNode(f"base_{role}", role, seed, role) for seed in seeds}
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
        if isinstance(node, TrainNode) and node.cache is not None
    }
    return Plan(recipe, tuple(seeds), lasts, names, fingerprints, reads)


def fingerprint(node: Node, recipe: Recipe, content: Mapping[str, Any], known: Mapping[Node, str]) -> str:
    """sha256 of everything that determines the node's result; how it is computed (device, microbatches) is not part of it."""

    def of(source: Role | Node | None) -> str | None:
        return known[source] if isinstance(source, Node) else None if source is None else content["models"](source)

    graded = not isinstance(node, CacheNode)
    fields: dict[str, Any] = {
        "kind": node.kind,
        "stage": node.stage,
        "role": node.role,
        "seed": node.seed,
        "start": of(node.start),
        "evals": content["evals"] if graded else None,
        "evaluate": recipe.evaluate.model_dump(mode="json") if graded else None,
        "task": recipe.task,
        "prompt": recipe.prompt.model_dump(mode="json"),
        "dtype": recipe.models.dtype,
        **dict.fromkeys(("teacher", "cache", "pool", "halves", "labels", "unlabeled", "settings")),
    }
    # Fields that came later are absent where they do not apply, so that earlier fingerprints stay valid.
    if graded and content.get("grader") is not None:
        fields["grader"] = content["grader"]
    if recipe.compute.sampler != "torch":  # draws other tokens, and the loss corrects for its distribution
        fields |= {"sampler": recipe.compute.sampler, "importance_cap": recipe.compute.vllm.importance_cap}
        if SAMPLERS[recipe.compute.sampler].of_user:
            fields["sampler_code"] = code_fingerprint(SAMPLERS[recipe.compute.sampler].module)
    if "day" in content and (day := content["day"](node.role)) is not None:
        fields["day"] = day
    if isinstance(node, StageNode):
        fields |= _stage_fields(node, recipe, content)
        if node.aligns_tokenizers:
            # The rollouts of a cache are in the ids of their reader, and the form decides what it holds.
            dense = node.settings.dense
            fields["aligned"] = [of(node.learner), dense.tokenizers, dense.divergence, recipe.models.teacher_tokenizer]
    if isinstance(node, CacheNode):  # only the teacher's sampling and storage, so that students share it
        sampled, dense = node.settings.sampling.model_dump(), node.settings.dense
        fields["settings"] = {"samples": node.settings.group_size, "sampling": sampled, "top_k": dense.top_k}
    if isinstance(node, TrainNode):
        fields |= _train_fields(node, recipe, content) | {"teacher": of(node.teacher), "cache": of(node.cache)}
        if node.compute is not None:
            fields["compute"] = [of(source) for source in node.compute]
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def _stage_fields(node: StageNode, recipe: Recipe, content: Mapping[str, Any]) -> dict[str, Any]:
    stage = node.settings
    fields: dict[str, Any] = {
        "pool": content["pools"][node.pool],
        "labels": content["labels"][node.pool] if stage.needs_labels else None,
        "unlabeled": None if stage.needs_labels else content["unlabeled"],
    }
    if node.pool != "all":  # a stage on a half counts its epochs over the smaller half
        fields["halves"] = [len(content["pools"][half]) for half in ("first_half", "second_half")]
    if stage.prompts == "every":
        fields["every_prompt"] = content["every_prompt"]
    if recipe.prompt.teacher is not None and recipe.prompt.teacher.privileged is not None and reads_contexts(node):
        fields["contexts"] = content["contexts"]
    return fields


def _train_fields(node: TrainNode, recipe: Recipe, content: Mapping[str, Any]) -> dict[str, Any]:
    stage, lora = node.settings, node.lora(recipe)
    fields: dict[str, Any] = {"settings": stage.model_dump(mode="json", exclude={"checkpoint_every"})}
    if stage.until is None:
        del fields["settings"]["until"]
    elif stage.until.metric == "validation":
        fields["validation"] = content["validation"]
    if recipe.compute.overlap and stage.on_policy:
        fields |= {"overlap": recipe.compute.overlap, "importance_cap": recipe.compute.vllm.importance_cap}
    if stage.spec.loss is not None:
        fields["objective_code"] = code_fingerprint(stage.spec.loss.__module__)
    if lora is not None:
        fields["lora"] = lora.model_dump(mode="json", exclude={"roles"})
    return fields


def reads_contexts(node: StageNode) -> bool:
    """Whether its teacher supervises the student, and so reads privileged contexts where there are some."""
    return node.learner == "student" and node.settings.needs_teacher
