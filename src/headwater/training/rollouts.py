"""Where a step's rows come from: the policy's own samples with their signals, or a teacher's cached rollouts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from headwater import seeds
from headwater.config.recipe import Guards
from headwater.config.stage import Stage
from headwater.data.labels import Labels
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError
from headwater.losses.advantages import ADVANTAGES
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions
from headwater.losses.objectives import Objective
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.shape import Shape
from headwater.sampling.base import OnFinished, Sampler, requests_for
from headwater.teachers.async_scoring import AsyncScorer
from headwater.teachers.build import Teacher
from headwater.teachers.scoring import distributions_of, logp_of
from headwater.training.evaluate import sampled_and_graded
from headwater.training.loop import Metrics, StepBatch, divided
from headwater.types import Rollout, Verdict


def stored(
    stage: Stage, seed: int, rows: Sequence[Row], ranks: ProcessGroup = SINGLE_PROCESS
) -> Callable[[int], StepBatch]:
    """Cached teacher rollouts, gone through in a fresh order each epoch."""

    def gather(step: int) -> StepBatch:
        chosen: list[Row] = []
        for position in range(step * stage.batch_size, (step + 1) * stage.batch_size):
            epoch, place = divmod(position, len(rows))
            chosen.append(rows[orders(epoch)[place]])
        chosen = shared_out(chosen, stage, 1, ranks)
        return StepBatch(chosen, {"seconds_sample": 0.0, "seconds_score": 0.0, "truncated": truncated(chosen)})

    held: dict[int, list[int]] = {}

    def orders(epoch: int) -> list[int]:
        if epoch not in held:
            held.clear()
            held[epoch] = seeds.generator(seed, "stored", epoch).permutation(len(rows)).tolist()
        return held[epoch]

    return gather


@dataclass(frozen=True)
class PolicyRollouts:
    """Rollouts of the policy as it is now, with the signals that the objective asks for: call it with a step.

    prompts    problem id -> prompt ids: what the stage may sample from
    labels     the answers it may look at; None where the objective is dense
    teacher    who scores the rollouts; None where the objective is sparse
    reference  the stage's starting weights, where the objective keeps close to them
    budget     at most so many tokens in a scoring pass; what fits is remembered
    parts      the teacher scores a step's rollouts in so many parts, each while later ones are still sampled (`AsyncScorer`);
               1 scores all of them after sampling
    """

    policy: Policy
    stage: Stage
    name: str
    seed: int
    objective: Objective
    prompts: Mapping[str, tuple[int, ...]]
    sampler: Sampler
    text: Callable[[Sequence[int]], str]
    labels: Labels | None
    teacher: Teacher | None
    reference: Policy | None
    guard: SignalGuard
    budget: BatchBudget
    parts: int = 1

    def __call__(self, step: int) -> StepBatch:
        with AsyncScorer(self.taught, -(-self.stage.batch_size // self.parts)) as ahead:
            everything, kept, seconds = self.sampled(step, ahead.submit if self.parts > 1 else None)
            started = time.perf_counter()
            kept = shared_out(kept, self.stage, self.stage.group_size, self.policy.ranks)
            kept = self.scored(kept, ahead.results())
        metrics: Metrics = {
            "seconds_sample": seconds["sample"],
            "seconds_score": seconds["grade"] + time.perf_counter() - started,
            "truncated": truncated(everything),
            "completion_tokens": sum(row.tokens for row in everything) / len(everything),
        }
        if self.labels is not None:
            groups = len(everything) // self.stage.group_size
            metrics["reward"] = sum(row.verdict.correct for row in everything if row.verdict) / len(everything)
            metrics["informative"] = 1.0 - uninformative(everything, self.stage) / groups
            metrics["best_of_group"] = solved(everything, self.stage) / groups
            self.guard.look(step, groups, metrics)
        problems = {row.rollout.problem_id for row in everything}
        return StepBatch(
            kept,
            metrics,
            labels=() if self.labels is None else tuple(sorted(problems)),
            checks=0 if self.labels is None else len(everything),
            tokens_sampled=sum(row.tokens for row in everything),
            tokens_teacher_scored=0 if self.teacher is None else sum(row.tokens for row in kept),
            flops=self.flops(everything, kept, sum(len(self.prompts[name]) for name in problems)),
        )

    def sampled(self, step: int, beside: OnFinished | None) -> tuple[list[Row], list[Row], dict[str, float]]:
        """All rows that were sampled, those to train on, and the seconds it took.

        The two differ where groups without a signal are sampled again (dynamic sampling).
        """
        everything: list[Row] = []
        kept: list[Row] = []
        seconds = {"sample": 0.0, "grade": 0.0}
        for attempt in range(1 + self.stage.sparse.dynamic_sampling):
            wanted = requests_for(
                [(name, self.prompts[name]) for name in self.problems_of(step, attempt)],
                self.stage.group_size, 0, self.seed, self.name, step, attempt,
            )  # fmt: skip
            found = sampled_and_graded(self.sampler, wanted, self.stage.sampling, self.labels, self.text, beside=beside)
            rows = [Row(rollout) for rollout in found.rollouts]
            if found.verdicts is not None:
                rows = with_rewards(rows, found.verdicts, self.stage, self.objective.idle_without_advantage)
            seconds = {"sample": seconds["sample"] + found.seconds, "grade": seconds["grade"] + found.seconds_waited}
            everything += rows
            kept = merged(kept, rows, self.stage)
            if self.labels is None or uninformative(kept, self.stage) == 0:
                break
        return everything, kept, seconds

    def problems_of(self, step: int, attempt: int) -> list[str]:
        """The problems of a step: an epoch's order cut into steps, so that each comes once before any comes twice."""
        names, count = list(self.prompts), self.stage.prompts_per_step
        if attempt:  # replacements for groups without a signal come from an order of their own
            return seeds.shuffled(names, self.seed, self.name, "again", step, attempt)[:count]
        places = (divmod(position, len(names)) for position in range(step * count, (step + 1) * count))
        return [self.order(epoch)[place] for epoch, place in places]

    @cached_property
    def order(self) -> Callable[[int], list[str]]:
        return epochs(list(self.prompts), self.stage.prompts_per_step, self.seed, self.name)

    def taught(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        """The teacher's distributions at these rollouts' tokens; none where no teacher is asked."""
        if self.teacher is None:
            return []
        return self.budget.fit_passes(partial(distributions_of, self.teacher, rollouts), rollouts)

    def scored(self, rows: list[Row], known: Mapping[tuple[str, int], Distributions]) -> list[Row]:
        """The rows with what the frozen models say of those that are run here; `known` holds what the teacher said already."""
        rollouts = [row.rollout for row in rows if row.here]
        if self.reference is not None:
            logps = iter(self.budget.fit_passes(partial(logp_of, self.reference, rollouts), rollouts))
            rows = [replace(row, reference_logp=next(logps)) if row.here else row for row in rows]
        if self.teacher is not None:
            keys = [(rollout.problem_id, rollout.sample) for rollout in rollouts]
            with torch.no_grad():
                found = iter([known[key] for key in keys] if known else self.taught(rollouts))
            rows = [replace(row, teacher=next(found)) if row.here else row for row in rows]
        return rows

    def flops(self, everything: Sequence[Row], kept: Sequence[Row], prompt_tokens: int) -> float:
        """Of sampling (each prompt of a group is run once) and scoring."""
        read = [len(row.rollout.prompt_ids) + row.tokens for row in kept]
        context = sum(read) / len(read) / 2
        sampled = sum(row.tokens for row in everything) + prompt_tokens
        spent = Shape.from_config(self.policy.model.config).flops(sampled, context)
        for scorer in (self.teacher, self.reference):
            if scorer is not None:
                spent += scorer.pass_flops(kept)
        return spent


def epochs(names: list[str], count: int, *draw: str | int) -> Callable[[int], list[str]]:
    """epoch -> the order in which it goes through the names, each once, `count` a step; no step holds a name twice.

    An epoch's own shuffle decides. Where the epoch before ends within a step, the names of its last part that would come again
    in the same step come right after it. That depends on the order before, and so on back to an epoch that begins with a step.

    Example: names a–c, 2 a step, shuffles abc and cab: the second becomes acb, and the steps are ab, ca, cb.
    """
    held: dict[int, list[str]] = {}
    every = count // math.gcd(len(names), count)  # epochs until one begins with a step again

    def order(epoch: int) -> list[str]:
        if epoch in held:
            return held[epoch]
        known = max((one for one in held if one < epoch), default=-1)
        for one in range(max(known + 1, epoch - epoch % every), epoch + 1):
            found = seeds.shuffled(names, *draw, "epoch", one)
            over = one * len(names) % count  # places of its first step that belong to the epoch before
            if over:
                before = set(held[one - 1][-over:])
                first = [name for name in found if name not in before][: count - over]
                found = first + [name for name in found if name not in set(first)]
            held[one] = found
            for old in [key for key in held if key < one - 1]:
                del held[old]
        return held[epoch]

    return order


def shared_out(rows: list[Row], stage: Stage, whole: int, ranks: ProcessGroup) -> list[Row]:
    """The rows with those marked that this rank runs: of every optimizer step a like number of tokens on each rank.

    Groups of `whole` rows, which share a prompt, stay together where there are enough of them. All ranks come to the same
    division, from what all of them know.

    Example: groups of 9, 5 and 4 tokens on two ranks: the first on one, the other two on the other.
    """
    if ranks.alone:
        return rows
    out: list[Row] = []
    for part in divided(rows, stage.minibatches, whole):
        groups = [part[start : start + whole] for start in range(0, len(part), whole)]
        if len(groups) < 2 * ranks.size:
            groups = [[row] for row in part]
        cost = [sum(len(row.rollout.prompt_ids) + row.tokens for row in group if not row.inert) for group in groups]
        load, owner = [0] * ranks.size, [0] * len(groups)
        for index in sorted(range(len(groups)), key=lambda index: (-cost[index], index)):
            owner[index] = load.index(min(load))
            load[owner[index]] += cost[index]
        out += [replace(row, here=owner[index] == ranks.rank) for index, group in enumerate(groups) for row in group]
    return out


def merged(kept: list[Row], fresh: list[Row], stage: Stage) -> list[Row]:
    """Keep what was there, but let informative fresh groups take the places of uninformative ones (dynamic sampling)."""
    if not kept:
        return fresh
    size = stage.group_size
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    spare = [fresh[start : start + size] for start in range(0, len(fresh), size)]
    better = iter([group for group in spare if uninformative(group, stage) == 0])
    out = [group if uninformative(group, stage) == 0 else next(better, group) for group in groups]
    return [row for group in out for row in group]


def uninformative(rows: Sequence[Row], stage: Stage) -> int:
    """Groups whose verdicts are all the same."""
    size = stage.group_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return sum(len({row.verdict.correct for row in group if row.verdict}) < 2 for group in groups)


def solved(rows: Sequence[Row], stage: Stage) -> int:
    """Groups with at least one right completion: pass@G on the problems of a step."""
    size = stage.group_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return sum(any(row.verdict.correct for row in group if row.verdict) for group in groups)


def truncated(rows: Sequence[Row]) -> float:
    return sum(row.rollout.finish == "length" for row in rows) / len(rows)


@dataclass(frozen=True)
class SignalGuard:
    """Stops a stage whose labels buy nothing: no group of its first steps has rewards that differ.

    pool     how many labels the stage may look at
    earlier  the metrics rows of the steps before this one
    """

    stop: bool
    patience: int
    pool: int
    looked_at: Callable[[], int]
    earlier: Callable[[], list[dict[str, Any]]]

    @staticmethod
    def of(
        guards: Guards,
        labels: Labels | None,
        steps: int,
        earlier: Callable[[], list[dict[str, Any]]],
        charged: Callable[[], set[str]] = set,
    ) -> SignalGuard:
        """charged  labels that the ledger says were looked at: a resumed process has not seen all of that itself"""
        return SignalGuard(
            stop=guards.no_signal == "stop",
            patience=min(guards.patience, steps),
            pool=0 if labels is None else len(labels),
            looked_at=lambda: 0 if labels is None else len(labels.looked_at | charged()),
            earlier=earlier,
        )

    def look(self, step: int, groups: int, metrics: Metrics) -> None:
        """Raises TrainingStoppedError at the end of the patience if nothing was informative until then."""
        if not self.stop or step + 1 != self.patience or metrics["informative"] > 0.0:
            return
        if any(row.get("informative", 0.0) > 0.0 for row in self.earlier()):
            return
        said = "wrong" if metrics["reward"] == 0.0 else "right" if metrics["reward"] == 1.0 else "graded alike"
        raise TrainingStoppedError(
            f"no group is informative: in each of the {groups * (step + 1)} groups so far all completions were {said}, so sparse "
            f"reward gives no gradient; {self.looked_at()} labels were looked at and bought nothing, and the other "
            f"{self.pool - self.looked_at()} of this stage's {self.pool} labels would be wasted too (set "
            "guards.no_signal=continue to go on all the same)"
        )


Annotate = Callable[[Sequence[Row]], list[Row]]


def with_rewards(
    rows: Sequence[Row], verdicts: Sequence[Verdict], stage: Stage, idle_without_advantage: bool
) -> list[Row]:
    """Write the verdicts and each group's advantages on the rows (groups of `group_size` in a row).

    A completion cut at the token limit is graded as it stands: whatever it says before the cut may be right.
    """
    rewards_PG = torch.tensor([float(verdict.correct) for verdict in verdicts]).view(-1, stage.group_size)
    advantages = ADVANTAGES[stage.sparse.advantage](rewards_PG).flatten().tolist()
    return [
        replace(row, verdict=verdict, advantage=advantage, inert=idle_without_advantage and advantage == 0.0)
        for row, verdict, advantage in zip(rows, verdicts, advantages, strict=True)
    ]
