"""Estimate what a plan costs from its recipe and model shapes: labels, tokens, FLOPs, memory, hours on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headwater.config.stage import Sampling
from headwater.losses.objectives import objective_of
from headwater.models.adapter_size import adapter_size
from headwater.models.folder import ModelFolder
from headwater.models.shape import Shape
from headwater.runs.hardware import MODELS
from headwater.runs.inputs import RunInputs
from headwater.runs.memory_estimate import (
    DeviceMemory,
    ModelBytes,
    gathered_bytes,
    model_bytes,
    pass_bytes,
    whole_copy_bytes,
)
from headwater.runs.node import ROLES, CacheNode, Node, Role, StageNode, TrainNode, base_of
from headwater.runs.node_estimate import Estimate
from headwater.runs.plan import Plan
from headwater.teachers.served_teacher import NO_SHAPE
from headwater.teachers.server_client import is_served
from headwater.training.conditions import Schedule
from headwater.training.update import needs_old_logp


@dataclass(frozen=True)
class Assumptions:
    """Mean length of completions where it is known, how many devices share the weights, and the memory of each where it is known."""

    mean_tokens: float | None = None
    devices: int = 1
    device_memory: float | None = None


def estimates(plan: Plan, inputs: RunInputs, assumptions: Assumptions = Assumptions()) -> list[Estimate]:
    """An estimate for every node of the plan, in its order. Raises UserError for models whose shape cannot be read."""
    estimator = Estimator(plan, inputs, model_shapes(inputs), assumptions)
    return [estimator.estimate(node) for node in plan.order()]


def condition_schedule(node: TrainNode, plan: Plan, inputs: RunInputs, steps: int) -> tuple[Schedule, float]:
    """When a stage of `steps` steps measures condition C2, and the share of the stage's FLOPs that this costs at most."""
    roles = {base_of(source) for source in (node.start, node.c2_teacher) if source is not None}
    estimator = Estimator(plan, inputs, model_shapes(inputs, tuple(roles)))
    return estimator.condition_schedule(node, steps), estimator.condition_share(node, steps)


def model_shapes(inputs: RunInputs, roles: Sequence[Role] = ROLES) -> dict[Role, Shape]:
    """Shape of the models of these roles; those in `hardware.MODELS` need not be on this machine."""
    models = inputs.recipe.models
    shapes: dict[Role, Shape] = {}
    for role in roles:
        named = models.by_role(role).items()
        if named:  # of several teachers the largest
            candidates = [model_shape(f"models.{name}", model, models.trust_remote_code) for name, model in named]
            shapes[role] = max(candidates, key=lambda shape: shape.matrix_parameters)
    return shapes


def model_shape(field: str, name: str, trust_remote_code: bool) -> Shape:
    """A model's shape from its config; a served model costs nothing on this machine. Raises UserError."""
    if is_served(name):
        return NO_SHAPE
    folder = ModelFolder.open(name, field, trust_remote_code)
    return Shape.from_fields(MODELS[folder.path]) if folder.path in MODELS else folder.shape


