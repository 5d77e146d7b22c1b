"""Evaluate models on sets of problems: avg@k, pass@k and maj@k, for `headwater eval` and `headwater.evaluate`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from headwater import stats
from headwater.config.recipe import Columns, Evaluate, Recipe, Source, parse_recipe
from headwater.data.labels import with_labels
from headwater.data.sources import LoadedProblems, load
from headwater.data.validate import failing
from headwater.errors import TrainingStoppedError, UserError, did_you_mean
from headwater.models.device import device_of
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.prompts import Prompter, spelt_template
from headwater.runs.display import ProgressDisplay
from headwater.sampling.base import Sampler
from headwater.sampling.build import sampler_factory
from headwater.storage.files import write_rows
from headwater.tasks.answer_forms import FORMS, form_asked_for
from headwater.tasks.registry import find_task
from headwater.tasks.verifier import Verifier
from headwater.training.evaluate import evaluate


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is prompted and sampled, and how completions are graded.

    samples     completions per problem
    task        a task's name or package.module:function
    problem, answer  columns; recognised by their names by default
    limit       use only this many problems, the first
    max_tokens  longest completion
    temperature 0 decodes greedily
    form        form of the answer that counts in strict reading (`tasks.answer_forms`); by default the one that the prompt names
    sampler     torch or vllm
    batch       sequences decoded at once
    template    the user turn; contains {problem}
    thinking    passed to chat templates that have a thinking mode
    chat        apply the model's chat template
    dtype       float32 or bfloat16
    device      auto, cpu or cuda
    out         file for every graded completion, as JSONL, with the model and the data set if there are several
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
    form: str | None = None
    sampler: str = "torch"
    batch: int = 256
    out: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model on one data set, as fractions with 95 % intervals over problems.

    samples    completions of each problem, at least
    measures   `avg@k`, `strict avg@k`, `pass@k`, `maj@k`; strict where the prompt asks for a form of the answer
    form       that form
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
    model: str = ""
    data: str = ""
    form: str | None = None

    @property
    def by_problem(self) -> dict[str, dict[str, float]]:
        """Share of each problem's completions that are correct, and correct in strict reading."""
        names = ("correct", "strict") if self.form else ("correct",)
        return {
            problem: {name: sum(row[name] for row in rows) / len(rows) for name in names}
            for problem, rows in _by_problem(self.rows).items()
        }

    def to_json(self) -> dict[str, Any]:
        """What `headwater eval --json` prints for one model and data set."""
        return {
            "model": self.model,
            "data": self.data,
            "form": self.form,
            "problems": self.problems,
            "samples": self.samples,
            "measures": {name: asdict(interval) for name, interval in self.measures.items()},
            "reasons": dict(self.reasons),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "text": self.text(),
            "by_problem": self.by_problem,
        }

    def text(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{self.problems} problems, {sum(self.reasons.values())} completions, {self.tokens:,.0f} tokens "
            f"in {self.seconds:.1f} s"
        ]
        width = max(8, *map(len, self.measures))
        for name, interval in self.measures.items():
            lines.append(f"{name:{width}} {interval.mean:6.1%}   95% interval {interval.low:.1%} – {interval.high:.1%}")
        lines.append("verdicts  " + ", ".join(f"{name} {count}" for name, count in self.reasons.items()))
        lines.append(f"cut at the token limit {self.truncated:.1%}")
        return "\n".join(lines)


def evaluate_models(
    models: Sequence[str], data: Sequence[str], settings: EvaluationSettings, display: ProgressDisplay
) -> list[Evaluation]:
    """Sample and grade every model on every data set; each model is loaded once.

    Raises UserError for a setting that a recipe would not allow, and for a model, file or row that cannot be used.
    """
    task, device = find_task(settings.task), device_of(settings.device or "auto")
    recipe = _recipe(models[0], settings, compiled=device.type != "cpu")
    make_sampler, evaluations = sampler_factory(recipe), []
    with Verifier(settings.task) as grade:
        columns = Columns(problem=settings.problem, answer=settings.answer)
        sets = [
            load(Source(path=path, columns=columns, limit=settings.limit), "--data", True, task.gold, grade)
            for path in data
        ]
        for loaded in sets:  # a grader that returns no verdict is refused before anything is sampled
            failing(grade, list(loaded.gold.items())[:1])
        folders = [ModelFolder.open(name, "MODEL", recipe.models.trust_remote_code) for name in models]
        for name, folder in zip(models, folders, strict=True):
            policy = load_policy(folder, LoadOptions(recipe.models, device, frozen=True))
            prompter, sampler = Prompter(policy.tokenizer, recipe.prompt, date.today()), make_sampler(policy)
            del policy  # so that two models are never in memory
            for path, loaded in zip(data, sets, strict=True):
                warnings = _data_warnings(path, loaded, prompter)
                for warning in warnings:
                    display.say(f"warning: {warning}")
                with display.node(f"eval {name}", 1, 1) as progress:
                    progress.start(0, len(loaded.problems) * settings.samples, "completions")
                    try:
                        evaluation = _evaluate(
                            sampler, prompter, loaded, grade, recipe.evaluate, settings, progress.advance
                        )
                    except TrainingStoppedError as error:
                        raise UserError(f"{name}: {error}") from None
                evaluations.append(replace(evaluation, model=name, data=path, warnings=warnings))
            del sampler, prompter
    if settings.out is not None:
        several = len(evaluations) > 1
        rows = (
            {"model": evaluation.model, "data": evaluation.data, **row} if several else row
            for evaluation in evaluations
            for row in evaluation.rows
        )
        write_rows(settings.out, rows)
    return evaluations


