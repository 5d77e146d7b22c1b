"""Collation: which tokens a loss sees, independence of padding, and microbatches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.losses.batch import Row, collate, microbatches
from headwater.losses.logprobs import token_stats
from headwater.losses.materialized import Exact
from headwater.losses.objectives import objective_of
from headwater.losses.token_stats import TokenInputs
from headwater.models.policy import Policy
from headwater.teachers.scoring import logp_of
from headwater.training.update import make_optimizer, update
from tiny import CPU, copied, furthest, gradient_of, rollout_of, sampled_rows, stage_of, tiny_policy, weights_of

END = 3
"""The pocket tokenizer's EOS."""


def test_collate_by_hand() -> None:
    rows = [
        replace(Row(rollout_of((5, 6), (7, 2), logp=-0.5)), advantage=1.0, old_logp=torch.tensor([-0.1, -0.2])),
        replace(Row(rollout_of((8,), (9, 4, 2), logp=-1.5)), advantage=-2.0, old_logp=torch.tensor([-0.3, -0.4, -0.6])),
    ]
    batch = collate(rows, pad_id=0, device=CPU)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 2], [8, 9, 4, 2]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.targets_N.tolist() == [7, 2, 9, 4, 2]
    # Row 0 predicts its tokens at positions 1 and 2; row 1, offset by 4, at positions 0, 1 and 2.
    assert batch.predictor_N.tolist() == [1, 2, 4, 5, 6]
    assert batch.row_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.advantages_N.tolist() == [1.0, 1.0, -2.0, -2.0, -2.0]
    assert batch.sampler_logp_N.tolist() == [-0.5, -0.5, -1.5, -1.5, -1.5]
    assert batch.old_logp_N is not None
    assert batch.old_logp_N.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.6])
    assert batch.reference_logp_N is None and batch.teacher is None


def test_collate_pads_on_right_outside_mask() -> None:
    batch = collate([Row(rollout_of((5, 6, 4), (7, 2))), Row(rollout_of((8,), (9,)))], pad_id=11, device=CPU)
    assert batch.ids_BT.tolist() == [[5, 6, 4, 7, 2], [8, 9, 11, 11, 11]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.targets_N.tolist() == [7, 2, 9]
    assert batch.predictor_N.tolist() == [2, 3, 5]


def test_collate_aligns_teacher_distributions_with_targets() -> None:
    rows = [
        Row(rollout_of((5, 6), (1, 0)), teacher=Exact(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))),
        Row(rollout_of((8,), (1,)), teacher=Exact(torch.tensor([[-5.0, -6.0]]))),
    ]
    batch = collate(rows, 0, CPU)
    assert batch.teacher is not None
    assert batch.teacher.materialize().token_logp(batch.targets_N).tolist() == [-2.0, -3.0, -6.0]


def test_collate_rejects_rows_of_different_temperatures() -> None:
    rows = [Row(rollout_of((5,), (7,), temperature=1.0)), Row(rollout_of((5,), (7,), temperature=0.7))]
    with pytest.raises(ValueError, match=r"different temperatures: \[0.7, 1.0\]"):
        collate(rows, 0, CPU)
    assert collate(rows[1:], 0, CPU).temperature == 0.7


def test_padding_id_changes_neither_log_probs_nor_gradients(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=4)
    result = []
    for pad in (0, 3, 17):
        policy.model.zero_grad()
        batch = collate(rows, pad, CPU)
        assert not bool(batch.mask_BT.all())
        stats = token_stats(policy.completion_hidden(batch), policy.logits, TokenInputs(batch.targets_N, 1.0))
        stats.logp_N.sum().backward()
        result.append((stats.logp_N.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters()}))
    for logp, gradient in result[1:]:
        assert torch.equal(logp, result[0][0])
        assert furthest(gradient, result[0][1]) == 0.0


