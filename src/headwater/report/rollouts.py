"""Sample a bounded number of rollouts for the page's browser: problem, completion, verdict and training signal.

The sample has the first, middle and last step of each stage, and the graded evaluation of each arm's result. The verdicts
(right, wrong, cut at max_tokens, …) alternate, and those with a stored dense signal come first. The run's files hold all rollouts.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from headwater.report.render import clean
from headwater.report.stages import STAGE_NAMES, stage_name
from headwater.report.study import Node, Study, is_finite_number
from headwater.storage.files import read_jsonl
from headwater.tasks.outcomes import Outcome, outcome

Item = TypeVar("Item")
VERDICTS: Mapping[Outcome, str] = {
    "right": "right",
    "cut": "cut at max_tokens",
    "no_answer": "no answer",
    "ungraded": "grader gave no result",
    "wrong": "wrong",
}
NOT_GRADED = "not graded"
MAX_BYTES = 1_300_000
"""Size of the sample as JSON, which is most of the page."""
PER_SOURCE = 6
"""Rollouts of one step or one evaluation."""
MAX_TEXT, MAX_PROBLEM, MAX_PIECES = 1600, 800, 200
"""Characters of a completion and of a problem; tokens with their signal."""
MAX_ROWS_READ = 20_000
"""Rows read of one file; a larger step is sampled from its beginning."""


@dataclass(frozen=True)
class Sample:
    """`rows` for browse.js, and `total`, the number of rollouts in the files they come from."""

    rows: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    arms: tuple[str, ...]
    total: int


def sample(study: Study) -> Sample:
    """Choose rollouts; the same files give the same sample."""
    problems = {str(row["id"]): str(row["text"]) for run in study.runs for row in read_jsonl(run.problems)}
    arms = tuple(study.arms)
    rows: list[dict[str, Any]] = []
    texts: dict[str, int] = {}
    size = 0
    for source, row in _candidates(study):
        shown = _shown(row, source) | {"arms": [arms.index(arm) for arm in source.arms]}
        text = clean(problems.get(str(row.get("problem_id")), ""))[:MAX_PROBLEM]
        if text:
            size += 0 if text in texts else len(json.dumps(text))
            shown["question"] = texts.setdefault(text, len(texts))
        size += len(json.dumps(shown))
        if size > MAX_BYTES:
            break
        rows.append(shown)
    order = {name: index for index, name in enumerate(STAGE_NAMES.values())}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return order.get(row["stage"], len(order)), row["seed"], row["node"], isinstance(row["step"], str), row["step"]

    return Sample(tuple(sorted(rows, key=place)), tuple(texts), arms, _total(study))


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a step of a node, or its final evaluation (step None), and the arms that share the node."""

    arms: list[str]
    node: Node
    seed: int
    step: int | None


def _candidates(study: Study) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Rows by seed, within a seed one from each source in turn, so that any prefix is balanced."""
    for seed in study.seeds:
        sources = [
            [(source, row) for row in choose(itertools.islice(rows, MAX_ROWS_READ))]
            for arms, by_seed in study.stage_groups()
            if seed in by_seed
            for source, rows in _sources(arms, by_seed[seed], seed, study)
        ]
        yield from _alternating(sources)


def _alternating(groups: Iterable[Iterable[Item]]) -> Iterator[Item]:
    """The first item of every group, then the second of every group, and so on."""
    return (item for items in itertools.zip_longest(*groups) for item in items if item is not None)


def _sources(arms: list[str], node: Node, seed: int, study: Study) -> Iterator[tuple[Source, Iterator[dict[str, Any]]]]:
    files = node.rollout_files()
    for step, path in sorted({files[0], files[len(files) // 2], files[-1]} if files else ()):
        yield Source(arms, node, seed, step), read_jsonl(path)
    for eval_name in study.evals:
        if eval_name in node.evals and any(study.arms[arm][seed][-1] == node for arm in arms):
            yield Source(arms, node, seed, None), ({**row, "eval": eval_name} for row in node.eval_rows(eval_name))


def choose(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most PER_SOURCE rows: verdicts alternate, strongest signals first, ties in an order given by hashed names."""
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        best = by_verdict.setdefault(verdict_text(row), [])
        best.append(row)
        if len(best) > 64:  # bounds the memory: a row may hold a long text and its signal
            best[:] = heapq.nsmallest(PER_SOURCE, best, key=_rank)
    groups = [heapq.nsmallest(PER_SOURCE, by_verdict[verdict], key=_rank) for verdict in sorted(by_verdict)]
    return list(itertools.islice(_alternating(groups), PER_SOURCE))


def verdict_text(row: Mapping[str, Any]) -> str:
    """How a rollout ended. Example: a wrong one with `finish` "length" is `cut at max_tokens`."""
    correct = row.get("correct")
    if correct is None:
        return NOT_GRADED
    return VERDICTS[outcome(bool(correct), str(row.get("reason")), str(row.get("finish")))]


def _rank(row: Mapping[str, Any]) -> tuple[float, str]:
    signal = row.get("signal")
    strongest = -1.0
    if isinstance(signal, list):
        strongest = max((abs(value) for value in signal if is_finite_number(value)), default=0.0)
    name = f"{row.get('problem_id')}:{row.get('sample')}"
    return -strongest, hashlib.sha256(name.encode(errors="replace")).hexdigest()


def _shown(row: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """One rollout as browse.js reads it; `cut` is the number of characters left out."""
    text, node = clean(str(row.get("completion", row.get("text")) or "")), source.node
    shown: dict[str, Any] = {
        "stage": "Evaluation" if source.step is None else stage_name(node.stage, node.objective),
        "node": node.name,
        "seed": source.seed,
        "step": clean(str(row.get("eval")))[:64] if source.step is None else source.step,
        "verdict": verdict_text(row),
        "reason": clean(str(row.get("reason") or ""))[:80],
        "problem": clean(str(row.get("problem_id")))[:64],
        "sample": _integer(row.get("sample")),
        "text": text[:MAX_TEXT],
        "tokens": _integer(row.get("tokens")),
        "finish": clean(str(row.get("finish") or ""))[:16],
    }
    if len(text) > MAX_TEXT:
        shown["cut"] = len(text) - MAX_TEXT
    if is_finite_number(row.get("advantage")):
        shown["advantage"] = round(row["advantage"], 2)
    pieces, signal = row.get("pieces"), row.get("signal")
    if isinstance(pieces, list) and isinstance(signal, list) and len(pieces) == len(signal):
        shown["pieces"] = [clean(str(piece))[:80] for piece in pieces[:MAX_PIECES]]
        shown["signal"] = [round(float(value), 2) if is_finite_number(value) else 0.0 for value in signal[:MAX_PIECES]]
    return shown


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _total(study: Study) -> int:
    """Rollouts used in training, and graded completions of the results."""
    nodes = study.nodes.values()
    graded = sum(int(scored.sampled.sum()) for node in nodes for scored in node.evals.values())
    sizes = [(node.info.get("settings") or {}).get("batch_size", 0) * len(node.metrics) for node in nodes]
    return graded + sum(size for size in sizes if isinstance(size, int))
