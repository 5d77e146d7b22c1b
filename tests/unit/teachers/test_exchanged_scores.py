"""Scores that travel between ranks: each arrives where its rollout is trained on, in the form that it had."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.distributions import FromHidden
from headwater.losses.materialized import TopK
from headwater.models.policy import Policy
from headwater.teachers.composed import ComposedTeacher, gain
from headwater.teachers.exchanged_scores import can_exchange_scores, exchanged
from headwater.teachers.scoring import distributions_of
from tiny import sampled_rows, tiny_policy


@dataclass(frozen=True)
class OtherRank(ProcessGroup):
    """Rank 0 of two; the other one sends `sends`."""

    sends: Any = None

    def exchange(self, parts: Sequence[Any]) -> list[Any]:
        assert pickle.loads(pickle.dumps(parts[1])).keys() == parts[1].keys()
        return [parts[0], pickle.loads(pickle.dumps(self.sends))]


def test_exchanged_scores_equal_those_made_here(policy: Policy) -> None:
    rollouts = [row.rollout for row in sampled_rows(policy)]
    keys = [(rollout.problem_id, rollout.sample) for rollout in rollouts]
    teacher = tiny_policy(seed=1)
    whole = dict(zip(keys, distributions_of(teacher, rollouts, 4096), strict=True))
    for form in ("hidden", "top_k"):
        made = {key: scores if form == "hidden" else scores.materialize().top_k(3) for key, scores in whole.items()}
        owner_of = {key: index % 2 for index, key in enumerate(keys)}
        arriving = {
            key: made[key].hidden_NH if form == "hidden" else made[key] for key in keys[4:] if owner_of[key] == 0
        }
        ranks, here = OtherRank(0, 2, sends=arriving), {key: made[key] for key in keys[:4]}  # sampled on rank 0
        own = exchanged(here, owner_of, rollouts[::2], teacher, ranks)
        assert list(own) == keys[::2]
        for key, scores in own.items():
            assert type(scores) is type(made[key])
            if isinstance(scores, FromHidden):
                assert scores.head.weight_VH is teacher.head.weight  # type: ignore[attr-defined]
                assert torch.equal(scores.hidden_NH, made[key].hidden_NH)
            else:
                assert isinstance(scores, TopK) and torch.equal(scores.logp_NK, made[key].logp_NK)


def test_composed_scores_stay_where_they_were_made(policy: Policy) -> None:
    assert can_exchange_scores(policy) and not can_exchange_scores(ComposedTeacher((policy, policy), gain))
