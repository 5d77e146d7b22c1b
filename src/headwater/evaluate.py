"""Evaluate a policy on held-out problems and keep every graded text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwater.config import Evaluate
from headwater.data import Problem, Rollout
from headwater.errors import TrainingStoppedError
from headwater.labels import Labels
from headwater.prompts import Prompter
from headwater.sampler import Sampler, requests_for


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
    rollouts = refuse_nan(sampler.sample(requests, settings.sampling, progress))
    texts = [prompter.completion(rollout.completion_ids) for rollout in rollouts]
    verdicts = labels.check([(rollout.problem_id, text) for rollout, text in zip(rollouts, texts, strict=True)])
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
        for rollout, text, verdict in zip(rollouts, texts, verdicts, strict=True)
    ]
    spent = {
        "checks": len(rows),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in rollouts),
        "tokens_prompt": sum(len(ids) for _, ids in prompts),
        "seconds": time.perf_counter() - started,
    }
    return rows, spent


def refuse_nan(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts, unless a model that gives no numbers made them: its texts are noise that would be graded as wrong.

    Raises TrainingStoppedError.
    """
    if any(math.isnan(sum(rollout.sampler_logp)) for rollout in rollouts):
        raise TrainingStoppedError(
            "the model's log-probs are not finite, so there is nothing to sample from: its weights hold a NaN or an infinity, "
            "or its learning rate was too large"
        )
    return rollouts
