"""The doctor's checks of problems, gold answers, splits, and of the memory and disk that the plan needs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from headwater.data.sources import Loaded, without_leaks
from headwater.data.validate import failing
from headwater.doctor.context import Case, Finding, UnavailableError
from headwater.runs.estimate import base_of, estimates
from headwater.teachers.cache import EXACT_CACHE_LIMIT

SHOWN = 3
UNBALANCED = 0.5
"""A half of fewer than this share of the other's problems."""
MOST_MEMORY = 0.8
"""Share of the free memory past which activations, which the estimate leaves out, may not fit."""
SLOW_GOLDS = 200
"""Gold answers tried before a run, where the grader is a user's own and may take long."""


def data_is_readable(case: Case) -> list[Finding]:
    found: dict[Finding, None] = {}
    for name in ("data.labeled", "data.unlabeled", *(f"data.evals.{name}" for name in case.recipe.data.evals)):
        try:
            if name != "data.unlabeled" or case.recipe.data.unlabeled is not None:
                case.source(name)
        except UnavailableError as error:
            found[error.finding] = None
    return list(found)


def _graded(case: Case) -> dict[str, Loaded]:
    """Where gold answers are needed."""
    return {"data.labeled": case.labeled} | {f"data.evals.{name}": held for name, held in case.evals.items()}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def answers(case: Case) -> list[Finding]:
    return [
        Finding(
            "label-without-answer",
            "error",
            f"{what}: {len(held.without_answer)} of {len(held.problems)} problems have no answer (rows "
            f"{_few([str(held.rows[name][0]) for name in held.without_answer])})",
            "give them answers, name the column in data.columns.answer, or move them to data.unlabeled",
        )
        for what, held in _graded(case).items()
        if held.without_answer
    ]


def golds(case: Case) -> list[Finding]:
    """Every gold answer, written as a completion, must grade correct against itself."""
    found, grade = [], case.grade
    slow = grade.task.bounded and grade.task.quick is None and not case.every
    for what, held in _graded(case).items():
        pairs = list(held.gold.items())[: SLOW_GOLDS if slow else None]
        failed = [f"{name} ({gold!r:.40}: {reason})" for name, gold, reason in failing(grade, pairs)]
        if failed:
            # One of our own graders that fails most golds was not made for this data: every reward would be 0.
            hopeless = ":" not in case.recipe.task and 2 * len(failed) > len(pairs)
            found.append(
                Finding(
                    "gold-fails-grader",
                    "error" if hopeless else "warning",
                    f"{what}: {len(failed)} of {len(pairs)} gold answers do not grade correct against themselves under task "
                    f"{case.recipe.task}: {_few(failed)}",
                    "a label that fails its own grader can only be wasted: mend or remove it, or choose another task",
                )
            )
    return found


def contamination(case: Case) -> list[Finding]:
    found = []
    for what in ("data.labeled", "data.unlabeled"):
        if what == "data.unlabeled" and case.unlabeled is None:
            continue
        leaks = case.leaks(what)
        for evaluation in case.recipe.data.evals:
            ours = [leak for leak in leaks if leak.eval == evaluation]
            if ours:
                exact = sum(leak.why == "exact" for leak in ours)
                found.append(
                    Finding(
                        "evaluation-leak",
                        "warning",
                        f"{what}: {len(ours)} problems also stand in data.evals.{evaluation}, {exact} of them word for word "
                        f"({_few([leak.problem_id for leak in ours])}); they are left out of training",
                        "nothing, unless they are many: then look for the same in what the models were pretrained on",
                    )
                )
    return found


def repeats(case: Case) -> list[Finding]:
    found = []
    sources = _graded(case) | ({} if case.unlabeled is None else {"data.unlabeled": case.unlabeled})
    for what, held in sources.items():
        if held.duplicates:
            found.append(
                Finding(
                    "duplicates",
                    "warning",
                    f"{what}: {held.duplicates} rows repeat a problem that stands before; each problem counts once",
                    "nothing, or remove the repeated rows so that counts agree with the file",
                )
            )
        if held.contradictions:
            rows = [" and ".join(map(str, held.rows[name][:2])) for name in held.contradictions]
            found.append(
                Finding(
                    "contradicting-answers",
                    "warning",
                    f"{what}: {len(held.contradictions)} problems stand there with different answers (rows {_few(rows)}); left out",
                    "keep the right answer and remove the others to have them back",
                )
            )
    return found


def evaluations(case: Case) -> list[Finding]:
    found = [
        Finding(
            "evaluation-empty",
            "error",
            f"data.evals.{name}: holds no problem that could be graded",
            "give it another file, or take it out of data.evals",
        )
        for name, held in case.evals.items()
        if not held.problems
    ]
    for (one, first), (other, second) in combinations(case.evals.items(), 2):
        shared = without_leaks(first, {other: second})[1][other]
        if shared:
            found.append(
                Finding(
                    "evaluations-overlap",
                    "warning",
                    f"data.evals.{one} and data.evals.{other} share {len(shared)} problems ({_few(shared)}), so their results are "
                    "not independent",
                    "take the shared problems out of one of them",
                )
            )
    return found


