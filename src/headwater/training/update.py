"""Policy updates: optimizer, learning rate, loss denominator, microbatches, gradient clipping."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from headwater.config.stage import Optim, Stage
from headwater.devices import to_device
from headwater.errors import TrainingStoppedError
from headwater.losses import token_losses
from headwater.losses.batch import Batch, Row
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.objectives import Objective
from headwater.losses.token_stats import TokenInputs, Tokens, TokenStats
from headwater.models.fsdp import clip_grad_norm, idle_pass, sharded_forward, stop_on_oom
from headwater.models.oom import BatchBudget, is_out_of_memory
from headwater.models.policy import Policy
from headwater.storage import fault_points
from headwater.teachers.scoring import logp_of
from headwater.training.groups import split_minibatches

Metrics = dict[str, float]


def make_optimizer(policy: Policy, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable weights; no weight decay on vectors (norms, biases)."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine decay to 0.

    Example: lr 1, warmup 0.5, constant, 4 steps: 0.5, 1, 1, 1.
    """
    rise = round(optim.warmup * steps)
    if step < rise:
        return optim.lr * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return optim.lr * decay[optim.schedule]


def token_weights(rows: Sequence[Row], stage: Stage) -> list[float]:
    """Loss weight of each row's tokens: the only place that computes the denominator.

    token     1 / all tokens of the optimizer step
    sequence  1 / (rows × the row's own tokens)
    constant  1 / (rows × max_tokens), so that length does not dilute a long wrong answer (Dr.GRPO, 2503.20783)

    With `dense.normalize: tags` these are the weights within each tag, divided by the number of tags among the rows. `rows` are
    those of all ranks, so the denominators are global.

    Inert rows count too: skipping their computation must not change the loss.

    Example: rows of 1 and 3 tokens: token ¼ and ¼; sequence ½ and ⅙. If they have tags of their own: token ½ and ⅙.
    """
    if stage.dense.normalize == "tags" and len(tags := {row.tag for row in rows}) > 1:
        weights = {tag: iter(token_weights([row for row in rows if row.tag == tag], stage)) for tag in tags}
        return [next(weights[row.tag]) / len(tags) for row in rows]
    if stage.loss_mean == "token":
        return [1.0 / sum(row.tokens for row in rows)] * len(rows)
    if stage.loss_mean == "sequence":
        return [1.0 / (len(rows) * row.tokens) for row in rows]
    return [1.0 / (len(rows) * stage.sampling.max_tokens)] * len(rows)


def needs_old_logp(stage: Stage) -> bool:
    """Whether a stage updates several times on a sampled batch, so that ratios need the log-probs from before the first update."""
    return stage.on_policy and stage.passes * stage.minibatches > 1


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rows: Sequence[Row], objective: Objective, tokens: int
) -> Metrics:
    """Take every optimizer step for one batch of rows (passes × minibatches) and return its metrics.

    tokens  maximum tokens in one forward and backward pass; halved and retried when memory runs out. The result's
            `microbatch_tokens` is the size that fitted.

    Raises TrainingStoppedError on a non-finite loss or gradient, before the weights change, and when a single row does not
    fit into memory.
    """
    stage, budget = objective.stage, BatchBudget(tokens)
    if needs_old_logp(stage) and not all(row.zero_gradient for row in rows):
        own = [row for row in rows if row.local and not row.zero_gradient]
        rollouts = [row.rollout for row in own]
        old_logps = iter(budget.fit_passes(partial(logp_of, policy, rollouts), rollouts, policy.memory_settings))
        rows = [replace(row, old_logp=next(old_logps)) if row.local and not row.zero_gradient else row for row in rows]
    group_size = stage.group_size if objective.source == "policy" else 1
    minibatches = split_minibatches(rows, stage.minibatches, group_size)
    sums: dict[str, float] = defaultdict(float)
    updates, started = 0, time.perf_counter()
    for _ in range(stage.passes):
        for minibatch in minibatches:
            live = [row for row in minibatch if not row.zero_gradient]
            if not live:
                continue  # no gradient: a step would move the weights by momentum alone
            weights = token_weights(minibatch, stage)
            weight_of = {id(row): weight for row, weight in zip(minibatch, weights, strict=True)}
            own = [row for row in live if row.local]
            attempt = partial(gradient, policy, objective, own, weight_of)
            measured = budget.fit_passes(attempt, [row.rollout for row in own], policy.memory_settings)
            for name, value in policy.ranks.all_reduce_sum(measured).items():
                sums[name] += value
            norm = clip_grad_norm(policy, stage.optim.grad_clip)
            if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
                what = "gradient" if math.isfinite(sums["loss"]) else "loss"
                raise TrainingStoppedError(f"the {what} is not finite; the weights were not changed by this step")
            fault_points.failpoint("update.gradient")
            optimizer_step(optimizer)
            fault_points.failpoint("update.stepped")
            updates += 1
            sums["grad_norm"] += norm
    count = max(1.0, sums.pop("tokens", 0.0))
    per_step = {name: sums.pop(name, 0.0) / max(1, updates) for name in ("loss", "grad_norm")}
    return {
        **per_step,
        **{name: value / count for name, value in sums.items()},
        "updates": updates,
        "microbatch_tokens": budget.size,
        "tokens_trained": int(count) if updates else 0,
        "seconds_update": time.perf_counter() - started,
    }


