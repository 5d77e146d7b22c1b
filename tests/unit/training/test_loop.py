"""Policy update: denominators, microbatches, clipping, finite checks; and that real steps lower the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from headwater.config.stage import Optim, Stage
from headwater.errors import TrainingStoppedError
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.materialized import Exact
from headwater.losses.objectives import objective_of
from headwater.models.policy import Policy
from headwater.teachers.scoring import logp_of
from headwater.training.groups import split_minibatches
from headwater.training.update import Metrics, learning_rate, make_optimizer, token_weights, update
from tiny import (
    copied,
    furthest,
    gradient_of,
    largest,
    rollout_of,
    same_bits,
    sampled_rows,
    stage_of,
    taught,
    tiny_policy,
    weights_of,
)


def run(policy: Policy, rows: list[Row], stage: Stage, steps: int = 1, tokens: int = 4096) -> list[Metrics]:
    optimizer = make_optimizer(policy, stage.optim)
    return [update(policy, optimizer, rows, objective_of(stage), tokens) for _ in range(steps)]


def plain_logp(policy: Policy, row: Row) -> torch.Tensor:
    """(n, V) log-probs at a row's completion tokens from the transformers model alone, unpadded."""
    ids = torch.tensor([row.rollout.prompt_ids + row.rollout.completion_ids])
    start = len(row.rollout.prompt_ids) - 1
    logits = policy.model(input_ids=ids).logits[0, start : start + row.tokens]
    return torch.log_softmax(logits / row.rollout.temperature, dim=-1)


# ---------------------------------------------------------------------------------------------------- the denominator


def test_token_weights_by_hand() -> None:
    rows = [Row(rollout_of((5,), (7,))), replace(Row(rollout_of((5,), (7, 8, 9))), zero_gradient=True)]
    # token: 1 and 3 of 4 tokens; sequence: 1/(2·1) and 1/(2·3); constant: 1/(2·10). The inert row counts everywhere.
    expected = {"token": [1 / 4, 1 / 4], "sequence": [1 / 2, 1 / 6], "constant": [1 / 20, 1 / 20]}
    for mean, weights in expected.items():
        assert token_weights(rows, stage_of("grpo", loss_mean=mean, sampling={"max_tokens": 10})) == weights


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_update_gradient_equals_plain_loss_gradient(
    policy: Policy, teacher: Policy, mean: str, temperature: float
) -> None:
    rows = taught(sampled_rows(policy, groups=4, temperature=temperature), teacher)
    rows = [replace(row, advantage=0.3 * index - 1.0) for index, row in enumerate(rows)]
    stage = stage_of("mixed", sparse_share=0.25, loss_mean=mean, batch_size=16)
    actual = gradient_of(policy, rows, stage, tokens=40)
    counts = [row.tokens for row in rows]
    weights = {
        "token": [1 / sum(counts)] * 16,
        "sequence": [1 / (16 * count) for count in counts],
        "constant": [1 / (16 * 8)] * 16,
    }[mean]
    total = torch.zeros(())
    for row, weight in zip(rows, weights, strict=True):
        student = plain_logp(policy, row)
        with torch.no_grad():
            known = plain_logp(teacher, row)
        chosen = student[torch.arange(row.tokens), torch.tensor(row.rollout.completion_ids)]
        sparse = -row.advantage * torch.exp(chosen - chosen.detach())
        dense = (student.exp() * (student - known)).sum(dim=-1)
        total = total + weight * (0.25 * sparse + 0.75 * dense).sum()
    total.backward()
    expected = {
        name: parameter.grad for name, parameter in policy.model.named_parameters() if parameter.grad is not None
    }
    assert furthest(actual, expected) < 1e-5 * max(1.0, largest(expected))


@pytest.mark.parametrize("objective", ["grpo", "opd", "sft"])
@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_eight_microbatches_of_one_equal_one_of_eight(
    policy: Policy, teacher: Policy, objective: str, mean: str
) -> None:
    rows = taught(sampled_rows(policy, groups=2), teacher)
    stage = stage_of(objective, loss_mean=mean, optim={"lr": 1e-3, "eps": 1e-4, "grad_clip": 0.5})
    alone, together = copied(policy), copied(policy)
    singly = run(alone, rows, stage, steps=3, tokens=1)
    at_once = run(together, rows, stage, steps=3, tokens=4096)
    moved = furthest(weights_of(together), weights_of(policy))
    assert furthest(weights_of(alone), weights_of(together)) < 1e-3 * moved
    assert [stats["loss"] for stats in singly] == pytest.approx([stats["loss"] for stats in at_once], abs=1e-5)


