"""Sources of a step's rollouts: sampled by the policy and annotated, or read from the teacher's cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import torch

from headwater import seeds
from headwater.config.stage import Stage
from headwater.data.labels import Labels
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError
from headwater.losses.batch import Row
from headwater.losses.distributions import Aligned, Distributions
from headwater.losses.materialized import SpanLogp
from headwater.losses.objectives import Objective
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.sampling.ahead import AheadSampler
from headwater.sampling.base import OnFinished, Request, Sampler, requests_for
from headwater.sampling.sharded_sampler import ShardedSampler
from headwater.teachers.async_scoring import AsyncScorer
from headwater.teachers.composed import ComposedTeacher
from headwater.teachers.exchanged_scores import Scores, exchanged
from headwater.teachers.scoring import distributions_of, logp_of, top_tokens
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training.dense_weights import with_dense_weights
from headwater.training.evaluate import SamplingStoppedError, sample_and_grade
from headwater.training.groups import (
    assign_to_ranks,
    count_solved,
    count_uninformative,
    owners,
    replace_uninformative,
    truncated_share,
    with_rewards,
    with_tags,
)
from headwater.training.loop import StepBatch
from headwater.training.prompt_order import PromptOrder
from headwater.training.teacher_contrast import contrast_metrics
from headwater.training.update import Metrics
from headwater.types import Rollout


@lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Order in which a stage reads `size` teacher rollouts in an epoch; a cache holds as many of epoch 0's first as are read."""
    return tuple(seeds.generator(seed, "stored", epoch).permutation(size).tolist())


