"""What a plan would cost, from its recipe and its models' shapes alone: labels, tokens, FLOPs, memory, hours on a device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwater.config.recipe import Lora
from headwater.config.stage import Sampling
from headwater.losses.objectives import objective_of
from headwater.models.folder import ModelFolder
from headwater.models.prompts import Prompter
from headwater.models.shape import Shape
from headwater.runs.hardware import BANDWIDTH_SHARE, MODELS, UTILISATION, Device
from headwater.runs.inputs import RunInputs
from headwater.runs.memory_estimate import Held, Work, held_bytes, working_bytes
from headwater.runs.plan import Node, Plan, Role, supervisor
from headwater.teachers.served_teacher import NO_SHAPE
from headwater.teachers.server_client import is_served


@dataclass(frozen=True)
class Estimate:
    """What a node costs where every completion is `max_tokens` long (an upper bound), or as long as was said.

    bytes    of weights, gradients and optimizer state, all devices together
    peak     bytes on each device at once, with activations and caches
    decoded  (bytes read, FLOPs) of decoding, where memory is what takes the time; FLOPs are part of `flops`
    """

    name: str
    labels: int
    steps: int
    tokens_sampled: int
    tokens_teacher_scored: int
    flops: float
    bytes: float
    peak: float
    decoded: tuple[float, float] = (0.0, 0.0)

    def seconds(self, device: Device, count: int = 1) -> float:
        """On `count` devices of a kind, at the stated shares of its peaks and divided evenly."""
        read, flops = self.decoded
        decoding = max(read / (BANDWIDTH_SHARE * device.bandwidth), flops / (UTILISATION * device.flops))
        return (decoding + (self.flops - flops) / (UTILISATION * device.flops)) / count

    def row(self) -> dict[str, Any]:
        return {
            "node": self.name,
            "labels": self.labels,
            "steps": self.steps,
            "tokens_sampled_at_most": self.tokens_sampled,
            "tokens_teacher_scored_at_most": self.tokens_teacher_scored,
            "flops_at_most": self.flops,
            "memory_bytes": self.bytes,
            "peak_bytes": self.peak,
        }


@dataclass(frozen=True)
class Asked:
    """What an estimate is for: the mean length of completions where it is known, and how many devices share the weights."""

    mean_tokens: float | None = None
    devices: int = 1


def estimates(plan: Plan, inputs: RunInputs, asked: Asked = Asked()) -> list[Estimate]:
    """An estimate for every node of the plan, in its order. Raises UserError for models whose shape cannot be read."""
    case = Case(plan, inputs, shapes_of(inputs), prompt_tokens(inputs, asked), asked)
    return [estimate(node, case) for node in plan.order()]


def shapes_of(inputs: RunInputs) -> dict[Role, Shape]:
    """The shape of every model of the recipe; those that are known (`known.MODELS`) need not be here."""
    models = inputs.recipe.models
    shapes: dict[Role, Shape] = {}
    for role in ("student", "teacher", "expert"):
        named = models.named(role).items()
        if named:  # of several teachers the costliest
            found = [shape_of(field, name, models.trust_remote_code) for field, name in named]
            shapes[role] = max(found, key=lambda one: one.matrix_parameters)
    return shapes


def shape_of(field: str, name: str, trust_remote_code: bool) -> Shape:
    """A model's shape from its config; a served one costs nothing here. Raises UserError."""
    if is_served(name):
        return NO_SHAPE
    folder = ModelFolder.open(name, field, trust_remote_code)
    return Shape.from_fields(MODELS[folder.path]) if folder.path in MODELS else folder.shape


@dataclass(frozen=True)
class Case:
    """What estimates rest on; `prompt` is the length of a prompt in tokens: the longest, or the mean where means are asked for."""

    plan: Plan
    inputs: RunInputs
    shapes: Mapping[Role, Shape]
    prompt: float
    asked: Asked = Asked()

    def shape(self, one: Role | Node) -> Shape:
        return self.shapes[base_of(one)]

    def completion(self, sampling: Sampling) -> float:
        """Tokens of a completion."""
        mean = self.asked.mean_tokens
        return float(sampling.max_tokens) if mean is None else min(mean, float(sampling.max_tokens))

    def adapter(self, node: Node) -> int:
        """Weights of the adapter that a node trains; 0 where it trains all."""
        lora = node.lora(self.inputs.recipe)
        return 0 if lora is None else self.shape(node.start).adapter_parameters(lora.r, targets_of(lora))

    @property
    def width(self) -> int:
        """Bytes of a number at the compute type."""
        return 2 if self.inputs.recipe.models.dtype == "bfloat16" else 4


