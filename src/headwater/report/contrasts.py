"""Accuracies with intervals, and paired contrasts of arms with what each of the two arms took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from headwater import stats
from headwater.config.arms import CONTRASTS
from headwater.errors import UserError
from headwater.report.read import Graded, Study

Values = Callable[[Graded], np.ndarray]
"""A value for each problem of one evaluation, (P,)."""

COMPUTE_WITHIN = 0.1


def accuracy(graded: Graded) -> np.ndarray:
    return stats.avg_at_k(graded.correct, graded.sampled)


def pass_at(k: int) -> Values:
    return lambda graded: stats.pass_at_k(graded.correct, graded.sampled, k)


def ks(graded: Iterable[Graded]) -> list[int]:
    """1, 2, 4, … up to the samples that every problem has, and that number itself."""
    most = min(one.samples for one in graded)
    return sorted({k for k in (2**power for power in range(most.bit_length())) if k <= most} | {most})


def scored(by_seed: Mapping[int, Graded], values: Values) -> dict[str, Any]:
    """Mean, 95 % interval and the value of each seed, over the problems that all seeds answered.

    Raises UserError where the seeds have no problem in common.
    """
    values_SP, ids = matrix(by_seed.values(), values)
    if not ids:
        raise UserError("report: the seeds of one arm were evaluated on problems of which none is the same")
    found = stats.accuracy_interval(values_SP)
    per_seed = {str(seed): number(row.mean()) for seed, row in zip(by_seed, values_SP, strict=True)}
    return {"mean": number(found.mean), "low": number(found.low), "high": number(found.high), "per_seed": per_seed}


def matrix(graded: Iterable[Graded], values: Values) -> tuple[np.ndarray, list[str]]:
    """(S, P) values on the problems that all have, and these problems."""
    held = list(graded)
    ids = sorted(set(held[0].ids).intersection(*(one.ids for one in held[1:])))
    return np.stack([one.at(ids, values(one)) for one in held]), ids


def contrasts(study: Study, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The named pairs that the study has, then every arm against the student before; on every evaluation.

    arms  the arms' values in report.json, for what they took
    """
    pairs = [pair for pair in CONTRASTS if set(pair) <= set(study.arms)]
    if "base_student" in study.arms:
        pairs += [(name, "base_student") for name in study.arms if name != "base_student"]
    found = [_contrast(study, arms, a, b, eval_name) for a, b in pairs for eval_name in study.evals]
    return [one for one in found if one is not None]


def _contrast(study: Study, arms: Mapping[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    seeds, first, second = _paired(study, a, b, eval_name)
    if not seeds:
        return None
    values_SP, ids = matrix(first + second, accuracy)
    if not ids:
        return None
    found = stats.contrast(values_SP[: len(seeds)], values_SP[len(seeds) :])
    labels = {side: _took(arms[arm], seeds, lambda c: c["labels"]["distinct"]) for side, arm in (("a", a), ("b", b))}
    flops = {side: _took(arms[arm], seeds, lambda c: c["flops"]) for side, arm in (("a", a), ("b", b))}
    return {
        "a": a,
        "b": b,
        "eval": eval_name,
        "difference": number(found.difference),
        "low": number(found.low),
        "high": number(found.high),
        "p": number(found.p),
        "seeds": len(seeds),
        "problems": len(ids),
        "labels": labels,
        "flops": flops,
        "equal": equal(labels, flops),
    }


def equal(labels: Mapping[str, float], flops: Mapping[str, float]) -> list[str]:
    """What a contrast's arms have in common, of "labels" and "compute".

    labels  distinct labels that training looked at, mean per seed: equal if the same number
    flops   measured in training, mean per seed: equal if the smaller is within 10 % of the larger

    Example: `equal({"a": 256, "b": 256}, {"a": 1.6e12, "b": 0.5e12})` is `["labels"]`; 0.95e12 beside 1.0e12 is compute too.
    """
    found = ["labels"] if labels["a"] == labels["b"] else []
    apart = abs(flops["a"] - flops["b"]) > COMPUTE_WITHIN * max(flops["a"], flops["b"])
    return found if apart else [*found, "compute"]


def _took(arm: Mapping[str, Any], seeds: list[int], what: Callable[[Any], float]) -> float:
    """The mean per seed over the paired seeds; a model that was not trained took nothing on any of them."""
    held = [what(arm["costs_per_seed"][str(seed)]) for seed in seeds if str(seed) in arm["costs_per_seed"]]
    mean = sum(held) / len(held)
    return int(mean) if float(mean).is_integer() else float(f"{mean:.9g}")


def _paired(study: Study, a: str, b: str, eval_name: str) -> tuple[list[int], list[Graded], list[Graded]]:
    """The seeds on which both arms finished, and the two arms' evaluations in that order.

    A model that was not trained has no seed: its one evaluation stands beside every seed of the other arm.
    """
    first, second = study.results(a, eval_name), study.results(b, eval_name)
    if first and second:
        if not _trained(study, a):
            first = {seed: first.get(seed, next(iter(first.values()))) for seed in second.keys() | first.keys()}
        if not _trained(study, b):
            second = {seed: second.get(seed, next(iter(second.values()))) for seed in first.keys() | second.keys()}
    seeds = sorted(first.keys() & second.keys())
    return seeds, [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _trained(study: Study, arm: str) -> bool:
    return any(node.trained for nodes in study.arms[arm].values() for node in nodes)


def mean(values: Iterable[float]) -> float:
    held = list(values)
    return number(sum(held) / len(held))


def number(value: float) -> float:
    """Six decimals: a thousandth of what sampling could tell apart."""
    return round(float(value), 6)
