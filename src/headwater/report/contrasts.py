"""Accuracies with confidence intervals, and paired contrasts between arms with the resources of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from headwater import stats
from headwater.config.arms import CONTRASTS
from headwater.errors import UserError
from headwater.report.format import counted, p_text, points
from headwater.report.study import EvalCounts, Study, mean_costs

Values = Callable[[EvalCounts], np.ndarray]
"""A function from one evaluation to a value per problem, (P,)."""
Reading = Literal["holds", "does not hold", "undecided"]
COMPARISON = {"holds": "is better than", "does not hold": "is worse than", "undecided": "is not shown to differ from"}

COMPUTE_TOLERANCE = 0.1
EQUALITY_GROUPS: tuple[tuple[str, list[str]], ...] = (
    ("Equal labels and compute", ["labels", "compute"]),
    ("Equal labels", ["labels"]),
    ("Equal compute", ["compute"]),
    ("Neither equal", []),
)


# Statistics -----------------------------------------------------------------------------------------------------------


def accuracy(counts: EvalCounts) -> np.ndarray:
    return stats.avg_at_k(counts.correct, counts.sampled)


def pass_at(k: int) -> Values:
    return lambda counts: stats.pass_at_k(counts.correct, counts.sampled, k)


def pass_ks(evals: Iterable[EvalCounts]) -> list[int]:
    """The k of pass@k: powers of two up to the number of samples of every problem, and that number."""
    largest = min(counts.samples for counts in evals)
    return sorted({k for k in (2**power for power in range(largest.bit_length())) if k <= largest} | {largest})


def summarize_seeds(by_seed: Mapping[int, EvalCounts], values: Values) -> dict[str, Any]:
    """Mean, 95 % interval and the value of each seed, on the problems that all seeds were evaluated on.

    Raises UserError if the seeds have no problem in common.
    """
    values_SP, ids = seed_matrix(by_seed.values(), values)
    if not ids:
        raise UserError("report: the evaluations of an arm's seeds have no problem in common")
    interval = stats.accuracy_interval(values_SP)
    numbers = {key: rounded(getattr(interval, key)) for key in ("mean", "low", "high")}
    per_seed = {str(seed): rounded(row.mean()) for seed, row in zip(by_seed, values_SP, strict=True)}
    return {**numbers, "per_seed": per_seed}


def seed_matrix(evals: Iterable[EvalCounts], values: Values) -> tuple[np.ndarray, list[str]]:
    """(S, P) values on the problems that all evaluations share, and the ids of these problems."""
    seeds = list(evals)
    ids = sorted(set(seeds[0].ids).intersection(*(counts.ids for counts in seeds[1:])))
    return np.stack([counts.at(ids, values(counts)) for counts in seeds]), ids


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return rounded(sum(numbers) / len(numbers))


def rounded(value: float) -> float:
    """Round to six decimals, a thousandth of what the sampling error can resolve."""
    return round(float(value), 6)


# Rows of report.json --------------------------------------------------------------------------------------------------


def paired_contrasts(study: Study, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Contrasts of the named pairs in the study, then of every arm with the untrained student, per evaluation.

    arms  the arms' values in report.json, for their labels and FLOPs
    """
    pairs = [pair for pair in CONTRASTS if set(pair) <= set(study.arms)]
    if "base_student" in study.arms:
        pairs += [(name, "base_student") for name in study.arms if name != "base_student"]
    rows = [_contrast(study, arms, a, b, eval_name) for a, b in pairs for eval_name in study.evals]
    return [row for row in rows if row is not None]


