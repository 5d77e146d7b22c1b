"""The training loop: get a batch of rollouts, update the policy, yield the step.

The loop names no objective and writes nothing: what differs between stages is in the values that it is handed, and the caller
(runs/train_node.py) records each step that it yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headwater.errors import TrainingStoppedError
from headwater.losses.batch import Row
from headwater.losses.objectives import Objective
from headwater.models.policy import Policy
from headwater.storage import fault_points
from headwater.training.update import Metrics, learning_rate, update


@dataclass(frozen=True)
class StepBatch:
    """The annotated rollouts of one step and what they cost.

    labels   ids of the problems whose answers were used; `checks` counts the completions that were graded
    flops    of sampling and scoring
    stopped  why the batch is incomplete and training must stop; what was graded by then is charged all the same
    """

    rows: list[Row]
    metrics: Metrics
    labels: tuple[str, ...] = ()
    checks: int = 0
    tokens_sampled: int = 0
    tokens_teacher_scored: int = 0
    flops: float = 0.0
    stopped: str | None = None


@dataclass(frozen=True)
class StepResult:
    """One step: its number (from 1), its batch, its row of metrics.jsonl and its duration in seconds.

    stopped  why training must stop once the step is recorded: its update was not finished. It is then the last step
    """

    step: int
    batch: StepBatch
    metrics: Metrics
    seconds: float
    stopped: str | None = None


Source = Callable[[int], StepBatch]
"""Step index (from 0) -> annotated rollouts: sampled by the policy now, or read from the teacher's cache."""


def train_steps(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    source: Source,
    objective: Objective,
    steps: range,
    microbatch_tokens: int,
) -> Iterator[StepResult]:
    """Train the policy and yield every step, after its weights have changed and before anything is written.

    steps              step indices to run, from the last checkpoint's to the end of the stage
    microbatch_tokens  maximum tokens in one pass; a size that did not fit is not tried again

    A step whose labels were used is yielded even if it stops training (`StepResult.stopped`), so that the caller can
    record what it cost. Raises TrainingStoppedError ("step 3 of 10: …") when the source stops before it has graded anything.
    """
    for step in steps:
        fault_points.failpoint("step.begun")
        started = time.perf_counter()
        lr = learning_rate(objective.stage.optim, step, steps.stop)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            batch = source(step)
        except TrainingStoppedError as error:
            raise TrainingStoppedError(f"step {step + 1} of {steps.stop}: {error}") from None
        fault_points.failpoint("step.gathered")
        stopped = batch.stopped
        update_metrics: Metrics = {"updates": 0, "microbatch_tokens": microbatch_tokens, "tokens_trained": 0}
        if stopped is None:
            try:
                update_metrics = update(policy, optimizer, batch.rows, objective, microbatch_tokens)
            except TrainingStoppedError as error:
                stopped = str(error)
        microbatch_tokens = int(update_metrics["microbatch_tokens"])
        seconds = time.perf_counter() - started
        metrics: Metrics = {
            "step": step + 1,
            **batch.metrics,
            **update_metrics,
            "lr": lr,
            "tokens_sampled": batch.tokens_sampled,
            "tokens_teacher_scored": batch.tokens_teacher_scored,
            "seconds": seconds,
        }
        yield StepResult(step + 1, batch, metrics, seconds, stopped)
        if stopped is not None:
            return
