"""Weights of the teacher's signal: by prompt, by position in the completion, and by a token's entropy and divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headwater.config.dense import TokenWeights
from headwater.losses.batch import Row
from headwater.losses.logprobs import token_stats
from headwater.losses.token_stats import TokenInputs
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.teachers.scoring import map_hidden
from headwater.training.groups import groups_of
from headwater.types import Rollout

ENTROPY_QUANTILE = 0.98
"""The student's entropy is clipped at this quantile of a step's tokens before it is scaled (2604.14084)."""


def with_dense_weights(
    rows: Sequence[Row], weights: TokenWeights, group_size: int, policy: Policy, budget: BatchBudget
) -> list[Row]:
    """Add the weight of the teacher's signal at each token to the rows of a step, which all ranks hold in the same order.

    The factors of prompt, position and token are multiplied, then rescaled to a mean of 1 over the step's tokens.

    group_size  rows of one prompt, which are consecutive
    policy      the student, which measures its own rows if `weights.soft_or` asks for it
    """
    factors = [
        torch.full((row.tokens,), prompt_weight(group, weights.prompts))
        for group in groups_of(rows, group_size)
        for row in group
    ]
    if weights.first is not None:
        for factor in factors:
            factor[weights.first :] = 0.0
    if weights.soft_or is not None:
        scores = soft_or(*_entropy_and_kl(rows, policy, budget))
        factors = [
            factor * keep for factor, keep in zip(factors, _highest(scores, factors, weights.soft_or), strict=True)
        ]
    if weights.prompts != "all_wrong":
        factors = mean_of_one(factors)
    return [replace(row, dense_weights=factor) for row, factor in zip(rows, factors, strict=True)]


def prompt_weight(group: Sequence[Row], by: str) -> float:
    """Weight of one prompt from the verdicts of its rollouts.

    Example: 1 right of 4 weighs ¼ · ¾ = 0.1875 by `pass_rate`, and 0 by `all_wrong`; 0 right of 4 weigh 0 and 1.
    """
    if by == "all":
        return 1.0
    passed = sum(row.verdict.correct for row in group if row.verdict is not None) / len(group)
    return passed * (1.0 - passed) if by == "pass_rate" else float(passed == 0.0)


def soft_or(entropy: Sequence[Tensor], kl: Sequence[Tensor]) -> list[Tensor]:
    """Score of each token, h + d − h·d: high where the student is uncertain, or the teacher disagrees with it (TIP 2604.14084).

    entropy  the student's entropy at the tokens of each row (n,); clipped at its 98 % quantile over all rows
    kl       KL(teacher ‖ student) at the same tokens
    Both are scaled to 0…1 over all rows first.

    Example: entropies 0, 1 and KLs 2, 0 are scaled to 0, 1 and 1, 0: both tokens score 1.
    """
    lengths = [len(row_n) for row_n in entropy]
    whole_N = torch.cat(list(entropy))
    h_N = _scaled(whole_N.clamp_max(torch.quantile(whole_N, ENTROPY_QUANTILE)))
    d_N = _scaled(torch.cat(list(kl)))
    return list((h_N + d_N - h_N * d_N).split(lengths))


def mean_of_one(factors: Sequence[Tensor]) -> list[Tensor]:
    """Rescale to a mean of 1 over all tokens; weights that are all 0 stay 0.

    Example: (1, 1, 0, 0) becomes (2, 2, 0, 0).
    """
    total, count = sum(float(factor.sum()) for factor in factors), sum(map(len, factors))
    return [factor * (count / total) if total else factor for factor in factors]


def _scaled(values_N: Tensor) -> Tensor:
    low, high = values_N.min(), values_N.max()
    return (values_N - low) / (high - low) if high > low else torch.zeros_like(values_N)


def _highest(scores: Sequence[Tensor], factors: Sequence[Tensor], share: float) -> list[Tensor]:
    """1 for the share of tokens with the highest scores among those of a positive factor, at least one; else 0."""
    score_N, open_N = torch.cat(list(scores)), torch.cat(list(factors)) > 0
    count = max(1, round(share * int(open_N.sum())))
    ranked = torch.where(open_N, score_N, -torch.inf).argsort(descending=True, stable=True)[:count]
    kept_N = torch.zeros_like(score_N).index_fill_(0, ranked, 1.0)
    return list(kept_N.split([len(row_n) for row_n in scores]))


def _entropy_and_kl(rows: Sequence[Row], policy: Policy, budget: BatchBudget) -> tuple[list[Tensor], list[Tensor]]:
    """The student's entropy and KL(teacher ‖ student) at every token of every row, from the ranks that hold them."""
    own = [(index, row) for index, row in enumerate(rows) if row.local and row.teacher is not None]
    teachers = {id(row.rollout): row.teacher for _, row in own}
    rollouts = [row.rollout for _, row in own]

    def measure(rollout: Rollout, hidden_nH: Tensor) -> Tensor:
        targets_n = torch.tensor(rollout.completion_ids, dtype=torch.long, device=hidden_nH.device)
        inputs = TokenInputs(targets_n, rollout.temperature, teachers[id(rollout)])
        stats = token_stats(hidden_nH, policy.logits, inputs)
        assert stats.kl_teacher_student_N is not None
        return torch.stack([stats.entropy_N, stats.kl_teacher_student_N]).float().cpu()

    measured = budget.fit_passes(lambda tokens: map_hidden(policy, rollouts, tokens, measure), rollouts)
    parts = policy.ranks.all_gather({index: pair for (index, _), pair in zip(own, measured, strict=True)})
    by_row = {index: pair for part in parts for index, pair in part.items()}
    return [by_row[index][0] for index in range(len(rows))], [by_row[index][1] for index in range(len(rows))]
