"""Facts and rules behind `headwater init mine`, without torch: `doctor.fit` measures the facts, `fitted_recipe` applies the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from headwater.config.commented_yaml import Setting

Trained = Literal["teacher", "student"]

TEMPLATES = {
    "maths": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": '{problem}\n\nThink step by step, and end with "The answer is X.", where X is the letter of your choice.',
    "exact": '{problem}\n\nThink step by step, and end with "The answer is …".',
    "json": "{problem}\n\nAnswer with one JSON object.",
    "python": "{problem}\n\nWrite the solution as one Python code block.",
}
TEMPLATES |= {"numeric": TEMPLATES["maths"], "regex": TEMPLATES["exact"]}
"""User turn by task: it asks for the answer in the form that the task's grader reads. Other tasks get the problem alone."""
ANSWER_TOKENS = {"maths": 1024, "numeric": 1024, "python": 1024, "choice": 512, "json": 512}
DEFAULT_ANSWER_TOKENS = 512
"""`max_tokens` by task where no worked solutions tell a length."""
SOLUTION_MARGIN = 2.0
"""Models write longer than reference solutions: on GSM8K 250 to 350 tokens where the 95th percentile of the references is 220."""
MOST_LABELS = 1024
ROLLOUTS = 128
GROUP, OPD_GROUP = 8, 4
LENGTHS = {"teacher_rl": (200, 10), "warmup": (60, 3), "opd": (100, 10), "student_rl": (200, 10)}
"""(steps that a stage should have, the most passes over its prompts)."""
STEP_SECONDS = 300.0
"""A device is slow for a pair where a GRPO step of ROLLOUTS takes longer."""
SLOW_HOURS = 8.0
"""What the default arm may take on a slow device where no other limit is given."""
MOST_EVALUATED = 500
JUDGED_GROUPS = 15
"""Groups without a difference in rewards before a stage is stopped: where 15 % of groups have one, chance alone gives none of 15 in
9 % of runs."""
SMALL_CACHE = 1 << 30
"""Bytes up to which a teacher cache keeps whole distributions."""


@dataclass(frozen=True)
class ModelFacts:
    """What the files of one model say.

    parameters     all weights
    vocabulary     columns of the output layer
    positions      longest sequence; None where the config gives none
    cache_numbers  elements of the KV cache per token
    chat_template  whether the tokenizer has one
    thinking       whether that template has a thinking mode
    sampling       sampling settings of the generation config
    """

    name: str
    parameters: int
    vocabulary: int
    positions: int | None
    cache_numbers: int
    chat_template: bool
    thinking: bool
    sampling: Mapping[str, float]


@dataclass(frozen=True)
class DataFacts:
    """What the files of problems hold; lengths in the student's tokens.

    labels           distinct labelled problems with an answer, without those of the evaluation
    held_out         problems of the evaluation
    held_out_share   share of the file that is held out; None where a file of its own is given
    prompt_tokens    the longest prompt
    solution_tokens  (mean, 95th percentile) of worked solutions; None where there are none
    asks_for_form    whether most problems ask for the form of the answer themselves
    columns          columns that the user names, by the field of `data.SOURCE.columns`
    alignment        how the tokenizers of student and teacher fit each other on the problems; empty where they give the same ids
    """

    path: str
    evals_path: str
    task: str
    task_reason: str
    labels: int
    held_out: int
    held_out_share: float | None
    prompt_tokens: int
    solution_tokens: tuple[float, float] | None
    asks_for_form: bool
    columns: Mapping[str, str] = field(default_factory=dict)
    alignment: str = ""