def test_update_does_not_depend_on_row_order(policy: Policy, teacher: Policy) -> None:
    rows = taught(sampled_rows(policy, groups=4), teacher)
    stage = stage_of("mixed", sparse_share=0.5, batch_size=16)
    forward, backward = gradient_of(policy, rows, stage, 64), gradient_of(policy, rows[::-1], stage, 64)
    assert furthest(forward, backward) < 1e-5 * max(1.0, largest(forward))


def test_padding_does_not_change_gradient_of_row(policy: Policy) -> None:
    short, long = Row(rollout_of((1, 6, 2), (7, 3))), Row(rollout_of((1, 6, 8, 9, 2), (7, 8, 9, 10, 11, 3)))
    stage = stage_of("sft", loss_mean="constant", batch_size=2)
    both = gradient_of(policy, [short, long], stage)
    first, other = gradient_of(policy, [short], stage), gradient_of(policy, [long], stage)
    # constant: each row weighs 1/(rows · max_tokens), so the pair's gradient is the mean of the two.
    expected = {name: (first[name] + other[name]) / 2 for name in first}
    assert furthest(both, expected) < 1e-5 * max(1.0, largest(expected))


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_skipped_zero_gradient_rows_do_not_change_gradient(policy: Policy, mean: str) -> None:
    rows = sampled_rows(policy, groups=3)
    rows = [replace(row, advantage=0.0) if index < 4 else row for index, row in enumerate(rows)]
    stage = stage_of("grpo", loss_mean=mean, batch_size=12)
    run_all = gradient_of(policy, rows, stage)
    left_out = gradient_of(policy, [replace(row, zero_gradient=row.advantage == 0.0) for row in rows], stage)
    dropped = gradient_of(policy, rows[4:], stage)
    assert furthest(left_out, run_all) < 1e-6 * max(1.0, largest(run_all))
    # Rows missing from the denominator too would give another gradient: that is the silent bug this guards against.
    assert furthest(dropped, run_all) > 0.1 * largest(run_all)


def test_batch_without_gradient_takes_no_optimizer_step(policy: Policy) -> None:
    rows, stage = sampled_rows(policy), stage_of("grpo", minibatches=2, passes=2)
    optimizer = make_optimizer(policy, stage.optim)
    update(policy, optimizer, rows, objective_of(stage), 4096)
    before = weights_of(policy)
    idle = [replace(row, advantage=0.0, zero_gradient=True) for row in rows]
    stats = update(policy, optimizer, idle, objective_of(stage), 4096)
    assert same_bits(weights_of(policy), before)
    assert stats["updates"] == 0 and stats["tokens_trained"] == 0


# ------------------------------------------------------------------------------------- minibatches, passes and clipping


def test_row_split_keeps_groups_whole() -> None:
    rows = [Row(rollout_of((5,), (7,), sample=index)) for index in range(12)]
    parts = split_minibatches(rows, 2, 4)
    # Three groups of four in two parts: cuts at round(1.5) = 2 groups.
    assert [[row.rollout.sample for row in part] for part in parts] == [list(range(8)), list(range(8, 12))]
    assert [len(part) for part in split_minibatches(rows, 5, 4)] == [4, 4, 4]
    assert [len(part) for part in split_minibatches(rows, 3, 1)] == [4, 4, 4]


def test_one_update_per_batch_is_exactly_on_policy(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=4)
    for passes, minibatches, updates in ((1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 4, 8)):
        stage = stage_of("grpo", batch_size=16, passes=passes, minibatches=minibatches)
        stats = run(copied(policy), rows, stage)[0]
        assert stats["updates"] == updates
        assert stats["tokens_trained"] == passes * sum(row.tokens for row in rows)
        assert (stats["ratio_off"] > 1e-3) is (updates > 1)


