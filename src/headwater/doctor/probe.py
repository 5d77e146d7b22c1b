"""`headwater probe`: sample student and teacher, measure their readiness, advise where the labels should go.

It uses labels of the recipe's own budget, the same that training would use, and says how many.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from headwater import seeds, stats
from headwater.config.arms import ARMS, missing_fields, split_pool
from headwater.config.recipe import Recipe
from headwater.doctor import advice
from headwater.doctor.checks import preflight
from headwater.doctor.context import DoctorContext
from headwater.doctor.probe_result import ProbeResult
from headwater.doctor.probe_samples import (
    ModelSamples,
    ProbeTask,
    Role,
    as_student_reads,
    first_part,
    sample_model,
    spend_of,
)
from headwater.doctor.readiness import Continuations, PairMeasures, Readiness, informative_share
from headwater.errors import UserError
from headwater.models.rope import mixed_lengths
from headwater.models.tokenizer import refuse_different_widths
from headwater.runs.display import ProgressDisplay
from headwater.runs.inputs import RunInputs
from headwater.runs.setup import prepared, prompt_day
from headwater.runs.translated_teacher import translated_teacher
from headwater.sampling.base import Request
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.files import write_json
from headwater.storage.ledger import Spend, record
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import refuse_links
from headwater.teachers.translated import Supervisor
from headwater.training import conditions
from headwater.types import Rollout

PROBLEMS = 128
SAMPLES = 8
CONTINUATIONS = 4
"""Samples that continue each prefix of a right answer."""
PREFIX = 0.25
"""Share of a right answer's tokens in the prefix: enough to show the path, with most of it still to go."""

PROBED_ARMS = ("bridge", "direct_grpo")
"""The arms between which the probe advises."""


def probe(
    recipe: Recipe,
    problems: int | None,
    samples: int | None,
    seed: int,
    out: Path | None,
    progress_display: ProgressDisplay,
) -> ProbeResult:
    """Measure and advise; with `out`, keep the answer and the label use in that run's folder.

    problems  number of labelled problems to sample; None is 128, or all that the budget buys if those are fewer
    samples   completions a problem; None is 8, or the group size if that is larger

    Raises UserError for what cannot be measured or loaded.
    """
    started = time.perf_counter()
    recipe_json = recipe.model_dump(mode="json")
    folder = None if out is None else RunDir(out)
    spends: list[Spend] = []

    def charge(spend: Spend) -> None:
        spends.append(spend)
        if folder is not None:
            record(folder.probe_ledger, spend)

    if folder is not None:
        refuse_links(folder.path, "--out")
        folder.refuse_other(recipe_json)
    day = date.today() if folder is None else prompt_day(folder)
    missing = {field: None for arm in PROBED_ARMS for field in missing_fields(ARMS[arm], recipe)}
    if missing:
        raise UserError(
            f"probe: compares labels on the teacher with labels on the student, which needs {', '.join(missing)}; the recipe has no "
            "such field"
        )
    with contextlib.ExitStack() as stack:
        plan, inputs = stack.enter_context(prepared(recipe, PROBED_ARMS, [seed], day))
        preflight(plan, inputs)
        refuse_longer_continuations(DoctorContext.of(plan, inputs))
        names, count = sampled_problems(inputs, problems, seed), samples_a_problem(recipe, samples)
        if folder is not None:
            stack.enter_context(folder.locked())
            folder.claim(recipe_json)
        task = ProbeTask(inputs, names, count, seed, inputs.labels.only(names), progress_display, charge)
        measures, c2 = measure(task)
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
            **as_json(measures, c2, count),
            "tokens_sampled": sum(spend.tokens_sampled for spend in spends),
            "seconds": time.perf_counter() - started,
        }
        if folder is not None:
            write_json(folder.probe, answer)
    return ProbeResult(measures, answer)


