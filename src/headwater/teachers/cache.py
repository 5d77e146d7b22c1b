"""On-disk cache of teacher rollouts and their distributions, for stages that the teacher samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, Known, concatenate, truncate_to_top_k
from headwater.losses.logprobs import tokens_at_once
from headwater.losses.materialized import Exact, Grouped, Sorted, TopK
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.storage import fault_points
from headwater.storage.node_dir import DISTRIBUTIONS
from headwater.teachers import compact_ids
from headwater.teachers.scoring import ScoringTeacher, distributions_of
from headwater.types import Rollout

EXACT_CACHE_LIMIT = 64 << 30
"""Largest exact cache in bytes; a top-k cache is 100 to 1000 times smaller."""


GROUPS = "group_of_token"
"""Tensor of a cache of groups of tokens: the group of each of the student's tokens."""


def refuse_huge_cache(teacher: Policy | ScoringTeacher, tokens: int, top_k: int | None) -> None:
    """Raises UserError if an exact cache of this many tokens would exceed EXACT_CACHE_LIMIT."""
    size = tokens * teacher.vocabulary * 4
    if top_k is None and size > EXACT_CACHE_LIMIT:
        raise UserError(
            f"dense.top_k of the stage that reads the teacher's rollouts (stages.warmup or stages.sft): exact distributions of "
            f"{tokens:,} tokens over {teacher.vocabulary:,} entries would take {size / 2**30:,.0f} GiB; set it to 64, say, to keep "
            "the top tokens and the mass of the tail"
        )


def write_rollouts(folder: Path, rollouts: Sequence[Rollout]) -> None:
    names = ("problem_id", "sample", "prompt_ids", "completion_ids", "sampler_logp", "finish", "sampler", "temperature")
    lines = []
    for rollout in rollouts:
        written = (*names, "teacher_ids") if rollout.teacher_ids else names
        lines.append(json.dumps({name: getattr(rollout, name) for name in written}))
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fault_points.failpoint("cache.rollouts")


def read_rollouts(folder: Path) -> list[Rollout]:
    return [
        Rollout.from_json(json.loads(line))
        for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def write_distributions(
    folder: Path,
    teacher: Policy | ScoringTeacher,
    rollouts: Sequence[Rollout],
    top_k: int | None,
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the teacher's distributions at each token of the rollouts: exact float32, or top-k and the tail's mass.

    Size with top_k 64: 256 bytes per token, 272 for a vocabulary of more than 65,536.

    tokens    of one scoring pass
    progress  called with the number of rollouts scored since the last call
    """
    budget = BatchBudget(tokens)
    chunks: list[dict[str, Tensor]] = []
    groups: dict[str, Tensor] = {}
    shard = teacher.ranks.shard(rollouts)
    for start in teacher.ranks.lockstep(range(0, len(shard), 64)):
        batch = [] if start is None else shard[start : start + 64]
        scored = budget.fit_passes(partial(distributions_of, teacher, batch), batch)
        distributions = concatenate(scored, teacher.device) if scored else Exact(torch.empty(0, teacher.vocabulary))
        size = tokens_at_once(teacher.vocabulary, teacher.device)
        for row in range(0, len(distributions), size):
            block = distributions.rows(row, min(len(distributions), row + size)).materialize()
            chunks.append(_to_tensors(block, top_k, teacher.vocabulary))
            if isinstance(block, (TopK, Grouped)) and block.group_V is not None:
                groups = {GROUPS: block.group_V.cpu()}
        if progress is not None:
            progress(len(batch))
        fault_points.failpoint("cache.scored")
    gathered = teacher.ranks.gather((chunks, groups))
    if not teacher.ranks.is_main:
        return
    chunks = [chunk for some, _ in gathered for chunk in some]
    # Rank 0 scores nothing where there are more ranks than rollouts.
    groups = next((some for _, some in gathered if some), {})
    save_file(
        {key: torch.cat([chunk[key] for chunk in chunks]).contiguous() for key in chunks[0]} | groups,
        folder / DISTRIBUTIONS,
    )
    fault_points.failpoint("cache.written")


def _to_tensors(block: Known, top_k: int | None, vocabulary: int) -> dict[str, Tensor]:
    """Named tensors of distributions: `logp` alone (exact), with `compared` (sorted or grouped), or with ids and, where rows are partly
    filled, `count` (top-k)."""
    if isinstance(block, Sorted):
        return {"logp": block.logp_NV.cpu(), "compared": block.compared_N.cpu()}
    if isinstance(block, Grouped) and top_k is None:
        return {"logp": block.logp_NE.cpu(), "compared": block.compared_N.cpu()}
    if isinstance(block, Exact) and top_k is None:
        return {"logp": block.logp_NV.cpu()}
    kept = truncate_to_top_k(block, top_k or 1)
    count = {} if kept.count_N is None else {"count": kept.count_N.cpu().int()}
    return {"logp": kept.logp_NK.half().cpu(), **compact_ids.pack_ids(kept.ids_NK.cpu(), vocabulary), **count}


def read_cache(folder: Path) -> list[Row]:
    """Read rollouts with their teacher's distributions. Raises UserError if a file is missing, damaged or inconsistent."""
    try:
        rollouts = read_rollouts(folder)
        stored = load_file(folder / DISTRIBUTIONS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the teacher cache cannot be read ({error})") from None
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    if sum(lengths) != stored["logp"].shape[0]:
        raise UserError(
            f"{folder}: the teacher cache holds {stored['logp'].shape[0]} distributions for {sum(lengths)} tokens"
        )
    logps = stored["logp"].split(lengths)
    teachers: list[Distributions]
    group_V = stored.pop(GROUPS, None)
    if len(stored) == 1:
        teachers = [Exact(logp) for logp in logps]
    elif "compared" in stored:
        pairs = zip(logps, stored["compared"].split(lengths), strict=True)
        teachers = [Sorted(logp, row) if group_V is None else Grouped(logp, group_V, row) for logp, row in pairs]
    else:
        kept = compact_ids.unpack_ids(stored).split(lengths)
        counts = stored["count"].split(lengths) if "count" in stored else [None] * len(lengths)
        teachers = [
            TopK(ids, logp.float(), count, group_V) for ids, logp, count in zip(kept, logps, counts, strict=True)
        ]
    return [Row(rollout, teacher=teacher) for rollout, teacher in zip(rollouts, teachers, strict=True)]