def gradient(
    policy: Policy, objective: Objective, live: Sequence[Row], weight_of: Mapping[int, float], tokens: int
) -> Metrics:
    """Compute the gradient of one optimizer step into `.grad` (cleared first); return the measurements, summed over tokens."""
    policy.model.zero_grad(set_to_none=True)
    sums: dict[str, float] = defaultdict(float)
    for turn in policy.ranks.lockstep(policy.batches(live, tokens)):
        if turn is None:
            idle_pass(policy)
            continue
        micro, batch = turn
        weight_N = to_device(torch.tensor([weight_of[id(row)] for row in micro]), policy.device)[batch.row_N]
        backward(policy, objective, batch, weight_N, sums)
    return sums


def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer. Raises TrainingStoppedError when its state does not fit: smaller microbatches would not help."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStoppedError("memory ran out in the optimizer's step; take a larger device") from None


def backward(policy: Policy, objective: Objective, batch: Batch, weight_N: Tensor, sums: dict[str, float]) -> None:
    """Add one microbatch's gradient to `.grad` and its measurements, summed over tokens, to `sums`."""
    cap = objective.importance_cap

    def token_loss(stats: TokenStats, chunk: slice) -> Tensor:
        old_logp_N = stats.logp_N.detach() if batch.old_logp_N is None else batch.old_logp_N[chunk]
        reference_logp_N = None if batch.reference_logp_N is None else batch.reference_logp_N[chunk]
        sampler_logp_N = batch.sampler_logp_N[chunk]
        importance_N = None if cap is None else token_losses.truncated_importance(old_logp_N, sampler_logp_N, cap)
        dense_weights_N = None if batch.dense_weights_N is None else batch.dense_weights_N[chunk]
        tokens = Tokens(stats, old_logp_N, batch.advantages_N[chunk], reference_logp_N, importance_N, dense_weights_N)
        return objective.token_loss(tokens) * weight_N[chunk]

    def forward() -> tuple[Tensor, TokenStats]:
        return loss_and_stats(
            policy.completion_hidden(batch),
            policy.logits,
            TokenInputs(
                batch.targets_N, batch.temperature, batch.teacher, objective.divergence, objective.teacher_tokens
            ),
            token_loss,
        )

    with stop_on_oom(policy):
        loss, stats = sharded_forward(policy, forward)
        loss.backward()
    with torch.no_grad():
        logp_N = stats.logp_N.detach()
        old_logp_N = logp_N if batch.old_logp_N is None else batch.old_logp_N
        measured = {
            "entropy": stats.entropy_N,
            "kl_student_teacher": stats.kl_student_teacher_N,
            "kl_teacher_student": stats.kl_teacher_student_N,
        }
        if objective.source == "policy":
            gap_N = measured["sampler_gap"] = (old_logp_N - batch.sampler_logp_N).abs()
            measured["ratio_off"] = ((logp_N - old_logp_N).exp() - 1.0).abs()
            if cap is not None:
                measured["importance"] = token_losses.truncated_importance(old_logp_N, batch.sampler_logp_N, cap)
                measured["token_mult_prob_error"] = gap_N.exp()
        if batch.reference_logp_N is not None:
            measured["kl_reference"] = token_losses.reference_kl(logp_N, batch.reference_logp_N)
        for name, value_N in measured.items():
            if value_N is not None:
                sums[name] += value_N.sum().item()
    sums["loss"] += loss.item()
    sums["tokens"] += len(batch.targets_N)
