"""Run directories -> the report: report.json, report.html, the terminal table. Reads files only; never imports torch.

    build(outs)   the values of report.json, from one run directory or several that differ in seeds
    write(out)    build, then OUT/report.json, OUT/report.html and OUT/labels.csv
    verdict, terminal_table, console    from `report_words`

Costs of an arm are those of all its nodes: a teacher that five arms share was paid for once, but each arm alone would
have had to pay for it. They are means per seed, over the seeds that finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater import label_use, report_html, stats
from headwater.errors import UserError
from headwater.report_read import ARM_TEXT, POOL_TEXT, Graded, Node, Study, costs, is_number, mean_costs, read
from headwater.report_words import NAMED_PAIRS, console, terminal_table, verdict
from headwater.rundir import RunDir, write_atomic, write_json

__all__ = ["ARM_TEXT", "POOL_TEXT", "build", "console", "read", "summarise", "terminal_table", "verdict", "write"]

Values = Callable[[Graded], np.ndarray]
"""A value for each problem of one evaluation, (P,)."""


def build(outs: Sequence[Path]) -> dict[str, Any]:
    """The values of report.json. Raises UserError for a folder without a run and for runs of different recipes."""
    return summarise(read(outs))


def write(out: Path, outs: Sequence[Path] | None = None) -> dict[str, Any]:
    """Build the report of `outs` (by default of `out` itself), write report.json, report.html and labels.csv into `out`."""
    study = read(outs or [out])
    report = summarise(study)
    write_json(RunDir(out).report_json, report)
    write_atomic(RunDir(out).labels, label_use.as_csv(label_use.uses(study)))
    write_atomic(RunDir(out).report_html, report_html.page(study, report))
    return report


def summarise(study: Study) -> dict[str, Any]:
    arms = {name: _arm(study, name) for name in study.arms}
    report: dict[str, Any] = {
        "recipe": study.recipe.get("name", ""),
        "seeds": study.seeds,
        "evals": study.evals,
        "arms": arms,
        "contrasts": _contrasts(study, arms),
        "conditions": {"C1": _c1(study), "C2": _c2(study)},
    }
    return {**report, "verdict": verdict(report)}


def _accuracy(graded: Graded) -> np.ndarray:
    return stats.avg_at_k(graded.correct, graded.sampled)


def _pass_at(k: int) -> Values:
    return lambda graded: stats.pass_at_k(graded.correct, graded.sampled, k)


def _arm(study: Study, name: str) -> dict[str, Any]:
    runs, finished = study.arms[name], study.finished(name)
    results = {eval_name: study.results(name, eval_name) for eval_name in study.evals}
    results = {eval_name: by_seed for eval_name, by_seed in results.items() if by_seed}
    return {
        "text": ARM_TEXT.get(name, ""),
        "accuracy": {key: _scored(by_seed, _accuracy) for key, by_seed in results.items()},
        "pass_at_k": {
            key: {str(k): _scored(by_seed, _pass_at(k)) for k in _ks(by_seed.values())}
            for key, by_seed in results.items()
        },
        "maj_at_k": {key: _majority(by_seed) for key, by_seed in results.items()},
        "truncated": {key: _mean([g.truncated for g in by_seed.values()]) for key, by_seed in results.items()},
        **mean_costs([costs(nodes) for nodes in (finished or runs).values()]),
        "costs_per_seed": {str(seed): costs(nodes) for seed, nodes in runs.items()},
        "stages": _stages(runs),
        "unfinished": {
            str(seed): next(node.name for node in nodes if not node.done)
            for seed, nodes in runs.items()
            if seed not in finished
        },
    }


def _stages(runs: Mapping[int, tuple[Node, ...]]) -> list[dict[str, Any]]:
    rows = []
    for place in range(max(len(nodes) for nodes in runs.values())):
        by_seed = {seed: nodes[place] for seed, nodes in runs.items() if place < len(nodes)}
        first = next(iter(by_seed.values()))
        evals = sorted({name for node in by_seed.values() for name in node.evals})
        graded = {name: {s: n.evals[name] for s, n in by_seed.items() if name in n.evals} for name in evals}
        rows.append(
            {
                "stage": first.stage,
                "role": first.role,
                "pool": first.pool,
                "nodes": {str(seed): node.name for seed, node in by_seed.items()},
                "accuracy": {name: _scored(found, _accuracy) for name, found in graded.items()},
                "informative": _informative(list(by_seed.values())),
                **mean_costs([costs([node]) for node in by_seed.values()]),
            }
        )
    return rows


def _informative(nodes: Sequence[Node]) -> float | None:
    """The share of groups, over all steps, whose rewards differed; None for a stage that looks at no label."""
    shares = [row["informative"] for node in nodes for row in node.metrics if is_number(row.get("informative"))]
    return _mean(shares) if shares else None


def _scored(by_seed: Mapping[int, Graded], values: Values) -> dict[str, Any]:
    """Mean, 95 % interval and the value of each seed, over the problems that all seeds answered."""
    values_SP, ids = _matrix(by_seed.values(), values)
    if not ids:
        raise UserError("report: the seeds of one arm were evaluated on problems of which none is the same")
    found = stats.accuracy_interval(values_SP)
    per_seed = {str(seed): _number(row.mean()) for seed, row in zip(by_seed, values_SP, strict=True)}
    return {"mean": _number(found.mean), "low": _number(found.low), "high": _number(found.high), "per_seed": per_seed}


def _majority(by_seed: Mapping[int, Graded]) -> dict[str, Any] | None:
    """None where a grader extracts no answers; a mean over other seeds than the accuracy's would mislead."""
    held = {seed: graded.majority for seed, graded in by_seed.items() if graded.majority is not None}
    if len(held) < len(by_seed):
        return None
    votes = {id(graded): held[seed] for seed, graded in by_seed.items()}
    return {"k": min(g.samples for g in by_seed.values()), **_scored(by_seed, lambda graded: votes[id(graded)])}


