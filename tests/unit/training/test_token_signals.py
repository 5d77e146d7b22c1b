"""Per-token teacher signals for the rollout browser."""

from __future__ import annotations

import math

import pytest
import torch

from headwater.losses.batch import Row
from headwater.losses.materialized import Exact, TopK
from headwater.training.token_signals import AT_ONCE, kept, pieces, signal_of
from headwater.types import Rollout


def _row(ids: tuple[int, ...], sampler: tuple[float, ...], teacher_NV: torch.Tensor | None) -> Row:
    rollout = Rollout("p", 0, (1,), ids, sampler, "stop", "s")
    return Row(rollout, teacher=None if teacher_NV is None else Exact(teacher_NV.log()))


def _letters(ids: tuple[int, ...] | list[int]) -> str:
    return "".join("abc"[token_id] for token_id in ids)


def test_token_signal_is_teacher_minus_sampler_log_prob() -> None:
    teacher_NV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    signal = signal_of(_row((1, 2), (math.log(0.5), math.log(0.4)), teacher_NV), _letters)
    # ln ¼ − ln ½ = −0.69, ln 0.8 − ln 0.4 = +0.69.
    assert signal == {"pieces": ["b", "c"], "signal": [-0.69, 0.69]}


def test_token_signal_of_long_completions_is_computed_in_chunks() -> None:
    count = 2 * AT_ONCE + 5
    teacher_NV = torch.rand(count, 3).softmax(dim=-1)
    ids = tuple(int(class_id) for class_id in torch.arange(count) % 3)
    signal = signal_of(_row(ids, (-1.0,) * count, teacher_NV), _letters)
    whole = (teacher_NV.log()[torch.arange(count), torch.tensor(ids)] + 1.0).tolist()
    assert signal["signal"] == pytest.approx(whole, abs=0.0051) and "".join(signal["pieces"]) == _letters(ids)


def test_token_signal_needs_exact_teacher() -> None:
    assert signal_of(_row((1,), (-1.0,), None), _letters) == {}
    top = Row(_row((1,), (-1.0,), None).rollout, teacher=TopK(torch.tensor([[1]]), torch.tensor([[-0.1]])))
    assert signal_of(top, _letters) == {}


def test_token_texts_put_split_character_at_its_last_token() -> None:
    halves = {(0,): "\ufffd", (0, 1): "é", (0, 1, 2): "é!", (): ""}
    assert pieces([0, 1, 2], lambda ids: halves[tuple(ids)]) == ["", "é", "!"]


def test_token_signal_rows_are_spread_over_step() -> None:
    assert kept([None] * 8) == [0, 2, 4, 6]  # type: ignore[list-item]
    assert kept([None] * 2) == [0, 1]  # type: ignore[list-item]
