"""Score rollouts under a frozen model, and keep a teacher's rollouts and distributions on disk.

Several students and controls read the same cache: a teacher is sampled and scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Batch, Row
from headwater.losses.distributions import Distributions, FromHidden
from headwater.losses.logprobs import token_stats
from headwater.models.fsdp import idle_pass, sharded_forward
from headwater.models.policy import Policy
from headwater.types import Rollout


class FrozenModel(Protocol):
    """A frozen model that scores: a `Policy` here, a server (`ServedTeacher`), or several by tag (`TaggedTeachers`)."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> ProcessGroup: ...
    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float: ...


class ScoringTeacher(FrozenModel, Protocol):
    """A scorer that makes its distributions itself."""

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]: ...


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

    for turn in policy.ranks.in_lockstep(policy.batches(rows, tokens)):
        if turn is None:
            idle_pass(policy)
        else:
            sharded_forward(policy, partial(take, *turn))
    return [found[index] for index in range(len(rows))]


def distributions_of(teacher: Policy | ScoringTeacher, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
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
