"""Headwater's side of every workload, through the calls that a run itself makes (`stages.gatherer`, `train.train`).

All that knows Headwater's signatures stands here, so that a change of one is a change of this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.models import completions_of, folder_of, prompts_of
from benchmarks.rewards import parity
from headwater.config import recipe as config
from headwater.config.stage import Optim, Sampling, Stage
from headwater.data.labels import Labels
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.distributions import FromHidden, LinearHead
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.objectives import objective_of
from headwater.losses.token_stats import TokenInputs, TokenStats
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.runs.setup import set_up
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.tasks.verifier import Verifier
from headwater.teachers.scoring import distributions_of
from headwater.training.rollouts import PolicyRollouts
from headwater.training.update import make_optimizer, update
from headwater.types import Problem, Rollout, Verdict

COMPUTE = config.Compute()
"""The microbatch and the sampler's batch are those that a recipe has unless it says otherwise."""

Step = Callable[[int], dict[str, float]]
"""One repetition: its number -> seconds of its parts and what was counted."""


def loaded(spec: str, case: Case, root: Path, frozen: bool) -> Policy:
    set_up(COMPUTE)
    folder = str(folder_of(spec, case.endless, root))
    models = config.Models(student=folder, teacher=folder)
    return load_policy(ModelFolder.open(folder, "benchmark"), LoadOptions(models, torch.device("cpu"), frozen))


def stage_of(case: Case) -> Stage:
    return Stage(
        objective="grpo" if case.kind == "grpo" else "opd",
        steps=case.repetitions,
        batch_size=case.batch,
        group_size=case.group,
        sampling=Sampling(max_tokens=case.new_tokens),
        optim=Optim(lr=1e-6),
        sparse={"kl_coef": 0.0},
    )


def labels_of(problems: Sequence[Problem], gold: dict[str, str]) -> Labels:
    if gold:
        return Labels(gold, Verifier("sums"), len(gold))

    def grade(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [Verdict(parity(text), "equal" if parity(text) else "different") for _, text in pairs]

    return Labels({one.id: "even" for one in problems}, grade, len(problems))


def step_of(case: Case, root: Path) -> Step:
    """A whole training step: sample, score, update."""
    policy = loaded(case.student, case, root, frozen=False)
    teacher = None if case.teacher is None else loaded(case.teacher, case, root, frozen=True)
    problems, gold = prompts_of(case, folder_of(case.student, case.endless, root), case.repetitions)
    stage, objective = stage_of(case), objective_of(stage_of(case))
    labels = labels_of(problems, gold) if "reward" in objective.signals else None
    prompter = Prompter(policy.tokenizer, config.Prompt())
    gather = PolicyRollouts(
        policy=policy,
        stage=stage,
        draw=("benchmark", 0),
        objective=objective,
        prompts={one.id: ids_of(policy, one) for one in problems},
        sampler=TorchSampler(policy, COMPUTE.sample_batch),
        prompter=prompter,
        labels=labels,
        teacher=teacher,
        reference=None,
        budget=BatchBudget(COMPUTE.microbatch_tokens),
    )
    optimizer = make_optimizer(policy, stage.optim)

    def step(number: int) -> dict[str, float]:
        gathered = gather(number)
        done = update(policy, optimizer, gathered.rows, objective, stage, COMPUTE.microbatch_tokens)
        return {
            "seconds_sample": gathered.metrics["seconds_sample"],
            "seconds_score": gathered.metrics["seconds_score"],
            "seconds_update": done["seconds_update"],
            "tokens_sampled": gathered.tokens_sampled,
            "tokens_trained": done["tokens_trained"],
        }

    return step


def ids_of(policy: Policy, problem: Problem) -> tuple[int, ...]:
    return tuple(policy.tokenizer(problem.text)["input_ids"])


def train_of(case: Case, root: Path) -> Step:
    """The training part of an OPD step on given completions: the teacher's pass and the update."""
    policy = loaded(case.student, case, root, frozen=False)
    assert case.teacher is not None
    teacher = loaded(case.teacher, case, root, frozen=True)
    problems, _ = prompts_of(case, folder_of(case.student, case.endless, root), case.repetitions)
    stage, objective = stage_of(case), objective_of(stage_of(case))
    given = completions_of(case, case.repetitions)
    optimizer = make_optimizer(policy, stage.optim)

    def step(number: int) -> dict[str, float]:
        asked = problems[number * case.batch : (number + 1) * case.batch]
        rollouts = [
            Rollout(one.id, 0, ids_of(policy, one), tuple(said), (0.0,) * len(said), "length", policy.fingerprint)
            for one, said in zip(asked, given[number], strict=True)
        ]
        with torch.no_grad():
            found = distributions_of(teacher, rollouts, COMPUTE.microbatch_tokens)
        rows = [replace(Row(one), teacher=each) for one, each in zip(rollouts, found, strict=True)]
        done = update(policy, optimizer, rows, objective, stage, COMPUTE.microbatch_tokens)
        return {"seconds_update": done["seconds_update"], "tokens_trained": done["tokens_trained"]}

    return step


def sampling_of(case: Case, root: Path) -> Step:
    policy = loaded(case.student, case, root, frozen=True)
    problems, _ = prompts_of(case, folder_of(case.student, case.endless, root), 1)
    sampler = TorchSampler(policy, COMPUTE.sample_batch)
    prompts = [(one.id, ids_of(policy, one)) for one in problems]

    def step(number: int) -> dict[str, float]:
        requests = requests_for(prompts, case.group, 0, "benchmark", number)
        found = sampler.sample(requests, Sampling(max_tokens=case.new_tokens))
        return {"tokens_sampled": sum(len(one.completion_ids) for one in found)}

    return step


def loss_stage(inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of given hidden states: exact reverse KL, as `train.backward` asks for it."""
    head, theirs = (
        LinearHead(one.weight, one.bias, one.weight.dtype) for one in (inputs["student_head"], inputs["teacher_head"])
    )
    count = len(inputs["targets"])

    def mean(stats: TokenStats, some: slice) -> torch.Tensor:
        assert stats.divergence_N is not None
        return stats.divergence_N / count

    teacher = FromHidden(inputs["teacher_hidden"], theirs, 1.0)
    return loss_and_stats(
        inputs["student_hidden"], head, TokenInputs(inputs["targets"], 1.0, teacher, token_losses.REVERSE), mean
    )[0]
