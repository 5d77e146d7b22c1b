"""Weights of the teacher's signal: by prompt, position and Soft-OR score, by hand; their effect on the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from headwater.config.arms import arm_of
from headwater.config.builtin import find_recipe
from headwater.config.dense import TokenWeights
from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.logprobs import token_stats
from headwater.losses.token_stats import TokenInputs
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.teachers.scoring import hidden_of
from headwater.training.dense_weights import mean_of_one, prompt_weight, soft_or, with_dense_weights
from headwater.types import Verdict
from tiny import furthest, gradient_of, rollout_of, same_bits, sampled_rows, stage_of, taught


def graded(rights: Sequence[Sequence[int]], tokens: int = 2) -> list[Row]:
    """Groups of rows of `tokens` tokens whose verdicts are given."""
    return [
        Row(rollout_of((group,), (1,) * tokens, sample), Verdict(bool(right), "equal" if right else "different"))
        for group, verdicts in enumerate(rights)
        for sample, right in enumerate(verdicts)
    ]


def weights_of(rows: list[Row], group_size: int, policy: Policy, **fields: object) -> list[list[float]]:
    weighted = with_dense_weights(rows, TokenWeights.model_validate(fields), group_size, policy, BatchBudget(4096))
    return [row.dense_weights.tolist() for row in weighted if row.dense_weights is not None]


def test_prompt_weight_by_hand() -> None:
    assert prompt_weight(graded([[1, 0, 0, 0]]), "pass_rate") == 0.1875  # ¼ · ¾
    assert prompt_weight(graded([[0, 0]]), "pass_rate") == prompt_weight(graded([[1, 1]]), "pass_rate") == 0.0
    assert [prompt_weight(graded([group]), "all_wrong") for group in ([0, 0], [0, 1], [1, 1])] == [1.0, 0.0, 0.0]
    assert prompt_weight(graded([[1, 1]]), "all") == 1.0


def test_pass_rate_weights_have_mean_one(policy: Policy) -> None:
    # Two groups: p = ½ weighs ¼, p = 1 weighs 0; all have equal lengths, so the first group's tokens weigh 2.
    rows = graded([[1, 0], [1, 1]])
    assert weights_of(rows, 2, policy, prompts="pass_rate") == [[2.0, 2.0]] * 2 + [[0.0, 0.0]] * 2


def test_all_wrong_weights_are_not_rescaled(policy: Policy) -> None:
    rows = graded([[0, 0], [1, 0], [1, 1]])
    assert weights_of(rows, 2, policy, prompts="all_wrong") == [[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 4


def test_first_tokens_are_rescaled_by_kept_share(policy: Policy) -> None:
    rows = graded([[0]], tokens=4) + graded([[0]], tokens=2)
    # 3 of the first 4 tokens and both of the others: 5 of 6 are kept, each of weight 6/5.
    assert weights_of(rows, 1, policy, first=3) == [
        pytest.approx([1.2, 1.2, 1.2, 0.0]),
        pytest.approx([1.2, 1.2]),
    ]


def test_mean_of_one_keeps_zeros() -> None:
    assert [factor.tolist() for factor in mean_of_one([torch.zeros(2), torch.zeros(1)])] == [[0.0, 0.0], [0.0]]


def test_soft_or_by_hand() -> None:
    # Entropies 0, ½, 1 (the 98 % quantile is 0.98: the last is clipped and scaled to 1, ½ to 0.5102); KLs 2, 0, 1 to 1, 0, ½.
    scores = soft_or([torch.tensor([0.0, 0.5]), torch.tensor([1.0])], [torch.tensor([2.0, 0.0]), torch.tensor([1.0])])
    assert [row.tolist() for row in scores] == [pytest.approx([1.0, 0.5 / 0.98]), pytest.approx([1.0])]


def test_soft_or_keeps_share_of_highest_scores(policy: Policy, teacher: Policy) -> None:
    rows = taught(sampled_rows(policy), teacher)
    whole = torch.tensor([weight for row in weights_of(rows, 4, policy, soft_or=0.25) for weight in row])
    kept = round(0.25 * len(whole))
    assert (whole > 0).sum() == kept and whole[whole > 0].tolist() == pytest.approx([len(whole) / kept] * kept)
    # The same from a direct measurement of each row.
    stats = [
        token_stats(
            hidden, policy.logits, TokenInputs(torch.tensor(row.rollout.completion_ids), 1.0, teacher=row.teacher)
        )
        for row, hidden in zip(rows, hidden_of(policy, [row.rollout for row in rows], 4096), strict=True)
    ]
    kls = [part.kl_teacher_student_N for part in stats if part.kl_teacher_student_N is not None]
    scores = torch.cat(soft_or([part.entropy_N.detach() for part in stats], [kl.detach() for kl in kls]))
    assert scores[whole > 0].min() >= scores[whole == 0].max()


@pytest.mark.parametrize("divergence", ["reverse", "sampled"])
def test_weights_of_one_leave_gradient_bitwise_equal(policy: Policy, teacher: Policy, divergence: str) -> None:
    rows = taught(sampled_rows(policy), teacher)
    stage = stage_of("opd", dense={"divergence": divergence})
    ones = [replace(row, dense_weights=torch.ones(row.tokens)) for row in rows]
    assert same_bits(gradient_of(policy, rows, stage), gradient_of(policy, ones, stage))


def test_weighted_gradient_equals_gradient_of_kept_rows(policy: Policy, teacher: Policy) -> None:
    """Weight 2 on half of the rows: the mean over them alone, if all have as many tokens."""
    rows = [row for row in taught(sampled_rows(policy), teacher) if row.tokens == 8][:4]
    assert len(rows) == 4
    stage = stage_of("opd", loss_mean="sequence")
    weighted = [
        replace(row, dense_weights=torch.full((row.tokens,), 2.0 if index < 2 else 0.0))
        for index, row in enumerate(rows)
    ]
    assert furthest(gradient_of(policy, weighted, stage), gradient_of(policy, rows[:2], stage)) < 1e-6


def test_dense_weights_leave_reward_term_of_mixed_alone(policy: Policy, teacher: Policy) -> None:
    rows = taught(sampled_rows(policy), teacher)
    zeros = [replace(row, dense_weights=torch.zeros(row.tokens)) for row in rows]
    mixed = gradient_of(policy, zeros, stage_of("mixed", sparse_share=0.5))
    grpo = gradient_of(policy, [replace(row, teacher=None) for row in rows], stage_of("grpo"))
    assert furthest(mixed, {name: 0.5 * value for name, value in grpo.items()}) < 1e-6


def test_stage_with_verdict_weights_needs_labels() -> None:
    stage = stage_of("opd", dense={"token_weights": {"prompts": "pass_rate"}})
    assert stage.needs_labels and stage.needs_teacher and not stage.needs_reference
    assert not stage_of("opd", dense={"token_weights": {"first": 4}}).needs_labels


@pytest.mark.parametrize("objective", ["grpo", "forward_kl"])
def test_token_weights_without_live_teacher_are_refused(objective: str) -> None:
    with pytest.raises(ValueError, match=r"dense.token_weights: objective \w+ does not compare"):
        stage_of(objective, dense={"token_weights": {"first": 4}})


def test_labels_of_dense_weights_must_be_spent_already() -> None:
    recipe = find_recipe("pocket", ["stages.opd.dense.token_weights.prompts=pass_rate", "stages.opd.group_size=4"])
    assert arm_of("bridge", recipe)
    with pytest.raises(UserError, match=r"token_weights.prompts: pass_rate .* no earlier stage of the arm raw_teacher"):
        arm_of("raw_teacher", recipe)