def split(case: Case) -> list[Finding]:
    """The bought labels and their halves: apart from each other, alike in size, enough for a step of every stage."""
    found, pools = [], case.pools
    both = set(pools.first_half) & set(pools.second_half)
    if both:
        found.append(
            Finding(
                "halves-overlap",
                "error",
                f"labels.budget: {len(both)} problems stand in both halves ({_few(sorted(both))})",
                "report it: halves are made by content and must be disjoint",
            )
        )
    sizes = len(pools.first_half), len(pools.second_half)
    halved = {node.pool for node in case.nodes} & {"first_half", "second_half"}
    if halved and min(sizes) < UNBALANCED * max(sizes):
        found.append(
            Finding(
                "halves-unbalanced",
                "warning",
                f"labels.budget: the halves hold {sizes[0]} and {sizes[1]} problems",
                "buy an even number of labels, or add labelled problems: halves go by content, so a small pool divides unevenly",
            )
        )
    seen = set()
    for node in case.nodes:
        if node.settings is None or node.pool is None or (node.stage, node.pool) in seen:
            continue
        seen.add((node.stage, node.pool))
        unlabeled = 0 if node.settings.needs_labels or case.unlabeled is None else len(case.unlabeled.problems)
        held = len(getattr(pools, node.pool)) + unlabeled
        wanted = node.settings.prompts_per_step if node.kind == "train" and node.settings.on_policy else 1
        if held < wanted:
            found.append(
                Finding(
                    "pool-too-small",
                    "error",
                    f"stages.{node.stage}: its pool ({node.pool}) holds {held} problems, fewer than the {wanted} of one step",
                    "raise labels.budget, or lower the stage's batch_size or raise its group_size",
                )
            )
    return found


# Resources ------------------------------------------------------------------------------------------------------------


def memory(case: Case) -> list[Finding]:
    """Weights, gradients and optimizer of the largest node against what is free; activations come on top."""
    if not case.pending:
        return []
    names = {case.plan.names[node] for node in case.pending}
    largest = max((row for row in estimates(case.plan, case.inputs) if row.name in names), key=lambda row: row.bytes)
    free = free_memory(case.device)
    if free is None or largest.bytes <= MOST_MEMORY * free:
        return []
    evidence = (
        f"{largest.name} needs {size(largest.bytes)} for weights, gradients and optimizer, activations not counted; "
        f"{size(free)} are free on {case.device.type}"
    )
    remedy = "take smaller models, models.dtype=bfloat16 (frozen models halve) or a larger machine"
    if largest.bytes > free:
        return [Finding("memory-too-small", "error", evidence, remedy)]
    remedy = (
        "lower compute.microbatch_tokens and compute.sample_batch, set models.gradient_checkpointing=true, or " + remedy
    )
    return [Finding("memory-tight", "warning", evidence, remedy)]


def free_memory(device: torch.device) -> float | None:
    """Bytes: of the GPU, or of the machine and the container that we run in. None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().splitlines()
        # The page cache counts as used, but gives way.
        cache = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        found.append(float(int((group / "memory.max").read_text()) - used + cache))
    return min(found, default=None)


def disk(case: Case) -> list[Finding]:
    """Models, checkpoints and teacher caches of what is still to run against the space of the output folder."""
    shapes = {role: case.folder(role).shape for role in case.roles}
    width = 2 if case.recipe.models.dtype == "bfloat16" else 4
    kept = extra = caches = 0.0
    found = []
    for node in case.pending:
        shape = shapes.get(base_of(node.start), shapes["student"])  # teachers elsewhere have the student's width
        if node.kind == "train":
            # A model at the compute type and a checkpoint: float32 weights and two moments. The next one is written beside it.
            kept += shape.parameters * (width + 12)
            extra = max(extra, shape.parameters * 12.0)
        elif node.kind == "rollouts" and node.settings is not None and node.pool is not None:
            settings, prompts = node.settings, len(case.inputs.prompts(node.pool, node.settings))
            tokens = prompts * settings.group_size * settings.sampling.max_tokens
            top_k = settings.dense.top_k
            caches += tokens * (4 * shape.vocabulary if top_k is None else 6 * min(top_k, shape.vocabulary))
            if top_k is None and tokens * shape.vocabulary * 4 > EXACT_CACHE_LIMIT:
                found.append(
                    Finding(
                        "cache-over-limit",
                        "warning",
                        f"{case.plan.names[node]}: exact distributions of up to {tokens:,} tokens over {shape.vocabulary:,} "
                        f"entries are up to {size(tokens * shape.vocabulary * 4)}; a cache over {size(EXACT_CACHE_LIMIT)} is "
                        "refused once its rollouts are sampled",
                        "set stages.warmup.dense.top_k=64, say: the likeliest tokens and the tail's mass",
                    )
                )
    free = shutil.disk_usage(
        next(path for path in (case.out.absolute(), *case.out.absolute().parents) if path.exists())
    ).free
    evidence = (
        f"--out {case.out}: {size(kept + extra)} for models and checkpoints and up to {size(caches)} for teacher caches are "
        f"needed, {size(free)} are free"
    )
    if kept + extra > free:
        found.append(Finding("disk-too-small", "error", evidence, "make room, or choose another --out"))
    elif kept + extra + caches > free:
        remedy = "make room, choose another --out, or set stages.warmup.dense.top_k"
        found.append(Finding("disk-tight", "warning", evidence, remedy))
    return found


def size(number: float) -> str:
    """Example: `size(3 << 30)` is `"3.0 GiB"`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
