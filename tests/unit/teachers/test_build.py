"""Teachers by problem tag, and an offloaded teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwater.config.stage import Sampling
from headwater.losses.batch import Row
from headwater.losses.distributions import Concatenated, Distributions, concatenate
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.build import OffloadedTeacher, TaggedTeachers, offloadable_weights
from headwater.teachers.scoring import distributions_of
from headwater.types import Rollout
from tiny import CPU, PROMPTS, furthest, gradient_of, rollout_of, sampled_rows, stage_of, tiny_policy


def two(cut: int | None = None) -> TaggedTeachers:
    teachers = {"left": tiny_policy(seed=1), "right": tiny_policy(seed=2)}
    return TaggedTeachers(teachers, {"a": "left", "b": "right"}, TorchSampler, cut)


def mixed_rollouts() -> list[Rollout]:
    """Of both tags in turn."""
    return [
        replace(rollout_of(prompt, (8, 9, 3) * (1 + index)), problem_id="ab"[index % 2], sample=index)
        for index, prompt in enumerate(PROMPTS)
    ]


def test_rollouts_are_scored_by_their_tagged_teacher_in_order() -> None:
    teacher, rollouts = two(), mixed_rollouts()
    for distribution, rollout in zip(teacher.distributions(rollouts, 4096), rollouts, strict=True):
        own = teacher.teachers["left" if rollout.problem_id == "a" else "right"]
        assert isinstance(own, Policy)
        expected = distributions_of(own, [rollout], 4096)[0].materialize()
        torch.testing.assert_close(distribution.materialize().logp_NV, expected.logp_NV, atol=1e-5, rtol=1e-5)


def test_requests_are_sampled_by_tagged_teacher_as_alone() -> None:
    teacher = two()
    requests = requests_for([("a", PROMPTS[0]), ("b", PROMPTS[1])], 3, "tags")[::-1]
    arrived: list[Rollout] = []
    rollouts = teacher.sample(requests, Sampling(max_tokens=8), arrived.extend)
    for tag, name in (("left", "a"), ("right", "b")):
        own = teacher.teachers[tag]
        assert isinstance(own, Policy)
        own_requests = [request for request in requests if request.problem_id == name]
        alone = TorchSampler(own).sample(own_requests, Sampling(max_tokens=8))
        assert [rollout for rollout in rollouts if rollout.problem_id == name] == alone
    assert len(arrived) == 6


@pytest.mark.parametrize("cut", [None, 5])
@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", "sampled"])
def test_two_teachers_in_batch_give_summed_gradients_of_each(policy: Policy, divergence: str, cut: int | None) -> None:
    if cut and divergence == "sampled":
        cut = 0  # a token outside the kept ones has no log-prob of its own
    stage = stage_of("opd", dense={"divergence": divergence})
    rows_ = [
        Row(replace(row.rollout, problem_id="ab"[index % 2]))
        for index, row in enumerate(sampled_rows(policy, groups=3))
    ]
    teacher = two(cut)
    distributions = teacher.distributions([row.rollout for row in rows_], 4096)
    taught = [replace(row, teacher=distribution) for row, distribution in zip(rows_, distributions, strict=True)]
    together = gradient_of(policy, taught, stage)
    total = sum(row.tokens for row in taught)
    apart: dict[str, torch.Tensor] = {}
    for name in "ab":
        some = [row for row in taught if row.rollout.problem_id == name]
        share = sum(row.tokens for row in some) / total
        for key, gradient in gradient_of(policy, some, stage).items():
            apart[key] = apart.get(key, torch.zeros_like(gradient)) + share * gradient
    assert furthest(together, apart) < 1e-5 < max(gradient.abs().max().item() for gradient in together.values())


def test_hidden_states_of_different_heads_are_not_concatenated(policy: Policy, teacher: Policy) -> None:
    rollouts = mixed_rollouts()
    parts: list[Distributions] = [distributions_of(model, rollouts[:2], 4096)[0] for model in (policy, teacher)]
    whole = concatenate(parts, CPU)
    assert isinstance(whole, Concatenated) and len(whole) == sum(map(len, parts))
    expected = torch.cat([part.materialize().logp_NV for part in parts])
    torch.testing.assert_close(whole.materialize().logp_NV, expected)
    torch.testing.assert_close(whole.rows(2, 5).materialize().logp_NV, expected[2:5])
    assert not isinstance(concatenate(distributions_of(policy, rollouts, 4096), CPU), Concatenated)


@pytest.mark.parametrize("tied", [True, False])
def test_offloaded_teacher_keeps_its_head_and_scores_as_before(tied: bool) -> None:
    policy = tiny_policy(tied=tied)
    rollouts = mixed_rollouts()
    expected = [distribution.materialize().logp_NV for distribution in distributions_of(policy, rollouts, 4096)]
    moved = {id(weight) for weight in offloadable_weights(policy)}
    stays = {name for name, parameter in policy.model.named_parameters() if id(parameter) not in moved}
    assert stays == ({"model.embed_tokens.weight"} if tied else {"lm_head.weight"})
    waiting = OffloadedTeacher(policy, CPU, TorchSampler)
    for distribution, whole in zip(waiting.distributions(rollouts, 4096), expected, strict=True):
        assert torch.equal(distribution.materialize().logp_NV, whole)