def test_clipped_token_gets_no_gradient_unless_moving_back(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=1)
    now = logp_of(policy, [row.rollout for row in rows], 4096)
    stage = stage_of("grpo", batch_size=4, sparse={"kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.5})

    def gradient(ratio: float, advantage: float) -> dict[str, torch.Tensor]:
        pairs = zip(rows, now, strict=True)
        return gradient_of(
            policy, [replace(r, advantage=advantage, old_logp=x - math.log(ratio)) for r, x in pairs], stage
        )

    up = gradient(1.0, 1.0)
    assert largest(gradient(1.6, 1.0)) == 0.0  # good and already 1.6 > 1.5 times as likely
    assert largest(gradient(0.7, -1.0)) == 0.0  # bad and already 0.7 < 0.8 times as likely
    for ratio, advantage in ((1.4, 1.0), (0.7, 1.0), (1.6, -1.0), (0.9, -1.0)):
        actual, scale = gradient(ratio, advantage), ratio * advantage
        assert furthest(actual, {name: scale * change for name, change in up.items()}) < 1e-4 * largest(up)


def test_clipping_bounds_change_over_many_passes(policy: Policy) -> None:
    rows = [replace(row, advantage=1.0) for row in sampled_rows(policy, groups=2)]
    before = torch.cat(logp_of(policy, [row.rollout for row in rows], 4096))
    median = {}
    for high in (0.1, 1e6):
        trained, stage = copied(policy), stage_of("grpo", passes=60, sparse={"kl_coef": 0.0, "clip_high": high})
        # Plain descent: with Adam, momentum would carry the weights on after the gradient has gone.
        descent = torch.optim.SGD(trained.model.parameters(), lr=0.003)
        update(trained, descent, rows, objective_of(stage), 4096)
        ratio = torch.exp(torch.cat(logp_of(trained, [row.rollout for row in rows], 4096)) - before)
        median[high] = ratio.median().item()
    assert 1.05 < median[0.1] < 1.3
    assert median[1e6] > 2.0


# ------------------------------------------------------------------------------------------------ finite, clipped, rated


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_before_weights_change(policy: Policy, poison: str) -> None:
    rows, stage = sampled_rows(policy), stage_of("grpo")
    optimizer = make_optimizer(policy, stage.optim)
    update(policy, optimizer, rows, objective_of(stage), 4096)
    before = weights_of(policy)
    # A loss of 1e38 is still finite in float32; the norm of its gradient is not.
    rows[3] = replace(rows[3], advantage=math.nan if poison == "loss" else 1e38)
    with pytest.raises(TrainingStoppedError, match=f"the {poison} is not finite") as stopped:
        update(policy, optimizer, rows, objective_of(stage), 4096)
    assert stopped.value.exit_code == 4
    assert same_bits(weights_of(policy), before)


def test_nan_teacher_stops_training_before_weights_change(policy: Policy) -> None:
    rows = [
        replace(row, teacher=Exact(torch.full((row.tokens, policy.vocabulary), math.nan)))
        for row in sampled_rows(policy)
    ]
    before = weights_of(policy)
    with pytest.raises(TrainingStoppedError, match="not finite"):
        run(policy, rows, stage_of("opd"))
    assert same_bits(weights_of(policy), before)


def test_gradient_is_clipped_and_its_norm_before_clipping_reported(policy: Policy) -> None:
    rows, stage = sampled_rows(policy), stage_of("grpo", optim={"lr": 1.0, "grad_clip": 0.01})
    whole = gradient_of(policy, rows, stage_of("grpo"))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in whole.values()))
    before = weights_of(policy)
    stats = update(policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), rows, objective_of(stage), 4096)
    moved = math.sqrt(sum((tensor - before[name]).square().sum().item() for name, tensor in weights_of(policy).items()))
    assert norm > 0.1
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_shrinks_matrices_and_leaves_vectors_alone(policy: Policy) -> None:
    optimizer = make_optimizer(policy, Optim(lr=0.1, weight_decay=0.5))
    before = weights_of(policy)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in weights_of(policy).items():
        # AdamW: w ← w − lr·decay·w = 0.95 w
        torch.testing.assert_close(parameter, before[name] * 0.95 if parameter.ndim >= 2 else before[name])
    assert any(tensor.ndim < 2 for tensor in before.values())


def test_learning_rate_schedule_by_hand() -> None:
    def rates(steps: int, **optim: object) -> list[float]:
        return [learning_rate(Optim(lr=1.0, **optim), step, steps) for step in range(steps)]  # type: ignore[arg-type]

    assert rates(4, warmup=0.5) == [0.5, 1.0, 1.0, 1.0]
    assert rates(4) == [1.0] * 4
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    # After two steps of rise, three remain: 1, ⅔, ⅓.
    assert rates(5, schedule="linear", warmup=0.4) == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3])
    # ½ (1 + cos 0, 60°, 120°) = 1, ¾, ¼
    assert rates(3, schedule="cosine") == pytest.approx([1.0, 0.75, 0.25])
    assert rates(2, warmup=1.0) == [0.5, 1.0]
    assert learning_rate(Optim(lr=2e-6, schedule="linear"), 1, 2) == pytest.approx(1e-6)


def test_update_statistics_agree_with_independent_measurements(policy: Policy, teacher: Policy) -> None:
    rows = taught(sampled_rows(policy, groups=3, temperature=0.7), teacher)
    stats = run(copied(policy), rows, stage_of("opd", batch_size=12), tokens=50)[0]
    with torch.no_grad():
        pairs = [(plain_logp(policy, row), plain_logp(teacher, row)) for row in rows]
    student, known = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    assert stats["loss"] == pytest.approx(token_losses.reverse_kl(student, known).mean().item(), abs=1e-4)
    assert stats["kl_student_teacher"] == pytest.approx(token_losses.reverse_kl(student, known).mean().item(), abs=1e-4)
    assert stats["kl_teacher_student"] == pytest.approx(token_losses.forward_kl(student, known).mean().item(), abs=1e-4)
    assert stats["entropy"] == pytest.approx(-(student.exp() * student).sum(dim=-1).mean().item(), abs=1e-4)
    assert stats["tokens_trained"] == sum(row.tokens for row in rows)
    assert stats["sampler_gap"] < 1e-5 and stats["ratio_off"] == 0.0