def measure(task: ProbeTask) -> tuple[PairMeasures, dict[str, float]]:
    """Measure both models; also returns C2 on all samples (`conditions.measure`), over groups of tokens where tokenizers differ."""
    recipe = task.recipe
    student, teacher = sample_model("student", task), sample_model("teacher", task)
    dense = recipe.stages.require("opd").dense
    compared = dense.model_copy(update={"divergence": "reverse"})  # whatever the loss compares, C2 is a KL
    supervisor = translated_teacher(teacher.policy, ("student", "teacher"), compared, task.inputs)
    refuse_different_widths(student.policy, supervisor, ("models.student", "models.teacher"))
    prompter = task.inputs.prompter(student.policy.tokenizer)
    read = as_student_reads(teacher.rollouts, supervisor, lambda name: prompter.ids(task.inputs.problems[name]))
    top_k, tokens = recipe.conditions.top_k, recipe.compute.microbatch_tokens
    with task.progress.node("how far apart they are", 3, 3) as watch:
        watch.start(0, 3, "measures")
        c2 = conditions.measure(student.policy, supervisor, student.rollouts, read, top_k, tokens)
        watch.advance(1, {"kl_student_teacher": c2["kl_student_teacher"]})
        continuations = continue_right_answers((student, teacher), supervisor, read, task)
        watch.advance(2, {})
    return PairMeasures(
        student=readiness(student, c2["entropy_student"]),
        teacher=readiness(teacher, c2["entropy_teacher"]),
        kl_student_prefixes=c2["kl_student_teacher"],
        continuations=continuations,
        passes=cache_passes(task.inputs),
        same_weights=student.policy.fingerprint == teacher.policy.fingerprint,
        spare_prompts=len(task.inputs.labeled.problems) - len(task.inputs.pools.all),
    ), c2


def refuse_longer_continuations(context: DoctorContext) -> None:
    """Raises UserError where a continued answer, longer than any of a run, could follow another rule for positions."""
    most, lengths = context.recipe.stages.require("teacher_rl").sampling.max_tokens, context.prompt_lengths
    completion = most + max(1, round(PREFIX * most))
    for role in context.roles if lengths else ():
        problem = mixed_lengths(context.inputs.config(role), lengths[-1][0], lengths[0][0], completion)
        if problem is not None:
            raise UserError(f"models.{role}: {problem}; the probe continues answers, up to {completion} tokens in all")


def sampled_problems(inputs: RunInputs, problems: int | None, seed: int) -> list[str]:
    """The labelled problems to sample, in an order set by content and seed. Raises UserError beyond the budget."""
    pool = inputs.pool(split_pool(inputs.recipe))
    if problems is not None and problems > len(pool):
        raise UserError(f"--problems {problems}: the recipe's label budget buys {len(pool)} problems")
    return seeds.shuffled(list(pool), seed, "probe")[: PROBLEMS if problems is None else problems]


def samples_a_problem(recipe: Recipe, samples: int | None) -> int:
    """Raises UserError for fewer samples than a group, whose information could not be measured."""
    group = max(recipe.stages.require(stage).group_size for stage in ("teacher_rl", "student_rl"))
    if samples is not None and samples < group:
        raise UserError(f"--samples {samples}: fewer than the group size {group}, so no whole group could be measured")
    return max(SAMPLES, group) if samples is None else samples


def cache_passes(inputs: RunInputs) -> float:
    """Times that the warm-up trains on each of the teacher's cached rollouts.

    Example: 80 steps of 64 rollouts over a cache of 64 prompts × 8 rollouts are 10 passes.
    """
    stage, pool = inputs.recipe.stages.require("warmup"), split_pool(inputs.recipe)
    cached = len(inputs.prompts(pool, stage)) * stage.group_size
    return inputs.steps(pool, stage) * stage.batch_size / cached


def readiness(samples: ModelSamples, entropy: float) -> Readiness:
    """One model's measures from its samples."""
    right_P, count, group = samples.correct().sum(axis=1), samples.samples, samples.stage.group_size
    samples_P, rollouts = np.full(len(right_P), count), samples.rollouts
    ks = sorted({k for k in (2, 4, 8, 16, 32, 64) if k <= count} | {count})
    pass_at = {k: float(stats.pass_at_k(right_P, samples_P, k).mean()) for k in ks}
    rate_P = right_P / count
    return Readiness(
        pass_rate=stats.accuracy_interval(rate_P[None]),
        pass_at=pass_at,
        group_size=group,
        informative=stats.accuracy_interval(informative_share(right_P, count, group)[None]),
        informative_formula=float((1.0 - rate_P**group - (1.0 - rate_P) ** group).mean()),
        c1=float(rate_P.mean()) / pass_at[count] if pass_at[count] > 0.0 else None,
        truncated=sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts),
        ended=sum(rollout.completion_ids[-1] in samples.policy.stop_ids for rollout in rollouts) / len(rollouts),
        entropy=entropy,
        tokens=sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts),
        outcomes=samples.outcomes,
        stage=samples.field,
        max_tokens=samples.stage.sampling.max_tokens,
    )


