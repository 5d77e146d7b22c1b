"""A copy that follows the policy's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwater.config.dense import StartUpdate
from headwater.distributed.process_group import SINGLE_PROCESS
from headwater.training.lagged_copy import LaggedCopy


def linear(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_average_moves_by_share_of_policy() -> None:
    copy = LaggedCopy(linear(1.0), (torch.tensor([[2.0]]),), StartUpdate(decay=0.9))
    copy.follow(1)
    assert copy.model.weight.item() == pytest.approx(1.1)
    copy.follow(2)
    assert copy.model.weight.item() == pytest.approx(0.9 * 1.1 + 0.2)


def test_lagged_copy_changes_every_so_many_steps() -> None:
    weight = torch.zeros(1, 1)
    copy = LaggedCopy(linear(0.0), (weight,), StartUpdate(every=3))
    seen = []
    for step in range(1, 7):
        weight.fill_(float(step))
        copy.follow(step)
        seen.append(copy.model.weight.item())
    assert seen == [0.0, 0.0, 3.0, 3.0, 3.0, 6.0]


def test_copy_is_saved_and_loaded(tmp_path: Path) -> None:
    LaggedCopy(linear(5.0), (), StartUpdate(every=1)).save(tmp_path, SINGLE_PROCESS)
    other = LaggedCopy(linear(0.0), (), StartUpdate(every=1))
    other.load(tmp_path, SINGLE_PROCESS)
    assert other.model.weight.item() == 5.0
