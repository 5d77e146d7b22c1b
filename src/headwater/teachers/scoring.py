"""Scoring of rollouts under a frozen model: hidden states, token log-probs and full distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Batch, Row
from headwater.losses.distributions import Distributions, FromHidden
from headwater.losses.logprobs import token_stats, tokens_at_once
from headwater.losses.materialized import Exact, TopK
from headwater.losses.token_stats import TokenInputs
from headwater.models.fsdp import idle_pass, sharded_forward
from headwater.models.policy import Policy
from headwater.types import Rollout


class Scorer(Protocol):
    """What computes distributions itself: a frozen model other than a `Policy`, or a combination of several."""

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]: ...


class ScoringTeacher(Scorer, Protocol):
    """A frozen model other than a `Policy`."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> ProcessGroup: ...


def hidden_of(policy: Policy, rollouts: Sequence[Rollout], tokens: int) -> list[Tensor]:
    """Hidden state that predicts each completion token: one (n, H) tensor per rollout, in order."""
    return map_hidden(policy, rollouts, tokens, lambda rollout, hidden: hidden)


@torch.no_grad()
def map_hidden(
    policy: Policy, rollouts: Sequence[Rollout], tokens: int, reduce: Callable[[Rollout, Tensor], Tensor]
) -> list[Tensor]:
    """`reduce(rollout, hidden (n, H))` for each rollout, in order, called while a sharded policy's output layer is gathered.

    tokens  of one forward pass
    """
    rows = [Row(rollout) for rollout in rollouts]
    index_of = {id(row): index for index, row in enumerate(rows)}
    results: dict[int, Tensor] = {}

    def forward(part: Sequence[Row], batch: Batch) -> None:
        pieces = policy.completion_hidden(batch).split([row.tokens for row in part])
        results.update((index_of[id(row)], reduce(row.rollout, piece)) for row, piece in zip(part, pieces, strict=True))

    for microbatch in policy.ranks.lockstep(policy.batches(rows, tokens)):
        if microbatch is None:
            idle_pass(policy)
        else:
            sharded_forward(policy, partial(forward, *microbatch))
    return [results[index] for index in range(len(rows))]


def distributions_of(teacher: Policy | Scorer, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
    """Teacher distributions at every completion token, one per rollout; a policy's are exact and stored as hidden states."""
    if not isinstance(teacher, Policy):
        return teacher.distributions(rollouts, tokens)
    hidden, head = hidden_of(teacher, rollouts, tokens), teacher.whole_head()
    return [FromHidden(own, head, rollout.temperature) for rollout, own in zip(rollouts, hidden, strict=True)]


def logp_of(policy: Policy, rollouts: Sequence[Rollout], tokens: int) -> list[Tensor]:
    """Log-prob of each completion token under the policy, at the sampling temperature: one (n,) tensor per rollout."""

    def logp(rollout: Rollout, hidden: Tensor) -> Tensor:
        targets_N = torch.tensor(rollout.completion_ids, dtype=torch.long, device=hidden.device)
        return token_stats(hidden, policy.logits, TokenInputs(targets_N, rollout.temperature)).logp_N

    return map_hidden(policy, rollouts, tokens, logp)


def top_tokens(policy: Policy, rollouts: Sequence[Rollout], k: int, tokens: int) -> list[Rollout]:
    """The rollouts with the policy's k most probable tokens at each completion token as `candidates`."""
    k, size = min(k, policy.vocabulary), tokens_at_once(policy.vocabulary, policy.device)

    def top(rollout: Rollout, hidden: Tensor) -> Tensor:
        return torch.cat([policy.logits(part).topk(k, dim=-1).indices.int().cpu() for part in hidden.split(size)])

    chosen = map_hidden(policy, rollouts, tokens, top)
    return [replace(rollout, candidates=ids.numpy()) for rollout, ids in zip(rollouts, chosen, strict=True)]


@torch.no_grad()
def token_logps(teacher: Policy | ScoringTeacher, rollouts: Sequence[Rollout], tokens: int) -> list[Tensor]:
    """As `logp_of`, for any teacher; a server is asked for the sampled tokens alone if its `top_k` is 0."""
    if isinstance(teacher, Policy):
        return logp_of(teacher, rollouts, tokens)
    size = tokens_at_once(teacher.vocabulary, teacher.device)
    logps = []
    for rollout, scored in zip(rollouts, teacher.distributions(rollouts, tokens), strict=True):
        targets_N, parts = torch.tensor(rollout.completion_ids, device=teacher.device), []
        for start in range(0, len(targets_N), size):
            known = scored.rows(start, min(len(targets_N), start + size)).materialize()
            assert isinstance(known, (Exact, TopK))
            parts.append(known.token_logp(targets_N[start : start + size]))
        logps.append(torch.cat(parts))
    return logps
