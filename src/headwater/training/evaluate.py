"""Evaluate a policy on held-out problems and keep every graded text."""

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
from headwater.types import Problem, Rollout, Verdict

Key = tuple[str, int]


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
    """Sample `settings.samples` completions a problem and grade them.

    Returns one row a completion, {"problem_id", "sample", "correct", "reason", "text", "extracted", "tokens", "finish"}, in
    order of (problem, sample), and what it cost: {"checks", "tokens_sampled", "tokens_prompt", "seconds"}.

    Raises TrainingStoppedError when the model gives no finite numbers; nothing is graded then.
    """
    started = time.perf_counter()
    prompts = [(problem.id, prompter.ids(problem)) for problem in problems]
    requests = requests_for(prompts, settings.samples, 0, *draw)
    found = sampled_and_graded(sampler, requests, settings.sampling, labels, prompter.completion, progress)
    assert found.verdicts is not None
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
        for rollout, text, verdict in zip(found.rollouts, found.texts, found.verdicts, strict=True)
    ]
    spent = {
        "checks": len(rows),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in found.rollouts),
        "tokens_prompt": sum(len(ids) for _, ids in prompts),
        "seconds": time.perf_counter() - started,
    }
    return rows, spent


@dataclass(frozen=True)
class Graded:
    """Rollouts in the order of their requests, their texts, and the verdicts where there were labels to look at.

    seconds         until the last rollout was there
    seconds_waited  for verdicts after that
    """

    rollouts: list[Rollout]
    texts: list[str]
    verdicts: list[Verdict] | None
    seconds: float
    seconds_waited: float


def sampled_and_graded(
    sampler: Sampler,
    requests: Sequence[Request],
    sampling: Sampling,
    labels: Labels | None,
    text: Callable[[Sequence[int]], str],
    progress: Callable[[int], None] | None = None,
    beside: OnFinished | None = None,
) -> Graded:
    """Sample, and grade each rollout while others are still being sampled; without labels only sample.

    beside  is told of rollouts as they finish, like the graders

    One thread hands completions to the graders in the order in which they arrive; slow graders work in processes of their
    own (`verifier`), so sampling hardly notices. Raises TrainingStoppedError when the model gives no finite numbers.
    """
    started = time.perf_counter()
    waiting: list[tuple[list[Key], Future[list[Verdict]]]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:

        def arrived(finished: Sequence[Rollout]) -> None:
            refuse_nan(finished)
            if labels is not None and finished:
                pairs = [(rollout.problem_id, text(rollout.completion_ids)) for rollout in finished]
                keys = [(rollout.problem_id, rollout.sample) for rollout in finished]
                waiting.append((keys, thread.submit(labels.check, pairs)))
            if beside is not None:
                beside(finished)
            fault_points.failpoint("rollouts.arrived")
            if progress is not None:
                progress(len(finished))

        rollouts = sampler.sample(requests, sampling, arrived)
        sampled = time.perf_counter()
        verdicts: dict[Key, Verdict] = {}
        for keys, future in waiting:
            verdicts.update(zip(keys, future.result(), strict=True))
            fault_points.failpoint("verdicts.checked")
    return Graded(
        rollouts=rollouts,
        texts=[text(rollout.completion_ids) for rollout in rollouts],
        verdicts=None if labels is None else [verdicts[rollout.problem_id, rollout.sample] for rollout in rollouts],
        seconds=sampled - started,
        seconds_waited=time.perf_counter() - sampled,
    )


def refuse_nan(rollouts: Sequence[Rollout]) -> None:
    """Refuse rollouts if a model that gives no numbers made them: its texts are noise that would be graded as wrong.

    Raises TrainingStoppedError.
    """
    if any(math.isnan(sum(rollout.sampler_logp)) for rollout in rollouts):
        raise TrainingStoppedError(
            "the model's log-probs are not finite, so there is nothing to sample from: its weights hold a NaN or an infinity, "
            "or its learning rate was too large"
        )
