"""Samples of a probed pair, their verdicts and costs, and the teacher's samples as the student reads them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.data.labels import Labels
from headwater.errors import TrainingStoppedError, UserError
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.runs.display import ProgressDisplay
from headwater.runs.inputs import RunInputs
from headwater.sampling.base import requests_for
from headwater.storage.ledger import Spend
from headwater.tasks.outcomes import Outcomes, outcome
from headwater.teachers.server_client import is_served
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training.evaluate import sample_and_grade
from headwater.types import Rollout, Verdict

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class ProbeTask:
    """What is sampled, with which labels, and where progress and label use are reported.

    problems  ids of the sampled problems
    samples   completions a problem
    charge    called with the spend of every use of labels, when it was made
    """

    inputs: RunInputs
    problems: Sequence[str]
    samples: int
    seed: int
    labels: Labels
    progress: ProgressDisplay
    charge: Callable[[Spend], None]

    @property
    def recipe(self) -> Recipe:
        return self.inputs.recipe


@dataclass(frozen=True)
class ModelSamples:
    """One model's samples, K of each of P problems in order of (problem, sample), and their verdicts.

    field  the recipe's field of its RL stage
    """

    policy: Policy
    stage: Stage
    field: str
    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]
    samples: int

    def correct(self) -> NDArray[np.int64]:
        """(P, K) 1 for right completions, 0 for the others."""
        return np.array([int(verdict.correct) for verdict in self.verdicts]).reshape(-1, self.samples)

    @property
    def outcomes(self) -> Outcomes:
        pairs = zip(self.rollouts, self.verdicts, strict=True)
        return Outcomes(Counter(outcome(verdict.correct, verdict.reason, rollout.finish) for rollout, verdict in pairs))


def sample_model(role: Role, task: ProbeTask) -> ModelSamples:
    """Sample one model as its RL stage would, and grade. Raises UserError if its log-probs are not finite."""
    recipe, inputs = task.recipe, task.inputs
    stage = recipe.stages.require("teacher_rl" if role == "teacher" else "student_rl")
    started = time.perf_counter()
    (name, model), *others = recipe.models.by_role(role).items()
    if others or is_served(model):
        raise UserError(f"models.{name}: probe measures one model whose weights are local; name a folder or a hub id")
    policy = load_policy(inputs.model_folder(role), LoadOptions(recipe.models, inputs.device, frozen=True))
    prompter = inputs.prompter(policy.tokenizer, role)
    prompts = [(name, prompter.ids(inputs.problems[name])) for name in task.problems]
    title = f"{role}, {len(prompts)} problems × {task.samples} samples"
    with task.progress.node(title, 1 if role == "student" else 2, 3) as watch:
        watch.start(0, len(prompts) * task.samples, "completions")
        try:
            graded = sample_and_grade(
                inputs.sampler(policy),
                # Both models use the same random numbers, as in evaluations, so that only the models differ.
                requests_for(prompts, task.samples, task.seed, "probe"),
                stage.sampling,
                task.labels,
                prompter,
                lambda finished: watch.advance(len(finished), {}),
            )
        except TrainingStoppedError as error:
            raise UserError(f"models.{role}: {error}") from None
    assert graded.verdicts is not None
    spend = spend_of(task, role, task.problems, policy, graded.rollouts, started)
    # Each model scores the rollouts of both for C2; the teacher's share of that is counted as scoring.
    task.charge(replace(spend, tokens_teacher_scored=spend.tokens_sampled, flops=2 * spend.flops))
    return ModelSamples(policy, stage, f"stages.{role}_rl", graded.rollouts, graded.verdicts, task.samples)


def spend_of(
    task: ProbeTask, stage: str, labels: Sequence[str], policy: Policy, rollouts: Sequence[Rollout], started: float
) -> Spend:
    """Ledger row of sampling and grading rollouts on these labels since `started`."""
    sampled = sum(len(rollout.completion_ids) for rollout in rollouts)
    read = sum(rollout.length for rollout in rollouts)
    return Spend(
        node="probe",
        stage=stage,
        seed=task.seed,
        step=0,
        purpose="probe",
        labels=tuple(labels),
        checks=len(rollouts),
        tokens_sampled=sampled,
        flops=policy.shape.flops(read, read / len(rollouts) / 2),
        seconds=time.perf_counter() - started,
    )


def as_student_reads(
    rollouts: Sequence[Rollout], supervisor: Supervisor, prompt_ids: Callable[[str], tuple[int, ...]]
) -> list[Rollout]:
    """The teacher's own rollouts behind the student's prompts and, where the tokenizers differ, in the student's ids.

    prompt_ids  problem id -> the student's prompt
    """
    if not isinstance(supervisor, TranslatedTeacher):
        return list(rollouts)
    if supervisor.pair is None:
        return [replace(rollout, prompt_ids=prompt_ids(rollout.problem_id)) for rollout in rollouts]
    return [supervisor.pair.to_student(rollout, prompt_ids(rollout.problem_id)) for rollout in rollouts]


def first_part(own: Rollout, read: Rollout, supervisor: Supervisor, share: float) -> dict[Role, tuple[int, ...]]:
    """About the first `share` of an answer's tokens in the ids of both models: one text, which ends with a token of each.

    own, read  the teacher's rollout in its own ids, and as the student reads it

    Without a common text, nothing for both.
    """
    tokens = max(1, round(share * len(own.completion_ids)))
    if not isinstance(supervisor, TranslatedTeacher) or supervisor.pair is None:
        return {"student": read.completion_ids[:tokens], "teacher": own.completion_ids[:tokens]}
    _, spans = supervisor.pair.to_teacher(read)
    ends = list(zip(spans.first_ends, spans.second_ends, strict=True))
    student, teacher = max((pair for pair in ends if pair[1] <= tokens), default=ends[0] if ends else (0, 0))
    return {"student": read.completion_ids[:student], "teacher": own.completion_ids[:teacher]}
