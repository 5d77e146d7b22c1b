"""Benchmark cases as plain values, equal for Headwater and each peer. Does not import torch.

A model is named by a spec: `pocket:NAME` ships with the package; `random:LAYERSxHIDDEN:VOCABULARY` is Qwen3-shaped with random
weights, `qwen2.5:LAYERSxHIDDEN:VOCABULARY` Qwen2.5-shaped (`models.py` makes them); `real:NAME` is one of `tools.real`. `endless`
models have an end token that cannot be sampled, so every completion has full length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["opd", "grpo", "sampling", "train", "loss", "loss_gpu", "pair"]

Figures = dict[str, float]
"""Seconds, bytes and counts of one repetition."""
Step = Callable[[int], Figures]
"""One repetition, called with its number."""
Work = Callable[[int], list[Figures]]
"""Loaded work: takes the number of repetitions and returns the figures of each."""

QWEN25 = "qwen2.5:24x896:151936"
"""The shape and vocabulary of Qwen2.5-0.5B."""
STUDENT, TEACHER = "random:4x256:{}", "random:8x512:{}"
POCKET = ("pocket:qwen3-student", "pocket:qwen3-teacher")
TRAINERS = ("headwater", "trl")
SAMPLERS = ("headwater", "transformers", "continuous", "vllm")
PEERS = ("headwater", "trl", "transformers", "continuous", "vllm", "plain", "liger")


class CannotRunError(RuntimeError):
    """This machine cannot run a measurement; it is skipped with the reason."""


@dataclass(frozen=True)
class Case:
    """One benchmark case, run by each of `peers` in turn.

    places   position of the result in the JSON: (workload, name) pairs, the first of which names the case
    kind     opd, grpo: whole steps; train: an OPD step on given completions; sampling; loss: the loss stage alone; pair: OPD steps of a
             real pair with two tokenizers
    batch    completions per step, `group` per prompt
    steps    timed repetitions within one process, after `untimed` ones
    tokens   for `loss`: number of token positions
    device   cpu in float32, or cuda in bfloat16
    """

    places: tuple[tuple[str, str], ...]
    kind: Kind
    student: str
    teacher: str | None = None
    batch: int = 16
    group: int = 1
    prompt_tokens: int = 16
    new_tokens: int = 128
    steps: int = 2
    untimed: int = 1
    endless: bool = True
    tokens: int = 0
    device: str = "cpu"
    peers: tuple[str, ...] = TRAINERS

    @property
    def name(self) -> str:
        return ".".join(self.places[0])

    @property
    def repetitions(self) -> int:
        return self.untimed + self.steps


def steps_of_b() -> list[Case]:
    student, teacher = STUDENT.format(32_768), TEACHER.format(32_768)
    return [
        Case((("b", "opd"),), "opd", student, teacher),
        Case((("b", "grpo"),), "grpo", student, group=8),
        Case((("b", "sampling"), ("d", "student")), "sampling", student, peers=SAMPLERS),
    ]


def pocket_steps() -> list[Case]:
    """The pocket recipe's batch sizes and lengths, with its problems, grader and end token."""
    opd = Case((("a", "opd"),), "opd", *POCKET, batch=64, new_tokens=48, steps=10, endless=False)
    return [opd, replace(opd, places=(("a", "grpo"),), kind="grpo", teacher=None, batch=128, group=8)]


def pocket_sampling() -> list[Case]:
    base = Case((("d", "pocket_student"),), "sampling", POCKET[0], batch=256, new_tokens=128, steps=3, peers=SAMPLERS)
    return [
        base,
        replace(base, places=(("d", "pocket_teacher"),), student=POCKET[1]),
        replace(base, places=(("d", "pocket_teacher_large"),), student="pocket:qwen3-teacher-large"),
    ]


def memory_cases() -> list[Case]:
    """Vocabulary 151,936: the loss stage alone at 2k and 16k tokens, and the training part of an OPD step."""
    student, teacher = STUDENT.format(151_936), TEACHER.format(151_936)
    loss = Case((("c", "loss_2k"),), "loss", student, teacher, steps=1, tokens=2048)
    loss = replace(loss, untimed=0, peers=(*TRAINERS, "plain"))
    return [
        loss,
        replace(loss, places=(("c", "loss_16k"),), tokens=16_384, peers=TRAINERS),
        Case((("c", "train"),), "train", student, teacher, new_tokens=512, steps=1),
    ]


