"""Composed teachers: each model scores, the product is exact, costs add up."""

from __future__ import annotations

from dataclasses import replace

import torch

from headwater.losses.batch import Row
from headwater.losses.materialized import Exact
from headwater.models.policy import Policy
from headwater.teachers.composed import ComposedTeacher, gain, product
from headwater.teachers.scoring import distributions_of
from tiny import furthest, gradient_of, largest, sampled_rows, stage_of, taught, tiny_policy


def composed_rows(rows: list[Row], teacher: ComposedTeacher) -> list[Row]:
    distributions = distributions_of(teacher, [row.rollout for row in rows], 4096)
    return [replace(row, teacher=distribution) for row, distribution in zip(rows, distributions, strict=True)]


def test_composed_teacher_gives_weighted_product_of_its_models(policy: Policy, teacher: Policy) -> None:
    rollouts = [row.rollout for row in sampled_rows(policy)]
    composed = ComposedTeacher((teacher, policy), product((1.25, -0.25))).distributions(rollouts, 4096)
    parts = zip(distributions_of(teacher, rollouts, 4096), distributions_of(policy, rollouts, 4096), strict=True)
    for actual, (strong, weak) in zip(composed, parts, strict=True):
        expected = 1.25 * strong.materialize().logp_NV - 0.25 * weak.materialize().logp_NV  # type: ignore[union-attr]
        torch.testing.assert_close(actual.materialize().logp_NV, torch.log_softmax(expected, dim=-1))  # type: ignore[union-attr]


def test_composed_teacher_trains_as_exact_distribution_of_its_product(policy: Policy, teacher: Policy) -> None:
    rows = composed_rows(sampled_rows(policy), ComposedTeacher((teacher, tiny_policy(seed=7)), product((1.5, -0.5))))
    stage = stage_of("opd")
    fused = gradient_of(policy, rows, stage)
    stored = gradient_of(
        policy, [replace(row, teacher=Exact(row.teacher.materialize().logp_NV)) for row in rows], stage
    )  # type: ignore[union-attr]
    assert furthest(fused, stored) < 1e-5 * largest(stored)
    assert furthest(fused, gradient_of(policy, taught(rows, teacher), stage)) > 0.01 * largest(fused)


def test_composed_teacher_costs_sum_of_its_models(policy: Policy, teacher: Policy) -> None:
    rows = sampled_rows(policy)
    together = ComposedTeacher((teacher, policy), product((1.25, -0.25))).pass_flops(rows)
    assert together == teacher.pass_flops(rows) + policy.pass_flops(rows)


def test_gain_over_student_itself_equals_plain_opd(policy: Policy, teacher: Policy) -> None:
    rows = composed_rows(sampled_rows(policy), ComposedTeacher((teacher, tiny_policy(seed=7)), gain))
    fused = gradient_of(policy, rows, stage_of("opd"))
    stored = [replace(row, teacher=row.teacher.materialize()) for row in rows]  # type: ignore[union-attr]
    assert furthest(fused, gradient_of(policy, stored, stage_of("opd"))) < 1e-5 * largest(fused)
    # Over the student itself the gain is the distance: all tokens pass the gate, and the target is the teacher.
    over_itself = composed_rows(sampled_rows(policy), ComposedTeacher((teacher, policy), gain))
    plain = gradient_of(policy, taught(over_itself, teacher), stage_of("opd"))
    assert furthest(gradient_of(policy, over_itself, stage_of("opd")), plain) < 1e-4 * largest(plain)