def _ks(graded: Iterable[Graded]) -> list[int]:
    """1, 2, 4, … up to the samples that every problem has, and that number itself."""
    most = min(one.samples for one in graded)
    return sorted({k for k in (2**power for power in range(most.bit_length())) if k <= most} | {most})


def _matrix(graded: Iterable[Graded], values: Values) -> tuple[np.ndarray, list[str]]:
    """(S, P) values on the problems that all have, and these problems."""
    held = list(graded)
    ids = sorted(set(held[0].ids).intersection(*(one.ids for one in held[1:])))
    return np.stack([one.at(ids, values(one)) for one in held]), ids


def _contrasts(study: Study, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = [pair for pair in NAMED_PAIRS if set(pair) <= set(study.arms)]
    if "base_student" in study.arms:
        pairs += [(name, "base_student") for name in study.arms if name != "base_student"]
    found = [_contrast(study, arms, a, b, eval_name) for a, b in pairs for eval_name in study.evals]
    return [one for one in found if one is not None]


def _contrast(study: Study, arms: Mapping[str, Any], a: str, b: str, eval_name: str) -> dict[str, Any] | None:
    seeds, first, second = _paired(study, a, b, eval_name)
    if not seeds:
        return None
    values_SP, ids = _matrix(first + second, _accuracy)
    if not ids:
        return None
    found = stats.contrast(values_SP[: len(seeds)], values_SP[len(seeds) :])
    return {
        "a": a,
        "b": b,
        "eval": eval_name,
        "difference": _number(found.difference),
        "low": _number(found.low),
        "high": _number(found.high),
        "p": _number(found.p),
        "seeds": len(seeds),
        "problems": len(ids),
        "labels": {"a": arms[a]["labels"]["distinct"], "b": arms[b]["labels"]["distinct"]},
    }


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


def _c1(study: Study) -> dict[str, Any] | None:
    """C1: has RL brought the teacher's accuracy to the best that it could already reach in k tries?

    For each evaluation the teacher before, and after each stage that trained it: accuracy beside best-of-k (pass@k
    at the largest k), and `reached`, the accuracy after as a share of the best-of-k before.
    """
    found: dict[str, Any] = {}
    before_nodes = {s: nodes[-1] for s, nodes in study.arms.get("base_teacher", {}).items() if nodes[-1].done}
    trained = [
        (arms, [n for n in by_seed.values() if n.done])
        for arms, _, by_seed in study.groups()
        if all(node.role == "teacher" and node.trained for node in by_seed.values())
    ]
    for name in sorted({key for node in before_nodes.values() for key in node.evals} | set(study.evals)):
        before = _own_best([n.evals[name] for n in before_nodes.values() if name in n.evals])
        after = []
        for arms, nodes in trained:
            own = _own_best([node.evals[name] for node in nodes if name in node.evals])
            if own is not None:
                reached = own["accuracy"] / before["best_of_k"] if before and before["best_of_k"] else None
                first = nodes[0]
                row = {"stage": first.stage, "pool": first.pool, "arms": arms, **own}
                after.append({**row, "reached": None if reached is None else _number(reached)})
        if before or after:
            found[name] = {"before": before, "after": after}
    return found or None


def _own_best(graded: Sequence[Graded]) -> dict[str, Any] | None:
    if not graded:
        return None
    k = min(one.samples for one in graded)
    best = [float(_pass_at(k)(one).mean()) for one in graded]
    return {"accuracy": _mean([float(_accuracy(one).mean()) for one in graded]), "best_of_k": _mean(best), "k": k}


def _c2(study: Study) -> dict[str, Any] | None:
    """C2: how far the student stood from its teacher at the first and at the last step of warm-up and OPD.

    arm -> stage -> metric -> {"first", "last"}, means over seeds in nats a token, as the stages measured them.
    """
    found: dict[str, Any] = {}
    for arm, runs in study.arms.items():
        for place in range(max(len(nodes) for nodes in runs.values())):
            nodes = [run[place] for run in runs.values() if place < len(run)]
            ends = _ends([node.metrics for node in nodes if node.role == "student"])
            if ends:
                found.setdefault(arm, {})[nodes[0].stage] = ends
    return found or None


def _ends(metrics: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    found = {}
    for key in ("kl_teacher_student", "kl_student_teacher"):
        series = [[row[key] for row in rows if is_number(row.get(key))] for rows in metrics]
        series = [values for values in series if values]
        if series:
            found[key] = {"first": _mean([v[0] for v in series]), "last": _mean([v[-1] for v in series])}
    return found


def _mean(values: Sequence[float]) -> float:
    return _number(sum(values) / len(values))


def _number(value: float) -> float:
    """Six decimals: a thousandth of what sampling could tell apart."""
    return round(float(value), 6)
