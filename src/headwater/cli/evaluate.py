"""`headwater eval`: avg@k, pass@k and maj@k of one model on one set of problems."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from datetime import date
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from headwater import stats
from headwater.cli.options import EvalOptions
from headwater.config.recipe import Evaluate, Models, Prompt, Source
from headwater.config.validation import complaints
from headwater.data.labels import Labels
from headwater.data.sources import load
from headwater.data.validate import failing
from headwater.errors import TrainingStoppedError, UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.prompts import Prompter
from headwater.runs.inputs import device_of
from headwater.runs.node_context import ProgressDisplay
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.run_dir import write_atomic
from headwater.tasks.registry import find_task
from headwater.tasks.verifier import Verifier
from headwater.training.evaluate import evaluate

Section = TypeVar("Section", bound=BaseModel)


def evaluate_model(name: str, data: str, options: EvalOptions, display: ProgressDisplay) -> dict[str, Any]:
    """Sample and grade; fractions with 95 % intervals over problems, and `text` for a terminal.

    Raises UserError for an option that a recipe would not allow, and for a model, file or row that cannot be used.
    """
    settings, prompt, models = _settings(name, options)
    task, device = find_task(options.task), device_of(options.device or "auto")
    with Verifier(options.task) as grade, contextlib.ExitStack() as stack:
        loaded = load(Source(path=data, limit=options.limit), "--data", True, task.gold, grade)
        failing(
            grade, list(loaded.gold.items())[:1]
        )  # refuses a grader that returns no verdict before anything is sampled
        folder = ModelFolder.open(name, "MODEL", models.trust_remote_code)
        policy = load_policy(folder, LoadOptions(models, device, frozen=True))
        progress = stack.enter_context(display.node(f"eval {name}", 1, 1))
        progress.start(0, len(loaded.problems) * settings.samples, "completions")
        try:
            rows, spent = evaluate(
                TorchSampler(policy),
                Prompter(policy.tokenizer, prompt, date.today()),
                loaded.problems,
                Labels(loaded.gold, grade, len(loaded.gold)),
                settings,
                (options.seed, "eval", "eval"),
                task.extract,
                lambda count: progress.advance(count, {}),
            )
        except TrainingStoppedError as error:
            raise UserError(f"{name}: {error}") from None
    if options.out is not None:
        write_atomic(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = summarize(rows, votes=task.extract is not None, one_answer=task.one_answer)
    summary |= {"tokens": int(spent["tokens_sampled"]), "seconds": spent["seconds"]}
    return {**summary, "text": summary_text(summary)}


def _settings(model_name: str, options: EvalOptions) -> tuple[Evaluate, Prompt, Models]:
    """The options as a recipe's objects, validated by the same rules."""
    sampling = {field: getattr(options, field) for field in ("max_tokens", "temperature", "top_p", "top_k")}
    return (
        _validated(Evaluate, {"samples": options.samples, "sampling": sampling}),
        _validated(Prompt, {"template": options.template, "thinking": options.thinking}),
        _validated(Models, {"student": model_name, "teacher": model_name, "dtype": options.dtype}),
    )


def _validated(section: type[Section], values: dict[str, Any]) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"eval: {complaints(error, section)[0][1]}") from None


def summarize(rows: list[dict[str, Any]], votes: bool, one_answer: bool = True) -> dict[str, Any]:
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
    intervals = {name: stats.accuracy_interval(values_P[None, :]) for name, values_P in measures.items()}
    return {
        "problems": len(groups),
        "samples": samples,
        "measures": {name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in intervals.items()},
        "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
        "truncated": sum(row["finish"] == "length" for row in rows) / len(rows),
    }


def summary_text(summary: dict[str, Any]) -> str:
    reasons = summary["reasons"]
    lines = [
        f"{summary['problems']} problems, {sum(reasons.values())} completions, {summary['tokens']:,.0f} tokens "
        f"in {summary['seconds']:.1f} s"
    ]
    for name, interval in summary["measures"].items():
        mean, low, high = (interval[key] for key in ("mean", "low", "high"))
        lines.append(f"{name:8} {mean:6.1%}   95 % interval {low:.1%} – {high:.1%}")
    lines.append("verdicts  " + ", ".join(f"{name} {count}" for name, count in reasons.items()))
    lines.append(f"cut at the token limit {summary['truncated']:.1%}")
    return "\n".join(lines)
