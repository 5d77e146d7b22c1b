"""Contrast of a teacher with a uniform distribution: values by hand in every form, and over the rows of a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headwater.distributed.process_group import SINGLE_PROCESS
from headwater.losses.distributions import Distributions, FromLogits
from headwater.losses.materialized import Exact, Sorted, TopK
from headwater.models.policy import Policy
from headwater.training.teacher_contrast import TOKENS, contrast, contrast_metrics
from tiny import sampled_rows, taught, tiny_policy


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (Exact(logs(0.5, 0.5, 0.0, 0.0)), 0.75),  # |−ln 2 + ln 4| / ln 4 = ½ twice, and 1 twice
        (FromLogits(torch.full((1, 4), 7.0), 1.0), 0.0),
        (TopK(torch.tensor([[2, 0]]), logs(0.25, 0.25)), 0.0),
        (TopK(torch.tensor([[2, 0]]), logs(0.5, 0.9), torch.tensor([1])), 0.5),  # the second id is padding
        (TopK(torch.tensor([[2, 0]]), logs(0.5, 0.9), torch.tensor([0])), None),
        (Sorted(logs(0.5, 0.5), torch.tensor([True])), None),
    ],
)
def test_contrast_by_hand(distribution: Distributions, expected: float | None) -> None:
    assert contrast(distribution, 4) == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_contrast_of_step_tells_trained_teacher_from_uniform(policy: Policy) -> None:
    rows = taught(sampled_rows(policy), tiny_policy(seed=1))
    measured = contrast_metrics(rows, policy.vocabulary, SINGLE_PROCESS)["teacher_contrast"]
    every = [
        (rows[index].teacher.rows(place, place + 1).materialize().logp_NV + math.log(policy.vocabulary)).abs()
        for index, place in ((index, index * 31 % rows[index].tokens) for index in range(len(rows)))
    ]
    by_hand = [(row / math.log(policy.vocabulary)).clamp_max(1.0).mean().item() for row in every]
    assert len(rows) <= TOKENS and measured == pytest.approx(sum(by_hand) / len(by_hand)) and measured > 0.3
    flat = [replace(row, teacher=FromLogits(torch.zeros(row.tokens, policy.vocabulary), 1.0)) for row in rows]
    assert contrast_metrics(flat, policy.vocabulary, SINGLE_PROCESS) == {
        "teacher_contrast": pytest.approx(0.0, abs=1e-6)
    }
    assert contrast_metrics([replace(row, teacher=None) for row in rows], policy.vocabulary, SINGLE_PROCESS) == {}