class CachedRollouts:
    """Teacher rollouts from the cache, reshuffled every epoch. Call it with a step index.

    prompts  the problem ids of the pool. The cache may hold only those of its rollouts, `stage.group_size` for each prompt, that
             come first in the first epoch
    tags     problem id -> tag, for a loss that is normalized by tag; else empty
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[str],
        stage: Stage,
        seed: int,
        ranks: ProcessGroup = SINGLE_PROCESS,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._rows = {row.rollout.key: row for row in with_tags(rows, tags or {})}
        self._pool = [(name, sample) for name in prompts for sample in range(stage.group_size)]
        self._stage, self._seed, self._ranks = stage, seed, ranks

    def __call__(self, step: int) -> StepBatch:
        size = len(self._pool)
        positions = range(step * self._stage.batch_size, (step + 1) * self._stage.batch_size)
        places = (divmod(position, size) for position in positions)
        rows = [self._rows[self._pool[epoch_order(size, self._seed, epoch)[place]]] for epoch, place in places]
        rows = assign_to_ranks(rows, self._stage, 1, self._ranks)
        return StepBatch(rows, {"seconds_sample": 0.0, "seconds_score": 0.0, "truncated": truncated_share(rows)})


@dataclass(frozen=True)
class PolicyRollouts:
    """Rollouts sampled by the current policy, with the signals its objective asks for. Call it with a step index.

    draw       seed and stage name: name the random numbers of prompts and samples
    prompts    problem id -> prompt ids of the problems that the stage may sample
    labels     capability to grade; None for a dense objective
    teacher    scores the rollouts; None for a sparse objective
    reference  the stage's initial weights, for an objective with a KL term to them
    budget     maximum tokens of a scoring pass; shrinks when memory runs out
    sampler    samples completions; an `AheadSampler` also gets the next step's requests
    parts      number of parts in which the teacher scores a step's rollouts, each while later ones are still being
               sampled (`AsyncScorer`); 1 scores everything after sampling. Of several ranks each scores what it samples, and
               `teacher` communicates over a process group of its own
    """

    policy: Policy
    stage: Stage
    draw: tuple[int, str]
    objective: Objective
    prompts: Mapping[str, tuple[int, ...]]
    sampler: Sampler
    prompter: Prompter
    labels: Labels | None
    teacher: Supervisor | ComposedTeacher | None
    reference: Policy | None
    budget: BatchBudget
    parts: int = 1
    labels_shown: frozenset[str] = frozenset()
    """Problems whose gold answer the teacher reads in its prompt: scoring their rollouts uses a label."""
    chooser: Policy | None = None
    """The policy, where it chooses the tokens that a served teacher scores (`dense.candidates`); else None."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Problem id -> tag, for a loss that is normalized by tag; else empty."""

    def __call__(self, step: int) -> StepBatch:
        sampled: list[Row] = []
        if isinstance(self.sampler, AheadSampler):
            following = step + 1
            job = (self._requests(following), self.stage.sampling_at(following))
            self.sampler.prepare(job if following < self.sampler.steps else None)
        try:
            with self._scorer() as scorer:
                kept, seconds = self._sample(step, sampled, scorer.submit if self.parts > 1 else None)
                started = time.perf_counter()
                kept = assign_to_ranks(kept, self.stage, self.stage.group_size, self.policy.ranks)
                kept = self._score(kept, self._own_scores(kept, scorer.results()))
                if (weights := self.stage.dense.token_weights) is not None:
                    kept = with_dense_weights(kept, weights, self.stage.group_size, self.policy, self.budget)
        except TrainingStoppedError as error:
            if not any(row.verdict for row in sampled):
                raise
            return self._batch(sampled, {}, sampled, [], str(error))  # what was graded must be charged
        metrics: Metrics = {
            "seconds_sample": seconds["sample"],
            "seconds_score": seconds["grade"] + time.perf_counter() - started,
            # A completion that the length schedule cuts says nothing about sampling.max_tokens, which the guard asks about.
            "truncated": truncated_share(sampled) if self.stage.sampling_at(step) == self.stage.sampling else 0.0,
            "completion_tokens": sum(row.tokens for row in sampled) / len(sampled),
        }
        if self.stage.length_schedule is not None:
            metrics["max_tokens"] = self.stage.sampling_at(step).max_tokens
        if isinstance(self.teacher, TranslatedTeacher) and self.teacher.pair is not None:
            metrics |= alignment_metrics(kept, self.policy.ranks)
        if self.teacher is not None:
            metrics |= contrast_metrics(kept, self.teacher.vocabulary, self.policy.ranks)
        if self.labels is not None:
            group_size = self.stage.group_size
            groups = len(sampled) // group_size
            metrics["reward"] = sum(row.verdict.correct for row in sampled if row.verdict) / len(sampled)
            metrics["informative"] = 1.0 - count_uninformative(sampled, group_size) / groups
            metrics["best_of_group"] = count_solved(sampled, group_size) / groups
        return self._batch(with_tags(kept, self.tags), metrics, sampled, kept)

    def _scorer(self) -> AsyncScorer:
        ranks = self.policy.ranks
        own = -(-self.stage.batch_size // ranks.size)
        size = -(-own // self.parts)
        together = self.parts > 1 and not ranks.single_process
        return AsyncScorer(self._teacher_distributions, size, -(-own // size) if together else 0, self.policy.device)

    def _own_scores(self, rows: Sequence[Row], scored: Scores) -> Scores:
        """The scores, made while sampling, of the rows that this rank trains on."""
        ranks = self.policy.ranks
        if self.parts == 1 or ranks.single_process:
            return scored
        assert self.teacher is not None and not isinstance(self.teacher, ComposedTeacher)
        keys = [row.rollout.key for row in rows]
        owner_of = dict(zip(keys, owners(rows, self.stage, self.stage.group_size, ranks.size), strict=True))
        return exchanged(scored, owner_of, [row.rollout for row in rows if row.local], self.teacher, ranks)

    def _batch(
        self, rows: list[Row], metrics: Metrics, sampled: list[Row], scored: list[Row], stopped: str | None = None
    ) -> StepBatch:
        """The batch of a step with what it cost: the rollouts of `sampled` and the scores of `scored`."""
        problems = {row.rollout.problem_id for row in sampled}
        return StepBatch(
            rows,
            metrics,
            labels=tuple(sorted(problems if self.labels is not None else problems & self.labels_shown)),
            checks=0 if self.labels is None else len(sampled),
            tokens_sampled=sum(row.tokens for row in sampled),
            tokens_teacher_scored=0 if self.teacher is None else sum(row.tokens for row in scored),
            flops=self._flops(sampled, scored, problems),
            stopped=stopped,
        )

    def _sample(
        self, step: int, sampled: list[Row], on_finished: OnFinished | None
    ) -> tuple[list[Row], dict[str, float]]:
        """Return the rows to train on, and the seconds of sampling and grading.

        sampled  receives all rows as they are graded: more than are returned when dynamic sampling replaces uninformative
                 groups, and those of a step that stops midway
        """
        kept: list[Row] = []
        seconds = {"sample": 0.0, "grade": 0.0}
        sampler = self.sampler
        if on_finished is not None and isinstance(sampler, ShardedSampler):
            sampler, on_finished = replace(sampler, on_sampled=on_finished), None
        for attempt in range(1 + self.stage.sparse.dynamic_sampling):
            requests, sampling = self._requests(step, attempt), self.stage.sampling_at(step)
            try:
                graded = sample_and_grade(sampler, requests, sampling, self.labels, self.prompter, on_finished)
            except SamplingStoppedError as error:
                sampled += [Row(*graded_row) for graded_row in zip(error.rollouts, error.verdicts, strict=True)]
                raise
            rows = [Row(rollout) for rollout in graded.rollouts]
            if graded.verdicts is not None:
                rows = with_rewards(rows, graded.verdicts, self.stage, self.objective.skip_zero_advantage)
            seconds["sample"] += graded.seconds
            seconds["grade"] += graded.seconds_waited
            sampled += rows
            kept = replace_uninformative(kept, rows, self.stage.group_size)
            if self.labels is None or count_uninformative(kept, self.stage.group_size) == 0:
                break
        return kept, seconds

    def _requests(self, step: int, attempt: int = 0) -> list[Request]:
        """The requests of a step, `stage.group_size` for each of its problems; further attempts (dynamic sampling) draw others."""
        if attempt:
            order = seeds.shuffled(list(self.prompts), *self.draw, "again", step, attempt)
            problems = order[: self.stage.prompts_per_step]
        else:
            problems = self._order.step(step)
        prompts = [(problem, self.prompts[problem]) for problem in problems]
        return requests_for(prompts, self.stage.group_size, *self.draw, step, attempt)

    @cached_property
    def _order(self) -> PromptOrder:
        return PromptOrder(list(self.prompts), self.stage.prompts_per_step, *self.draw)

    def _teacher_distributions(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        """The teacher's distributions at the rollouts' tokens; empty without a teacher."""
        if self.teacher is None:
            return []
        if self.chooser is not None:
            assert self.stage.dense.top_k is not None
            rollouts = self.budget.fit_passes(
                partial(top_tokens, self.chooser, rollouts, self.stage.dense.top_k), rollouts
            )
        return self.budget.fit_passes(partial(distributions_of, self.teacher, rollouts), rollouts)

    def _score(self, rows: list[Row], scored: Scores) -> list[Row]:
        """Add reference log-probs and teacher distributions to this rank's rows; `scored` holds those computed while sampling."""
        rollouts = [row.rollout for row in rows if row.local]
        if self.reference is not None:
            logps = iter(self.budget.fit_passes(partial(logp_of, self.reference, rollouts), rollouts))
            rows = [replace(row, reference_logp=next(logps)) if row.local else row for row in rows]
        if self.teacher is not None:
            keys = [rollout.key for rollout in rollouts]
            with torch.no_grad():
                distributions = iter(
                    [scored[key] for key in keys] if self.parts > 1 else self._teacher_distributions(rollouts)
                )
            rows = [replace(row, teacher=next(distributions)) if row.local else row for row in rows]
        return rows

    def _flops(self, sampled: Sequence[Row], kept: Sequence[Row], problems: Set[str]) -> float:
        """FLOPs of sampling (each prompt once per group) and of scoring the kept rows."""
        lengths = [row.rollout.length for row in kept or sampled]
        context = sum(lengths) / len(lengths) / 2
        tokens = sum(row.tokens for row in sampled) + sum(len(self.prompts[name]) for name in problems)
        flops = self.policy.shape.flops(tokens, context)
        weights = self.stage.dense.token_weights
        student = self.policy if weights is not None and weights.soft_or is not None else None
        scorers = [scorer for scorer in (self.teacher, self.reference, student, self.chooser) if scorer is not None]
        return flops + sum(scorer.pass_flops(kept) for scorer in scorers)


def alignment_metrics(rows: Sequence[Row], ranks: ProcessGroup) -> Metrics:
    """Shares of the step's tokens: `compared` with a teacher of another tokenizer, and `unreadable`, which it does not give back."""
    teachers = [row.teacher for row in rows if row.local]
    states = [t.state_N if isinstance(t, Aligned) else t.size_N for t in teachers if isinstance(t, (Aligned, SpanLogp))]
    sums = {
        "compared": float(sum(int((state_N > 0).sum()) for state_N in states)),
        "unreadable": float(sum(int((state_N < 0).sum()) for state_N in states)),
        "tokens": float(sum(map(len, states))),
    }
    sums = ranks.all_reduce_sum(sums)
    tokens = max(1.0, sums.pop("tokens"))
    return {name: value / tokens for name, value in sums.items()}
