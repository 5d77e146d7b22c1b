"""The doctor's checks that need weights: a few problems, a few tokens, through the very paths that training uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.doctor.context import Case, Finding
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.logprobs import token_stats
from headwater.models.policy import Policy
from headwater.teachers.scoring import distributions_of, logp_of
from headwater.types import Rollout

MOST_TRUNCATED = 0.5
# Bounds in nats, for float32 and bfloat16: float32 leaves 1e-6 and less, bfloat16 about 1e-2 a token.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
SELF_KL = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def finite(case: Case) -> list[Finding]:
    return [
        Finding(
            "not-finite",
            "error",
            f"models.{role}: its log-probs are not finite, so there is nothing to sample from",
            "its weights hold a NaN or an infinity, or models.dtype is too narrow for it: fetch the weights again, or use "
            "models.dtype=float32",
        )
        for role in case.sampled_roles
        if not all(math.isfinite(sum(rollout.sampler_logp)) for rollout in case.sample(role).rollouts)
    ]


def sampler_against_trainer(case: Case) -> list[Finding]:
    """The log-probs that a token was drawn with against those that the trainer computes for it (TRL #6789)."""
    found = []
    for role in case.sampled_roles:
        sample = case.sample(role)
        theirs = logp_of(sample.policy, sample.rollouts, case.recipe.compute.microbatch_tokens)
        drawn = [torch.tensor(one.sampler_logp) for one in sample.rollouts]
        gap = mean_gap(drawn, theirs)
        if not gap <= GAP[sample.policy.compute_dtype]:
            found.append(
                Finding(
                    "sampler-trainer-gap",
                    "error",
                    f"models.{role}: a sampled token's log-prob differs by {gap:.2g} nats on average between sampler and "
                    f"trainer (at most {GAP[sample.policy.compute_dtype]:g} in {name_of(sample.policy)})",
                    "use models.dtype=float32; if the gap stays, the model's cached and whole forward passes differ: report it",
                )
            )
    return found


def teacher_agrees_with_itself(case: Case) -> list[Finding]:
    """One teacher, the same tokens, scored in one batch and one by one: company and padding must not change a score."""
    found = []
    rollouts = scored(case)
    for role in [role for role in case.roles if role != "student" and any(pair[1] == role for pair in case.pairs)]:
        teacher = case.policy(role, frozen=True)
        together = logp_of(teacher, rollouts, case.recipe.compute.microbatch_tokens)
        alone = [logp_of(teacher, [one], 1)[0] for one in rollouts]
        gap = mean_gap(together, alone)
        if not gap <= AGREEMENT[teacher.compute_dtype]:
            found.append(
                Finding(
                    "teacher-disagrees-with-itself",
                    "error",
                    f"models.{role}: scored twice, in a batch and alone, the same tokens differ by {gap:.2g} nats on average "
                    f"(at most {AGREEMENT[teacher.compute_dtype]:g} in {name_of(teacher)})",
                    "use models.dtype=float32 or compute.deterministic=true; if it stays, the model is random at inference or "
                    "reads its padding",
                )
            )
    return found


def scored(case: Case) -> list[Rollout]:
    """What teachers are asked about: the student's completions where a stage samples it, else those of its teacher."""
    return case.sample(case.sampled_roles[0]).rollouts


def self_distillation(case: Case) -> list[Finding]:
    """The student as its own teacher: KL must be 0 through the path that on-policy distillation takes."""
    if not any(pair[0] == "student" for pair in case.pairs):
        return []
    student, copy = case.policy("student", frozen=False), case.policy("student", frozen=True)
    kl = self_kl(student, copy, scored(case), case.recipe.compute.microbatch_tokens)
    if abs(kl) < SELF_KL[student.compute_dtype]:
        return []
    return [
        Finding(
            "self-kl",
            "error",
            f"models.student: taught by itself it has a mean KL of {kl:.2g} nats a token, where it should have none (less than "
            f"{SELF_KL[student.compute_dtype]:g} in {name_of(student)})",
            "use models.dtype=float32; if it stays, the model is random at inference, or trains in another mode than it scores",
        )
    ]


@torch.no_grad()
def self_kl(student: Policy, teacher: Policy, rollouts: Sequence[Rollout], tokens: int) -> float:
    """Mean reverse KL a token between a policy and its frozen copy, each as training holds it."""
    taught = distributions_of(teacher, rollouts, tokens)
    rows = [Row(rollout, teacher=one) for rollout, one in zip(rollouts, taught, strict=True)]
    total = 0.0
    for _, batch in student.batches(rows, tokens):
        stats = token_stats(
            student.completion_hidden(batch),
            student.logits,
            batch.targets_N,
            batch.temperature,
            batch.teacher,
            token_losses.REVERSE,
        )
        assert stats.divergence_N is not None
        total += stats.divergence_N.sum().item()
    return total / sum(row.tokens for row in rows)


def truncation(case: Case) -> list[Finding]:
    """Completions that run into the limit are graded as they stand, and a model that never ends is no teacher."""
    found = []
    for role in case.sampled_roles:
        sample = case.sample(role)
        cut = sum(rollout.finish == "length" for rollout in sample.rollouts) / len(sample.rollouts)
        if not sample.cut and cut > MOST_TRUNCATED:
            found.append(
                Finding(
                    "truncated",
                    "warning",
                    f"models.{role}: {cut:.0%} of {len(sample.rollouts)} sampled completions run into sampling.max_tokens "
                    f"{sample.limit}",
                    "raise sampling.max_tokens, or check that the model knows how to end (its stop ids, its chat template)",
                )
            )
    return found


def mean_gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Mean absolute difference a token; NaN where either is."""
    return (torch.cat([one.cpu() for one in ours]) - torch.cat([one.cpu() for one in theirs])).abs().mean().item()


def name_of(policy: Policy) -> str:
    return str(policy.compute_dtype).removeprefix("torch.")
