"""Contrast of a teacher with a uniform distribution: values by hand in every form, and over the rows of a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headwater.distributed.process_group import SINGLE_PROCESS
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, FromHidden, FromLogits
from headwater.losses.materialized import Exact, Sorted, TopK
from headwater.models.policy import Policy
from headwater.training.teacher_contrast import TOKENS, contrast, contrast_metrics
from tiny import sampled_rows, taught, tiny_policy


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("distributions", "expected"),
    [
        (Exact(torch.cat([logs(0.5, 0.5, 0.0, 0.0), logs(0.25, 0.25, 0.25, 0.25)])), [0.75, 0.0]),
        (FromLogits(torch.full((1, 4), 7.0), 1.0), [0.0]),
        (TopK(torch.tensor([[2, 0]]), logs(0.25, 0.25)), [0.0]),
        # Of the first row the second id is padding, of the second both are.
        (TopK(torch.tensor([[2, 0]] * 2), logs(0.5, 0.9).expand(2, 2), torch.tensor([1, 0])), [0.5]),
        (Sorted(logs(0.5, 0.5), torch.tensor([True])), []),
    ],
)
def test_contrast_by_hand(distributions: Distributions, expected: list[float]) -> None:
    """0.75: |−ln 2 + ln 4| / ln 4 = ½ twice, and 1 twice."""
    assert contrast(distributions, 4) == pytest.approx(expected, abs=1e-6)


def by_hand(rows: list[Row], vocabulary: int) -> float:
    every = [
        (rows[index].teacher.rows(place, place + 1).materialize().logp_NV + math.log(vocabulary)).abs()
        for index, place in ((index, index * 31 % rows[index].tokens) for index in range(len(rows)))
    ]
    values = [(row / math.log(vocabulary)).clamp_max(1.0).mean().item() for row in every]
    return sum(values) / len(values)


def test_contrast_of_step_tells_trained_teacher_from_uniform(policy: Policy) -> None:
    rows = taught(sampled_rows(policy), tiny_policy(seed=1))
    measured = contrast_metrics(rows, policy.vocabulary, SINGLE_PROCESS)["teacher_contrast"]
    assert len(rows) <= TOKENS and measured == pytest.approx(by_hand(rows, policy.vocabulary)) and measured > 0.3
    flat = [replace(row, teacher=FromLogits(torch.zeros(row.tokens, policy.vocabulary), 1.0)) for row in rows]
    assert contrast_metrics(flat, policy.vocabulary, SINGLE_PROCESS) == {
        "teacher_contrast": pytest.approx(0.0, abs=1e-6)
    }
    assert contrast_metrics([replace(row, teacher=None) for row in rows], policy.vocabulary, SINGLE_PROCESS) == {}


def test_contrast_of_two_teachers_uses_head_of_each(policy: Policy) -> None:
    first, second = (taught(sampled_rows(policy), tiny_policy(seed=seed)) for seed in (1, 2))
    rows = [row for pair in zip(first[::2], second[1::2], strict=True) for row in pair]
    measured = contrast_metrics(rows, policy.vocabulary, SINGLE_PROCESS)["teacher_contrast"]
    assert measured == pytest.approx(by_hand(rows, policy.vocabulary))
    assert measured != pytest.approx(by_hand(first, policy.vocabulary), rel=1e-3)


def test_contrast_of_step_reads_output_head_once(policy: Policy) -> None:
    rows, passes = taught(sampled_rows(policy), tiny_policy(seed=1)), []

    def counted(hidden_NH: torch.Tensor) -> torch.Tensor:
        passes.append(len(hidden_NH))
        return hidden_NH

    hidden = [replace(row, teacher=FromHidden(row.teacher.hidden_NH, counted, 1.0)) for row in rows]
    contrast_metrics(hidden, policy.vocabulary, SINGLE_PROCESS)
    assert passes == [len(rows)]
