"""Workload `gold`: OPD steps of a real pair with two tokenizers, by Headwater and by TRL's GOLD trainer.

`tools.real` fetches the models. Both trainers sample from the student at temperature 1 and train all weights in float32 at one rate.
Headwater compares groups of tokens (`dense.tokenizers: prefix`); GOLD's hybrid loss compares tokens of equal names by their JSD and
the others by sorted probabilities. After the timed steps each is judged by KL(student‖teacher) over groups on fixed texts that the
untrained student wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks import ours
from benchmarks.cases import CannotRunError, Case, Figures, Work
from benchmarks.child import repeated
from headwater.config.dense import Dense
from headwater.config.prompt import Prompt
from headwater.config.stage import Optim, Sampling, Stage
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.token_bytes import TokenBytes, TokenPair
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.tasks import word_problems
from headwater.teachers.translated import TranslatedTeacher
from headwater.training.conditions import divergences
from headwater.types import Problem, Rollout

CPU = torch.device("cpu")
LEARNING_RATE = 3e-5
HELD_OUT = 8
DIALS = word_problems.WordsDials(min_ops=1, max_ops=1, distractors=0, largest=40)


@dataclass(frozen=True)
class PairWork:
    """Loaded work: `steps(times)` trains and gives a row for each step; `held_out()` is measured after it."""

    steps: Work
    held_out: Callable[[], Figures]

    def __call__(self, times: int) -> list[Figures]:
        return self.steps(times)


def folder_of(spec: str) -> str:
    folder = Path(".real") / spec.removeprefix("real:")
    if not (folder / "config.json").is_file():
        raise CannotRunError(f"{folder} is missing: python -m tools.real {folder.name}")
    return str(folder)


def problems_of(count: int, pool: str) -> list[Problem]:
    return [Problem.of(text, "benchmark") for text, _ in word_problems.generate(count, pool, 0, DIALS)]


def translated(teacher: Policy, student: Policy, problems: Sequence[Problem]) -> TranslatedTeacher:
    pair = TokenPair(*(TokenBytes.of(policy.tokenizer, policy.stop_ids) for policy in (student, teacher)))
    prompter, by_id = Prompter(teacher.tokenizer, Prompt()), {problem.id: problem for problem in problems}
    return TranslatedTeacher(
        teacher,
        lambda name: prompter.ids(by_id[name]),
        pair,
        "prefix",
        student.tokenizer,
        student.vocabulary,
        TorchSampler,
    )


def held_out_texts(student: Policy, new_tokens: int) -> list[Rollout]:
    """What the untrained student writes to problems that nothing trains on."""
    prompter = Prompter(student.tokenizer, Prompt())
    prompts = [(problem.id, prompter.ids(problem)) for problem in problems_of(HELD_OUT, "eval")]
    return TorchSampler(student).sample(requests_for(prompts, 1, "held out"), Sampling(max_tokens=new_tokens))


def kl(student: Policy, teacher: TranslatedTeacher, rollouts: Sequence[Rollout]) -> float:
    return divergences(student, teacher, rollouts, 1, ours.COMPUTE.microbatch_tokens).kl_student_teacher


def work_of(peer: str, case: Case) -> PairWork:
    return headwater_work(case) if peer == "headwater" else gold_work(case)


def headwater_work(case: Case) -> PairWork:
    assert case.teacher is not None
    student = ours.policy_of(folder_of(case.student), CPU, frozen=False)
    teacher = ours.policy_of(folder_of(case.teacher), CPU, frozen=True)
    problems, prompter = problems_of(case.repetitions * case.batch, "train"), Prompter(student.tokenizer, Prompt())
    stage = Stage(
        objective="opd",
        steps=case.repetitions,
        batch_size=case.batch,
        group_size=1,
        sampling=Sampling(max_tokens=case.new_tokens),
        optim=Optim(lr=LEARNING_RATE),
        dense=Dense(tokenizers="prefix"),
    )
    prompts = {problem.id: prompter.ids(problem) for problem in problems}
    step = ours.training_step(student, stage, prompts, None, translated(teacher, student, problems))

    def held_out() -> Figures:
        before = ours.policy_of(folder_of(case.student), CPU, frozen=True)
        texts = held_out_texts(before, case.new_tokens)
        its = translated(teacher, student, problems_of(HELD_OUT, "eval"))
        return {"kl_before": kl(before, its, texts), "kl_after": kl(student, its, texts)}

    return PairWork(repeated(step), held_out)


def gold_work(case: Case) -> PairWork:
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    from benchmarks.trl_peer import Clock, model_of, settings_of, work_of_trainer

    assert case.teacher is not None
    folder, teacher_folder, clock = folder_of(case.student), folder_of(case.teacher), Clock()
    rows = [
        {"messages": [{"role": "user", "content": problem.text}, {"role": "assistant", "content": "."}]}
        for problem in problems_of(case.repetitions * case.batch, "train")
    ]
    arguments = GOLDConfig(
        **settings_of(case, case.repetitions) | {"learning_rate": LEARNING_RATE},
        lmbda=1.0,
        beta=1.0,
        use_uld_loss=True,
        uld_use_hybrid_loss=True,
        teacher_tokenizer_name_or_path=teacher_folder,
    )
    trainer = GOLDTrainer(
        model_of(folder),
        model_of(teacher_folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[clock],
    )
    trainer.model.generate = clock.around(trainer.model.generate)

    def held_out() -> Figures:
        trainer.teacher_model = trainer.optimizer = None  # two more models are loaded
        before, its_teacher = (ours.policy_of(path, CPU, frozen=True) for path in (folder, teacher_folder))
        texts = held_out_texts(before, case.new_tokens)
        before.model.load_state_dict(trainer.model.state_dict())
        its = translated(its_teacher, before, problems_of(HELD_OUT, "eval"))
        return {"kl_after": kl(before, its, texts)}

    return PairWork(work_of_trainer(trainer, clock, case.repetitions), held_out)
