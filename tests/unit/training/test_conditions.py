"""Conditions C1 and C2: divergences in both directions and token overlap."""

from __future__ import annotations

import math

import pytest
import torch

from headwater.config.stage import Sampling
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.training.conditions import Schedule, divergences, measure, overlap
from tiny import tiny_policy

PROMPTS = [("a", (5, 6, 7)), ("b", (8, 9)), ("c", (10, 5, 6, 7))]


def rollouts(policy, draw: str, count: int = 4):  # type: ignore[no-untyped-def]
    requests = requests_for(PROMPTS, count, draw)
    return TorchSampler(policy).sample(requests, Sampling(max_tokens=6))


def test_overlap_is_share_of_common_top_k_tokens() -> None:
    # Likeliest two: student {0, 1}, teacher {1, 2} and then the same two in the other order.
    student = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]]).log()
    teacher = torch.tensor([[0.1, 0.3, 0.5, 0.1], [0.3, 0.5, 0.1, 0.1]]).log()
    assert overlap(student, teacher, 2).tolist() == [0.5, 1.0]
    # Half the vocabulary is the most that is compared.
    assert overlap(student, teacher, 4).tolist() == [0.5, 1.0]


def test_conditions_of_model_with_itself_show_no_divergence() -> None:
    policy = tiny_policy(seed=1)
    own = rollouts(policy, "own")
    conditions = measure(policy, policy, own, own, 4, 1000)
    assert conditions["kl_teacher_student"] == pytest.approx(0.0, abs=1e-6)
    assert conditions["kl_student_teacher"] == pytest.approx(0.0, abs=1e-6)
    assert conditions["overlap_student_prefixes"] == conditions["overlap_teacher_prefixes"] == 1.0
    assert conditions["entropy_student"] == pytest.approx(conditions["entropy_teacher"])


def test_each_divergence_uses_prefixes_of_its_first_model() -> None:
    student, teacher = tiny_policy(seed=1), tiny_policy(seed=2)
    own, teacher_rollouts = rollouts(student, "own"), rollouts(teacher, "theirs")
    conditions = measure(student, teacher, own, teacher_rollouts, 4, 1000)
    assert conditions["kl_teacher_student"] == pytest.approx(by_hand(teacher, student, teacher_rollouts), rel=1e-4)
    assert conditions["kl_student_teacher"] == pytest.approx(by_hand(student, teacher, own), rel=1e-4)
    other = measure(student, teacher, teacher_rollouts, own, 4, 1000)
    assert abs(other["kl_teacher_student"] - conditions["kl_teacher_student"]) > 0.01


def test_scoring_batch_size_does_not_change_conditions() -> None:
    student, teacher = tiny_policy(seed=1), tiny_policy(seed=2)
    own = rollouts(student, "own")
    many, few = divergences(student, teacher, own, 4, 10_000), divergences(student, teacher, own, 4, 12)
    assert many.kl_student_teacher == pytest.approx(few.kl_student_teacher, rel=1e-5)
    assert many.overlap == few.overlap


@torch.no_grad()
def by_hand(first, second, rollouts) -> float:  # type: ignore[no-untyped-def]
    """Token mean of KL(first ‖ second), one sequence at a time through the whole model."""
    total, count = 0.0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        p, q = (torch.log_softmax(model.model(ids).logits[0].double(), dim=-1) for model in (first, second))
        start = len(rollout.prompt_ids) - 1
        p, q = p[start:-1], q[start:-1]
        total += float((p.exp() * (p - q)).sum())
        count += len(rollout.completion_ids)
    assert math.isfinite(total)
    return total / count


@pytest.mark.parametrize(
    ("schedule", "budget", "steps", "expected"),
    [
        (Schedule(64, 25), 256.0, 60, Schedule(64, 25)),  # 0, 25, 50, 60: 4 × 64 fit exactly
        (Schedule(64, 25), 255.9, 60, Schedule(64, 30)),  # 3 × 64 = 192: at 0, 30 and 60
        (Schedule(64, 25), 150.0, 60, Schedule(64, 60)),  # 2 × 64 = 128
        (Schedule(64, 25), 100.0, 60, Schedule(50, 60)),  # 2 × 50
        (Schedule(64, 25), 8.0, 60, Schedule(4, 60)),
        (Schedule(64, 25), 7.9, 60, Schedule(0, 60)),  # 2 × 3: fewer than MIN_PROBLEMS
        (Schedule(64, 25), 0.0, 60, Schedule(0, 60)),
        (Schedule(0, 25), 0.0, 60, Schedule(0, 25)),
        (Schedule(64, 25), 100.0, 1, Schedule(50, 1)),
    ],
)
def test_schedule_within_budget_measures_less_often_then_fewer_problems(
    schedule: Schedule, budget: float, steps: int, expected: Schedule
) -> None:
    assert schedule.within(budget, 1.0, steps) == expected
    due = [step for step in range(steps + 1) if expected.due(step, step == steps)]
    assert len(due) == expected.measurements(steps)
    assert len(due) * expected.problems <= budget
