"""What a plan would cost, from its recipe and its models' shapes alone: labels, tokens, FLOPs, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headwater import model
from headwater.materials import Materials
from headwater.model import Shape
from headwater.objective import objective_of
from headwater.plan import Node, Plan, Role

PROMPT_TOKENS = 64
"""Assumed where prompts have not been read; measured otherwise."""


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
    models = materials.recipe.models
    shapes: dict[Role, Shape] = {}
    for role in ("student", "teacher", "expert"):
        name = getattr(models, role)
        if name is not None:
            shapes[role] = Shape.of(model.resolve(name, f"models.{role}"), models.trust_remote_code)
    return [estimate(node, plan, materials, shapes) for node in plan.order()]


def base_of(one: Role | Node) -> Role:
    """The base model whose shape a node's weights have."""
    while isinstance(one, Node):
        one = one.start
    return one


def estimate(node: Node, plan: Plan, materials: Materials, shapes: dict[Role, Shape]) -> Estimate:
    shape, recipe = shapes[base_of(node.start)], materials.recipe
    compute_bytes = 2 if recipe.models.dtype == "bfloat16" else 4
    evals = sum(len(problems) for problems, _ in materials.evals.values()) * recipe.evaluate.samples
    eval_tokens = evals * recipe.evaluate.sampling.max_tokens
    if node.settings is None or node.pool is None:
        length = recipe.evaluate.sampling.max_tokens + PROMPT_TOKENS
        flops = shape.flops(eval_tokens + evals * PROMPT_TOKENS, length / 2)
        return Estimate(plan.names[node], 0, 0, eval_tokens, 0, flops, frozen_bytes(shape, compute_bytes))
    stage, prompts = node.settings, len(materials.prompts(node.pool, node.settings))
    length = stage.sampling.max_tokens + PROMPT_TOKENS
    if node.kind == "rollouts":
        rollouts = prompts * stage.group_size
        sampled = rollouts * stage.sampling.max_tokens
        flops = 2 * shape.flops(rollouts * length, length / 2)
        return Estimate(plan.names[node], 0, 0, sampled, sampled, flops, frozen_bytes(shape, compute_bytes))
    steps, objective = materials.steps(node.pool, stage), objective_of(stage)
    rollouts = steps * stage.batch_size
    read = rollouts * length
    flops = stage.passes * shape.flops(read, length / 2, passes=3)
    memory = trained_bytes(shape, compute_bytes)
    scored = 0
    if objective.source == "policy":
        flops += shape.flops(read, length / 2)
        if node.teacher is not None and "teacher" in objective.signals:
            teacher = shapes[base_of(node.teacher)]
            flops += teacher.flops(read, length / 2)
            memory += frozen_bytes(teacher, compute_bytes)
            scored = rollouts * stage.sampling.max_tokens
        if "reference" in objective.signals:
            flops += shape.flops(read, length / 2)
            memory += frozen_bytes(shape, compute_bytes)
    sampled = rollouts * stage.sampling.max_tokens if objective.source == "policy" else 0
    labels = len(materials.pool(node.pool)) if stage.needs_labels else 0
    flops += shape.flops(eval_tokens + evals * PROMPT_TOKENS, length / 2)
    return Estimate(plan.names[node], labels, steps, sampled + eval_tokens, scored, flops, memory)


def frozen_bytes(shape: Shape, width: int) -> float:
    return float(shape.parameters * width)


def trained_bytes(shape: Shape, width: int) -> float:
    """float32 weights, gradients and two moments, and a copy of the weights at the compute type."""
    return float(shape.parameters * (16 + (width if width < 4 else 0)))