def growth_cases() -> list[Case]:
    """An OPD step of (b) with growing completion length, vocabulary or batch."""
    base = replace(steps_of_b()[0], steps=1)
    cases = []
    for length in (128, 512, 2048):
        cases.append(replace(base, places=(("e", f"length_{length}"),), new_tokens=length))
    for vocabulary in (512, 8192, 32_768, 151_936):
        models = {"student": STUDENT.format(vocabulary), "teacher": TEACHER.format(vocabulary)}
        cases.append(replace(base, places=(("e", f"vocabulary_{vocabulary}"),), **models))
    for batch in (8, 32, 128):
        cases.append(replace(base, places=(("e", f"batch_{batch}"),), batch=batch))
    # TRL's largest points take minutes each and add no information.
    large = {"e.length_2048", "e.batch_128"}
    return [replace(case, peers=("headwater",)) if case.name in large else case for case in cases]


def real_cases() -> list[Case]:
    """Steps at the shape of Qwen2.5-0.5B on 2,048 completion tokens, and the loss stage with the heads of 0.5B ← 1.5B.

    The teacher has the student's shape: float32 weights of 1.5B beside the student's optimizer would not fit 24 GB for every peer.
    """
    opd = Case((("real", "opd"),), "opd", QWEN25, QWEN25, steps=1)
    loss = Case((("real", "loss"),), "loss", "random:1x896:151936", "random:1x1536:151936", steps=1, tokens=2048)
    return [
        opd,
        replace(opd, places=(("real", "grpo"),), kind="grpo", teacher=None, group=8),
        replace(opd, places=(("real", "sampling"),), kind="sampling", teacher=None, peers=SAMPLERS),
        replace(loss, untimed=0),
    ]


def pair_cases() -> list[Case]:
    """OPD steps of Qwen2.5-Coder-0.5B → SmolLM2-135M on short answers, against TRL's GOLD trainer."""
    models = ("real:SmolLM2-135M-Instruct", "real:Qwen2.5-Coder-0.5B-Instruct")
    return [Case((("gold", "opd"),), "pair", *models, batch=4, new_tokens=32, steps=3, endless=False)]


def gpu_cases() -> list[Case]:
    """The heads of Qwen3-1.7B and Qwen3-8B over 8,192 tokens; a step and sampling at the shape of Qwen2.5-0.5B."""
    case = Case((("gpu", "loss"),), "loss_gpu", "random:1x2048:151936", "random:1x4096:151936", steps=5, tokens=8192)
    opd = Case(
        (("gpu", "opd"),), "opd", QWEN25, QWEN25, batch=128, group=4, prompt_tokens=128, new_tokens=512, steps=3,
        device="cuda", peers=("headwater",),
    )  # fmt: skip
    return [
        replace(case, peers=(*TRAINERS, "liger")),
        opd,
        replace(opd, places=(("gpu", "sampling"),), kind="sampling", teacher=None),
    ]


def all_cases() -> list[Case]:
    return [
        *pocket_steps(),
        *steps_of_b(),
        *memory_cases(),
        *pocket_sampling(),
        *growth_cases(),
        *real_cases(),
        *pair_cases(),
        *gpu_cases(),
    ]


def select_cases(names: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Select the cases of the named workloads (`b`) and the named cases (`b.opd`).

    Raises ValueError for an unknown name.
    """
    matches = {name: [case for case in cases if _has_place(case, name)] for name in names}
    for name, matching in matches.items():
        if not matching:
            known = sorted({".".join(place) for case in cases for place in case.places})
            raise ValueError(f"no workload {name!r}; choose from {', '.join(known)}")
    return [case for case in cases if any(case in matching for matching in matches.values())]


def _has_place(case: Case, wanted: str) -> bool:
    return any(wanted in (workload, f"{workload}.{name}") for workload, name in case.places)
