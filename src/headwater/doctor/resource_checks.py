"""Doctor checks of the memory and disk that a plan needs."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from headwater.config.lora import Lora
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note, warning
from headwater.models.adapter_size import adapter_size
from headwater.models.shape import Shape
from headwater.runs.estimate import Estimator
from headwater.runs.inputs import RunInputs
from headwater.runs.node import CacheNode, TrainNode, base_of
from headwater.teachers.cache import EXACT_CACHE_LIMIT
from headwater.training.checkpoint import KEPT

MAX_MEMORY = 0.8
"""Share of the free memory beyond which activations, which the estimate leaves out, may not fit."""
LARGE_CACHE, CACHED_TOP_K = 1 << 30, 64
"""Bytes of an exact teacher cache from which a smaller one is advised, and the tokens that it then keeps at each position."""
LAYER_ROWS, LAYER_WEIGHTS = 128, 1 << 18
"""Tokens and the most weights of the layer that is timed in both types: a few milliseconds."""
SLOWER, MUCH_SLOWER = 1.2, 2.0
"""Ratios of times from which bfloat16 is called slower, and float32 too slow; less is within the noise of a short measurement."""
WIDE = 512
"""Width from which the time of a model is mostly that of its matrix products."""


def memory(context: DoctorContext) -> Iterator[Finding]:
    """Compare the largest node's weights, gradients and optimizer state, without activations, with the free memory."""
    for role in context.roles:
        context.inputs.config(role)  # one that cannot be used has its own finding
    device = context.inputs.device
    largest, free = largest_pending(context, context.inputs), free_memory(device)
    if largest is None or free is None:
        return
    needed, name = largest
    evidence = (
        f"{name} needs {size(needed)} for weights, gradients and optimizer, activations not counted; "
        f"{size(free)} are free on {device.type}"
    )
    smaller = smaller_settings(context, needed)
    remedies = [*(f"set {setting} (then {size(bytes_)})" for setting, bytes_ in smaller), "take smaller models"]
    if needed > free:
        yield error("memory-too-small", evidence, f"{', '.join(remedies)} or a larger machine")
    elif needed > MAX_MEMORY * free:
        if not context.recipe.models.gradient_checkpointing:
            remedies.insert(0, "set models.gradient_checkpointing=true")
        remedies.insert(0, "lower compute.microbatch_tokens and compute.sample_batch")
        yield warning("memory-tight", evidence, f"{', '.join(remedies)} or a larger machine")


def largest_pending(context: DoctorContext, inputs: RunInputs) -> tuple[float, str] | None:
    """(persistent bytes, name) of the pending node that needs most; None without pending nodes."""
    estimator = Estimator(context.plan, inputs, context.model_shapes)
    node_bytes = [(estimator.model_bytes(node).total, context.plan.names[node]) for node in context.pending]
    return max(node_bytes, key=lambda pair: pair[0], default=None)


def smaller_settings(context: DoctorContext, needed: float) -> list[tuple[str, float]]:
    """(setting, bytes that the largest node needs with it) of every unused setting that saves memory, the best first."""
    models, changes = context.recipe.models, dict[str, dict[str, object]]()
    if models.lora is None:
        changes["models.lora={r: 16}"] = {"lora": Lora()}
        changes["models.lora={r: 16, quantize: nf4}"] = {"lora": Lora(quantize="nf4")}
    else:
        if len(models.lora.roles) == 1:
            both = models.lora.model_copy(update={"roles": ("teacher", "student")})
            changes["models.lora.roles=[teacher, student]"] = {"lora": both}
        if models.lora.quantize is None:
            changes["models.lora.quantize=nf4"] = {"lora": models.lora.model_copy(update={"quantize": "nf4"})}
    if models.dtype != "bfloat16":
        changes["models.dtype=bfloat16"] = {"dtype": "bfloat16"}
    smaller = []
    for setting, change in changes.items():
        recipe = context.recipe.model_copy(update={"models": models.model_copy(update=change)})
        largest = largest_pending(context, replace(context.inputs, recipe=recipe))
        if largest is not None and largest[0] < needed:
            smaller.append((setting, largest[0]))
    return sorted(smaller, key=lambda pair: pair[1])


def free_memory(device: torch.device) -> float | None:
    """Bytes: of the GPU, or of the machine and the container that it runs in; None if the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limits.append(1024.0 * _value(Path("/proc/meminfo"), "MemAvailable:"))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        cgroup = Path("/sys/fs/cgroup")
        most, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        # The page cache counts as used, but is freed on demand.
        limits.append(float(most - used + _value(cgroup / "memory.stat", "inactive_file")))
    return min(limits, default=None)


def _value(path: Path, name: str) -> int:
    """The number after a name in a file of names and numbers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[:1] == [name])


