"""`headwater eval`: one model, one set of problems, avg@k, pass@k and maj@k with intervals."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from headwater import stats
from headwater.config.recipe import Evaluate, Models, Prompt, Source, first_complaint
from headwater.data.labels import Labels
from headwater.data.sources import load
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

Settings = tuple[Evaluate, Prompt, Models]


def settings_of(evaluate_: dict[str, Any], prompt: dict[str, Any], models: dict[str, Any]) -> Settings:
    """Options as the recipe's own objects, checked by the same rules. Raises UserError naming the option."""
    try:
        return Evaluate.model_validate(evaluate_), Prompt.model_validate(prompt), Models.model_validate(models)
    except ValidationError as error:
        raise UserError(f"eval: {first_complaint(error)}") from None


def evaluate_model(
    settings: Settings,
    data: str,
    task: str,
    limit: int | None,
    seed: int,
    device: str,
    out: Path | None,
    progress_display: ProgressDisplay,
) -> dict[str, Any]:
    """Sample and grade; the result holds fractions with 95 % intervals over problems, and `text` for people.

    Raises UserError for a model, file or row that cannot be used.
    """
    how, prompt, models = settings
    found, where = find_task(task), device_of(device)
    loaded = load(Source(path=data, limit=limit), "--data", need_answers=True, gold=found.gold)
    with Verifier(task) as grade, contextlib.ExitStack() as stack:
        folder = ModelFolder.open(models.student, "MODEL", models.trust_remote_code)
        policy = load_policy(folder, LoadOptions(models, where, frozen=True))
        watch = stack.enter_context(progress_display.node(f"eval {models.student}", 1, 1))
        watch.start(0, len(loaded.problems) * how.samples, "completions")
        try:
            rows, spent = evaluate(
                TorchSampler(policy),
                Prompter(policy.tokenizer, prompt),
                loaded.problems,
                Labels(loaded.gold, grade, len(loaded.gold)),
                how,
                (seed, "eval", "eval"),
                found.extract,
                lambda count: watch.advance(count, {}),
            )
        except TrainingStoppedError as error:
            raise UserError(f"{models.student}: {error}") from None
    if out is not None:
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return summary(rows, spent["tokens_sampled"], spent["seconds"], votes=found.extract is not None)


def summary(rows: list[dict[str, Any]], tokens: float, seconds: float, votes: bool) -> dict[str, Any]:
    """The measures of one evaluation from its graded rows."""
    by_problem: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem_id"]].append(row)
    groups = list(by_problem.values())
    correct_P = np.array([sum(row["correct"] for row in group) for group in groups])
    samples_P = np.array([len(group) for group in groups])
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= int(samples_P.min())]
    measures = {f"avg@{int(samples_P.min())}": stats.avg_at_k(correct_P, samples_P)}
    measures |= {f"pass@{k}": stats.pass_at_k(correct_P, samples_P, k) for k in ks}
    if votes:
        voted = [stats.maj_at_k([(row["extracted"], row["correct"]) for row in group]) for group in groups]
        if ks and None not in voted:
            measures[f"maj@{int(samples_P.min())}"] = np.array([float(value or 0.0) for value in voted])
    out: dict[str, Any] = {"problems": len(groups), "samples": int(samples_P.min()), "measures": {}}
    lines = [f"{len(groups)} problems, {len(rows)} completions, {tokens:,.0f} tokens in {seconds:.1f} s"]
    for name, values_P in measures.items():
        interval = stats.accuracy_interval(values_P[None, :])
        out["measures"][name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        lines.append(f"{name:8} {interval.mean:6.1%}   95 % interval {interval.low:.1%} – {interval.high:.1%}")
    reasons: dict[str, int] = defaultdict(int)
    for row in rows:
        reasons[row["reason"]] += 1
    out["reasons"] = dict(sorted(reasons.items()))
    out["truncated"] = sum(row["finish"] == "length" for row in rows) / len(rows)
    lines.append("verdicts  " + ", ".join(f"{name} {count}" for name, count in out["reasons"].items()))
    lines.append(f"cut at the token limit {out['truncated']:.1%}")
    return {**out, "tokens": int(tokens), "seconds": seconds, "text": "\n".join(lines)}