def continue_right_answers(
    models: tuple[ModelSamples, ModelSamples], supervisor: Supervisor, read: Sequence[Rollout], task: ProbeTask
) -> Continuations | None:
    """Let both models continue the first quarter of the teacher's right answers, one per problem.

    models      samples of the student and of the teacher
    supervisor  the teacher as the student reads it
    read        the teacher's rollouts as the student reads them

    None, at no cost, if the teacher got nothing right.
    """
    recipe, (student, teacher) = task.recipe, models
    right = [
        (own, its)
        for own, its, verdict in zip(teacher.rollouts, read, teacher.verdicts, strict=True)
        if verdict.correct
    ]
    answers: dict[str, tuple[Rollout, Rollout]] = {}
    for own, its in right:
        answers.setdefault(own.problem_id, (own, its))
    if not answers:
        return None
    parts = {name: first_part(own, its, supervisor, PREFIX) for name, (own, its) in answers.items()}
    prompts = {name: {"student": its.prompt_ids, "teacher": own.prompt_ids} for name, (own, its) in answers.items()}
    accuracy = {}
    roles: tuple[tuple[Role, ModelSamples], ...] = (("student", student), ("teacher", teacher))
    for role, samples in roles:
        requests = [
            Request(name, sample, prompts[name][role] + parts[name][role], (task.seed, "probe", "finish", name, sample))
            for name in answers
            for sample in range(CONTINUATIONS)
        ]
        started = time.perf_counter()
        text = task.inputs.prompter(samples.policy.tokenizer).completion
        rollouts = TorchSampler(samples.policy, recipe.compute.sample_batch).sample(requests, teacher.stage.sampling)
        verdicts = task.labels.check(
            [(row.problem_id, text(parts[row.problem_id][role] + row.completion_ids)) for row in rollouts]
        )
        right_PK = np.array([int(verdict.correct) for verdict in verdicts]).reshape(-1, CONTINUATIONS)
        accuracy[role] = stats.accuracy_interval(right_PK.mean(axis=1)[None])
        task.charge(spend_of(task, f"{role}_finish", list(answers), samples.policy, rollouts, started))
    divergences = conditions.divergences(
        student.policy, supervisor, [its for _, its in right], recipe.conditions.top_k, recipe.compute.microbatch_tokens
    )
    return Continuations(len(answers), accuracy["student"], accuracy["teacher"], divergences.kl_teacher_student)


def as_json(measures: PairMeasures, c2: dict[str, float], samples: int) -> dict[str, Any]:
    """The measures and the advice as plain values, for probe.json and `--json`."""
    labels, warmup = advice.label_advice(measures), advice.warmup_advice(measures)
    arm, because = advice.arm_to_run(measures)
    follow_up = advice.follow_up_advice(measures)
    continuations, passes = measures.continuations, measures.passes
    models = {
        role: {**asdict(readiness), "outcomes": readiness.outcomes.shares}
        for role, readiness in (("student", measures.student), ("teacher", measures.teacher))
    }
    return {
        "models": models,
        "conditions": {
            "C1": {
                role: {"reward": row["pass_rate"]["mean"], "best_of": row["pass_at"][samples], "ratio": row["c1"]}
                for role, row in models.items()
            },
            "C2": c2,
        },
        "finish": None
        if continuations is None
        else {
            **asdict(continuations),
            "lead": continuations.lead,
            "toll": continuations.memorization_cost(passes),
        },
        "cache_passes": passes,
        "advice": {
            "labels": {**asdict(labels), "arm": labels.arm, "close": labels.close},
            "warmup": asdict(warmup),
            "run": {"arm": arm, "because": because},
            "follow_up": None if follow_up is None else asdict(follow_up),
            "outcomes": advice.outcome_advice(measures),
            "teacher": advice.teacher_advice(measures),
            "switch": advice.student_rl_advice(measures),
            "thresholds": {
                "signal": advice.MIN_INFORMATIVE,
                "enough": advice.C1_SATURATED,
                "lead": advice.MIN_LEAD,
                "far": advice.MAX_KL_WITHOUT_WARMUP,
                "worn": advice.MAX_WARMUP_COST,
            },
        },
    }
