"""Early stopping: when a metric has reached its plateau."""

from __future__ import annotations

import pytest

from headwater.config.stage import Until
from headwater.training.early_stopping import has_plateau, plateau


def rows(metric: str, *values: float | None) -> list[dict[str, float]]:
    return [{} if value is None else {metric: value} for value in values]


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ((3.0, 1.0, 2.0, 1.0), True),  # neither 2 nor 1 is below the best of (3, 1)
        ((3.0, 1.0, 2.0, 0.9), False),
        ((3.0, 2.0, 1.0), False),
        ((1.0, 1.0, 1.0), True),
        ((1.0, 1.0), False),  # two windows cannot be worse than none before them
        ((), False),
    ],
)
def test_plateau_of_divergence_needs_two_windows_without_decrease(values: tuple[float, ...], over: bool) -> None:
    assert plateau(rows("loss", *values), "loss", every=1, patience=2, least=0.0) is over


@pytest.mark.parametrize("metric", ["reward", "validation"])
def test_plateau_of_reward_counts_increases(metric: str) -> None:
    assert plateau(rows(metric, 0.1, 0.5, 0.4, 0.5), metric, every=1, patience=2, least=0.0)
    assert not plateau(rows(metric, 0.5, 0.4, 0.3, 0.6), metric, every=1, patience=2, least=0.0)


def test_plateau_ignores_improvements_below_its_threshold() -> None:
    # Best before: 1.0. 0.96 is 4 % lower.
    assert plateau(rows("loss", 1.0, 0.96), "loss", every=1, patience=1, least=0.05)
    assert not plateau(rows("loss", 1.0, 0.94), "loss", every=1, patience=1, least=0.05)


def test_plateau_compares_means_of_full_windows() -> None:
    # Windows of two: 2, 2, then half a window of 0.
    flat = rows("loss", 1.0, 3.0, 3.0, 1.0)
    assert plateau(flat, "loss", every=2, patience=1, least=0.0)
    assert plateau(flat + rows("loss", 0.0), "loss", every=2, patience=1, least=0.0)
    assert not plateau(flat + rows("loss", 0.0, 0.0), "loss", every=2, patience=1, least=0.0)


def test_plateau_reads_metrics_measured_once_per_window() -> None:
    measured = rows("validation", None, None, 0.5, None, None, 0.5, None, None, 0.4)
    assert plateau(measured, "validation", every=3, patience=2, least=0.0)
    assert not plateau(measured[:6], "validation", every=3, patience=2, least=0.0)


def test_stage_ends_only_at_end_of_window() -> None:
    until = Until(metric="loss", every=2, patience=1, least=0.0)
    flat = rows("loss", *[1.0] * 5)
    assert [has_plateau(flat[:steps], until) for steps in range(6)] == [False, False, False, False, True, False]
    assert not has_plateau(flat[:4], None)
