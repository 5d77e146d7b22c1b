"""TRL's side: `DistillationTrainer` (on its own samples, exact reverse KL) and `GRPOTrainer`, configured for speed.

float32 and no gradient checkpointing (their defaults are bfloat16 and checkpointing), the whole batch in one pass, no logging,
no evaluation, no saving, no reference model, `transformers.generate` for the samples (its continuous batching, which GRPO may use,
is slower on a CPU: workload d).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from benchmarks.cases import Case, Figures, Work
from benchmarks.models import completions_of, folder_of, parity, prompts_of
from headwater.tasks.registry import find_task


class Clock(TrainerCallback):
    """Times each optimizer step and the generation within it."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []
        self.began = self.generating = 0.0
        self.tokens = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        seconds = now - self.began
        self.rows.append(
            {"seconds": seconds, "seconds_sample": self.generating, "seconds_update": seconds - self.generating}
        )
        self.began, self.generating = now, 0.0

    def around(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            output = generate(*args, **named)
            self.generating += time.perf_counter() - started
            return output

        return timed


def settings_of(case: Case, steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "max_completion_length": case.new_tokens,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def work_of(case: Case, root: Path) -> Work:
    steps = case.repetitions
    folder = folder_of(case.student, case.endless, root)
    problems, gold = prompts_of(case, folder, steps)
    rows = [{"prompt": problem.text, "gold": gold.get(problem.id, "")} for problem in problems]
    clock = Clock()
    trainer_arguments: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": AutoTokenizer.from_pretrained(folder, padding_side="left"),
        "callbacks": [clock],
    }
    student = model_of(folder)
    if case.teacher is None:
        arguments = GRPOConfig(**settings_of(case, steps), num_generations=case.group, beta=0.0)
        trainer = GRPOTrainer(student, reward, args=arguments, **trainer_arguments)
    else:
        teacher = model_of(folder_of(case.teacher, case.endless, root))
        arguments = DistillationConfig(**settings_of(case, steps), beta=1.0)
        trainer = DistillationTrainer(student, teacher, args=arguments, **trainer_arguments)
    if case.kind == "train":
        given = iter(completions_of(case, steps))
        trainer._generate_single_turn = lambda *_, **__: next(given)
    else:
        trainer.model.generate = clock.around(trainer.model.generate)

    return work_of_trainer(trainer, clock, steps)


def work_of_trainer(trainer: Any, clock: Clock, steps: int) -> Work:
    """The whole training of a trainer that takes so many steps."""

    def work(times: int) -> list[Figures]:
        assert times == steps
        trainer.train()
        return clock.rows

    return work


def model_of(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def reward(completions: list[str], gold: list[str], **_: Any) -> list[float]:
    """Headwater's rewards for the same completions: the task's grader, or the parity of the last token."""
    grade = find_task("sums").grade
    return [
        float(grade(answer, completion)[0] if answer else parity(completion))
        for completion, answer in zip(completions, gold, strict=True)
    ]