def targets_of(lora: Lora) -> tuple[str, ...] | None:
    return None if isinstance(lora.targets, str) else lora.targets


def prompt_tokens(inputs: RunInputs, asked: Asked = Asked()) -> float:
    """Tokens of the longest prompt among the first 256 problems, or of the mean one; one over the limit is refused elsewhere.

    Where the student's tokenizer or the problems are not here (`missing`), `prompt.max_tokens`.
    """
    recipe = inputs.recipe
    if inputs.missing or not inputs.model_folder("student").is_local:
        return float(recipe.prompt.max_tokens)
    unbounded = recipe.prompt.model_copy(update={"max_tokens": sys.maxsize})
    prompter = Prompter(inputs.tokenizer("student"), unbounded)
    lengths = [len(prompter.ids(inputs.problems[name])) for name in sorted(inputs.problems)[:256]]
    return max(lengths) if asked.mean_tokens is None else sum(lengths) / len(lengths)


def base_of(one: Role | Node) -> Role:
    """The base model whose shape a node's weights have."""
    while isinstance(one, Node):
        one = one.start
    return one


def steps_of(node: Node, case: Case) -> int:
    """A stage's steps; where they depend on what other arms will have cost, on what those are estimated to cost."""
    assert node.settings is not None and node.pool is not None
    usual = case.inputs.steps(node.pool, node.settings)
    if node.compute is None:
        return usual
    like, as_ = node.compute
    wanted = sum(work_flops(one, case) for one in as_.lineage())
    wanted -= sum(work_flops(one, case) for one in node.lineage() if one != node)
    return max(1, round(wanted / (work_flops(like, case) / usual)))


def rows_of(node: Node, case: Case) -> tuple[int, int]:
    """(rows, prompts run for them) of all of a node's steps: a group's prompt is run once, but for a bound no row shares one."""
    assert node.settings is not None and node.pool is not None
    stage = node.settings
    if node.kind == "rollouts":
        prompts = len(case.inputs.prompts(node.pool, stage))
        return prompts * stage.group_size, prompts
    steps = steps_of(node, case)
    shared = stage.on_policy and case.asked.mean_tokens is not None
    return steps * stage.batch_size, steps * (stage.prompts_per_step if shared else stage.batch_size)


def work_flops(node: Node, case: Case) -> float:
    """FLOPs of a node without its evaluation."""
    if node.settings is None or node.pool is None:
        return 0.0
    stage, shape, (rows, prompts) = node.settings, case.shape(node.start), rows_of(node, case)
    completion = case.completion(stage.sampling)
    read, context = rows * completion + prompts * case.prompt, (completion + case.prompt) / 2
    if node.kind == "rollouts":  # sampled, and scored row by row
        return 2 * shape.flops(rows * (completion + case.prompt), context)
    objective, adapter = objective_of(stage), case.adapter(node)
    flops = stage.passes * shape.flops(read, context, 3, adapter)
    if objective.source == "policy":
        if stage.passes * stage.minibatches > 1:
            flops += shape.flops(read, context, 1, adapter)
        flops += shape.flops(read, context)
        if node.teacher is not None and "teacher" in objective.signals:
            flops += case.shape(node.teacher).flops(read, context)
        if "reference" in objective.signals:
            flops += shape.flops(read, context)
    return flops


def estimate(node: Node, case: Case) -> Estimate:
    """One node, its evaluation included."""
    name, recipe, shape = case.plan.names[node], case.inputs.recipe, case.shape(node.start)
    sampling, evals = recipe.evaluate.sampling, 0
    if node.kind != "rollouts":
        evals = sum(len(problems) for problems, _ in case.inputs.evals.values()) * recipe.evaluate.samples
    completion = case.completion(sampling)
    eval_tokens = int(evals * completion)
    eval_flops = shape.flops(eval_tokens + evals * case.prompt, (completion + case.prompt) / 2)
    held, work, devices = held_of(node, case), work_of(node, case), case.asked.devices
    memory = held_bytes(held, devices=1)
    peak = held_bytes(held, devices) + working_bytes(work)
    if node.settings is None or node.pool is None:
        decoded = decoding(shape, eval_tokens, completion, case)
        return Estimate(name, 0, 0, eval_tokens, 0, eval_flops, memory, peak, decoded)
    stage, flops, (rows, _) = node.settings, work_flops(node, case), rows_of(node, case)
    own = int(rows * case.completion(stage.sampling))
    if node.kind == "rollouts":
        decoded = decoding(shape, own, case.completion(stage.sampling), case)
        return Estimate(name, 0, 0, own, own, flops, memory, peak, decoded)
    objective = objective_of(stage)
    sampled = own if objective.source == "policy" else 0
    scored = own if node.teacher is not None and "teacher" in objective.signals else 0
    labels = len(case.inputs.pool(node.pool)) if stage.needs_labels else 0
    steps = steps_of(node, case)
    more, shown, beside = beside_flops(node, steps, case)
    parts = (
        decoding(shape, sampled + more, case.completion(stage.sampling), case),
        decoding(shape, eval_tokens, completion, case),
    )
    decoded = sum(one[0] for one in parts), sum(one[1] for one in parts)
    return Estimate(
        name, labels, steps, sampled + eval_tokens + more, scored + shown, flops + eval_flops + beside, memory, peak, decoded
    )  # fmt: skip


