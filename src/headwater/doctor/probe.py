"""`headwater probe`: is this pair ready, and where should its labels go? A few samples of each model, measured and judged.

It looks at labels of the recipe's own budget, the same that training would look at, and says how many.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwater import seeds, stats
from headwater.config.arms import split_pool
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.data.labels import Labels
from headwater.doctor import advice
from headwater.doctor.advice import Finish, Measures, Readiness
from headwater.doctor.checks import check_plan
from headwater.errors import TrainingStoppedError, UserError
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.shape import Shape
from headwater.models.tokenizer import refuse_different_widths
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import ProgressDisplay
from headwater.runs.setup import prepared
from headwater.sampling.base import Request, requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.stats import Counts, Floats, Interval
from headwater.storage.ledger import Spend, record
from headwater.storage.run_dir import RunDir, write_json
from headwater.storage.untrusted import refuse_links
from headwater.teachers.server_client import is_served
from headwater.training import conditions
from headwater.training.evaluate import sample_and_grade
from headwater.types import Rollout

PROBLEMS = 128
SAMPLES = 8
FINISHES = 4
"""Samples that go on from each beginning (`finish`)."""
BEGINNING = 0.25
"""Share of a right answer's tokens that is given: enough to show the way, and most of it is still to go."""

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Looks:
    """One model's samples, K of each of P problems in order of (problem, sample), and which were right."""

    policy: Policy
    stage: Stage
    rollouts: Sequence[Rollout]
    right_PK: NDArray[np.int64]

    @property
    def right(self) -> list[Rollout]:
        return [rollout for rollout, right in zip(self.rollouts, self.right_PK.flat, strict=True) if right]


@dataclass(frozen=True)
class Probed:
    """What was measured with so many samples a problem; `c2` is `conditions.measure` on all of them."""

    measures: Measures
    c2: dict[str, float]
    samples: int


def probe(
    recipe: Recipe,
    problems: int | None,
    samples: int | None,
    seed: int,
    out: Path | None,
    progress_display: ProgressDisplay,
) -> dict[str, Any]:
    """Measure and advise; with `out`, keep the answer and the looks at labels in that run's folder.

    problems  how many labelled problems to sample; None takes 128, or all that the budget buys where those are fewer
    samples   completions a problem; None takes 8, or the group size where that is larger

    Returns what probe.json holds. Raises UserError for what cannot be measured or loaded.
    """
    started = time.perf_counter()
    wanted = recipe.model_dump(mode="json")
    folder = None if out is None else RunDir(out)
    spends: list[Spend] = []

    def spent(spend: Spend) -> None:
        spends.append(spend)
        if folder is not None:
            record(folder.probe_ledger, spend)

    if folder is not None:
        refuse_links(folder.path, "--out")
        folder.refuse_other(wanted)
    with contextlib.ExitStack() as stack:
        plan, inputs = stack.enter_context(prepared(recipe, ["bridge", "direct_grpo"], [seed]))
        check_plan(plan, inputs)
        names, count = chosen(inputs, problems, seed), samples_of(recipe, samples)
        if folder is not None:
            stack.enter_context(folder.locked())
            folder.claim(wanted)
        found = measured(inputs, names, count, seed, progress_display, spent)
        answer = {
            "recipe": recipe.name,
            "seed": seed,
            "problems": len(names),
            "samples": count,
            "labels": {
                "looked_at": len(inputs.labels.looked_at),
                "checks": inputs.labels.checks,
                "budget": len(inputs.pools.all),
            },
            **written(found),
            "tokens_sampled": sum(spend.tokens_sampled for spend in spends),
            "seconds": time.perf_counter() - started,
        }
        if folder is not None:
            write_json(folder.probe, answer)
    return answer


def measured(
    inputs: RunInputs,
    names: Sequence[str],
    samples: int,
    seed: int,
    progress_display: ProgressDisplay,
    spent: Callable[[Spend], None],
) -> Probed:
    """The measures of both models on the problems named; `spent` is told of every look at labels when it was taken."""
    recipe, labels = inputs.recipe, inputs.labels.only(names)
    student = look("student", inputs, names, labels, samples, seed, progress_display, spent)
    teacher = look("teacher", inputs, names, labels, samples, seed, progress_display, spent)
    refuse_different_widths(student.policy, teacher.policy, ("models.student", "models.teacher"))
    tokens = recipe.compute.microbatch_tokens
    with progress_display.node("how far apart they are", 3, 3) as watch:
        watch.start(0, 3, "measures")
        c2 = conditions.measure(
            student.policy, teacher.policy, student.rollouts, teacher.rollouts, recipe.conditions.top_k, tokens
        )
        watch.advance(1, {"kl_student_teacher": c2["kl_student_teacher"]})
        finished = finish(student, teacher, labels, recipe, seed, spent)
        watch.advance(2, {})
    return Probed(
        Measures(
            student=readiness(student, c2["entropy_student"]),
            teacher=readiness(teacher, c2["entropy_teacher"]),
            kl_student_prefixes=c2["kl_student_teacher"],
            finish=finished,
            passes=cache_passes(inputs),
        ),
        c2,
        samples,
    )