@dataclass(frozen=True)
class Estimator:
    """Estimates nodes of one plan."""

    plan: Plan
    inputs: RunInputs
    shapes: Mapping[Role, Shape]
    assumptions: Assumptions = Assumptions()

    @cached_property
    def prompt(self) -> float:
        """Tokens of the longest prompt among the first 256 problems, or the mean where completions are assumed to be of mean length.

        Where the student's tokenizer or the problems are not on this machine, `prompt.max_tokens`.
        """
        inputs = self.inputs
        if inputs.missing or not inputs.model_folder("student").is_local:
            return float(inputs.recipe.prompt.max_tokens)
        prompter = inputs.prompter(inputs.tokenizer("student")).without_limit()
        lengths = [len(prompter.ids(inputs.problems[name])) for name in sorted(inputs.problems)[:256]]
        return max(lengths) if self.assumptions.mean_tokens is None else sum(lengths) / len(lengths)

    def estimate(self, node: Node) -> Estimate:
        """Cost of one node, its evaluation and measurements included."""
        recipe, shape = self.inputs.recipe, self.shape(node.start)
        evals = 0
        if not isinstance(node, CacheNode):
            evals = sum(len(problems) for problems, _ in self.inputs.evals.values()) * recipe.evaluate.samples
        completion = self.completion_tokens(recipe.evaluate.sampling)
        tokens = int(evals * completion)
        evaluation = Estimate(
            name=self.plan.names[node],
            labels=0,
            steps=0,
            tokens_sampled=tokens,
            tokens_teacher_scored=0,
            flops=shape.flops(tokens + evals * self.prompt, (completion + self.prompt) / 2),
            bytes=self.model_bytes(node).total,
            memory=self.device_memory(node),
            decoded=self.decoding(shape, tokens, completion),
        )
        if isinstance(node, TrainNode):
            return self._with_stage(evaluation, node)
        return self._with_cache(evaluation, node) if isinstance(node, CacheNode) else evaluation

    def _with_cache(self, nothing: Estimate, node: CacheNode) -> Estimate:
        completion, flops = self.completion_tokens(node.settings.sampling), self.stage_flops(node)
        tokens = int(self.rows(node)[0] * completion)
        decoded = self.decoding(self.shape(node.start), tokens, completion)
        return replace(
            nothing,
            tokens_sampled=tokens,
            tokens_teacher_scored=tokens,
            flops=flops,
            decoded=decoded,
            scoring=self.scoring_flops(node),
            training=(flops, decoded),
        )

    def _with_stage(self, evaluation: Estimate, node: TrainNode) -> Estimate:
        """Add the cost of a stage to that of its evaluation."""
        stage, shape, steps = node.settings, self.shape(node.start), self.steps(node)
        completion, stage_flops = self.completion_tokens(stage.sampling), self.stage_flops(node)
        own = int(self.rows(node)[0] * completion) if stage.on_policy else 0
        scored = own if node.teacher is not None else 0
        sampled_measuring, scored_measuring, flops_measuring = self.measurements(node, steps)
        read, decoding_flops = self.decoding(shape, own + sampled_measuring, completion)
        return replace(
            evaluation,
            labels=self.labels(node, steps),
            steps=steps,
            tokens_sampled=evaluation.tokens_sampled + own + sampled_measuring,
            tokens_teacher_scored=scored + scored_measuring,
            flops=stage_flops + evaluation.flops + flops_measuring,
            decoded=(read + evaluation.decoded[0], decoding_flops + evaluation.decoded[1]),
            measured=flops_measuring,
            condition_share=self.condition_share(node, steps),
            scoring=self.scoring_flops(node),
            training=(stage_flops, self.decoding(shape, own, completion)),
        )

    def shape(self, source: Role | Node) -> Shape:
        return self.shapes[base_of(source)]

    def completion_tokens(self, sampling: Sampling) -> float:
        mean = self.assumptions.mean_tokens
        return float(sampling.max_tokens) if mean is None else min(mean, float(sampling.max_tokens))

    def adapter_size(self, node: TrainNode) -> tuple[int, float]:
        """(weights of the LoRA adapter that a node trains, those that one token uses); 0 where it trains all weights."""
        lora = node.lora(self.inputs.recipe)
        return (0, 0.0) if lora is None else adapter_size(self.shape(node.start), lora)

    @property
    def bytes_per_value(self) -> int:
        """Of the compute dtype."""
        return 2 if self.inputs.recipe.models.dtype == "bfloat16" else 4

    def steps(self, node: TrainNode) -> int:
        """A stage's steps; at equal compute, as many as the estimated FLOPs of the other arm pay for."""
        return node.matched_steps(self.inputs.steps(node.pool, node.settings), self.stage_flops)

    def labels(self, node: TrainNode, steps: int) -> int:
        """Distinct labels that a stage's steps use. Dynamic sampling may use every label of the pool."""
        if not node.settings.needs_labels:
            return 0
        pool = len(self.inputs.pool(node.pool))
        return pool if node.settings.sparse.dynamic_sampling else min(pool, steps * node.settings.prompts_per_step)

    def rows(self, node: TrainNode | CacheNode) -> tuple[int, int]:
        """(rows, prompts prefilled) of all steps, or of a cache. A cache and an upper bound prefill a prompt per row, an estimate
        one per group.
        """
        if isinstance(node, CacheNode):
            rows = self.plan.cached_rollouts(node)
            return rows, rows
        stage, steps = node.settings, self.steps(node)
        shared = stage.on_policy and self.assumptions.mean_tokens is not None
        return steps * stage.batch_size, steps * (stage.prompts_per_step if shared else stage.batch_size)

    def stage_flops(self, node: Node) -> float:
        """FLOPs of a node without its evaluation and measurements."""
        if isinstance(node, CacheNode):  # sampled, and scored
            return 2 * self.scoring_flops(node)
        if not isinstance(node, TrainNode):
            return 0.0
        stage, shape, (_, adapter) = node.settings, self.shape(node.start), self.adapter_size(node)
        tokens, context = self.tokens_and_context(node)
        flops = stage.passes * shape.flops(tokens, context, 3, adapter)
        if stage.on_policy:
            if needs_old_logp(stage):
                flops += shape.flops(tokens, context, 1, adapter)
            flops += shape.flops(tokens, context)
            flops += self.scoring_flops(node)
            weights = stage.dense.token_weights
            scoring_passes = stage.needs_reference + (weights is not None and weights.soft_or is not None)
            scoring_passes += stage.dense.candidates != "teacher"
            flops += scoring_passes * shape.flops(tokens, context)
        return flops

    def scoring_flops(self, node: TrainNode | CacheNode) -> float:
        """FLOPs of a node's rollouts under its teacher; a served teacher's are not this machine's."""
        tokens, context = self.tokens_and_context(node)
        models = [node.start] if isinstance(node, CacheNode) else node.scorers()
        return sum((self.shape(source).flops(tokens, context) for source in models), 0.0)

    def tokens_and_context(self, node: TrainNode | CacheNode) -> tuple[float, float]:
        """(tokens of a node's rows and the prompts that are prefilled for them, mean number of tokens that one attends to)."""
        (rows, prompts), completion = self.rows(node), self.completion_tokens(node.settings.sampling)
        return rows * completion + prompts * self.prompt, (completion + self.prompt) / 2

    def measurements(self, node: TrainNode, steps: int) -> tuple[int, int, float]:
        """(tokens sampled, tokens scored by the teacher, FLOPs) of measurements between a stage's steps."""
        recipe, stage, shape = self.inputs.recipe, node.settings, self.shape(node.start)
        sampled, scored, flops = self.condition_cost(node, self.condition_schedule(node, steps), steps)
        if stage.until is not None and stage.until.metric == "validation" and self.inputs.validation is not None:
            rows = steps // stage.until.every * len(self.inputs.validation[0]) * recipe.evaluate.samples
            length = self.completion_tokens(recipe.evaluate.sampling) + self.prompt
            sampled, flops = sampled + int(rows * length), flops + shape.flops(rows * length, length / 2)
        return sampled, scored, flops

    def condition_schedule(self, node: TrainNode, steps: int) -> Schedule:
        """When condition C2 is measured: as the recipe says, within its `conditions.max_share` of the stage's FLOPs."""
        settings, teacher = self.inputs.recipe.conditions, node.c2_teacher
        whole = Schedule(0 if teacher is None else len(self.inputs.condition_problems), settings.every)
        if settings.max_share is None or whole.problems == 0:
            return whole
        cost = self.condition_cost(node, Schedule(1, settings.every), 0)[2]
        return whole.within(settings.max_share * self.stage_flops(node), cost, steps)

    def condition_share(self, node: TrainNode, steps: int) -> float:
        """FLOPs of measuring condition C2 in a stage of this many steps, as a share of the FLOPs of its training."""
        measured = self.condition_cost(node, self.condition_schedule(node, steps), steps)[2]
        trained = self.stage_flops(node)
        return measured / trained if trained else 0.0

    def condition_cost(self, node: TrainNode, schedule: Schedule, steps: int) -> tuple[int, int, float]:
        """(tokens sampled, tokens scored by the teacher, FLOPs) of measuring condition C2 in a stage of this many steps."""
        teacher = node.c2_teacher
        if teacher is None:
            return 0, 0, 0.0
        rows = schedule.measurements(steps) * schedule.problems
        completion = self.completion_tokens(node.settings.sampling)
        length = completion + self.prompt
        scored = int(2 * rows * length)
        flops = self.shape(node.start).flops(3 * rows * length, length / 2)
        return int(rows * completion), scored, flops + self.shape(teacher).flops(scored, length / 2)

    def decoding(self, shape: Shape, tokens: float, completion: float) -> tuple[float, float]:
        """(bytes read, FLOPs) of decoding: each step reads all weights once, and every row's KV cache so far."""
        rows, context = self.inputs.recipe.compute.sample_batch, self.prompt + completion / 2
        kv_cache = context * shape.kv_cache_numbers * self.bytes_per_value
        read = tokens / rows * shape.matrix_parameters * self.bytes_per_value + tokens * kv_cache
        return read, shape.flops(tokens, context)

    def model_bytes(self, node: Node) -> ModelBytes:
        """What a node holds from its start to its end, all devices together, by part."""
        shape, width = self.shape(node.start), self.bytes_per_value
        if not isinstance(node, TrainNode):
            return model_bytes(None, 0, False, [shape], width)
        stage, (adapter, _), lora = node.settings, self.adapter_size(node), node.lora(self.inputs.recipe)
        queried = set(node.scorers())
        teacher = node.c2_teacher
        if teacher is not None and self.inputs.recipe.conditions.problems:
            queried.add(teacher)
        if stage.on_policy and stage.needs_reference:
            queried.add(node.start)
        frozen = [self.shape(source) for source in queried if source != node.start or not adapter]
        return model_bytes(shape, adapter, lora is not None and lora.quantize is not None, frozen, width)

    def device_memory(self, node: Node) -> DeviceMemory:
        """What a node holds on each device, by part. Weights and optimizer state are divided evenly over the devices (FSDP2)."""
        parts, count, compute = self.model_bytes(node), self.assumptions.devices, self.inputs.recipe.compute
        trains = isinstance(node, TrainNode)
        ahead = bool(compute.overlap) and isinstance(node, TrainNode) and node.settings.on_policy
        sampler, kv_cache = self.sampler_bytes(node, ahead)
        return DeviceMemory(
            weights=parts.weights / count,
            optimizer=parts.optimizer / count,
            frozen=(parts.frozen - parts.heads) / count + parts.heads if count > 1 else parts.frozen,
            sampler=sampler,
            kv_cache=kv_cache,
            gathered=gathered_bytes(self.shape(node.start), self.trained_width(node)) if trains and count > 1 else 0.0,
            activations=self.activation_bytes(node),
            both=ahead or (trains and compute.sampler == "vllm" and not compute.vllm.sleep),
        )

    def trained_width(self, node: Node) -> int:
        """Bytes of a weight of the model that a node trains: float32, or under an adapter the compute dtype."""
        return 4 if isinstance(node, TrainNode) and node.lora(self.inputs.recipe) is None else self.bytes_per_value

    def sampler_bytes(self, node: Node, ahead: bool) -> tuple[float, float]:
        """(what the sampler holds on a device besides the node's own weights, KV cache that is not part of that).

        The embedded sampler of several devices gathers all weights on each. vLLM takes its share of the device; where no device is
        named, its own weights and a cache for the same sequences.
        """
        compute, shape, kv_cache = self.inputs.recipe.compute, self.shape(node.start), self.kv_cache_bytes(node)
        whole = float(shape.parameters * self.bytes_per_value)
        if compute.sampler == "vllm":
            engine = whole / compute.vllm.tensor_parallel_size + kv_cache
            memory = self.assumptions.device_memory
            share = engine if memory is None else compute.vllm.memory * memory
            return share + (whole if ahead else 0.0), 0.0
        if ahead:
            return whole, kv_cache
        if self.assumptions.devices == 1:
            return 0.0, kv_cache
        return whole_copy_bytes(shape, self.bytes_per_value, self.trained_width(node) > self.bytes_per_value), kv_cache

    def completion_and_prompt(self, node: Node) -> float:
        """Tokens of a node's longest sequence, or its mean one."""
        settings = node.settings if isinstance(node, StageNode) else self.inputs.recipe.evaluate
        return self.prompt + self.completion_tokens(settings.sampling)

    def kv_cache_bytes(self, node: Node) -> float:
        """The decoder's KV cache for the rows that a device decodes at once: its share of a step's."""
        recipe, shape = self.inputs.recipe, self.shape(node.start)
        evals = next(iter(self.inputs.evals.values()), ((), None))[0]
        rows = node.settings.batch_size if isinstance(node, StageNode) else len(evals) * recipe.evaluate.samples
        length = self.completion_and_prompt(node)
        rows = -(-rows // self.assumptions.devices)
        return min(rows, recipe.compute.sample_batch) * length * shape.kv_cache_numbers * self.bytes_per_value

    def activation_bytes(self, node: Node) -> float:
        """A microbatch's activations; 0 for a node that does not train."""
        if not isinstance(node, TrainNode):
            return 0.0
        recipe, stage, length = self.inputs.recipe, node.settings, self.completion_and_prompt(node)
        tokens = max(min(float(recipe.compute.microbatch_tokens), stage.batch_size * length), length)
        logits = 2 if objective_of(stage).divergence is not None else 1
        cuda = recipe.compute.device != "cpu" and self.inputs.device.type == "cuda"
        recompute = recipe.models.gradient_checkpointing
        return pass_bytes(self.shape(node.start), tokens, self.bytes_per_value, recompute, cuda, logits)
