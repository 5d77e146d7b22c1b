"""The loop. It names no objective: what differs between stages is in the values that it is handed."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headwater.config.stage import Optim, Stage
from headwater.errors import TrainingStoppedError
from headwater.losses import token_losses
from headwater.losses.batch import Batch, Row
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.objectives import Objective
from headwater.losses.token_stats import Tokens, TokenStats
from headwater.models.fsdp import clip_grad_norm, idle_pass, sharded_forward, stop_on_oom
from headwater.models.oom import BatchBudget, is_out_of_memory
from headwater.models.policy import Policy
from headwater.storage import fault_points
from headwater.storage.files import Logs
from headwater.storage.ledger import Spend, record
from headwater.storage.run_dir import NodeDir, append_jsonl, read_jsonl
from headwater.teachers.scoring import logp_of
from headwater.training.checkpoint import load_checkpoint, prune, save_checkpoint
from headwater.training.guards import GuardMonitor

Metrics = dict[str, float]


@dataclass(frozen=True)
class StepBatch:
    """What one step trains on, and what it cost to get it."""

    rows: list[Row]
    metrics: Metrics
    labels: tuple[str, ...] = ()
    checks: int = 0
    tokens_sampled: int = 0
    tokens_teacher_scored: int = 0
    flops: float = 0.0


def make_optimizer(policy: Policy, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the weights that train; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise, then constant, linear to 0 or half a cosine to 0.

    Example: lr 1, warmup 0.5, constant, 4 steps: 0.5, 1, 1, 1.
    """
    rise = round(optim.warmup * steps)
    if step < rise:
        return optim.lr * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return (
        optim.lr
        * {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[optim.schedule]
    )


def token_weights(rows: Sequence[Row], stage: Stage) -> list[float]:
    """The weight of each row's tokens in the loss: the one place that owns the denominator.

    token     1 / all tokens of the optimizer step
    sequence  1 / (rows × the row's own tokens)
    constant  1 / (rows × max_tokens), so a long wrong answer is not diluted by its length (Dr.GRPO, 2503.20783)

    Inert rows count here like all others: leaving out their computation must not change the loss.

    Example: rows of 1 and 3 tokens: token ¼ and ¼; sequence ½ and ⅙.
    """
    if stage.loss_mean == "token":
        return [1.0 / sum(row.tokens for row in rows)] * len(rows)
    if stage.loss_mean == "sequence":
        return [1.0 / (len(rows) * row.tokens) for row in rows]
    return [1.0 / (len(rows) * stage.sampling.max_tokens)] * len(rows)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    objective: Objective,
    stage: Stage,
    tokens: int,
) -> Metrics:
    """Every optimizer step that one batch of rows gives: microbatches, denominator, clipping, finite check.

    tokens  at most so many tokens in a forward and backward pass; where memory runs out it is halved and the pass
            made again. `microbatch_tokens` of the result says what fitted.

    Raises TrainingStoppedError on a non-finite loss or gradient, before the weights are touched, and where not even one row
    fits into memory.
    """
    budget = BatchBudget(tokens)
    again = objective.source == "policy" and stage.passes * stage.minibatches > 1
    if again and not all(row.inert for row in rows):
        own = [row for row in rows if row.here and not row.inert]
        rollouts = [row.rollout for row in own]
        old = iter(budget.fit_passes(partial(logp_of, policy, rollouts), rollouts))
        rows = [replace(row, old_logp=next(old)) if row.here and not row.inert else row for row in rows]
    whole = stage.group_size if objective.source == "policy" else 1
    parts = divided(rows, stage.minibatches, whole)
    sums: dict[str, float] = defaultdict(float)
    taken, seconds = 0, time.perf_counter()
    for _ in range(stage.passes):
        for part in parts:
            live = [row for row in part if not row.inert]
            if not live:
                continue  # nothing here has a gradient: a step would move the weights on momentum alone
            weight_of = {id(row): weight for row, weight in zip(part, token_weights(part, stage), strict=True)}
            own = [row for row in live if row.here]
            attempt = partial(gradient, policy, objective, own, weight_of)
            found = budget.fit_passes(attempt, [row.rollout for row in own])
            for name, value in policy.ranks.all_reduce_sum(found).items():
                sums[name] += value
            norm = clip_grad_norm(policy, stage.optim.grad_clip)
            if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
                what = "gradient" if math.isfinite(sums["loss"]) else "loss"
                raise TrainingStoppedError(f"the {what} is not finite; the weights were not changed by this step")
            fault_points.failpoint("update.gradient")
            stepped(optimizer)
            fault_points.failpoint("update.stepped")
            taken += 1
            sums["grad_norm"] += norm
    count = max(1.0, sums.pop("tokens", 0.0))
    per_step = {name: sums.pop(name, 0.0) / max(1, taken) for name in ("loss", "grad_norm")}
    return {
        **per_step,
        **{name: value / count for name, value in sums.items()},
        "updates": taken,
        "microbatch_tokens": budget.size,
        "tokens_trained": int(count) if taken else 0,
        "seconds_update": time.perf_counter() - seconds,
    }


