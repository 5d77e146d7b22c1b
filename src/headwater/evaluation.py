"""Evaluate one model on one set of problems: avg@k, pass@k and maj@k, for `headwater eval` and `headwater.evaluate`."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from headwater import stats
from headwater.config.recipe import Columns, Evaluate, Models, Prompt, Source
from headwater.config.validation import complaints
from headwater.data.labels import Labels
from headwater.data.sources import LoadedProblems, load
from headwater.data.validate import failing
from headwater.errors import TrainingStoppedError, UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.prompts import Prompter, spelt_template
from headwater.runs.inputs import device_of
from headwater.runs.node_context import ProgressDisplay
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.run_dir import write_atomic
from headwater.tasks.registry import find_task
from headwater.tasks.verifier import Verifier
from headwater.training.evaluate import evaluate

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is prompted and sampled, and how completions are graded.

    samples     completions per problem
    task        a task's name or package.module:function
    problem, answer  columns; recognised by their names by default
    limit       use only the first so many problems
    max_tokens  longest completion
    template    the user turn; contains {problem}
    thinking    passed to chat templates that have a thinking mode
    chat        apply the model's chat template
    dtype       float32 or bfloat16
    device      auto, cpu or cuda
    out         file for every graded completion, as JSONL
    """

    samples: int = 1
    task: str = "maths"
    problem: str | None = None
    answer: str | None = None
    limit: int | None = None
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    template: str = "{problem}"
    thinking: bool = False
    chat: bool = True
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Measures of one evaluation, as fractions with 95 % intervals over problems.

    samples    completions of each problem, at least
    measures   `avg@k`, `pass@k`, `maj@k`
    reasons    how often the grader gave each reason
    truncated  share of completions cut at the token limit
    tokens     sampled in all
    rows       every graded completion
    warnings   sentences on the data, such as columns that may belong to the problems and are not read
    """

    problems: int
    samples: int
    measures: Mapping[str, stats.Interval]
    reasons: Mapping[str, int]
    truncated: float
    tokens: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `headwater eval --json` prints."""
        return {
            "problems": self.problems,
            "samples": self.samples,
            "measures": {name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in self.measures.items()},
            "reasons": dict(self.reasons),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "text": self.text(),
        }

    def text(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{self.problems} problems, {sum(self.reasons.values())} completions, {self.tokens:,.0f} tokens "
            f"in {self.seconds:.1f} s"
        ]
        for name, interval in self.measures.items():
            lines.append(f"{name:8} {interval.mean:6.1%}   95 % interval {interval.low:.1%} – {interval.high:.1%}")
        lines.append("verdicts  " + ", ".join(f"{name} {count}" for name, count in self.reasons.items()))
        lines.append(f"cut at the token limit {self.truncated:.1%}")
        return "\n".join(lines)


def evaluate_model(name: str, data: str, settings: EvaluationSettings, display: ProgressDisplay) -> Evaluation:
    """Sample and grade.

    Raises UserError for a setting that a recipe would not allow, and for a model, file or row that cannot be used.
    """
    evaluated, prompt, models = _sections(name, settings)
    task, device = find_task(settings.task), device_of(settings.device or "auto")
    with Verifier(settings.task) as grade, contextlib.ExitStack() as stack:
        columns = Columns(problem=settings.problem, answer=settings.answer)
        loaded = load(Source(path=data, columns=columns, limit=settings.limit), "--data", True, task.gold, grade)
        # A grader that returns no verdict is refused before anything is sampled.
        failing(grade, list(loaded.gold.items())[:1])
        folder = ModelFolder.open(name, "MODEL", models.trust_remote_code)
        policy = load_policy(folder, LoadOptions(models, device, frozen=True))
        prompter = Prompter(policy.tokenizer, prompt, date.today())
        warnings = _data_warnings(data, loaded, prompter)
        for warning in warnings:
            display.say(f"warning: {warning}")
        progress = stack.enter_context(display.node(f"eval {name}", 1, 1))
        progress.start(0, len(loaded.problems) * evaluated.samples, "completions")
        try:
            rows, spent = evaluate(
                TorchSampler(policy),
                prompter,
                loaded.problems,
                Labels(loaded.gold, grade, len(loaded.gold)),
                evaluated,
                (settings.seed, "eval", "eval"),
                task.extract,
                lambda count: progress.advance(count, {}),
            )
        except TrainingStoppedError as error:
            raise UserError(f"{name}: {error}") from None
    if settings.out is not None:
        write_atomic(settings.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = summarize(rows, votes=task.extract is not None, one_answer=task.one_answer)
    return replace(summary, tokens=int(spent["tokens_sampled"]), seconds=spent["seconds"], warnings=warnings)


def _data_warnings(data: str, loaded: LoadedProblems, prompter: Prompter) -> tuple[str, ...]:
    """What the doctor would report of a run's data and prompts as `column-not-read` and `chat-template-twice`."""
    sentences = [f"{data}: {unused.evidence}; {unused.remedy('--problem')}" for unused in loaded.unused]
    marks = [(mark, problem) for problem in loaded.problems if (mark := spelt_template(problem)) is not None]
    if marks and prompter.has_template:
        mark, problem = marks[0]
        sentences.append(
            f"{len(marks)} of {len(loaded.problems)} problems spell a chat template (the first: {mark} in {problem.name}), and the "
            "model's is applied around them; use --no-chat, or write them as messages (role and content)"
        )
    return tuple(sentences)


def _sections(model_name: str, settings: EvaluationSettings) -> tuple[Evaluate, Prompt, Models]:
    """The settings as sections of a recipe, validated by the same rules."""
    sampling = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    return (
        _validated(Evaluate, {"samples": settings.samples, "sampling": sampling}),
        _validated(Prompt, {"template": settings.template, "thinking": settings.thinking, "chat": settings.chat}),
        _validated(Models, {"student": model_name, "teacher": model_name, "dtype": settings.dtype}),
    )


def _validated(section: type[Section], values: dict[str, Any]) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"eval: {complaints(error, section)[0][1]}") from None


def summarize(rows: list[dict[str, Any]], votes: bool, one_answer: bool = True) -> Evaluation:
    """Measures of one evaluation from its graded rows.

    votes       whether answers can be extracted for maj@k
    one_answer  whether correct answers to one problem are the same answer (`Task.one_answer`)
    """
    by_problem: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem_id"]].append(row)
    groups = list(by_problem.values())
    correct_P = np.array([sum(row["correct"] for row in group) for group in groups])
    samples_P = np.array([len(group) for group in groups])
    samples = int(samples_P.min())
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= samples]
    measures = {f"avg@{samples}": stats.avg_at_k(correct_P, samples_P)}
    measures |= {f"pass@{k}": stats.pass_at_k(correct_P, samples_P, k) for k in ks}
    if votes and ks:
        voted = [stats.maj_at_k([(row["extracted"], row["correct"]) for row in group], one_answer) for group in groups]
        if None not in voted:
            measures[f"maj@{samples}"] = np.array([float(value or 0.0) for value in voted])
    return Evaluation(
        problems=len(groups),
        samples=samples,
        measures={name: stats.accuracy_interval(values_P[None, :]) for name, values_P in measures.items()},
        reasons=dict(sorted(Counter(row["reason"] for row in rows).items())),
        truncated=sum(row["finish"] == "length" for row in rows) / len(rows),
        rows=rows,
    )
