"""Headwater's side of every workload, through the functions that a run uses (`training.rollouts`, `training.update`).

Only this file of the benchmarks depends on Headwater's signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CannotRunError, Case, Figures, Step
from benchmarks.models import completions_of, folder_of, parity, prompts_of
from headwater.config import recipe as config
from headwater.config.stage import Optim, Sampling, Stage
from headwater.data.labels import Labels
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.distributions import FromHidden
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.objectives import objective_of
from headwater.losses.output_head import LinearHead
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
from headwater.teachers.translated import Supervisor
from headwater.training.rollouts import PolicyRollouts
from headwater.training.update import make_optimizer, update
from headwater.types import Problem, Rollout, Verdict

COMPUTE = config.Compute()
"""A recipe's default microbatch and sampler batch."""


def loaded(spec: str, case: Case, root: Path, frozen: bool) -> Policy:
    device = torch.device(case.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotRunError("no GPU on this machine")
    return policy_of(str(folder_of(spec, case.endless, root)), device, frozen)


def policy_of(folder: str, device: torch.device, frozen: bool) -> Policy:
    """A model folder on a device: float32 on the CPU, else bfloat16."""
    set_up(COMPUTE)
    models = config.Models(student=folder, teacher=folder, dtype="float32" if device.type == "cpu" else "bfloat16")
    return load_policy(ModelFolder.open(folder, "benchmark"), LoadOptions(models, device, frozen))


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

    return Labels({problem.id: "even" for problem in problems}, grade, len(problems))


def step_of(case: Case, root: Path) -> Step:
    """A whole training step of a case with one tokenizer."""
    policy = loaded(case.student, case, root, frozen=False)
    teacher = None if case.teacher is None else loaded(case.teacher, case, root, frozen=True)
    problems, gold = prompts_of(case, folder_of(case.student, case.endless, root), case.repetitions)
    stage, prompts = stage_of(case), {problem.id: ids_of(policy, problem) for problem in problems}
    labels = labels_of(problems, gold) if stage.needs_labels else None
    return training_step(policy, stage, prompts, labels, teacher)


def training_step(
    policy: Policy,
    stage: Stage,
    prompts: Mapping[str, tuple[int, ...]],
    labels: Labels | None,
    teacher: Supervisor | None,
) -> Step:
    """A whole training step: sample, score, update."""
    objective, optimizer = objective_of(stage), make_optimizer(policy, stage.optim)
    source = PolicyRollouts(
        policy=policy,
        stage=stage,
        draw=(0, "benchmark"),
        objective=objective,
        prompts=prompts,
        sampler=TorchSampler(policy, COMPUTE.sample_batch),
        prompter=Prompter(policy.tokenizer, config.Prompt()),
        labels=labels,
        teacher=teacher,
        reference=None,
        budget=BatchBudget(COMPUTE.microbatch_tokens),
    )

    def step(number: int) -> Figures:
        batch = source(number)
        stats = update(policy, optimizer, batch.rows, objective, COMPUTE.microbatch_tokens)
        return {
            "seconds_sample": batch.metrics["seconds_sample"],
            "seconds_score": batch.metrics["seconds_score"],
            "seconds_update": stats["seconds_update"],
            "tokens_sampled": batch.tokens_sampled,
            "tokens_trained": stats["tokens_trained"],
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

    def step(number: int) -> Figures:
        step_problems = problems[number * case.batch : (number + 1) * case.batch]
        rollouts = [
            Rollout(problem.id, 0, ids_of(policy, problem), tuple(ids), (0.0,) * len(ids), "length", policy.fingerprint)
            for problem, ids in zip(step_problems, given[number], strict=True)
        ]
        with torch.no_grad():
            scores = distributions_of(teacher, rollouts, COMPUTE.microbatch_tokens)
        rows = [replace(Row(rollout), teacher=score) for rollout, score in zip(rollouts, scores, strict=True)]
        stats = update(policy, optimizer, rows, objective, COMPUTE.microbatch_tokens)
        return {"seconds_update": stats["seconds_update"], "tokens_trained": stats["tokens_trained"]}

    return step


def sampling_of(case: Case, root: Path) -> Step:
    policy = loaded(case.student, case, root, frozen=True)
    problems, _ = prompts_of(case, folder_of(case.student, case.endless, root), 1)
    sampler = TorchSampler(policy, COMPUTE.sample_batch)
    prompts = [(problem.id, ids_of(policy, problem)) for problem in problems]

    def step(number: int) -> Figures:
        requests = requests_for(prompts, case.group, "benchmark", number)
        rollouts = sampler.sample(requests, Sampling(max_tokens=case.new_tokens))
        return {"tokens_sampled": sum(len(rollout.completion_ids) for rollout in rollouts)}

    return step


def loss_stage(inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of given hidden states: exact reverse KL, as in `training.update`."""
    student_head, teacher_head = (
        LinearHead(head.weight, head.bias, head.weight.dtype)
        for head in (inputs["student_head"], inputs["teacher_head"])
    )
    count = len(inputs["targets"])

    def mean(stats: TokenStats, some: slice) -> torch.Tensor:
        assert stats.divergence_N is not None
        return stats.divergence_N / count

    teacher = FromHidden(inputs["teacher_hidden"], teacher_head, 1.0)
    return loss_and_stats(
        inputs["student_hidden"], student_head, TokenInputs(inputs["targets"], 1.0, teacher, token_losses.REVERSE), mean
    )[0]