def gradient(
    policy: Policy, objective: Objective, live: Sequence[Row], weight_of: Mapping[int, float], tokens: int
) -> Metrics:
    """The gradient of one optimizer step in the weights' .grad, whatever was there before, and its measurements summed."""
    policy.model.zero_grad(set_to_none=True)
    sums: dict[str, float] = defaultdict(float)
    for turn in policy.ranks.in_lockstep(policy.batches(live, tokens)):
        if turn is None:
            idle_pass(policy)
            continue
        micro, batch = turn
        weight_N = torch.tensor([weight_of[id(row)] for row in micro], device=policy.device)[batch.row_N]
        backward(policy, objective, batch, weight_N, sums)
    return sums


def stepped(optimizer: torch.optim.Optimizer) -> None:
    """One step. Raises TrainingStoppedError where its own state does not fit, which no microbatch could help."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStoppedError("memory ran out in the optimizer's step; take a larger device") from None


def divided(rows: Sequence[Row], parts: int, whole: int) -> list[list[Row]]:
    """Split rows into `parts` of nearly equal size without cutting a group of `whole` rows."""
    groups = [list(rows[start : start + whole]) for start in range(0, len(rows), whole)]
    cuts = [round(index * len(groups) / parts) for index in range(parts + 1)]
    return [[row for group in groups[a:b] for row in group] for a, b in itertools.pairwise(cuts) if b > a]


def backward(policy: Policy, objective: Objective, batch: Batch, weight_N: Tensor, sums: dict[str, float]) -> None:
    """Add one microbatch's gradient to the weights' .grad and its measurements, summed over tokens, to `sums`."""

    cap = objective.importance_cap

    def token_loss(stats: TokenStats, some: slice) -> Tensor:
        old_logp_N = stats.logp_N.detach() if batch.old_logp_N is None else batch.old_logp_N[some]
        reference_logp_N = None if batch.reference_logp_N is None else batch.reference_logp_N[some]
        drawn_N = batch.sampler_logp_N[some]
        importance_N = None if cap is None else token_losses.truncated_importance(old_logp_N, drawn_N, cap)
        tokens = Tokens(stats, old_logp_N, batch.advantages_N[some], reference_logp_N, importance_N)
        return objective.token_loss(tokens) * weight_N[some]

    def forward() -> tuple[Tensor, TokenStats]:
        return loss_and_stats(
            policy.completion_hidden(batch),
            policy.logits,
            batch.targets_N,
            batch.temperature,
            token_loss,
            batch.teacher,
            objective.divergence,
            objective.teacher_tokens,
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
            measured["sampler_gap"] = (old_logp_N - batch.sampler_logp_N).abs()
            measured["ratio_off"] = ((logp_N - old_logp_N).exp() - 1.0).abs()
            if cap is not None:
                measured["importance"] = token_losses.truncated_importance(old_logp_N, batch.sampler_logp_N, cap)
        if batch.reference_logp_N is not None:
            measured["kl_reference"] = token_losses.reference_kl(logp_N, batch.reference_logp_N)
        for name, value_N in measured.items():
            if value_N is not None:
                sums[name] += value_N.sum().item()
    sums["loss"] += loss.item()
    sums["tokens"] += len(batch.targets_N)


def train(
    policy: Policy,
    stage: Stage,
    steps: int,
    objective: Objective,
    gather: Callable[[int], StepBatch],
    node: NodeDir,
    spend: Spend,
    *,
    microbatch_tokens: int,
    update_flops: Callable[[Sequence[Row]], float],
    on_start: Callable[[int], None],
    on_step: Callable[[int, Metrics], None],
    write_rollouts: Callable[[int, Sequence[Row]], None],
    evaluate: Callable[[str], None],
    beside: Callable[[int, bool], Metrics],
    ended: Callable[[int], bool],
    guards: GuardMonitor,
    should_stop: Callable[[], bool],
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Run one stage from wherever its last checkpoint left it to its end; how many steps it took.

    spend   the ledger row of this node; each step records a copy with its own amounts
    beside  measures the policy after that many steps, and whether they are the last; what it returns joins the step's metrics
    ended   whether the metrics of the first so many steps say that the stage is over before its last step
    guards  whether a step's metrics say that it must stop; asked again, a stopped stage stops at once

    Raises TrainingStoppedError when training stopped itself, KeyboardInterrupt when it was asked to stop; both leave a
    checkpoint to go on from.
    """
    optimizer = make_optimizer(policy, stage.optim)
    done = load_checkpoint(node, policy.model, optimizer, say, policy.ranks)
    fault_points.failpoint("stage.loaded")
    node.cut_back_to(done if done else -1)
    prune(node)  # whoever was killed right after its last checkpoint has not
    fault_points.failpoint("stage.begun")
    logs = Logs(node.logs)
    on_start(done)
    earlier = list(read_jsonl(node.metrics))
    if why := guards.catch_up(earlier):
        raise TrainingStoppedError(f"{spend.stage}, step {done} of {steps}: {why}")
    if earlier:  # the sums of smaller microbatches differ in their last bits, so a resumed stage takes the same ones
        microbatch_tokens = min(microbatch_tokens, int(earlier[-1].get("microbatch_tokens", microbatch_tokens)))
    del earlier
    if done and ended(done):
        return done
    if not done:
        beside(0, steps == 0)
    for step in range(done, steps):
        fault_points.failpoint("step.begun")
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage.optim, step, steps)
        try:
            gathered = gather(step)
            fault_points.failpoint("step.gathered")
            measured = update(policy, optimizer, gathered.rows, objective, stage, microbatch_tokens)
            microbatch_tokens = int(measured["microbatch_tokens"])
        except TrainingStoppedError as error:
            raise TrainingStoppedError(f"{spend.stage}, step {step + 1} of {steps}: {error}") from None
        seconds = time.perf_counter() - started
        row: Metrics = {
            "step": step + 1,
            **gathered.metrics,
            **measured,
            "lr": learning_rate(stage.optim, step, steps),
            "tokens_sampled": gathered.tokens_sampled,
            "tokens_teacher_scored": gathered.tokens_teacher_scored,
            "seconds": seconds,
            **beside(step + 1, step + 1 == steps),
        }
        append_jsonl(node.metrics, [row])
        fault_points.failpoint("step.measured")
        record(
            node.ledger,
            replace(
                spend,
                step=step + 1,
                labels=gathered.labels,
                checks=gathered.checks,
                tokens_sampled=gathered.tokens_sampled,
                tokens_trained=int(measured["tokens_trained"]),
                tokens_teacher_scored=gathered.tokens_teacher_scored,
                flops=gathered.flops + update_flops(gathered.rows),
                seconds=seconds,
            ),
        )
        fault_points.failpoint("step.charged")
        write_rollouts(step + 1, gathered.rows)
        fault_points.failpoint("step.kept")
        on_step(step + 1, row)
        why = guards.look(row)
        last = step + 1 == steps or ended(step + 1)
        if stage.eval_every and (step + 1) % stage.eval_every == 0 and not last:
            evaluate(f"step-{step + 1:06d}")
            fault_points.failpoint("step.evaluated")
        fault_points.failpoint("step.ended")
        asked = should_stop()
        if last or asked or why or (stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0):
            save_checkpoint(node, step + 1, policy.model, optimizer, logs, policy.ranks)
        if why:
            raise TrainingStoppedError(f"{spend.stage}, step {step + 1} of {steps}: {why}")
        if last:
            return step + 1
        if asked:
            raise KeyboardInterrupt
    return steps
