"""Scoring under a frozen model, self-distillation through the real path, and the teacher cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwater.errors import UserError
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.materialized import Exact, TopK
from headwater.losses.objectives import objective_of
from headwater.models.policy import Policy
from headwater.teachers.cache import read_cache, refuse_huge_cache, write_distributions, write_rollouts
from headwater.teachers.scoring import distributions_of, hidden_of, logp_of
from headwater.training.update import make_optimizer, update
from tiny import copied, furthest, gradient_of, largest, sampled_rows, stage_of, taught, tiny_policy


def plain_logp(policy: Policy, row: Row) -> torch.Tensor:
    ids = torch.tensor([row.rollout.prompt_ids + row.rollout.completion_ids])
    start = len(row.rollout.prompt_ids) - 1
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, start : start + row.tokens]
    return torch.log_softmax(logits / row.rollout.temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_scores_equal_plain_model_in_order(architecture: str, temperature: float, tokens: int) -> None:
    policy = tiny_policy(architecture, seed=5)
    rows = sampled_rows(policy, groups=4, group_size=2, temperature=temperature)
    rows = [rows[index] for index in (5, 0, 7, 2, 1, 6, 3, 4)]  # lengths in no order
    rollouts = [row.rollout for row in rows]
    for row, logp, known in zip(
        rows, logp_of(policy, rollouts, tokens), distributions_of(policy, rollouts, tokens), strict=True
    ):
        whole = plain_logp(policy, row)
        targets = torch.tensor(row.rollout.completion_ids)
        torch.testing.assert_close(logp, whole[torch.arange(row.tokens), targets], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(known.materialize().align(whole)[1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", "sampled"])
def test_teacher_equal_to_student_gives_zero_loss_and_gradient(
    policy: Policy, teacher: Policy, divergence: str
) -> None:
    rows = sampled_rows(policy, groups=4)
    stage = stage_of("opd", dense={"divergence": divergence}, batch_size=16)
    itself = copied(policy)
    scale = largest(gradient_of(policy, taught(rows, teacher), stage))
    # Other microbatches than the student's, so the two forward passes are not the same to the last bit.
    mirrored = taught(rows, itself, tokens=30)
    assert largest(gradient_of(policy, mirrored, stage)) < 1e-4 * scale
    stats = update(policy, make_optimizer(policy, stage.optim), mirrored, objective_of(stage), 4096)
    assert abs(stats["loss"]) < 1e-5
    assert abs(stats["kl_student_teacher"]) < 1e-6 and abs(stats["kl_teacher_student"]) < 1e-6


def cached(folder: Path, teacher: Policy, top_k: int | None = None, temperature: float = 1.0) -> list[Row]:
    rows = sampled_rows(teacher, groups=4, temperature=temperature)
    folder.mkdir(exist_ok=True)
    write_rollouts(folder, [row.rollout for row in rows])
    write_distributions(folder, teacher, [row.rollout for row in rows], top_k, 64)
    return rows


@pytest.mark.parametrize("objective", ["forward_kl", "opd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_teacher_equals_live_teacher(
    tmp_path: Path, policy: Policy, teacher: Policy, objective: str, temperature: float
) -> None:
    rows = cached(tmp_path, teacher, temperature=temperature)
    again = read_cache(tmp_path)
    assert [row.rollout for row in again] == [row.rollout for row in rows]
    stage = stage_of(objective, batch_size=16)
    live, stored = gradient_of(policy, taught(rows, teacher), stage), gradient_of(policy, again, stage)
    assert furthest(stored, live) < 1e-5 * max(1.0, largest(live))
    update_of = [
        update(copied(policy), torch.optim.SGD([torch.zeros(1)], lr=0.0), some, objective_of(stage), 4096)["loss"]
        for some in (taught(rows, teacher), again)
    ]
    assert update_of[0] == pytest.approx(update_of[1], abs=1e-5)
    assert update_of[0] > 0.1


def test_top_k_cache_bounds_exact_divergence_from_below(tmp_path: Path, policy: Policy, teacher: Policy) -> None:
    exact = cached(tmp_path, teacher)
    student = torch.cat([plain_logp(policy, row) for row in exact])
    known = torch.cat([plain_logp(teacher, row) for row in exact])
    whole = token_losses.forward_kl(student, known)
    gaps = []
    for k in (1, 4, 16, 99):  # the vocabulary has 30 entries; more are not to be had
        cached(tmp_path, teacher, top_k=k)
        rows = read_cache(tmp_path)
        teachers = [row.teacher for row in rows]
        assert all(
            isinstance(distribution, TopK) and distribution.ids_NK.shape[1] == min(k, 30) for distribution in teachers
        )
        merged = torch.cat([
            token_losses.forward_kl(*distribution.materialize().align(plain_logp(policy, row)))
            for distribution, row in zip(teachers, rows, strict=True) if distribution is not None
        ])  # fmt: skip
        assert bool((merged <= whole + 0.01).all())  # kept log-probs are rounded to float16
        gaps.append((whole - merged).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] - 1e-3
    assert abs(gaps[3]) < 0.005


def test_exact_cache_of_student_itself_gives_zero_loss(tmp_path: Path, policy: Policy) -> None:
    cached(tmp_path, policy)
    stage = stage_of("forward_kl", batch_size=16)
    stats = update(copied(policy), make_optimizer(policy, stage.optim), read_cache(tmp_path), objective_of(stage), 64)
    assert abs(stats["loss"]) < 1e-6
    assert all(isinstance(row.teacher, Exact) for row in read_cache(tmp_path))


def drop_a_line(folder: Path) -> None:
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    (folder / "rollouts.jsonl").write_text("\n".join(lines[1:]) + "\n")


def rename_a_key(folder: Path) -> None:
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["prompt"] = first.pop("prompt_ids")
    (folder / "rollouts.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")


def cut(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no rollouts": lambda folder: (folder / "rollouts.jsonl").unlink(),
    "no distributions": lambda folder: (folder / "distributions.safetensors").unlink(),
    "distributions cut short": lambda folder: cut(folder, "distributions.safetensors", 0.5),
    "distributions empty": lambda folder: cut(folder, "distributions.safetensors", 0.0),
    "distributions are not safetensors": lambda folder: (folder / "distributions.safetensors").write_bytes(b"PK" * 99),
    "rollouts cut in a row": lambda folder: cut(folder, "rollouts.jsonl", 0.5),
    "rollouts are not text": lambda folder: (folder / "rollouts.jsonl").write_bytes(b"\xff\xfe\x00"),
    "a rollout missing": drop_a_line,
    "a field missing": rename_a_key,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_refused_by_name(tmp_path: Path, teacher: Policy, damage: str) -> None:
    cached(tmp_path, teacher)
    DAMAGE[damage](tmp_path)
    with pytest.raises(UserError, match="the teacher cache") as refused:
        read_cache(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_huge_exact_cache_is_refused_before_sampling_with_top_k_offered(teacher: Policy) -> None:
    tokens = (64 << 30) // (4 * teacher.vocabulary)  # 64 GiB of float32, to the token
    refuse_huge_cache(teacher, tokens, None)
    refuse_huge_cache(teacher, 100 * tokens, 64)
    with pytest.raises(UserError, match=r"dense\.top_k of the stage.*64 GiB; set it to 64"):
        refuse_huge_cache(teacher, tokens + 1, None)


def test_scoring_leaves_no_gradient(policy: Policy) -> None:
    rollouts = [row.rollout for row in sampled_rows(policy)]
    assert not any(hidden.requires_grad for hidden in hidden_of(policy, rollouts, 64))
    assert not any(logp.requires_grad for logp in logp_of(policy, rollouts, 64))