def test_loss_gradient_is_zero_at_prompt_and_padding_positions(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=4, group_size=1)
    batch = collate(rows, policy.pad_id, CPU)
    hidden = policy.hidden(batch.ids_BT, batch.mask_BT).detach().requires_grad_()
    stats = token_stats(hidden.flatten(0, 1)[batch.predictor_N], policy.logits, TokenInputs(batch.targets_N, 1.0))
    stats.logp_N.square().sum().backward()
    assert hidden.grad is not None
    touched = (hidden.grad.abs().sum(dim=-1) > 0).tolist()
    width = batch.ids_BT.shape[1]
    for row, marks in zip(rows, touched, strict=True):
        prompt = len(row.rollout.prompt_ids)
        # The position before each completion token, the last prompt token's included, and no other.
        assert marks == [prompt - 1 <= at < prompt - 1 + row.tokens for at in range(width)]


def test_prompt_tokens_are_never_targets() -> None:
    for prompt in ((5, 6, 4), (7, 7, 7), (END, END, END)):
        assert collate([Row(rollout_of(prompt, (7, END)))], END, CPU).targets_N.tolist() == [7, END]


def test_eos_is_trained_on_even_if_used_as_padding(policy: Policy) -> None:
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    assert policy.pad_id == END == policy.tokenizer.eos_token_id
    ended = [Row(rollout_of((1, 6, 2), (7, END))), Row(rollout_of((1, 6, 8, 2), (9, 9, 9, END)))]
    batch = collate(ended, policy.pad_id, CPU)
    assert batch.targets_N.tolist() == [7, END, 9, 9, 9, END]

    before = logp_of(policy, [row.rollout for row in ended], 4096)
    stage = stage_of("sft", optim={"lr": 3e-3})
    optimizer = make_optimizer(policy, stage.optim)
    for _ in range(30):
        update(policy, optimizer, ended, objective_of(stage), 4096)
    after = logp_of(policy, [row.rollout for row in ended], 4096)
    for old, new in zip(before, after, strict=True):
        assert new[-1].exp().item() > 0.9 > old[-1].exp().item()


def test_sft_gradient_of_eos_row_of_head_by_hand() -> None:
    policy = tiny_policy(tied=False)
    stage = stage_of("sft")
    only_eos = gradient_of(policy, [Row(rollout_of((1, 6, 2), (END,)))], stage)["lm_head.weight"]
    # d(−log p_EOS)/d logit = p − 1 at EOS: the only negative one, so its row points against the hidden state.
    hidden = policy.hidden(torch.tensor([[1, 6, 2]]), torch.ones(1, 3, dtype=torch.long))[0, -1].detach()
    p = torch.softmax(policy.logits(hidden[None])[0], dim=-1)[END].item()
    torch.testing.assert_close(only_eos[END], (p - 1.0) * hidden, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=24),
    budget=st.integers(1, 200),
)
def test_microbatches_respect_token_budget_and_lose_nothing(lengths: list[tuple[int, int]], budget: int) -> None:
    rows = [Row(rollout_of((5,) * p, (7,) * c, sample=i)) for i, (p, c) in enumerate(lengths)]
    parts = list(microbatches(rows, budget))
    assert sorted(row.rollout.sample for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        width = max(row.rollout.length for row in part)
        assert width * len(part) <= budget or len(part) == 1


def test_microbatches_group_rows_of_similar_length() -> None:
    rows = [Row(rollout_of((5,), (7,) * n)) for n in (9, 1, 9, 1, 9, 1)]
    # Widths 10 and 2: three short rows take 6 of 30 tokens and leave no room for a row of width 10 beside them (40).
    assert [[row.tokens for row in part] for part in microbatches(rows, 30)] == [[1, 1, 1], [9, 9, 9]]


def test_policy_copies_share_no_memory(policy: Policy) -> None:
    """The helper that other tests rely on: training a copy leaves the original alone."""
    other, before = copied(policy), weights_of(policy)
    stage = stage_of("sft")
    update(other, make_optimizer(other, stage.optim), sampled_rows(policy), objective_of(stage), 4096)
    assert furthest(weights_of(policy), before) == 0.0 < furthest(weights_of(other), before)
