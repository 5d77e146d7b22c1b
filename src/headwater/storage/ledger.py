"""Ledger: an append-only file with one row per cost (labels, tokens, FLOPs, seconds)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from headwater.storage.files import append_jsonl

Purpose = Literal["train", "eval", "validation", "measure", "probe"]
"""Training; evaluation; early stopping; measuring the conditions (no labels); the probe before a run."""


@dataclass(frozen=True, slots=True)
class Spend:
    """One ledger row: the cost of one step, one teacher cache or one evaluation.

    labels    ids of the problems whose gold answers were used (distinct within the row)
    checks    number of completions that were graded
    tokens_*  sampled by a policy; trained on (completion tokens in the loss); scored under a teacher
    flops     floating-point operations estimated from the models' shapes
    """

    node: str
    stage: str
    seed: int
    step: int
    purpose: Purpose
    labels: tuple[str, ...] = ()
    checks: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    tokens_teacher_scored: int = 0
    flops: float = 0.0
    seconds: float = 0.0


def record(path: Path, spend: Spend) -> None:
    append_jsonl(path, [asdict(spend)])


@dataclass(frozen=True)
class Totals:
    """Sums over ledger rows; `distinct` counts each label once."""

    distinct: int
    checks: int
    tokens_sampled: int
    tokens_trained: int
    tokens_teacher_scored: int
    flops: float
    seconds: float


def totals(rows: Iterable[dict[str, Any]], purpose: Purpose = "train") -> Totals:
    """Add up the rows of one purpose: labels used for training and for evaluation are never mixed."""
    chosen = [row for row in rows if row["purpose"] == purpose]
    sums = {field.name: sum(row[field.name] for row in chosen) for field in fields(Totals) if field.name != "distinct"}
    return Totals(distinct=len({label for row in chosen for label in row["labels"]}), **sums)
