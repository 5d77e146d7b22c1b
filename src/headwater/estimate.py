"""What a plan would cost, from its recipe and its models' shapes alone: labels, tokens, FLOPs, memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from headwater import model, model_files
from headwater.materials import Materials, read_tokenizer
from headwater.model import Shape
from headwater.objective import objective_of
from headwater.plan import Node, Plan, Role, supervisor
from headwater.prompts import Prompter
from headwater.served import NO_SHAPE, is_served


@dataclass(frozen=True)
class Estimate:
    """Upper bounds for a node: every completion is taken to be `max_tokens` long."""

    name: str
    labels: int
    steps: int
    tokens_sampled: int
    tokens_teacher_scored: int
    flops: float
    bytes: float

    def row(self) -> dict[str, Any]:
        return {
            "node": self.name,
            "labels": self.labels,
            "steps": self.steps,
            "tokens_sampled_at_most": self.tokens_sampled,
            "tokens_teacher_scored_at_most": self.tokens_teacher_scored,
            "flops_at_most": self.flops,
            "memory_bytes": self.bytes,
        }


def estimates(plan: Plan, materials: Materials) -> list[Estimate]:
    """An estimate for every node of the plan, in its order. Raises UserError for models whose shape cannot be read."""
    models = materials.recipe.models
    shapes: dict[Role, Shape] = {}
    for role in ("student", "teacher", "expert"):
        named = models.named(role).items()
        if named:  # of several teachers the costliest
            found = [shape_of(field, name, models.trust_remote_code) for field, name in named]
            shapes[role] = max(found, key=lambda one: one.matrix_parameters)
    case = Case(plan, materials, shapes, prompt_tokens(materials))
    return [estimate(node, case) for node in plan.order()]


def shape_of(field: str, name: str, trust_remote_code: bool) -> Shape:
    """A model's shape from its config; a served one costs nothing here. Raises UserError."""
    if is_served(name):
        return NO_SHAPE
    where = model.resolve(name, field)
    model.refuse_untrusted(where, field, name, trust_remote_code)
    with model_files.reading(f"{field}: the config of {name} cannot be used"):
        return Shape.of(where, trust_remote_code)


@dataclass(frozen=True)
class Case:
    """What estimates rest on; `prompt` is the length of the longest prompt in tokens."""

    plan: Plan
    materials: Materials
    shapes: dict[Role, Shape]
    prompt: float

    def shape(self, one: Role | Node) -> Shape:
        return self.shapes[base_of(one)]

    @property
    def width(self) -> int:
        """Bytes of a number at the compute type."""
        return 2 if self.materials.recipe.models.dtype == "bfloat16" else 4


def prompt_tokens(materials: Materials) -> float:
    """Tokens of the longest prompt among the first 256 problems; one over the limit is refused elsewhere, by name."""
    unbounded = materials.recipe.prompt.model_copy(update={"max_tokens": sys.maxsize})
    prompter = Prompter(read_tokenizer(materials.recipe, "student"), unbounded)
    chosen = [materials.problems[name] for name in sorted(materials.problems)[:256]]
    return max(len(prompter.ids(problem)) for problem in chosen)


def base_of(one: Role | Node) -> Role:
    """The base model whose shape a node's weights have."""
    while isinstance(one, Node):
        one = one.start
    return one


def steps_of(node: Node, case: Case) -> int:
    """A stage's steps; where they depend on what other arms will have cost, on what those are estimated to cost."""
    assert node.settings is not None and node.pool is not None
    usual = case.materials.steps(node.pool, node.settings)
    if node.compute is None:
        return usual
    like, as_ = node.compute
    wanted = sum(work_flops(one, case) for one in as_.lineage())
    wanted -= sum(work_flops(one, case) for one in node.lineage() if one != node)
    return max(1, round(wanted / (work_flops(like, case) / usual)))