def chosen(inputs: RunInputs, problems: int | None, seed: int) -> list[str]:
    """Which labelled problems are sampled, in an order that content and seed decide. Raises UserError past the budget."""
    pool = inputs.pool(split_pool(inputs.recipe))
    if problems is not None and problems > len(pool):
        raise UserError(f"--problems {problems}: the recipe's label budget buys {len(pool)} problems to look at")
    return seeds.shuffled(list(pool), seed, "probe")[: PROBLEMS if problems is None else problems]


def samples_of(recipe: Recipe, samples: int | None) -> int:
    """Samples a problem. Raises UserError where they are fewer than a group, whose information could not be measured."""
    group = max(recipe.stages.teacher_rl.group_size, recipe.stages.student_rl.group_size)
    if samples is not None and samples < group:
        raise UserError(f"--samples {samples}: fewer than the group size {group}, so no whole group could be looked at")
    return max(SAMPLES, group) if samples is None else samples


def cache_passes(inputs: RunInputs) -> float:
    """Times that the warm-up goes through each of the teacher's cached rollouts.

    Example: 80 steps of 64 rollouts over a cache of 64 prompts × 8 rollouts are 10 passes.
    """
    settings, pool = inputs.recipe.stages.warmup, split_pool(inputs.recipe)
    cached = len(inputs.prompts(pool, settings)) * settings.group_size
    return inputs.steps(pool, settings) * settings.batch_size / cached


def look(
    role: Role,
    inputs: RunInputs,
    names: Sequence[str],
    labels: Labels,
    samples: int,
    seed: int,
    progress_display: ProgressDisplay,
    spent: Callable[[Spend], None],
) -> Looks:
    """Sample one model as its RL stage would, and grade. Raises UserError when it gives no finite numbers."""
    recipe = inputs.recipe
    stage = recipe.stages.teacher_rl if role == "teacher" else recipe.stages.student_rl
    started = time.perf_counter()
    (field, name), *others = recipe.models.named(role).items()
    if others or is_served(name):
        raise UserError(f"{field}: probe measures one model whose weights are here; name a folder or a hub id")
    policy = load_policy(inputs.model_folder(role), LoadOptions(recipe.models, inputs.device, frozen=True))
    prompter = Prompter(policy.tokenizer, recipe.prompt)
    prompts = [(name, prompter.ids(inputs.problems[name])) for name in names]
    with progress_display.node(
        f"{role}, {len(names)} problems × {samples} samples", 1 if role == "student" else 2, 3
    ) as watch:
        watch.start(0, len(names) * samples, "completions")
        try:
            found = sample_and_grade(
                inputs.sampler(policy),
                # Both models draw the same numbers, as in evaluations: what differs is then the models.
                requests_for(prompts, samples, 0, seed, "probe"),
                stage.sampling,
                labels,
                prompter,
                lambda finished: watch.advance(len(finished), {}),
            )
        except TrainingStoppedError as error:
            raise UserError(f"models.{role}: {error}") from None
    assert found.verdicts is not None
    right_PK = np.array([int(verdict.correct) for verdict in found.verdicts]).reshape(len(names), samples)
    sampled = sum(len(rollout.completion_ids) for rollout in found.rollouts)
    read = sampled + samples * sum(len(ids) for _, ids in prompts)
    shape = Shape.from_config(policy.model.config)
    spent(
        Spend(
            node="probe",
            stage=role,
            seed=seed,
            step=0,
            purpose="probe",
            labels=tuple(names),
            checks=len(found.rollouts),
            tokens_sampled=sampled,
            # Each model reads the rollouts of both for C2; the teacher's share of that is counted as scoring.
            tokens_teacher_scored=sampled,
            flops=2 * shape.flops(read, read / len(found.rollouts) / 2),
            seconds=time.perf_counter() - started,
        )
    )
    return Looks(policy, stage, found.rollouts, right_PK)


def readiness(looks: Looks, entropy: float) -> Readiness:
    """One model's measures from its samples."""
    right_P = looks.right_PK.sum(axis=1)
    samples, group = looks.right_PK.shape[1], looks.stage.group_size
    samples_P = np.full(len(right_P), samples)
    ks = sorted({k for k in (2, 4, 8, 16, 32, 64) if k <= samples} | {samples})
    pass_at = {k: float(stats.pass_at_k(right_P, samples_P, k).mean()) for k in ks}
    rate_P = right_P / samples
    stopped = [rollout.completion_ids[-1] in looks.policy.stop_ids for rollout in looks.rollouts]
    return Readiness(
        pass_rate=stats.accuracy_interval(rate_P[None]),
        pass_at=pass_at,
        group_size=group,
        informative=stats.accuracy_interval(informative(right_P, samples, group)[None]),
        informative_formula=float((1.0 - rate_P**group - (1.0 - rate_P) ** group).mean()),
        c1=float(rate_P.mean()) / pass_at[samples] if pass_at[samples] > 0.0 else None,
        truncated=sum(rollout.finish == "length" for rollout in looks.rollouts) / len(looks.rollouts),
        ended=sum(stopped) / len(stopped),
        entropy=entropy,
        tokens=sum(len(rollout.completion_ids) for rollout in looks.rollouts) / len(looks.rollouts),
    )