def test_reference_kl_is_reported_and_zero_at_start(policy: Policy) -> None:
    rows = sampled_rows(policy)
    logps = logp_of(policy, [row.rollout for row in rows], 4096)
    rows = [replace(row, reference_logp=logp) for row, logp in zip(rows, logps, strict=True)]
    first, *_, last = run(policy, rows, stage_of("grpo", sparse={"kl_coef": 0.01}), steps=6)
    assert first["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert last["kl_reference"] > 1e-3


# --------------------------------------------------------------------------------------- real steps, in the right direction


def fresh(policy: Policy, step: int) -> list[Row]:
    return sampled_rows(policy, groups=4, group_size=8, draw=step)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", "sampled"])
def test_opd_lowers_divergence_from_teacher(policy: Policy, teacher: Policy, divergence: str) -> None:
    stage = stage_of("opd", dense={"divergence": divergence}, batch_size=32, optim={"lr": 5e-3, "grad_clip": 1.0})
    optimizer = make_optimizer(policy, stage.optim)
    seen = [
        update(policy, optimizer, taught(fresh(policy, step), teacher), objective_of(stage), 4096) for step in range(20)
    ]
    for name in ("kl_student_teacher", "kl_teacher_student"):
        early, late = (sum(stats[name] for stats in part) / 3 for part in (seen[:3], seen[-3:]))
        # The one-token estimate is noisier, so it gets less far in twenty steps.
        assert late < (0.9 if divergence == "sampled" else 0.6) * early, name


def test_forward_kl_lowers_divergence_on_unseen_teacher_rollouts(policy: Policy, teacher: Policy) -> None:
    stage = stage_of("forward_kl", batch_size=32, optim={"lr": 5e-3, "grad_clip": 1.0})

    def unseen() -> float:
        rows = taught(sampled_rows(teacher, groups=4, group_size=8, draw=99), teacher)
        return run(copied(policy), rows, stage)[0]["kl_teacher_student"]

    before, optimizer = unseen(), make_optimizer(policy, stage.optim)
    for step in range(20):
        rows = taught(sampled_rows(teacher, groups=4, group_size=8, draw=step), teacher)
        update(policy, optimizer, rows, objective_of(stage), 4096)
    assert unseen() < 0.6 * before


def mean_logp(policy: Policy, rows: list[Row]) -> float:
    return torch.cat(logp_of(policy, [row.rollout for row in rows], 4096)).mean().item()


def test_sft_raises_log_prob_of_teacher_samples_more_than_half_way(policy: Policy, teacher: Policy) -> None:
    rows = sampled_rows(teacher, groups=4)
    before, goal = mean_logp(policy, rows), mean_logp(teacher, rows)
    run(policy, rows, stage_of("sft", batch_size=16, optim={"lr": 5e-3, "grad_clip": 1.0}), steps=20)
    assert before < goal
    assert mean_logp(policy, rows) > before + 0.5 * (goal - before)


def rewarded(rows: list[Row], wanted: Callable[[Row], bool]) -> list[Row]:
    return [replace(row, advantage=1.0 if wanted(row) else -1.0) for row in rows]


def test_grpo_raises_log_probs_of_rewarded_rollouts_and_lowers_rest(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=4)
    good, bad = [row for row in rows if row.advantage > 0], [row for row in rows if row.advantage < 0]
    before = mean_logp(policy, good), mean_logp(policy, bad)
    run(policy, rows, stage_of("grpo", batch_size=16, passes=4))
    assert mean_logp(policy, good) > before[0] + 0.05
    assert mean_logp(policy, bad) < before[1] - 0.05


def test_grpo_steps_raise_share_of_rewarded_rollouts() -> None:
    policy = tiny_policy(seed=4, std=0.15)
    stage = stage_of("grpo", batch_size=32, optim={"lr": 1e-2, "grad_clip": 1.0})
    optimizer, share = make_optimizer(policy, stage.optim), []
    for step in range(20):
        rows = rewarded(fresh(policy, step), lambda row: row.rollout.completion_ids[0] % 2 == 0)  # an even first token
        share.append(sum(row.advantage > 0 for row in rows) / len(rows))
        update(policy, optimizer, rows, objective_of(stage), 4096)
    assert share[0] < 0.5
    assert sum(share[-5:]) / 5 > 0.9
