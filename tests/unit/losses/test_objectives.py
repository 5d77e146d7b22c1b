"""Objectives: token losses by hand, exact endpoints of the λ axis, advantages of rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headwater.config.objectives import OBJECTIVES
from headwater.losses.batch import Row, collate
from headwater.losses.objectives import LOSSES, objective_of
from headwater.losses.token_losses import truncated_importance
from headwater.losses.token_stats import Tokens, TokenStats
from headwater.models.policy import Policy
from headwater.teachers.scoring import logp_of
from headwater.training.groups import with_rewards
from headwater.training.update import update
from headwater.types import Verdict
from tiny import (
    CPU,
    furthest,
    gradient_of,
    largest,
    rollout_of,
    same_bits,
    sampled_rows,
    stage_of,
    taught,
)

SPARSE = {"kl_coef": 0.05, "clip_low": 0.2, "clip_high": 0.3}


def annotated(policy: Policy, teacher: Policy) -> list[Row]:
    """Rows with the inputs of every objective; the reference is the teacher, so its KL is not 0."""
    rows = taught(sampled_rows(policy, groups=3), teacher)
    logps = logp_of(teacher, [row.rollout for row in rows], 4096)
    return [replace(row, reference_logp=logp) for row, logp in zip(rows, logps, strict=True)]


def test_mixed_with_sparse_share_one_equals_grpo_without_teacher(policy: Policy, teacher: Policy) -> None:
    rows = [replace(row, teacher=None) for row in annotated(policy, teacher)]
    grpo = gradient_of(policy, rows, stage_of("grpo", sparse=SPARSE))
    mixed = gradient_of(policy, rows, stage_of("mixed", sparse_share=1.0, sparse=SPARSE))
    assert largest(grpo) > 1e-3
    assert same_bits(mixed, grpo)
    assert objective_of(stage_of("mixed", sparse_share=1.0, sparse=SPARSE)).signals == ("reward", "reference")


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", "sampled"])
def test_mixed_with_sparse_share_zero_equals_opd_without_labels(
    policy: Policy, teacher: Policy, divergence: str
) -> None:
    # NaN advantages and missing reference log-probs would break any loss that reads them.
    rows = [replace(row, advantage=math.nan, reference_logp=None) for row in annotated(policy, teacher)]
    dense = {"divergence": divergence}
    opd = gradient_of(policy, rows, stage_of("opd", dense=dense, sparse=SPARSE))
    mixed = gradient_of(policy, rows, stage_of("mixed", sparse_share=0.0, dense=dense, sparse=SPARSE))
    assert largest(opd) > 1e-3
    assert same_bits(mixed, opd)
    stage = stage_of("mixed", sparse_share=0.0, dense=dense, sparse=SPARSE)
    assert objective_of(stage).signals == ("teacher",)
    assert not stage.needs_labels and stage.needs_teacher


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("divergence", ["reverse", "sampled"])
def test_mixed_gradient_is_weighted_sum_of_grpo_and_opd(
    policy: Policy, teacher: Policy, share: float, divergence: str
) -> None:
    rows = annotated(policy, teacher)
    dense = {"divergence": divergence}
    grpo = gradient_of(policy, rows, stage_of("grpo", sparse=SPARSE))
    opd = gradient_of(policy, rows, stage_of("opd", dense=dense))
    mixed = gradient_of(policy, rows, stage_of("mixed", sparse_share=share, dense=dense, sparse=SPARSE))
    expected = {name: share * grpo[name] + (1.0 - share) * opd[name] for name in grpo}
    assert furthest(mixed, expected) < 1e-5 * max(1.0, largest(expected))
    assert furthest(mixed, grpo) > 0.01 * largest(grpo) and furthest(mixed, opd) > 0.01 * largest(opd)


def test_token_loss_of_every_objective_by_hand() -> None:
    rows = [replace(Row(rollout_of((5,), (7,))), advantage=2.0, reference_logp=torch.tensor([-1.0 + math.log(2.0)]))]
    batch = collate(rows, 0, CPU)
    student = TokenStats(
        logp_N=torch.tensor([-1.0]),
        entropy_N=torch.tensor([0.5]),
        divergence_N=torch.tensor([0.3]),
        teacher_logp_N=torch.tensor([-0.6]),
    )
    tokens = Tokens(student, torch.tensor([-1.0]), batch.advantages_N, batch.reference_logp_N)
    sparse = {"kl_coef": 0.1}
    # Ratio 1: −A = −2, plus 0.1·(2 − ln 2 − 1) = 0.1·0.306853
    grpo = -2.0 + 0.0306853
    expected = {
        "grpo": (stage_of("grpo", sparse=sparse), grpo),
        "opd": (stage_of("opd"), 0.3),
        "opd sampled": (stage_of("opd", dense={"divergence": "sampled"}), -0.4),  # −(−0.6 − −1.0)
        "mixed": (stage_of("mixed", sparse_share=0.25, sparse=sparse), 0.25 * grpo + 0.75 * 0.3),
        "forward_kl": (stage_of("forward_kl"), 0.3),
        "sft": (stage_of("sft"), 1.0),
        "constant": (stage_of("constant"), 1.0),  # ratio 1, advantage −1, whatever the row's own is
    }
    for name, (stage, loss) in expected.items():
        assert objective_of(stage).token_loss(tokens).tolist() == pytest.approx([loss], abs=1e-6), name
    assert {stage.objective for stage, _ in expected.values()} == set(LOSSES) == set(OBJECTIVES)


def test_source_and_signals_of_each_objective() -> None:
    needed = {
        name: (objective_of(stage).source, objective_of(stage).signals)
        for name, stage in {
            "grpo": stage_of("grpo", sparse=SPARSE),
            "grpo without kl": stage_of("grpo", sparse={"kl_coef": 0.0}),
            "opd": stage_of("opd"),
            "mixed": stage_of("mixed", sparse_share=0.5, sparse=SPARSE),
            "forward_kl": stage_of("forward_kl"),
            "sft": stage_of("sft"),
        }.items()
    }
    assert needed == {
        "grpo": ("policy", ("reward", "reference")),
        "grpo without kl": ("policy", ("reward",)),
        "opd": ("policy", ("teacher",)),
        "mixed": ("policy", ("reward", "reference", "teacher")),
        "forward_kl": ("teacher", ()),
        "sft": ("teacher", ()),
    }


def test_only_grpo_without_reference_kl_skips_rows_of_zero_advantage() -> None:
    idle = {
        share: objective_of(stage_of("mixed", sparse_share=share, sparse={"kl_coef": kl})).skip_zero_advantage
        for share, kl in ((1.0, 0.0), (0.5, 0.0), (0.0, 0.0))
    }
    assert idle == {1.0: True, 0.5: False, 0.0: False}
    assert not objective_of(stage_of("grpo", sparse={"kl_coef": 1e-4})).skip_zero_advantage


def verdicts_of(rows: list[Row], right: int) -> list[Verdict]:
    return [Verdict(row.rollout.completion_ids[0] == right, "by hand") for row in rows]


def test_with_rewards_sets_advantages_and_marks_zero_gradient_rows() -> None:
    completions = ((10,), (11,), (12,), (13,), (20,), (21,), (22,), (23,))
    rows = [Row(rollout_of((1, 2) if c[0] < 20 else (1, 3), c, sample=i % 4)) for i, c in enumerate(completions)]
    stage = stage_of("grpo", sparse={"advantage": "dr_grpo", "kl_coef": 0.0})
    result = with_rewards(rows, verdicts_of(rows, 11), stage, skip_zero_advantage=True)
    # Group 1 is 0, 1, 0, 0: mean ¼. Group 2 is all wrong: exactly 0.
    assert [row.advantage for row in result] == [-0.25, 0.75, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0]
    assert [row.zero_gradient for row in result] == [False] * 4 + [True] * 4
    assert [row.verdict.correct for row in result if row.verdict] == [False, True] + [False] * 6
    kept = with_rewards(rows, verdicts_of(rows, 11), stage, skip_zero_advantage=False)
    assert not any(row.zero_gradient for row in kept)
    assert all(row.verdict is None and row.advantage == 0.0 for row in rows)  # the input rows are unchanged


def test_with_rewards_normalizes_by_group_by_hand() -> None:
    rows = [Row(rollout_of((1,), (c,), sample=i)) for i, c in enumerate((10, 11, 12, 13))]
    result = with_rewards(rows, verdicts_of(rows, 10), stage_of("grpo"), True)
    # ¾ / 0.4330 = √3, −¼ / 0.4330 = −1/√3
    assert [row.advantage for row in result] == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-5)


@pytest.mark.parametrize("objective", ["grpo", "opd", "constant"])
def test_importance_weights_make_engine_policy_gradient_unbiased(objective: str) -> None:
    """Σ_y q(y) · p(y)/q(y) · ∇loss(y) = Σ_y p(y) · ∇loss(y), summed over the whole vocabulary, for any engine's q."""
    torch.manual_seed(5)
    logits_V = torch.randn(6, dtype=torch.float64, requires_grad=True)
    q_V = torch.softmax(torch.randn(6, dtype=torch.float64), dim=0)
    advantages_V, teacher_logp_V = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    stage = stage_of(objective, dense={"divergence": "sampled"})

    def gradient(drawn_V: torch.Tensor, cap: float | None) -> torch.Tensor:
        logp_V = torch.log_softmax(logits_V, dim=0)
        stats = TokenStats(logp_V, torch.zeros(6), teacher_logp_N=teacher_logp_V)
        weight_V = None if cap is None else truncated_importance(logp_V.detach(), drawn_V.log(), cap)
        tokens = Tokens(stats, logp_V.detach(), advantages_V, importance_N=weight_V)
        return torch.autograd.grad((drawn_V * objective_of(stage, cap).token_loss(tokens)).sum(), logits_V)[0]

    own = gradient(torch.softmax(logits_V.detach(), dim=0), None)
    torch.testing.assert_close(gradient(q_V, 1e9), own)
    assert (gradient(q_V, None) - own).abs().max() > 0.01  # without the weights it is another gradient