def informative(right_P: Counts, samples: int, group: int) -> Floats:
    """(P,) share of the groups of `group` among each problem's samples whose rewards differ; unbiased.

        1 − C(c, G)/C(n, G) − C(n−c, G)/C(n, G) = pass@G + (pass@G of the wrong ones) − 1,   c right of n samples

    Example: one of four right, groups of two: of six pairs three hold it, ½.
    """
    right_P, samples_P = np.asarray(right_P), np.full(len(right_P), samples)
    some_right, some_wrong = (stats.pass_at_k(one, samples_P, group) for one in (right_P, samples_P - right_P))
    return np.clip(some_right + some_wrong - 1.0, 0.0, 1.0)


def finish(
    student: Looks, teacher: Looks, labels: Labels, recipe: Recipe, seed: int, spent: Callable[[Spend], None]
) -> Finish | None:
    """Both models go on from the first quarter of the teacher's right answers, one beginning a problem.

    None, at no cost, where the teacher got nothing right.
    """
    beginnings: dict[str, Rollout] = {}
    for rollout in teacher.right:
        beginnings.setdefault(rollout.problem_id, rollout)
    if not beginnings:
        return None
    given = {
        name: rollout.completion_ids[: max(1, round(BEGINNING * len(rollout.completion_ids)))]
        for name, rollout in beginnings.items()
    }
    requests = [
        Request(name, sample, rollout.prompt_ids + given[name], (seed, "probe", "finish", name, sample))
        for name, rollout in beginnings.items()
        for sample in range(FINISHES)
    ]
    ends: list[Interval] = []
    for role, looks in (("student", student), ("teacher", teacher)):
        started = time.perf_counter()
        text = Prompter(looks.policy.tokenizer, recipe.prompt).completion
        rollouts = TorchSampler(looks.policy, recipe.compute.sample_batch).sample(requests, teacher.stage.sampling)
        verdicts = labels.check(
            [(one.problem_id, text(given[one.problem_id] + one.completion_ids)) for one in rollouts]
        )
        right_PK = np.array([int(verdict.correct) for verdict in verdicts]).reshape(-1, FINISHES)
        ends.append(stats.accuracy_interval(right_PK.mean(axis=1)[None]))
        sampled = sum(len(one.completion_ids) for one in rollouts)
        read = sampled + sum(len(request.prompt_ids) for request in requests)
        spent(
            Spend(
                node="probe",
                stage=f"{role}_finish",
                seed=seed,
                step=0,
                purpose="probe",
                labels=tuple(beginnings),
                checks=len(rollouts),
                tokens_sampled=sampled,
                flops=Shape.from_config(looks.policy.model.config).flops(read, read / len(rollouts) / 2),
                seconds=time.perf_counter() - started,
            )
        )
    apart = conditions.divergences(
        student.policy, teacher.policy, teacher.right, recipe.conditions.top_k, recipe.compute.microbatch_tokens
    )
    return Finish(len(beginnings), ends[0], ends[1], apart.kl_teacher_student)


def written(found: Probed) -> dict[str, Any]:
    """The measures and the advice as plain values, for probe.json and `--json`."""
    measures = found.measures
    labels, warmup, finished, passes = (
        advice.labels(measures),
        advice.warmup(measures),
        measures.finish,
        measures.passes,
    )
    models = {role: asdict(getattr(measures, role)) for role in ("student", "teacher")}
    return {
        "models": models,
        "conditions": {
            "C1": {
                role: {"reward": one["pass_rate"]["mean"], "best_of": one["pass_at"][found.samples], "ratio": one["c1"]}
                for role, one in models.items()
            },
            "C2": found.c2,
        },
        "finish": None
        if finished is None
        else {**asdict(finished), "lead": finished.lead, "toll": finished.toll(passes)},
        "cache_passes": passes,
        "advice": {
            "labels": {**asdict(labels), "arm": labels.arm, "close": labels.close},
            "warmup": asdict(warmup),
            "switch": advice.switch(measures),
            "thresholds": {
                "signal": advice.SIGNAL,
                "enough": advice.ENOUGH,
                "lead": advice.LEAD,
                "far": advice.FAR,
                "worn": advice.WORN,
            },
        },
    }