def _evaluate(
    sampler: Sampler,
    prompter: Prompter,
    loaded: LoadedProblems,
    grade: Verifier,
    section: Evaluate,
    settings: EvaluationSettings,
    advance: Callable[[int, dict[str, float]], None],
) -> Evaluation:
    """One model on one data set."""
    task = find_task(settings.task)
    rows, spent = evaluate(
        sampler,
        prompter,
        *with_labels(loaded, grade),
        section,
        (settings.seed, "eval", "eval"),
        task.extract,
        lambda count: advance(count, {}),
    )
    form = settings.form or form_asked_for(settings.template, (problem.text for problem in loaded.problems))
    if form is not None:
        _add_strict_verdicts(rows, form, loaded.gold, grade)
    summary = summarize(rows, votes=task.extract is not None, one_answer=task.one_answer)
    return replace(summary, tokens=int(spent["tokens_sampled"]), seconds=spent["seconds"], form=form)


def _add_strict_verdicts(rows: list[dict[str, Any]], form: str, gold: Mapping[str, str], grade: Verifier) -> None:
    """Grade only what has the form that the prompt asks for: a key `strict` in each row."""
    answers = [FORMS[form][1](row["text"]) for row in rows]
    pairs = [(gold[row["problem_id"]], answer) for row, answer in zip(rows, answers, strict=True) if answer is not None]
    verdicts = iter(grade(pairs))
    for row, answer in zip(rows, answers, strict=True):
        row["strict"] = answer is not None and next(verdicts).correct


def _data_warnings(data: str, loaded: LoadedProblems, prompter: Prompter) -> tuple[str, ...]:
    """What the doctor would report of a run's data and prompts as `column-not-read` and `chat-template-twice`."""
    sentences = [f"{data}: {unused.evidence}; {unused.remedy('--problem')}" for unused in loaded.unused]
    marks = [(mark, problem) for problem in loaded.problems if (mark := spelt_template(problem)) is not None]
    if marks and prompter.has_template:
        mark, problem = marks[0]
        sentences.append(
            f"{len(marks)} of {len(loaded.problems)} problems contain a chat template (the first: {mark} in {problem.name}), and the "
            "model's is applied around them; use --no-chat, or write them as messages (role and content)"
        )
    return tuple(sentences)


def _recipe(model: str, settings: EvaluationSettings, compiled: bool) -> Recipe:
    """The settings as a recipe that only evaluates: validated by the same rules, and what makes the sampler.

    compiled  whether vLLM compiles the model, which on a CPU takes longer than most evaluations
    """
    if settings.form is not None and settings.form not in FORMS:
        raise UserError(f"eval: form {settings.form!r} is unknown{did_you_mean(settings.form, FORMS)}")
    sampling = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    raw = {
        "name": "eval",
        "models": {"student": model, "teacher": model, "dtype": settings.dtype},
        "prompt": {"template": settings.template, "thinking": settings.thinking, "chat": settings.chat},
        "data": {"unlabeled": "none"},
        "stages": {"opd": {"objective": "opd", "steps": 1, "sampling": {"max_tokens": settings.max_tokens}}},
        "evaluate": {"samples": settings.samples, "sampling": sampling},
        "compute": {"sampler": settings.sampler, "sample_batch": settings.batch, "vllm": {"compiled": compiled}},
    }
    return parse_recipe(raw, "eval")


def summarize(rows: list[dict[str, Any]], votes: bool, one_answer: bool = True) -> Evaluation:
    """Measures of one evaluation from its graded rows.

    votes       whether answers can be extracted for maj@k
    one_answer  whether correct answers to one problem are the same answer (`Task.one_answer`)
    """
    groups = list(_by_problem(rows).values())
    correct_P = np.array([sum(row["correct"] for row in group) for group in groups])
    samples_P = np.array([len(group) for group in groups])
    samples = int(samples_P.min())
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= samples]
    measures = {f"avg@{samples}": stats.avg_at_k(correct_P, samples_P)}
    if all("strict" in row for row in rows):
        strict_P = np.array([sum(row["strict"] for row in group) for group in groups])
        measures[f"strict avg@{samples}"] = stats.avg_at_k(strict_P, samples_P)
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


def _by_problem(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["problem_id"]].append(row)
    return groups
