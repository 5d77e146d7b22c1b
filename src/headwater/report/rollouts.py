"""A bounded sample of a study's rollouts, for the page's browser: what was asked, what was written, what was said of it.

Of each stage the first, the middle and the last step; of each arm's result its graded evaluations. Right and wrong ones, and
those whose dense signal was kept, come first. The whole lies in the run's files.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headwater.report.html_parts import clean
from headwater.report.stages import STAGE_NAMES, stage_name
from headwater.report.study import Node, Study, is_finite_number
from headwater.storage.run_dir import read_jsonl

BYTES = 1_200_000
"""Of the sample as JSON; it is most of the page."""
EACH = 6
"""Rollouts of one step, or of one evaluation."""
CHARACTERS, PROMPT_CHARACTERS, PIECES = 1600, 800, 200
READ = 20_000
"""Rows of one file that are looked at: the sample of a very large step is one of its beginning."""


@dataclass(frozen=True)
class Sample:
    """`rows` for the page, `total` rollouts in the files that they were taken from, as far as these say."""

    rows: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    arms: tuple[str, ...]
    total: int


def sample(study: Study, problems: Mapping[str, str]) -> Sample:
    """A sample that is the same for the same files. `problems` are the problems' texts by id."""
    arms = tuple(study.arms)
    place = {arm: number for number, arm in enumerate(arms)}
    rows: list[dict[str, Any]] = []
    texts: dict[str, int] = {}
    size = 0
    for held, node, seed, where, row in _offered(study):
        one = _row(row, node, seed, where) | {"a": [place[arm] for arm in held]}
        text = clean(problems.get(str(row.get("problem_id")), ""))[:PROMPT_CHARACTERS]
        if text:
            one["q"] = texts.setdefault(text, len(texts))
        size += len(json.dumps(one)) + (len(json.dumps(text)) if one.get("q") == len(texts) - 1 else 0)
        if size > BYTES:
            break
        rows.append(one)
    order = {name: number for number, name in enumerate(STAGE_NAMES.values())}
    rows.sort(
        key=lambda one: (order.get(one["s"], len(order)), one["d"], one["n"], isinstance(one["t"], str), one["t"])
    )
    return Sample(tuple(rows), tuple(texts), arms, _total(study))


Offer = tuple[list[str], Node, int, int, dict[str, Any]]
"""The arms that share it, its node, seed, step (−1 for a final evaluation), and the row as it stands in the file."""


def _offered(study: Study) -> Iterator[Offer]:
    """Every row that could be shown, seed by seed, and within a seed one of each source in turn: a cut anywhere is fair."""
    for seed in study.seeds:
        sources = [
            iterator
            for arms, by_seed in study.stage_groups()
            if seed in by_seed
            for iterator in _sources(arms, by_seed[seed], seed, study)
        ]
        for round_ in itertools.zip_longest(*sources):
            yield from (offer for offer in round_ if offer is not None)


def _sources(arms: list[str], node: Node, seed: int, study: Study) -> Iterator[Iterator[Offer]]:
    files = node.rollout_files()
    chosen = {files[0], files[len(files) // 2], files[-1]} if files else set()
    for step, path in sorted(chosen):
        yield _each(arms, node, seed, step, read_jsonl(path))
    for eval_name in study.evals:
        if eval_name in node.evals and any(study.arms[arm][seed][-1] == node for arm in arms):
            rows = ({**row, "eval": eval_name} for row in node.eval_rows(eval_name))
            yield _each(arms, node, seed, -1, rows)


def _each(arms: list[str], node: Node, seed: int, step: int, rows: Iterable[dict[str, Any]]) -> Iterator[Offer]:
    for row in chosen(itertools.islice(rows, READ)):
        yield arms, node, seed, step, row


def chosen(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """EACH rows at most, right and wrong ones in turn, the strongest signals first, else in an order that only names decide."""
    best: dict[Any, list[tuple[float, str, int, dict[str, Any]]]] = {}
    for number, row in enumerate(rows):
        name = f"{row.get('problem_id')}:{row.get('sample')}"
        rank = hashlib.sha256(name.encode(errors="replace")).hexdigest()
        kept = best.setdefault(row.get("correct"), [])
        signal = row.get("signal")
        strongest = (
            max((abs(one) for one in signal if is_finite_number(one)), default=0.0)
            if isinstance(signal, list)
            else -1.0
        )
        kept.append((-strongest, rank, number, row))
        if len(kept) > 64:
            kept[:] = heapq.nsmallest(EACH, kept)
    kinds = [
        [row for *_, row in heapq.nsmallest(EACH, kept)] for _, kept in sorted(best.items(), key=str, reverse=True)
    ]
    mixed = [row for several in itertools.zip_longest(*kinds) for row in several if row is not None]
    return mixed[:EACH]


def _row(row: Mapping[str, Any], node: Node, seed: int, step: int) -> dict[str, Any]:
    """One rollout in the page's short names (read by page/browse.js)."""
    text = clean(str(row.get("completion", row.get("text")) or ""))
    correct = row.get("correct")
    found: dict[str, Any] = {
        "s": "Evaluation" if step < 0 else stage_name(node.stage, node.objective),
        "n": node.name,
        "d": seed,
        "t": clean(str(row.get("eval")))[:64] if step < 0 else step,
        "v": "not graded" if correct is None else "right" if correct else "wrong",
        "r": clean(str(row.get("reason") or ""))[:80],
        "p": clean(str(row.get("problem_id")))[:64],
        "i": _whole(row.get("sample")),
        "c": text[:CHARACTERS],
        "k": _whole(row.get("tokens")),
        "f": clean(str(row.get("finish") or ""))[:16],
    }
    if len(text) > CHARACTERS:
        found["m"] = len(text) - CHARACTERS
    if is_finite_number(row.get("advantage")):
        found["g"] = round(row["advantage"], 2)
    pieces, signal = row.get("pieces"), row.get("signal")
    if isinstance(pieces, list) and isinstance(signal, list) and len(pieces) == len(signal):
        found["w"] = [clean(str(piece))[:80] for piece in pieces[:PIECES]]
        found["x"] = [round(float(value), 2) if is_finite_number(value) else 0.0 for value in signal[:PIECES]]
    return found


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _total(study: Study) -> int:
    """Rollouts that stages trained on, and graded completions of results."""
    nodes = {node.name: node for runs in study.arms.values() for run in runs.values() for node in run}
    graded = sum(int(one.sampled.sum()) for node in nodes.values() for one in node.evals.values())
    sizes = [(node.info.get("settings") or {}).get("batch_size", 0) * len(node.metrics) for node in nodes.values()]
    return graded + sum(size for size in sizes if isinstance(size, int))