@dataclass(frozen=True)
class DeviceFacts:
    """Where the recipe is to run.

    memory  bytes that are free
    flops   FLOP/s of matrix products that training can expect
    source  where the two come from
    bandwidth  bytes per second of its memory, which limits decoding
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory: float
    flops: float
    source: str
    bandwidth: float = math.inf


@dataclass(frozen=True)
class Effort:
    """How large steps, stages and evaluations may be.

    step, stage, evaluation  seconds that the settings aim for
    fewest_*                 lower bounds of what is trained and evaluated
    """

    step: float = STEP_SECONDS
    stage: float = 7200.0
    evaluation: float = 600.0
    fewest_steps: int = 5
    fewest_rollouts: int = 16
    fewest_evaluated: int = 10

    @classmethod
    def scaled(cls, share: float) -> Effort:
        """The usual seconds times a share; a share below ½ also lowers the lower bounds."""
        usual = cls()
        fewest = {"fewest_steps": 2, "fewest_rollouts": 8, "fewest_evaluated": 4} if share < 0.5 else {}
        return cls(share * usual.step, share * usual.stage, share * usual.evaluation, **fewest)


USUAL_EFFORT = Effort()


@dataclass(frozen=True)
class Form:
    """How the models train: what decides memory.

    adapted  roles that train LoRA adapters
    """

    dtype: Literal["float32", "bfloat16"]
    adapted: tuple[Trained, ...] = ()
    quantize: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        adapters = "adapters on 4-bit weights" if self.quantize else "adapters"
        trained = {
            (): "all weights of both models train",
            ("teacher",): f"{adapters} of the teacher train, and all weights of the student",
        }.get(self.adapted, f"{adapters} of both models train")
        return trained + (", with gradient checkpointing" if self.checkpointing else "")


def forms(kind: Literal["cpu", "cuda"]) -> list[Form]:
    """Forms of training in order of falling memory; the first that fits is taken."""
    dtype: Literal["float32", "bfloat16"] = "float32" if kind == "cpu" else "bfloat16"
    return [
        Form(dtype),
        Form(dtype, checkpointing=True),
        Form(dtype, ("teacher",), checkpointing=True),
        Form(dtype, ("teacher", "student"), checkpointing=True),
        Form("bfloat16", ("teacher", "student"), quantize=kind == "cuda", checkpointing=True),
    ]


def max_tokens(data: DataFacts, positions: int | None) -> Setting:
    """Longest completion: the worked solutions' 95th percentile with a margin, or the task's default; at most what positions leave.

    Example: solutions of 220 tokens (95th percentile) give 448.
    """
    if data.solution_tokens is not None:
        mean, high = data.solution_tokens
        tokens = rounded_up(SOLUTION_MARGIN * high, 64)
        comment = (
            f"{SOLUTION_MARGIN:g} × {high:.0f} tokens, the 95th percentile of the worked solutions (mean {mean:.0f}), since models "
            "write longer; doctor compares it with samples"
        )
    else:
        tokens = ANSWER_TOKENS.get(data.task, DEFAULT_ANSWER_TOKENS)
        comment = (
            f"default for {data.task}: the data has no worked solutions to measure; doctor compares it with samples"
        )
    room = tokens if positions is None else positions - data.prompt_tokens
    if room < tokens:
        return Setting(max(1, room), f"what the model's {positions:,} positions leave after the longest prompt")
    return Setting(tokens, comment)


def rounded_up(value: float, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple) * multiple)


def steps_for(wanted: int, one_pass: int, passes: int, step_seconds: float, effort: Effort = USUAL_EFFORT) -> int:
    """At least one pass over the prompts, at most `passes`, and in between `wanted`; fewer where a stage would take too long.

    Example: 100 wanted, 17 a pass, 10 passes at most: 100. With 2 a pass: 20. Of 300 seconds each: 24.
    """
    steps = min(max(wanted, one_pass), passes * one_pass)
    return max(1, min(steps, max(effort.fewest_steps, int(effort.stage / max(step_seconds, 1e-9)))))


def millions(parameters: int) -> str:
    """Example: `millions(134_515_008)` is `"135 million"`, `millions(1_543_714_304)` `"1.5 billion"`."""
    return f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.3g} million"


def passes(number: float) -> str:
    """Example: `passes(1.25)` is `"1.2 passes"`, `passes(1.0)` `"1 pass"`."""
    shown = f"{number:.2g}"
    return f"{shown} pass" if shown == "1" else f"{shown} passes"


def duration(seconds: float) -> str:
    """Example: `duration(5400)` is `"1.5 h"`."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
