"""What is measured beside a stage's training: the conditions, and the accuracy that decides when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from headwater.models.policy import Policy
from headwater.runs.node_context import Asked, NodeContext, held_out, named
from headwater.runs.plan import Node, supervisor
from headwater.sampling.base import requests_for
from headwater.storage import fault_points
from headwater.storage.ledger import record
from headwater.storage.run_dir import append_jsonl
from headwater.teachers.build import Teacher
from headwater.training import conditions
from headwater.training.evaluate import refuse_nan
from headwater.training.loop import Metrics
from headwater.types import Rollout


def beside(node: Node, place: NodeContext, policy: Policy, asked: Asked) -> Callable[[int, bool], Metrics]:
    """(steps done, whether they are the last) -> metrics that join the step's row; the conditions have a file of their own."""
    measured, validated = condition_c2(node, place, policy, asked), validation(node, place, policy)

    def measure(step: int, last: bool) -> Metrics:
        measured(step, last)
        return validated(step)

    return measure


def condition_c2(node: Node, place: NodeContext, policy: Policy, asked: Asked) -> Callable[[int, bool], None]:
    """Writes a row of conditions.jsonl at the first and last step and every so many between (`conditions.measure`)."""
    recipe, whose, settings = place.inputs.recipe, supervisor(node), node.settings
    held_out, _ = next(iter(place.inputs.evals.values()))
    problems = held_out[: recipe.conditions.problems]
    if whose is None or settings is None or not problems:
        return lambda step, last: None
    folder, prompter = place.node_dir(node), place.prompter(policy)
    prompts = [(problem.id, prompter.ids(problem)) for problem in problems]

    def sample(who: Teacher, *draw: str | int) -> list[Rollout]:
        requests = requests_for(prompts, 1, 0, node.seed, "conditions", *draw)
        rollouts = place.sampler(who).sample(requests, settings.sampling)
        refuse_nan(rollouts)
        return rollouts

    @cache
    def teacher() -> tuple[Teacher, list[Rollout]]:
        loaded = asked(whose)
        return loaded, sample(loaded, "teacher")

    def measure(step: int, last: bool) -> None:
        if step % recipe.conditions.every and not last:
            return
        started = time.perf_counter()
        with named(node, step):
            (held, theirs), own = teacher(), sample(policy, "student", step)
        found = conditions.measure(policy, held, own, theirs, recipe.conditions.top_k, recipe.compute.microbatch_tokens)
        append_jsonl(
            folder.conditions,
            [{"step": step, **found, "top_k": recipe.conditions.top_k, "problems": len(problems)}],
        )
        fault_points.failpoint("conditions.measured")
        read = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in (*own, *theirs))
        context = read / (len(own) + len(theirs)) / 2
        student, theirs_shape = policy.shape, held.shape
        sampled = sum(len(rollout.completion_ids) for rollout in own)
        record(
            folder.ledger,
            replace(
                place.spend(node),
                purpose="measure",
                step=step,
                tokens_sampled=sampled,
                tokens_teacher_scored=read,
                flops=student.flops(read + sampled, context) + theirs_shape.flops(read, context),
                seconds=time.perf_counter() - started,
            ),
        )

    return measure


def validation(node: Node, place: NodeContext, policy: Policy) -> Callable[[int], Metrics]:
    """The accuracy on `data.validation` whenever a window of a stage that ends on it is over; its looks count apart."""
    inputs = place.inputs
    until = None if node.settings is None else node.settings.until
    if until is None or until.metric != "validation" or inputs.validation is None:
        return lambda step: {}
    asked, every = inputs.validation, until.every

    def measure(step: int) -> Metrics:
        if step == 0 or step % every:
            return {}
        rows, spend = held_out(node, place, policy, asked, "validation", step, (node.seed, "validation"))
        record(place.node_dir(node).ledger, spend)
        return {"validation": sum(row["correct"] for row in rows) / len(rows)}

    return measure