def _contrast(study: Study, arms: Mapping[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    results_a, results_b = _results_by_seed(study, a, b, eval_name)
    row = paired_difference(results_a, results_b)
    if row is None:
        return None
    seeds = sorted(results_a.keys() & results_b.keys())
    costs = {"a": _costs(arms[a], seeds), "b": _costs(arms[b], seeds)}
    labels = {side: cost["labels"]["distinct"] for side, cost in costs.items()}
    flops = {side: cost["flops"] for side, cost in costs.items()}
    equal = equal_resources(labels, flops)
    return {"a": a, "b": b, "eval": eval_name, **row, "labels": labels, "flops": flops, "equal": equal}


def paired_difference(a: Mapping[int, EvalCounts], b: Mapping[int, EvalCounts]) -> dict[str, Any] | None:
    """Accuracy of `a` minus that of `b`, paired over the seeds and problems that both have; None if there are none.

    a, b  seed -> graded completions

    Example: `{"difference": 0.06, "low": 0.01, "high": 0.11, "p": 0.02, "seeds": 3, "problems": 500}`.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    values_SP, ids = seed_matrix([side[seed] for side in (a, b) for seed in seeds], accuracy)
    if not ids:
        return None
    result = stats.contrast(values_SP[: len(seeds)], values_SP[len(seeds) :])
    numbers = {key: rounded(getattr(result, key)) for key in ("difference", "low", "high", "p")}
    return {**numbers, "seeds": len(seeds), "problems": len(ids)}


def equal_resources(labels: Mapping[str, float], flops: Mapping[str, float]) -> list[str]:
    """Which of "labels" and "compute" are equal for both arms of a contrast.

    labels  distinct labels used in training, mean per seed: equal if the same number
    flops   training FLOPs, mean per seed: equal if the smaller is within 10 % of the larger

    Example: `equal_resources({"a": 256, "b": 256}, {"a": 1.6e12, "b": 0.5e12})` is `["labels"]`.
    """
    names = ["labels"] if labels["a"] == labels["b"] else []
    differ = abs(flops["a"] - flops["b"]) > COMPUTE_TOLERANCE * max(flops["a"], flops["b"])
    return names if differ else [*names, "compute"]


def _costs(arm: Mapping[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Mean costs of the paired seeds. An untrained model may have none of these seeds; its training costs are zero for all."""
    per_seed = arm["costs_per_seed"]
    return mean_costs([per_seed[str(seed)] for seed in seeds if str(seed) in per_seed] or [*per_seed.values()])


def _results_by_seed(study: Study, a: str, b: str, eval_name: str) -> list[dict[int, EvalCounts]]:
    """The evaluations of both arms by seed.

    The evaluation of an untrained model does not depend on the seed, so it is paired with every seed of the other arm.
    """
    results = [study.results(a, eval_name), study.results(b, eval_name)]
    for side, arm in enumerate((a, b)):
        trained = any(node.trained for nodes in study.arms[arm].values() for node in nodes)
        if results[side] and not trained:
            first = next(iter(results[side].values()))
            results[side] = {seed: results[side].get(seed, first) for seed in results[0].keys() | results[1].keys()}
    return results


# Selection and text of contrasts --------------------------------------------------------------------------------------


def reading(contrast: dict[str, Any]) -> Reading:
    """Whether `a` is better than `b`: the one rule of every page and table. Decided only if the 95 % interval excludes zero
    and p < 0.05."""
    if contrast["p"] < 0.05 and contrast["low"] > 0:
        return "holds"
    return "does not hold" if contrast["p"] < 0.05 and contrast["high"] < 0 else "undecided"


def disagreement(contrast: dict[str, Any]) -> str:
    """Why a contrast is undecided although the interval or p alone would decide it; empty if they agree."""
    excludes = contrast["low"] > 0 or contrast["high"] < 0
    if excludes == (contrast["p"] < 0.05):
        return ""
    if excludes:
        return "the interval excludes 0 but p is not below 0.05: undecided"
    return "p is below 0.05 but the interval includes 0: undecided"


def find_contrast(report: dict[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    wanted = (a, b, eval_name)
    return next((c for c in report["contrasts"] if (c["a"], c["b"], c["eval"]) == wanted), None)


def named_contrasts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Contrasts of CONTRASTS; if the report has none of them, every arm against the untrained student."""
    named = [c for c in report["contrasts"] if (c["a"], c["b"]) in CONTRASTS]
    return named or list(report["contrasts"])


def group_by_equality(contrasts: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Contrasts grouped by their equal resources, in the order of EQUALITY_GROUPS, without empty groups."""
    groups = [(title, [c for c in contrasts if c["equal"] == equal]) for title, equal in EQUALITY_GROUPS]
    return [(title, members) for title, members in groups if members]


def pair_text(c: dict[str, Any]) -> str:
    """Example: `bridge − replay`."""
    return f"{c['a']} − {c['b']}"


def difference_text(c: dict[str, Any]) -> str:
    """Example: `bridge − replay +3.6 points, 95 % +1.0 to +6.3, p 0.009`, and in brackets whether interval and p disagree."""
    return f"{pair_text(c)} {estimate_text(c)}"


def estimate_text(c: dict[str, Any]) -> str:
    """`difference_text` without the arms."""
    interval = f"{points(c['difference'])} points, 95 % {points(c['low'])} to {points(c['high'])}"
    note = f" ({disagreement(c)})" if disagreement(c) else ""
    return f"{interval}, p {p_text(c['p'])}{note}"


def sample_size(c: dict[str, Any]) -> str:
    """Example: `3 seeds × 500 problems`."""
    return f"{counted(c['seeds'], 'seed')} × {c['problems']} problems"


def flops_ratio(c: dict[str, Any]) -> str:
    """FLOPs of a divided by those of b. Example: `3.20×`; `–` if one of them is zero."""
    a, b = c["flops"]["a"], c["flops"]["b"]
    return f"{a / b:.2f}×" if a and b else "–"


def interval_note(report: dict[str, Any]) -> str:
    """What the intervals and p values generalize to; with one seed they do not cover training noise."""
    if len(report["seeds"]) > 1:
        return "the interval covers new problems and new training runs, p covers new problems with these models"
    return "one seed: interval and p cover new problems with these models; new training runs would vary more"
