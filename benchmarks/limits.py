"""Measure the machine's limits: matrix products of a workload's exact shapes, and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cases import Case
from benchmarks.models import config_of, folder_of
from headwater.models.folder import ModelFolder
from headwater.models.shape import Shape

Pass = Literal["forward", "training"]
HEAD_ELEMENTS = 1 << 26
"""Maximum logits per product, as in any memory-bounded loss."""
SECONDS = 0.15
"""Duration for which each product is repeated."""


def shape_of(spec: str) -> Shape:
    """The shape of a model spec, without its weights."""
    if not spec.startswith("pocket:"):
        return Shape.from_config(config_of(spec))
    return ModelFolder.open(str(folder_of(spec, False, Path())), "benchmark").shape


def products(shape: Shape, rows: int) -> list[tuple[int, int, int, float]]:
    """(rows, in, out, count) of every matrix product in a forward pass over `rows` tokens.

    The head's product is limited to HEAD_ELEMENTS, so its count is fractional.
    """
    attention = shape.key_dim * (shape.heads + 2 * shape.kv_heads)
    layer = [
        (shape.hidden, attention),
        (shape.key_dim * shape.heads, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]
    at_once = max(1, min(rows, HEAD_ELEMENTS // shape.vocabulary))
    return [
        *((rows, a, b, float(shape.layers)) for a, b in layer),
        (at_once, shape.hidden, shape.vocabulary, rows / at_once),
    ]


def seconds_of(product: Callable[[], Any]) -> float:
    """Best time of many calls, in seconds: a limit is the best case, not the typical one."""
    product()
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        started = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - started)
    return best


def gemm_rate(shape: Shape, rows: int, kind: Pass, dtype: torch.dtype) -> float:
    """FLOP/s over all matrix products of a pass, into preallocated memory.

    A training pass adds the two products of each backward pass: the gradients of the input and of the weight.
    """
    flops = seconds = 0.0
    for n, a, b, times in products(shape, rows):
        x_NA, w_BA, y_NB = torch.rand(n, a).to(dtype), torch.rand(b, a).to(dtype), torch.rand(n, b).to(dtype)
        turns = [(x_NA, w_BA.T, torch.empty(n, b, dtype=dtype))]
        if kind == "training":
            turns += [(y_NB, w_BA, torch.empty(n, a, dtype=dtype)), (y_NB.T, x_NA, torch.empty(b, a, dtype=dtype))]
        for left, right, out in turns:
            flops += times * 2.0 * n * a * b
            seconds += times * seconds_of(lambda x=left, y=right, z=out: torch.mm(x, y, out=z))
    return flops / seconds


def bandwidth() -> float:
    """Bytes read and written per second by a copy larger than any cache."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / seconds_of(lambda: target.copy_(source))


def parts_of(case: Case) -> dict[str, tuple[str, int, Pass, float]]:
    """Arithmetic of a case: part -> (model spec, rows of its products, pass, FLOPs).

    Sampling runs each distinct prompt and each sampled token once, scoring is the teacher's pass, an update is a forward and
    a backward pass of the student. Recomputation to save memory is not counted.
    """
    length, prompts = case.prompt_tokens + case.new_tokens, case.batch // case.group
    student, tokens = shape_of(case.student), case.batch * length
    parts: dict[str, tuple[str, int, Pass, float]] = {}
    if case.kind in ("opd", "grpo", "sampling"):
        sampled = case.batch * case.new_tokens + prompts * case.prompt_tokens
        parts["sample"] = (case.student, case.batch, "forward", student.flops(sampled, length / 2))
    if case.kind in ("opd", "train") and case.teacher is not None:
        parts["score"] = (case.teacher, tokens, "forward", shape_of(case.teacher).flops(tokens, length / 2))
    if case.kind in ("opd", "grpo", "train"):
        parts["update"] = (case.student, tokens, "training", student.flops(tokens, length / 2, passes=3))
    return parts


def measure(cases: Sequence[Case], root: Path) -> dict[str, Any]:
    """Measure the machine's limits for these cases, and the work of each case.

    Returns {"memory_bandwidth", "gemm": {KEY: {"float32", "bfloat16"}}, "work": {CASE: {PART: {"flops", "gemm": KEY}}}}, rates per
    second. Cases with completions of variable length have no fixed amount of work and are omitted.
    """
    gemm: dict[str, dict[str, float]] = {}
    work: dict[str, dict[str, Any]] = {}
    for case in cases:
        if not case.endless or case.kind in ("loss", "loss_gpu") or case.device != "cpu":
            continue
        work[case.name] = {}
        for part, (spec, rows, kind, flops) in parts_of(case).items():
            key = f"{spec}, {rows} rows, {kind}"
            if key not in gemm:
                gemm[key] = {
                    name: gemm_rate(shape_of(spec), rows, kind, getattr(torch, name))
                    for name in ("float32", "bfloat16")
                }
            work[case.name][part] = {"flops": flops, "gemm": key}
    return {"memory_bandwidth": bandwidth(), "threads": torch.get_num_threads(), "gemm": gemm, "work": work}