def work_flops(node: Node, case: Case) -> float:
    """FLOPs of a node without its evaluation."""
    if node.settings is None or node.pool is None:
        return 0.0
    stage, shape = node.settings, case.shape(node.start)
    length = stage.sampling.max_tokens + case.prompt
    if node.kind == "rollouts":
        rollouts = len(case.materials.prompts(node.pool, stage)) * stage.group_size
        return 2 * shape.flops(rollouts * length, length / 2)
    objective = objective_of(stage)
    read = steps_of(node, case) * stage.batch_size * length
    flops = stage.passes * shape.flops(read, length / 2, passes=3)
    if objective.source == "policy":
        flops += shape.flops(read, length / 2)
        if node.teacher is not None and "teacher" in objective.signals:
            flops += case.shape(node.teacher).flops(read, length / 2)
        if "reference" in objective.signals:
            flops += shape.flops(read, length / 2)
    return flops


def estimate(node: Node, case: Case) -> Estimate:
    """Upper bounds of one node, its evaluation included."""
    name, recipe, shape = case.plan.names[node], case.materials.recipe, case.shape(node.start)
    evals = sum(len(problems) for problems, _ in case.materials.evals.values()) * recipe.evaluate.samples
    eval_tokens = evals * recipe.evaluate.sampling.max_tokens
    eval_flops = shape.flops(eval_tokens + evals * case.prompt, (recipe.evaluate.sampling.max_tokens + case.prompt) / 2)
    if node.settings is None or node.pool is None:
        return Estimate(name, 0, 0, eval_tokens, 0, eval_flops, frozen_bytes(shape, case.width))
    stage, flops = node.settings, work_flops(node, case)
    if node.kind == "rollouts":
        sampled = len(case.materials.prompts(node.pool, stage)) * stage.group_size * stage.sampling.max_tokens
        return Estimate(name, 0, 0, sampled, sampled, flops, frozen_bytes(shape, case.width))
    steps, objective = steps_of(node, case), objective_of(stage)
    sampled = steps * stage.batch_size * stage.sampling.max_tokens if objective.source == "policy" else 0
    scored, memory = 0, trained_bytes(shape, case.width)
    if node.teacher is not None and "teacher" in objective.signals:
        memory += frozen_bytes(case.shape(node.teacher), case.width)
        scored = sampled
    if "reference" in objective.signals:
        memory += frozen_bytes(shape, case.width)
    labels = len(case.materials.pool(node.pool)) if stage.needs_labels else 0
    more, asked, work = beside_flops(node, steps, case)
    return Estimate(
        name, labels, steps, sampled + eval_tokens + more, scored + asked, flops + eval_flops + work, memory
    )


def beside_flops(node: Node, steps: int, case: Case) -> tuple[int, int, float]:
    """What is measured beside a stage: tokens sampled, tokens shown to the teacher, FLOPs."""
    recipe, stage, shape = case.materials.recipe, node.settings, case.shape(node.start)
    assert stage is not None
    sampled, asked, flops = 0, 0, 0.0
    whose = supervisor(node)
    if whose is not None:
        problems = min(recipe.conditions.problems, len(next(iter(case.materials.evals.values()))[0]))
        times = (steps // recipe.conditions.every + 2) * problems
        length = int(stage.sampling.max_tokens + case.prompt)
        sampled, asked = times * stage.sampling.max_tokens, 2 * times * length
        flops = shape.flops(3 * times * length, length / 2) + case.shape(whose).flops(asked, length / 2)
    if stage.until is not None and stage.until.metric == "validation" and case.materials.validation is not None:
        times = steps // stage.until.every * len(case.materials.validation[0]) * recipe.evaluate.samples
        length = int(recipe.evaluate.sampling.max_tokens + case.prompt)
        sampled, flops = sampled + times * length, flops + shape.flops(times * length, length / 2)
    return sampled, asked, flops


def frozen_bytes(shape: Shape, width: int) -> float:
    return float(shape.parameters * width)


def trained_bytes(shape: Shape, width: int) -> float:
    """float32 weights, gradients and two moments, and a copy of the weights at the compute type."""
    return float(shape.parameters * (16 + (width if width < 4 else 0)))
