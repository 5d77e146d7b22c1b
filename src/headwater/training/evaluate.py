"""Sample and grade completions; evaluate a policy on held-out problems."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from headwater.config.recipe import Evaluate
from headwater.config.stage import Sampling
from headwater.data.labels import Labels
from headwater.errors import TrainingStoppedError
from headwater.models.prompts import Prompter
from headwater.sampling.base import OnFinished, Request, Sampler, requests_for
from headwater.storage import fault_points
from headwater.types import Problem, Rollout, RolloutKey, Verdict


class SamplingStoppedError(TrainingStoppedError):
    """Sampling stopped after some completions were graded: those rollouts, and their verdicts in the same order."""

    def __init__(self, message: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> None:
        super().__init__(message)
        self.rollouts, self.verdicts = rollouts, verdicts


def evaluate(
    sampler: Sampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    labels: Labels,
    settings: Evaluate,
    draw: Sequence[str | int],
    extract: Callable[[str], str | None] | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], Mapping[str, float]]:
    """Sample `settings.samples` completions per problem and grade them.

    Returns one row per completion, {"problem_id", "sample", "correct", "reason", "text", "extracted", "tokens", "finish"},
    ordered by (problem, sample), and the cost {"checks", "tokens_sampled", "tokens_prompt", "seconds"}.

    Raises TrainingStoppedError when the model's log-probs are not finite; nothing is graded then.
    """
    started = time.perf_counter()
    prompts = [(problem.id, prompter.ids(problem)) for problem in problems]
    requests = requests_for(prompts, settings.samples, *draw)
    on_finished = None if progress is None else lambda rollouts: progress(len(rollouts))
    graded = sample_and_grade(sampler, requests, settings.sampling, labels, prompter, on_finished)
    assert graded.verdicts is not None
    texts = [prompter.completion(rollout.completion_ids) for rollout in graded.rollouts]
    rows = [
        {
            "problem_id": rollout.problem_id,
            "sample": rollout.sample,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "text": text,
            "extracted": None if extract is None else extract(text),
            "tokens": len(rollout.completion_ids),
            "finish": rollout.finish,
        }
        for rollout, text, verdict in zip(graded.rollouts, texts, graded.verdicts, strict=True)
    ]
    spent = {
        "checks": len(rows),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in graded.rollouts),
        "tokens_prompt": sum(len(ids) for _, ids in prompts),
        "seconds": time.perf_counter() - started,
    }
    return rows, spent


@dataclass(frozen=True)
class Graded:
    """Rollouts in the order of their requests, and their verdicts (None without labels).

    seconds         time until the last rollout was sampled
    seconds_waited  time spent waiting for verdicts after that
    """

    rollouts: list[Rollout]
    verdicts: list[Verdict] | None
    seconds: float
    seconds_waited: float


def sample_and_grade(
    sampler: Sampler,
    requests: Sequence[Request],
    sampling: Sampling,
    labels: Labels | None,
    prompter: Prompter,
    on_finished: OnFinished | None = None,
) -> Graded:
    """Sample, and grade finished rollouts while others are still being sampled; only sample when `labels` is None.

    on_finished  called with rollouts as they finish, and with none between verdicts; what it raises ends the work

    One thread hands completions to the graders in the order in which they finish; slow graders run in processes of their
    own (tasks/verifier.py), so sampling is hardly slowed. Raises SamplingStoppedError when log-probs are not finite or memory
    runs out; it holds what was graded by then.
    """
    started = time.perf_counter()
    pending: list[tuple[Sequence[Rollout], Future[list[Verdict]]]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:

        def arrived(finished: Sequence[Rollout]) -> None:
            refuse_nan(finished)
            if on_finished is not None:
                on_finished(finished)  # first: where it stops a node of several ranks, none of them has begun to grade
            if labels is not None and finished:
                pairs = [(rollout.problem_id, prompter.completion(rollout.completion_ids)) for rollout in finished]
                pending.append((finished, thread.submit(labels.check, pairs)))
            if finished:
                fault_points.failpoint("rollouts.arrived")

        try:
            rollouts = sampler.sample(requests, sampling, arrived)
            sampled = time.perf_counter()
            verdicts: dict[RolloutKey, Verdict] = {}
            for finished, future in pending:
                keys = [rollout.key for rollout in finished]
                verdicts.update(zip(keys, future.result(), strict=True))
                fault_points.failpoint("verdicts.checked")
                if on_finished is not None:
                    on_finished([])
        except TrainingStoppedError as error:
            raise SamplingStoppedError(
                str(error),
                [rollout for finished, _ in pending for rollout in finished],
                [verdict for _, future in pending for verdict in future.result()],
            ) from None
        except BaseException:
            thread.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for a long queue of slow graders
            raise
    return Graded(
        rollouts=rollouts,
        verdicts=None if labels is None else [verdicts[rollout.problem_id, rollout.sample] for rollout in rollouts],
        seconds=sampled - started,
        seconds_waited=time.perf_counter() - sampled,
    )


def refuse_nan(rollouts: Sequence[Rollout]) -> None:
    """Raise TrainingStoppedError when sampled log-probs are not finite: the texts are noise that would be graded as wrong."""
    if any(math.isnan(sum(rollout.sampler_logp)) for rollout in rollouts):
        raise TrainingStoppedError(
            "the model's log-probs are not finite: its weights hold a NaN or an infinity, or its learning rate was too large"
        )
