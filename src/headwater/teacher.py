"""Score rollouts under a frozen model, and keep a teacher's rollouts and distributions on disk.

Several students and controls read the same cache: a teacher is sampled and scored once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater import faults, token_ids
from headwater.batch import Batch, Row
from headwater.data import Rollout
from headwater.distributions import Distributions, Exact, FromHidden, TopK, joined
from headwater.errors import UserError
from headwater.logprobs import token_stats, tokens_at_once
from headwater.memory import Budget, passes
from headwater.model import Policy
from headwater.ranks import Ranks
from headwater.sharded import idle, within


class Scorer(Protocol):
    """A frozen model that scores: a `Policy` in this process, a server (`served.Served`), or several by tag (`teachers.ByTag`)."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> Ranks: ...
    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float: ...


class Elsewhere(Scorer, Protocol):
    """A scorer that makes its distributions itself."""

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]: ...


EXACT_CACHE_LIMIT = 64 << 30
"""Bytes past which an exact cache is refused before it is made; top-k with its tail is 100–1000 times smaller."""


def hidden_of(policy: Policy, rollouts: Sequence[Rollout], tokens: int) -> list[Tensor]:
    """The policy's hidden state before every completion token: one (n, H) tensor a rollout, in order."""
    return read_off(policy, rollouts, tokens, lambda rollout, hidden: hidden)


@torch.no_grad()
def read_off(
    policy: Policy, rollouts: Sequence[Rollout], tokens: int, what: Callable[[Rollout, Tensor], Tensor]
) -> list[Tensor]:
    """What is to be had of each rollout and its hidden states (n, H) while the policy's head is in reach; in order."""
    rows = [Row(rollout) for rollout in rollouts]
    place = {id(row): index for index, row in enumerate(rows)}
    found: dict[int, Tensor] = {}

    def take(part: Sequence[Row], batch: Batch) -> None:
        pieces = policy.completion_hidden(batch).split([row.tokens for row in part])
        found.update((place[id(row)], what(row.rollout, piece)) for row, piece in zip(part, pieces, strict=True))

    for turn in policy.ranks.turns(policy.batches(rows, tokens)):
        if turn is None:
            idle(policy)
        else:
            within(policy, partial(take, *turn))
    return [found[index] for index in range(len(rows))]


def distributions_of(teacher: Policy | Elsewhere, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
    """The teacher's distributions at every completion token, one a rollout: a policy's exact and held as hidden states."""
    if not isinstance(teacher, Policy):
        return teacher.distributions(rollouts, tokens)
    return [
        FromHidden(hidden, teacher.logits, rollout.temperature)
        for rollout, hidden in zip(rollouts, hidden_of(teacher, rollouts, tokens), strict=True)
    ]


def logp_of(policy: Policy, rollouts: Sequence[Rollout], tokens: int) -> list[Tensor]:
    """Log-prob of every completion token under the policy, at the temperature that sampled: one (n,) a rollout."""

    def logp(rollout: Rollout, hidden: Tensor) -> Tensor:
        targets_N = torch.tensor(rollout.completion_ids, dtype=torch.long, device=hidden.device)
        return token_stats(hidden, policy.logits, targets_N, rollout.temperature).logp_N

    return read_off(policy, rollouts, tokens, logp)


def refuse_huge_cache(policy: Scorer, tokens: int, top_k: int | None) -> None:
    """Raises UserError when an exact cache of that many tokens would pass EXACT_CACHE_LIMIT."""
    size = tokens * policy.vocabulary * 4
    if top_k is None and size > EXACT_CACHE_LIMIT:
        raise UserError(
            f"stages.warmup.dense.top_k: exact distributions of {tokens:,} tokens over {policy.vocabulary:,} entries would take "
            f"{size / 2**30:,.0f} GiB; set it to 64, say, to keep the likeliest tokens and the tail"
        )


def write_cache(
    folder: Path,
    policy: Policy | Elsewhere,
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
    budget = Budget(tokens)
    faults.point("cache.rollouts")
    parts: list[dict[str, Tensor]] = []
    own = policy.ranks.share(rollouts)
    for start in policy.ranks.turns(range(0, len(own), 64)):
        chosen = [] if start is None else own[start : start + 64]
        said = passes(budget, chosen, partial(distributions_of, policy, chosen))
        whole = joined(said, policy.device) if said else Exact(torch.empty(0, policy.vocabulary))
        size = tokens_at_once(policy.vocabulary, policy.device)
        for row in range(0, len(whole), size):
            known = whole.rows(row, min(len(whole), row + size)).ready()
            if isinstance(known, Exact) and top_k is None:
                parts.append({"logp": known.logp_NV.cpu()})
            else:
                kept = known if isinstance(known, TopK) else known.likeliest(top_k or 1)
                ids = token_ids.narrowed(kept.ids_NK.cpu(), policy.vocabulary)
                parts.append({"logp": kept.logp_NK.half().cpu(), **ids})
        if progress is not None:
            progress(len(chosen))
        faults.point("cache.scored")
    parts = [part for some in policy.ranks.collected(parts) for part in some]
    if not policy.ranks.first:
        return
    save_file(
        {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]},
        folder / "distributions.safetensors",
    )
    faults.point("cache.written")


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
        kept = token_ids.widened(stored).split(lengths)
        teachers = [TopK(ids, logp.float()) for ids, logp in zip(kept, logps, strict=True)]
    return [Row(rollout, teacher=teacher) for rollout, teacher in zip(rollouts, teachers, strict=True)]


def _rollout(stored: dict[str, Any]) -> Rollout:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return Rollout(**fields)