def disk(context: DoctorContext) -> Iterator[Finding]:
    """Compare models, checkpoints and teacher caches of the pending nodes with the output folder's free space."""
    inputs = context.inputs
    shapes = {role: inputs.shape(role) for role in context.roles}
    models = next_checkpoint = caches = 0.0
    for node in context.pending:
        shape = shapes.get(base_of(node.start), shapes["student"])  # served teachers have the student's vocabulary
        if isinstance(node, TrainNode):
            model, checkpoint, kept = stage_files(node, inputs, shape)
            stays = inputs.recipe.compute.keep_checkpoints
            models += model + (kept * checkpoint if stays else 0)
            # Written in addition to the kept ones, which a stage that is done removes unless they stay.
            next_checkpoint = max(next_checkpoint, checkpoint if stays else (kept + 1) * checkpoint)
        elif isinstance(node, CacheNode):
            stage = node.settings
            tokens = context.plan.cached_rollouts(node) * stage.sampling.max_tokens
            top_k, exact = stage.dense.top_k, tokens * shape.vocabulary * 4
            caches += exact if top_k is None else 6 * tokens * min(top_k, shape.vocabulary)
            if top_k is None and LARGE_CACHE < exact <= EXACT_CACHE_LIMIT and shape.vocabulary > 2 * CACHED_TOP_K:
                yield warning(
                    "cache-whole-vocabulary",
                    f"{context.plan.names[node]}: exact distributions over {shape.vocabulary:,} entries take "
                    f"{size(4 * shape.vocabulary)} for each token, up to {size(exact)} in all; the top {CACHED_TOP_K} and the "
                    f"tail's mass up to {size(6 * tokens * CACHED_TOP_K)}",
                    f"set dense.top_k={CACHED_TOP_K} in the stage that reads it (stages.warmup or stages.sft)",
                )
            if top_k is None and exact > EXACT_CACHE_LIMIT:
                yield warning(
                    "cache-over-limit",
                    f"{context.plan.names[node]}: exact distributions of up to {tokens:,} tokens over {shape.vocabulary:,} entries "
                    f"take up to {size(exact)}; a cache over {size(EXACT_CACHE_LIMIT)} is refused once its rollouts are sampled",
                    "set for example dense.top_k=64 in the stage that reads it (stages.warmup or stages.sft)",
                )
    folder = next(path for path in (context.out.absolute(), *context.out.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, models + next_checkpoint
    evidence = (
        f"--out {context.out}: {size(needed)} for models and checkpoints and up to {size(caches)} for teacher caches are "
        f"needed, {size(free)} are free"
    )
    if needed > free:
        yield error("disk-too-small", evidence, "free some space, or choose another --out")
    elif needed + caches > free:
        remedy = "free some space, choose another --out, or set stages.warmup.dense.top_k"
        yield warning("disk-tight", evidence, remedy)


def stage_files(node: TrainNode, inputs: RunInputs, shape: Shape) -> tuple[float, float, int]:
    """(bytes of the model that a stage saves, bytes of one of its checkpoints, checkpoints that stay).

    A checkpoint holds what trains, as float32 with two moments: all weights, or the adapter. The model is saved in the compute
    dtype, an adapter alone (`models.lora.output: adapter`) in float32.
    """
    recipe, stage = inputs.recipe, node.settings
    lora = node.lora(recipe)
    adapter = 0 if lora is None else adapter_size(shape, lora)[0]
    model = float(shape.parameters * (2 if recipe.models.dtype == "bfloat16" else 4))
    if lora is not None and lora.output == "adapter":
        model = 4.0 * adapter
    kept = KEPT if 0 < stage.checkpoint_every < inputs.steps(node.pool, stage) else 1
    return model, 12.0 * (shape.parameters if lora is None else adapter), kept


def experts(context: DoctorContext) -> Iterator[Finding]:
    """Report mixtures of experts whose config does not state the number of experts per token."""
    for role in context.roles:
        shape = context.inputs.shape(role)
        if not shape.experts_known:
            yield warning(
                "experts-per-token-unknown",
                f"models.{role}: its config.json does not say how many experts a token is sent to, so the FLOPs in ledger, report "
                "and dry run are not known: they count all experts",
                "set num_experts_per_tok in its config.json, if the model reads it",
            )


def compute_dtype(context: DoctorContext) -> Iterator[Finding]:
    """Whether this CPU computes a layer of the largest model's width much faster in the other dtype: measured."""
    if context.inputs.device.type != "cpu":
        return
    dtype, width = context.recipe.models.dtype, max(context.inputs.shape(role).hidden for role in context.roles)
    if dtype == "float32" and width < WIDE:
        return
    single, half = layer_seconds(width)
    times = f"forward and backward of a layer of width {width}: {1e3 * half:.2f} ms in bfloat16, {1e3 * single:.2f} in float32"
    if dtype == "bfloat16" and half > SLOWER * single:
        yield warning(
            "bfloat16-slower",
            f"models.dtype: bfloat16 is {half / single:.1f} times slower than float32 on this CPU ({times})",
            "set models.dtype=float32 where the memory allows it, or run on a GPU",
        )
    if dtype == "float32" and single > MUCH_SLOWER * half:
        yield note(
            "bfloat16-faster",
            f"models.dtype: bfloat16 is {single / half:.1f} times faster than float32 on this CPU ({times})",
            "set models.dtype=bfloat16; the weights that train stay float32",
        )


def layer_seconds(width: int) -> tuple[float, float]:
    """(float32, bfloat16) seconds of a forward and backward pass of one linear layer, as a training step runs it.

    The best of a few, alternating and on one thread: other load on the machine would otherwise decide. About 50 ms in all.
    """
    layer = torch.nn.Linear(width, max(1, min(width, LAYER_WEIGHTS // width)), bias=False)
    x = torch.ones(LAYER_ROWS, width, requires_grad=True)
    best, threads = [float("inf")] * 2, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):  # the first of each prepares kernels
            for half in (False, True):
                started = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    y = layer(x)
                y.sum().backward()
                best[half] = min(best[half], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return best[0], best[1]


def size(number: float) -> str:
    """Example: `size(3 << 30)` is `"3.0 GiB"`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
