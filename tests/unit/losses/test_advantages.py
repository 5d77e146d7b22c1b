"""Group-relative advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from headwater.losses.advantages import ADVANTAGES, group_normalised, informative, mean_centred


def test_group_normalised_by_hand() -> None:
    result = group_normalised(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64))
    # Mean ¼, deviations ¾, −¼, −¼, −¼; variance (9/16 + 3/16) / 4 = 3/16; std 0.4330127: √3 and −1/√3.
    assert result[0].tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-5)
    # Mean ½, std ½: ±1, less the floor of 1e-6 in 0.500001.
    assert result[1].tolist() == pytest.approx([0.5 / 0.500001] * 2 + [-0.5 / 0.500001] * 2, rel=1e-12)


def test_mean_centred_by_hand() -> None:
    result = mean_centred(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]))
    assert result.tolist() == [[0.75, -0.25, -0.25, -0.25], [-0.75, 0.25, 0.25, 0.25]]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_advantages_of_equal_rewards_are_exactly_zero_despite_rounding(name: str, size: int) -> None:
    for value in (0.0, 1.0, 0.1, 1 / 3):
        assert ADVANTAGES[name](torch.full((2, size), value)).tolist() == [[0.0] * size] * 2


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_sum_to_zero_in_each_group_independently(name: str) -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    result = ADVANTAGES[name](rewards)
    assert result.sum(dim=1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    for index in range(3):
        assert torch.equal(ADVANTAGES[name](rewards[index : index + 1])[0], result[index])


def test_group_normalised_weighs_rare_successes_more_than_mean_centred() -> None:
    rare = torch.tensor([[1.0] + [0.0] * 7])
    # p = 1/8: std = √(7/64) = 0.3307; (7/8) / 0.3307 = √7 = 2.6458, against 7/8 without the division.
    assert group_normalised(rare)[0, 0].item() == pytest.approx(math.sqrt(7), rel=1e-5)
    assert mean_centred(rare)[0, 0].item() == 0.875


def test_informative_marks_groups_with_differing_rewards() -> None:
    rewards = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert informative(rewards).tolist() == [False, False, True, True]