def test_update_applies_importance_weights_if_cap_is_set(policy: Policy) -> None:
    rows = sampled_rows(policy)
    exact = logp_of(policy, [row.rollout for row in rows], 4096)
    # A sampler that claims to have drawn each token at twice its probability: every token counts half.
    doubled = [
        replace(row, rollout=replace(row.rollout, sampler_logp=tuple((logp + math.log(2.0)).tolist())))
        for row, logp in zip(rows, exact, strict=True)
    ]
    stage, optimizer = stage_of("grpo"), torch.optim.SGD(policy.model.parameters(), lr=0.0)

    def gradient(cap: float | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        result = update(policy, optimizer, doubled, objective_of(stage, cap), 4096)
        return {
            name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None
        }, result

    (plain, plain_metrics), (half, measured) = gradient(None), gradient(2.0)
    assert furthest({name: gradient_ * 0.5 for name, gradient_ in plain.items()}, half) < 1e-6 < largest(half)
    assert measured["importance"] == pytest.approx(0.5, abs=1e-5) and "importance" not in plain_metrics
    # exp(|log p − log 2p|) = 2 for every token
    assert measured["token_mult_prob_error"] == pytest.approx(2.0, abs=1e-4)


def test_clip_bounds_divergence_and_stops_gradient_of_tokens_above_it(policy: Policy, teacher: Policy) -> None:
    rows = annotated(policy, teacher)
    divergence = torch.tensor([0.5, 3.0], requires_grad=True)
    stats = TokenStats(torch.zeros(2), torch.zeros(2), divergence_N=divergence)
    loss = objective_of(stage_of("opd", dense={"clip": 2.0})).token_loss(Tokens(stats, torch.zeros(2), torch.zeros(2)))
    assert loss.tolist() == [0.5, 2.0]
    assert torch.autograd.grad(loss.sum(), divergence)[0].tolist() == [1.0, 0.0]
    plain = gradient_of(policy, rows, stage_of("opd"))
    assert same_bits(gradient_of(policy, rows, stage_of("opd", dense={"clip": 1e6})), plain)
    assert largest(gradient_of(policy, rows, stage_of("opd", dense={"clip": 1e-6}))) == 0.0
