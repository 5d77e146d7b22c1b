"""Doctor checks that need weights: a few problems and tokens through the code paths that training uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note, warning
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.logprobs import token_stats
from headwater.losses.token_stats import TokenInputs
from headwater.models.policy import Policy
from headwater.teachers.scoring import distributions_of, logp_of
from headwater.types import Rollout

# Bounds in nats for float32 and bfloat16: float32 leaves 1e-6 and less, bfloat16 about 1e-2 a token.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
SELF_KL = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def finite(context: DoctorContext) -> Iterator[Finding]:
    """NaN and infinity in the weights of every model that samples or teaches, and in the log-probs of what was sampled."""
    sampled = context.sampled_roles
    teachers = {teacher for _, teacher in context.distillations}
    for role in [role for role in context.roles if role in sampled or role in teachers]:
        bad = not_finite(context.policy(role, frozen=role != "student"))
        if bad is not None:
            name, count, size = bad
            yield error(
                "not-finite",
                f"models.{role}: {count:,} of the {size:,} numbers in its weight {name} are NaN or infinite",
                "download or save the weights again",
            )
        elif role in sampled and not all(
            math.isfinite(sum(rollout.sampler_logp)) for rollout in context.sample(role).rollouts
        ):
            yield error(
                "not-finite",
                f"models.{role}: its log-probs are not finite, so nothing can be sampled",
                "models.dtype is too narrow for it, or its config.json does not fit its weights: use models.dtype=float32, or "
                "download the model again",
            )


def forward_paths(context: DoctorContext) -> Iterator[Finding]:
    """Report models that need a slower forward pass, as measured when they were loaded."""
    for role in context.sampled_roles:
        policy = context.sample(role).policy
        kind = policy.model.config.model_type
        if context.recipe.compute.sampler == "torch" and policy.decoding == "recompute":
            yield warning(
                "decodes-without-cache",
                f"models.{role}: transformers has no cache with selectable rows for {kind} models, so the embedded "
                "sampler recomputes the whole sequence for every token",
                "nothing for short completions; else set compute.sampler=vllm if it supports the model, or take another model",
            )
        config = policy.model.config
        if config._attn_implementation == "eager" and hasattr(config.get_text_config(), "num_attention_heads"):
            yield note(
                "eager-attention",
                f"models.{role}: transformers' sdpa attention does not support {kind} models, so it runs in plain (eager) "
                "attention, whose memory grows with the square of the length",
                "nothing, or lower compute.microbatch_tokens if memory is short",
            )


def not_finite(policy: Policy) -> tuple[str, int, int] | None:
    """(name, numbers that are NaN or infinite, all numbers) of the first weight that holds any; None if all are finite."""
    for name, tensor in policy.model.named_parameters():
        # A sum is fast; only where it is not finite are the numbers counted.
        if tensor.is_floating_point() and not tensor.detach().sum(dtype=torch.float32).isfinite():
            count = int((~tensor.detach().isfinite()).sum())
            if count:
                return name, count, tensor.numel()
    return None


def sampler_against_trainer(context: DoctorContext) -> Iterator[Finding]:
    """The log-probs that tokens were sampled with against those that the trainer computes for them (TRL #6789)."""
    for role in context.sampled_roles:
        sample = context.sample(role)
        trainer_logp = logp_of(sample.policy, sample.rollouts, context.recipe.compute.microbatch_tokens)
        gap = mean_gap([torch.tensor(rollout.sampler_logp) for rollout in sample.rollouts], trainer_logp)
        bound = AGREEMENT[sample.policy.compute_dtype]
        if not gap <= bound:
            yield error(
                "sampler-trainer-gap",
                f"models.{role}: a sampled token's log-prob differs by {gap:.2g} nats on average between sampler and trainer (at "
                f"most {bound:g} in {dtype_name(sample.policy)})",
                precision_remedy(
                    sample.policy,
                    "the model's cached and whole forward passes differ: report a bug with the model's config.json",
                ),
            )


def teacher_agrees_with_itself(context: DoctorContext) -> Iterator[Finding]:
    """The same tokens scored in one batch and one by one: neither other rows nor padding may change a score."""
    rollouts = scored_rollouts(context)
    teachers = {teacher for _, teacher in context.distillations}
    for role in [role for role in context.roles if role != "student" and role in teachers]:
        teacher = context.policy(role, True)
        own_rollouts = rollouts if role not in context.aligned_roles else context.sample(role).rollouts
        batched = logp_of(teacher, own_rollouts, context.recipe.compute.microbatch_tokens)
        single = [logp_of(teacher, [rollout], 1)[0] for rollout in own_rollouts]
        gap, bound = mean_gap(batched, single), AGREEMENT[teacher.compute_dtype]
        if not gap <= bound:
            yield error(
                "teacher-disagrees-with-itself",
                f"models.{role}: scored twice, in a batch and alone, the same tokens differ by {gap:.2g} nats on average (at most "
                f"{bound:g} in {dtype_name(teacher)})",
                precision_remedy(
                    teacher,
                    "set compute.deterministic=true; else the model is random at inference or reads its padding",
                ),
            )


def scored_rollouts(context: DoctorContext) -> list[Rollout]:
    """What teachers score: the student's completions if a stage samples it, else those of a teacher with its token ids."""
    role = context.sampled_roles[0]
    return context.sample("student" if role in context.aligned_roles else role).rollouts


def self_distillation(context: DoctorContext) -> Iterator[Finding]:
    """The student as its own teacher: KL must be 0 through the path of on-policy distillation."""
    if not any(learner == "student" for learner, _ in context.distillations):
        return
    student, copy = context.policy("student", False), context.policy("student", True)
    kl = self_kl(student, copy, scored_rollouts(context), context.recipe.compute.microbatch_tokens)
    bound = SELF_KL[student.compute_dtype]
    if not abs(kl) < bound:
        yield error(
            "self-kl",
            f"models.student: its mean KL to its own frozen copy is {kl:.2g} nats a token and should be 0 (less than "
            f"{bound:g} in {dtype_name(student)})",
            precision_remedy(
                student, "the model is random at inference, or trains in a different mode than it scores: report a bug"
            ),
        )


@torch.no_grad()
def self_kl(student: Policy, teacher: Policy, rollouts: Sequence[Rollout], tokens: int) -> float:
    """Mean reverse KL per token between a policy and its frozen copy, each in the form that training uses."""
    signals = distributions_of(teacher, rollouts, tokens)
    rows = [Row(rollout, teacher=signal) for rollout, signal in zip(rollouts, signals, strict=True)]
    total = 0.0
    for _, batch in student.batches(rows, tokens):
        stats = token_stats(
            student.completion_hidden(batch),
            student.logits,
            TokenInputs(batch.targets_N, batch.temperature, batch.teacher, token_losses.REVERSE),
        )
        assert stats.divergence_N is not None
        total += stats.divergence_N.sum().item()
    return total / sum(row.tokens for row in rows)


def mean_gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean absolute difference per token; NaN if either input has one."""
    return (torch.cat([row.cpu() for row in first]) - torch.cat([row.cpu() for row in second])).abs().mean().item()


def precision_remedy(policy: Policy, cause: str) -> str:
    """Float32 first, unless the model computes in it already."""
    return cause if policy.compute_dtype == torch.float32 else f"use models.dtype=float32; if the gap stays, {cause}"


def dtype_name(policy: Policy) -> str:
    return str(policy.compute_dtype).removeprefix("torch.")