def beside_flops(node: Node, steps: int, case: Case) -> tuple[int, int, float]:
    """What is measured beside a stage: tokens sampled, tokens shown to the teacher, FLOPs."""
    recipe, stage, shape = case.inputs.recipe, node.settings, case.shape(node.start)
    assert stage is not None
    sampled, shown, flops = 0, 0, 0.0
    whose = supervisor(node)
    completion = case.completion(stage.sampling)
    if whose is not None:
        problems = min(recipe.conditions.problems, len(next(iter(case.inputs.evals.values()))[0]))
        # The first state, the last, and every so many between; the last may be one of those.
        times = (-(-steps // recipe.conditions.every) + 1) * problems
        length = completion + case.prompt
        sampled, shown = int(times * completion), int(2 * times * length)
        flops = shape.flops(3 * times * length, length / 2) + case.shape(whose).flops(shown, length / 2)
    if stage.until is not None and stage.until.metric == "validation" and case.inputs.validation is not None:
        times = steps // stage.until.every * len(case.inputs.validation[0]) * recipe.evaluate.samples
        length = case.completion(recipe.evaluate.sampling) + case.prompt
        sampled, flops = sampled + int(times * length), flops + shape.flops(times * length, length / 2)
    return sampled, shown, flops


def decoding(shape: Shape, tokens: float, completion: float, case: Case) -> tuple[float, float]:
    """(bytes read, FLOPs) of decoding so many tokens: at each step all weights once, and every row's keys and values so far."""
    rows, context = case.inputs.recipe.compute.sample_batch, case.prompt + completion / 2
    keys_and_values = context * shape.kv_cache_numbers * case.width
    return (
        tokens / rows * shape.matrix_parameters * case.width + tokens * keys_and_values,
        shape.flops(tokens, context),
    )


# Memory ---------------------------------------------------------------------------------------------------------------


def held_of(node: Node, case: Case) -> Held:
    """What a node keeps from its beginning to its end."""
    shape, stage = case.shape(node.start), node.settings
    frozen: list[Shape] = []
    if node.kind != "train" or stage is None:
        return Held(None, 0, False, (shape,), case.width)
    objective, adapter, lora = objective_of(stage), case.adapter(node), node.lora(case.inputs.recipe)
    whose = supervisor(node)
    if whose is not None and ("teacher" in objective.signals or case.inputs.recipe.conditions.problems):
        frozen.append(case.shape(whose))
    if "reference" in objective.signals and not adapter:
        frozen.append(shape)
    return Held(shape, adapter, lora is not None and lora.quantize is not None, tuple(frozen), case.width)


def work_of(node: Node, case: Case) -> Work:
    """What a node needs for a while: activations of a microbatch, or a decoder's cache."""
    recipe, shape, stage = case.inputs.recipe, case.shape(node.start), node.settings
    sampling = recipe.evaluate.sampling if stage is None else stage.sampling
    rows = (
        len(next(iter(case.inputs.evals.values()))[0]) * recipe.evaluate.samples if stage is None else stage.batch_size
    )
    rows = min(rows, recipe.compute.sample_batch)
    length = case.prompt + case.completion(sampling)
    trained = node.kind == "train" and stage is not None
    tokens = min(float(recipe.compute.microbatch_tokens), stage.batch_size * length) if trained and stage else 0.0
    return Work(
        shape=shape,
        tokens=max(tokens, length) if trained else 0.0,
        rows=rows,
        length=length,
        width=case.width,
        recomputed=recipe.models.gradient_checkpointing,
        cuda=recipe.compute.device != "cpu" and case.inputs.device.type == "cuda",
        logits=2 if trained and stage is not None and objective_of(stage).divergence is not None else 1,
    )
