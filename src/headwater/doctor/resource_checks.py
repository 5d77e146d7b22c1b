"""Doctor checks of the memory and disk that a plan needs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, warning
from headwater.runs.estimate import base_of, estimates
from headwater.teachers.cache import EXACT_CACHE_LIMIT

MAX_MEMORY = 0.8
"""Share of the free memory beyond which activations, which the estimate leaves out, may not fit."""


def memory(context: DoctorContext) -> Iterator[Finding]:
    """Weights, gradients and optimizer state of the largest node against what is free; activations come on top."""
    for role in context.roles:
        context.inputs.config(role)  # one that cannot be used has its own finding
    names, device = {context.plan.names[node] for node in context.pending}, context.inputs.device
    pending = [row for row in estimates(context.plan, context.inputs) if row.name in names]
    free = free_memory(device)
    if not pending or free is None:
        return
    largest = max(pending, key=lambda row: row.bytes)
    evidence = (
        f"{largest.name} needs {size(largest.bytes)} for weights, gradients and optimizer, activations not counted; "
        f"{size(free)} are free on {device.type}"
    )
    remedy = "take smaller models, models.dtype=bfloat16 (halves frozen models) or a larger machine"
    if largest.bytes > free:
        yield error("memory-too-small", evidence, remedy)
    elif largest.bytes > MAX_MEMORY * free:
        reduce = "lower compute.microbatch_tokens and compute.sample_batch, set models.gradient_checkpointing=true, or "
        yield warning("memory-tight", evidence, reduce + remedy)


def free_memory(device: torch.device) -> float | None:
    """Bytes: of the GPU, or of the machine and the container that it runs in; None if the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        limits.append(1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        cgroup = Path("/sys/fs/cgroup")
        used = int((cgroup / "memory.current").read_text())
        stat = (cgroup / "memory.stat").read_text().splitlines()
        # The page cache counts as used, but is freed on demand.
        cache = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        limits.append(float(int((cgroup / "memory.max").read_text()) - used + cache))
    return min(limits, default=None)


def disk(context: DoctorContext) -> Iterator[Finding]:
    """Models, checkpoints and teacher caches of the pending nodes against the output folder's free space."""
    inputs = context.inputs
    shapes = {role: inputs.shape(role) for role in context.roles}
    bytes_per_weight = 2 if context.recipe.models.dtype == "bfloat16" else 4
    models = next_checkpoint = caches = 0.0
    for node in context.pending:
        shape = shapes.get(base_of(node.start), shapes["student"])  # served teachers have the student's vocabulary
        if node.kind == "train":
            # The model at its compute type, and a checkpoint of float32 weights and two moments; the next one is written beside it.
            models += shape.parameters * (bytes_per_weight + 12)
            next_checkpoint = max(next_checkpoint, shape.parameters * 12.0)
        elif node.kind == "rollouts" and node.settings is not None and node.pool is not None:
            stage = node.settings
            tokens = len(inputs.prompts(node.pool, stage)) * stage.group_size * stage.sampling.max_tokens
            top_k, exact = stage.dense.top_k, tokens * shape.vocabulary * 4
            caches += exact if top_k is None else 6 * tokens * min(top_k, shape.vocabulary)
            if top_k is None and exact > EXACT_CACHE_LIMIT:
                yield warning(
                    "cache-over-limit",
                    f"{context.plan.names[node]}: exact distributions of up to {tokens:,} tokens over {shape.vocabulary:,} entries "
                    f"take up to {size(exact)}; a cache over {size(EXACT_CACHE_LIMIT)} is refused once its rollouts are sampled",
                    "set for example stages.warmup.dense.top_k=64: the most probable tokens and the tail's mass",
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


def size(number: float) -> str:
    """Example: `size(3 << 30)` is `"3.0 GiB"`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
