"""Teacher rollouts and their distributions, cached on disk for teacher-sampled stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, Exact, TopK, joined
from headwater.losses.logprobs import tokens_at_once
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.storage import fault_points
from headwater.teachers import compact_ids
from headwater.teachers.scoring import FrozenModel, ScoringTeacher, distributions_of
from headwater.types import Rollout

EXACT_CACHE_LIMIT = 64 << 30
"""Bytes past which an exact cache is refused before it is made; top-k with its tail is 100–1000 times smaller."""


def refuse_huge_cache(policy: FrozenModel, tokens: int, top_k: int | None) -> None:
    """Raises UserError when an exact cache of that many tokens would pass EXACT_CACHE_LIMIT."""
    size = tokens * policy.vocabulary * 4
    if top_k is None and size > EXACT_CACHE_LIMIT:
        raise UserError(
            f"stages.warmup.dense.top_k: exact distributions of {tokens:,} tokens over {policy.vocabulary:,} entries would take "
            f"{size / 2**30:,.0f} GiB; set it to 64, say, to keep the likeliest tokens and the tail"
        )


def write_cache(
    folder: Path,
    policy: Policy | ScoringTeacher,
    rollouts: Sequence[Rollout],
    top_k: int | None,
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Store rollouts and the teacher's distributions at each of their tokens: exact float32, or top-k and the tail.

    With 64 kept tokens a token takes 256 bytes, 272 for a vocabulary of over 65,536.
    """
    keys = ("problem_id", "sample", "prompt_ids", "completion_ids", "sampler_logp", "finish", "sampler", "temperature")
    lines = [json.dumps({key: getattr(rollout, key) for key in keys}) for rollout in rollouts]
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    budget = BatchBudget(tokens)
    fault_points.failpoint("cache.rollouts")
    parts: list[dict[str, Tensor]] = []
    own = policy.ranks.share(rollouts)
    for start in policy.ranks.in_lockstep(range(0, len(own), 64)):
        chosen = [] if start is None else own[start : start + 64]
        said = budget.fit_passes(partial(distributions_of, policy, chosen), chosen)
        whole = joined(said, policy.device) if said else Exact(torch.empty(0, policy.vocabulary))
        size = tokens_at_once(policy.vocabulary, policy.device)
        for row in range(0, len(whole), size):
            known = whole.rows(row, min(len(whole), row + size)).ready()
            if isinstance(known, Exact) and top_k is None:
                parts.append({"logp": known.logp_NV.cpu()})
            else:
                kept = known if isinstance(known, TopK) else known.likeliest(top_k or 1)
                ids = compact_ids.narrowed(kept.ids_NK.cpu(), policy.vocabulary)
                parts.append({"logp": kept.logp_NK.half().cpu(), **ids})
        if progress is not None:
            progress(len(chosen))
        fault_points.failpoint("cache.scored")
    parts = [part for some in policy.ranks.gather_to_first(parts) for part in some]
    if not policy.ranks.first:
        return
    save_file(
        {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]},
        folder / "distributions.safetensors",
    )
    fault_points.failpoint("cache.written")


def read_cache(folder: Path) -> list[Row]:
    """The cached rollouts with their teacher's distributions. Raises UserError when a file is missing or does not fit."""
    try:
        lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
        stored = load_file(folder / "distributions.safetensors")
        rollouts = [_rollout(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the teacher cache cannot be read ({error})") from None
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    if sum(lengths) != stored["logp"].shape[0]:
        raise UserError(
            f"{folder}: the teacher cache holds {stored['logp'].shape[0]} distributions for {sum(lengths)} tokens"
        )
    logps = stored["logp"].split(lengths)
    if len(stored) == 1:
        teachers: list[Distributions] = [Exact(logp) for logp in logps]
    else:
        kept = compact_ids.widened(stored).split(lengths)
        teachers = [TopK(ids, logp.float()) for ids, logp in zip(kept, logps, strict=True)]
    return [Row(rollout, teacher=teacher) for rollout, teacher in zip(rollouts, teachers, strict=True)]


def _rollout(stored: dict[str, Any]) -> Rollout:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return Rollout(**fields)
