"""Totals of the ledger against counts made independently of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from headwater.storage.files import read_jsonl
from headwater.storage.ledger import Spend, Totals, record, totals


def test_ledger_totals_are_sums_with_each_label_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    plain = Spend("node", "opd", 0, 1, "train")
    record(
        path,
        replace(plain, labels=("a", "b"), checks=16, tokens_sampled=100, tokens_trained=90, flops=1e12, seconds=2.0),
    )
    record(
        path,
        replace(
            plain,
            step=2,
            labels=("b", "c"),
            checks=16,
            tokens_sampled=50,
            tokens_teacher_scored=7,
            flops=5e11,
            seconds=0.5,
        ),
    )
    record(
        path,
        replace(plain, purpose="eval", labels=("x", "y", "z"), checks=12, tokens_sampled=30, flops=1e9, seconds=9.0),
    )
    assert totals(read_jsonl(path)) == Totals(3, 32, 150, 90, 7, 1.5e12, 2.5)
    assert totals(read_jsonl(path), "eval") == Totals(3, 12, 30, 0, 0, 1e9, 9.0)


def test_ledger_totals_agree_with_independent_counts(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "ledger.jsonl"
    seen: dict[str, set[str]] = {"train": set(), "eval": set()}
    counts = {"train": [0] * 4, "eval": [0] * 4}
    for step in range(200):
        purpose = draw.choice(("train", "eval"))
        labels = tuple(draw.sample([f"{purpose}{index}" for index in range(40)], 3))
        amounts = [draw.randrange(1000) for _ in range(4)]
        record(path, Spend("n", "s", 0, step, purpose, labels, *amounts))  # type: ignore[arg-type]
        seen[purpose] |= set(labels)
        counts[purpose] = [a + b for a, b in zip(counts[purpose], amounts, strict=True)]
    for purpose in ("train", "eval"):
        sums = totals(read_jsonl(path), purpose)  # type: ignore[arg-type]
        assert sums.distinct == len(seen[purpose])
        assert [sums.checks, sums.tokens_sampled, sums.tokens_trained, sums.tokens_teacher_scored] == counts[purpose]


def test_empty_ledger_has_zero_totals(tmp_path: Path) -> None:
    assert totals(read_jsonl(tmp_path / "none.jsonl")) == Totals(0, 0, 0, 0, 0, 0.0, 0.0)
