"""`headwater report --audit`: what a run's files prove about its labels. Reads files only; never imports torch.

Each check recounts one claim from several files that were written independently of each other: what a stage was to do
(recipe.json, through the same plan), what it says it did (node.json, ledger.jsonl), and what it left behind (rollouts,
caches, graded texts). Texts are known by their ids, which are hashes of their content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwater.config.recipe import Recipe
from headwater.data.labels import half_of
from headwater.errors import UserError
from headwater.report.audit_files import Files, NodeFiles, read
from headwater.storage.run_dir import RunDir, read_json, read_jsonl

SHOWN = 3
VERDICT_FIELDS = ("correct", "reason", "advantage")


@dataclass(frozen=True)
class CheckResult:
    """One claim: whether it holds, and what was counted. `faults` are sentences that name the file and the ids.

    Example: `CheckResult("budget", "at most 256 distinct labels", "256 looked at by 9 nodes", ())`.
    """

    name: str
    claim: str
    evidence: str
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


def audit_run(path: Path) -> list[CheckResult]:
    """Every check of one run directory, in the order of CHECKS.

    Raises UserError for a folder that holds no run, or one whose recipe or plan cannot be read.
    """
    files = read(RunDir(Path(path)))
    found = []
    for name, (claim, check) in CHECKS.items():
        try:
            evidence, faults = check(files)
        except UserError as error:
            evidence, faults = "a file cannot be read", [str(error)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Whoever edits a file may leave any shape behind; what cannot be recounted is not proved.
            evidence, faults = "a row is not of the shape that the run writes", [f"{type(error).__name__}: {error}"]
        found.append(CheckResult(name, claim, evidence, tuple(faults)))
    return found


# The checks: each gives (evidence, faults) ----------------------------------------------------------------------------

Found = tuple[str, list[str]]


def _few(names: set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def nodes_as_planned(files: Files) -> Found:
    faults, begun, done = list(files.strange), 0, 0
    for node in files.nodes.values():
        if not node.dir.info.exists():
            if node.dir.path.exists() and any(node.dir.path.iterdir()):
                faults.append(f"{node.name}: has files but no node.json")
            continue
        begun += 1
        planned, info = node.planned, node.info
        wanted = {
            "kind": planned.kind,
            "stage": planned.stage,
            "role": planned.role,
            "seed": planned.seed,
            "settings": None if planned.settings is None else planned.settings.model_dump(mode="json"),
        }
        faults += [f"{node.name}: {key} is not what the recipe says" for key in wanted if info.get(key) != wanted[key]]
        noted = info.get("labels")
        if planned.kind == "train" and (noted is None or noted["pool"] != planned.pool):
            faults.append(f"{node.name}: its labels are not of the pool that the recipe says ({planned.pool})")
        if node.dir.done.exists():
            done += 1
            if read_json(node.dir.done).get("fingerprint") != info.get("fingerprint"):
                faults.append(f"{node.name}: DONE carries another fingerprint than node.json")
    unknown = {one.name for one in files.out.nodes()} - files.nodes.keys()
    faults += [f"{name}: is in no arm of plan.json" for name in sorted(unknown)]
    return f"{len(files.nodes)} nodes planned, {begun} begun, {done} done", faults


def halves_apart(files: Files) -> Found:
    faults: list[str] = []
    looks = 0
    by_half: dict[int, set[str]] = {0: set(), 1: set()}
    for node in files.nodes.values():
        if node.half is None:
            continue
        graded = {row["problem_id"] for rows in node.rollouts.values() for row in rows if "correct" in row}
        held = node.looked_at | graded
        looks += len(held)
        by_half[node.half] |= held
        strangers = {label for label in held if half_of(label) != node.half}
        if strangers:
            faults.append(f"{node.name}: looked at labels of the other half ({_few(strangers)})")
        prompts = {label for label in node.trained_on if half_of(label) != node.half} - strangers
        if prompts and files.recipe.data.unlabeled is None:
            faults.append(f"{node.name}: sampled on problems of the other half ({_few(prompts)})")
    both = by_half[0] & by_half[1]
    if both:
        faults.append(f"stages of 1H and stages of 2H looked at the same labels ({_few(both)})")
    sizes = f"{len(by_half[0])} labels in 1H, {len(by_half[1])} in 2H, {len(both)} in both"
    return f"{sizes}; each id's half recomputed for {looks} uses", faults


def dense_without_labels(files: Files) -> Found:
    faults, count, rows_read = [], 0, 0
    for node in files.nodes.values():
        if node.sparse:
            continue
        count += 1
        checks = sum(row["checks"] for row in node.blind_spends)
        looked_at = {label for row in node.blind_spends for label in row["labels"]}
        if looked_at or checks:
            faults.append(f"{node.name}: its ledger has {len(looked_at)} labels and {checks} checks")
        allowed = (node.info.get("labels") or {}).get("distinct_allowed", 0)
        if allowed:
            faults.append(f"{node.name}: node.json allows it {allowed} labels")
        for step, rows in node.rollouts.items():
            rows_read += len(rows)
            if any(field in row for row in rows for field in VERDICT_FIELDS):
                faults.append(f"{node.name}: its rollouts of step {step} carry verdicts")
    return f"{count} nodes without sparse reward, {rows_read} rollouts without a verdict", faults


def evals_not_trained(files: Files) -> Found:
    faults, rows_read = [], 0
    for node in files.nodes.values():
        rows_read += sum(map(len, node.rollouts.values()))
        for what, ids in (("trained on", node.trained_on), ("looked at labels of", node.looked_at)):
            if shared := ids & files.eval_ids:
                faults.append(f"{node.name}: {what} {len(shared)} evaluation problems ({_few(shared)})")
    return f"{len(files.eval_ids)} evaluation problems, none in {rows_read} rollouts", faults


def budget_held(files: Files) -> Found:
    faults: list[str] = []
    everything: set[str] = set()
    for node in files.nodes.values():
        everything |= node.looked_at
        allowed = (node.info.get("labels") or {}).get("distinct_allowed")
        if allowed is not None and len(node.looked_at) > allowed:
            faults.append(f"{node.name}: looked at {len(node.looked_at)} labels, {allowed} were allowed")
    budget = files.recipe.labels.budget
    if budget is not None and len(everything) > budget:
        faults.append(f"all nodes together looked at {len(everything)} labels; labels.budget is {budget}")
    spent = [
        len(set().union(*(files.nodes[name].looked_at for name in names if name in files.nodes)))
        for by_seed in files.plan["arms"].values()
        for names in by_seed.values()
    ]
    bound = "no budget set" if budget is None else f"budget {budget}"
    return f"{bound}; {len(everything)} labels over all arms and seeds, at most {max(spent, default=0)} in one", faults


def ledger_agrees(files: Files) -> Found:
    faults: list[str] = []
    steps = graded = 0
    for node in files.nodes.values():
        if node.planned.kind == "train":
            steps += len(node.train_spends)
            faults += _steps_agree(node)
        elif node.planned.kind == "rollouts" and node.train_spends:
            rows = node.rollouts.get(0, [])
            if node.train_spends[0]["tokens_sampled"] != sum(len(row["completion_ids"]) for row in rows):
                faults.append(f"{node.name}: the ledger's tokens are not those of the cache")
        for when, name, found in _looks(node, files.recipe):
            graded += len(found[1])
            faults += [f"{node.name}, evals/{when}/{name}: {said}" for said in _eval_faults(*found)]
    return f"{steps} training steps and {graded} graded evaluation texts recounted", faults


def _steps_agree(node: NodeFiles) -> Iterator[str]:
    """Each step once, with the labels, checks and tokens that its rollouts have."""
    seen = [row["step"] for row in node.train_spends]
    if seen != list(range(1, len(seen) + 1)):
        yield f"{node.name}: the ledger's steps are not 1 to {len(seen)}, each once"
    if set(seen) != node.rollouts.keys():
        yield f"{node.name}: {len(seen)} steps in the ledger, rollouts of {len(node.rollouts)}"
    metrics = {row["step"]: row for row in read_jsonl(node.dir.metrics)}
    if set(seen) != metrics.keys():
        yield f"{node.name}: {len(seen)} steps in the ledger, {len(metrics)} in metrics.jsonl"
    settings = node.planned.settings
    # What dynamic sampling replaced was looked at, paid for and not kept.
    whole = settings is not None and settings.sparse.dynamic_sampling == 0
    for row in node.train_spends:
        rows = node.rollouts.get(row["step"], [])
        graded = [one for one in rows if "correct" in one]
        labels, ids = set(row["labels"]), {one["problem_id"] for one in graded}
        if not (labels == ids if whole else labels >= ids):
            yield f"{node.name}, step {row['step']}: the ledger's labels are not the rollouts' ({_few(labels ^ ids)})"
        if not (row["checks"] == len(graded) if whole else row["checks"] >= len(graded)):
            yield f"{node.name}, step {row['step']}: {row['checks']} checks in the ledger, {len(graded)} verdicts"
        sampled, tokens = row["tokens_sampled"], sum(one["tokens"] for one in rows)
        if settings is not None and settings.on_policy and not (sampled == tokens if whole else sampled >= tokens):
            yield f"{node.name}, step {row['step']}: {sampled} tokens in the ledger, {tokens} in the rollouts"
        trained = metrics.get(row["step"], {}).get("tokens_trained")
        if trained != row["tokens_trained"]:
            yield f"{node.name}, step {row['step']}: {row['tokens_trained']} tokens trained on, metrics.jsonl has {trained}"


Look = tuple[dict[str, Any] | None, list[dict[str, Any]]]


def _looks(node: NodeFiles, recipe: Recipe) -> Iterator[tuple[str, str, Look]]:
    """(when, evaluation, (ledger row, graded texts)): the ledger has a row an evaluation, in the recipe's order."""
    last = max((row["step"] for row in node.train_spends), default=0)
    names = list(recipe.data.evals)
    ledger: dict[tuple[int, str], dict[str, Any]] = {}
    counts: dict[int, int] = {}
    for row in node.spends:
        if row["purpose"] == "eval":
            place = counts.get(row["step"], 0)
            counts[row["step"]] = place + 1
            ledger[row["step"], names[place] if place < len(names) else f"evaluation {place + 1}"] = row
    for when, name, rows in node.evaluations():
        step = (last if node.planned.kind == "train" else 0) if when == "final" else int(when.removeprefix("step-"))
        yield when, name, (ledger.pop((step, name), None), rows)
    for (step, name), row in ledger.items():
        yield f"step {step}", name, (row, [])


def _eval_faults(row: dict[str, Any] | None, rows: list[dict[str, Any]]) -> Iterator[str]:
    if row is None:
        yield "its graded texts are in no row of the ledger"
        return
    if set(row["labels"]) != {one["problem_id"] for one in rows}:
        yield "the ledger's problems are not those of the graded texts"
    if row["checks"] != len(rows):
        yield f"{row['checks']} checks in the ledger, {len(rows)} graded texts"
    if row["tokens_sampled"] != sum(one["tokens"] for one in rows):
        yield f"{row['tokens_sampled']} tokens in the ledger, {sum(one['tokens'] for one in rows)} in the graded texts"


def ledger_joined(files: Files) -> Found:
    def lines(path: Path) -> list[str]:
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []

    own = [line for node in files.out.nodes() for line in lines(node.ledger)]
    joined = lines(files.out.ledger)
    strangers = [
        f"{node.name}: row {number} of its ledger is another node's"
        for node in files.nodes.values()
        for number, row in enumerate(node.spends, 1)
        if (row["node"], row["seed"]) != (node.name, node.planned.seed)
    ]
    faults = [] if own == joined else [f"ledger.jsonl has {len(joined)} rows that are not the nodes' {len(own)}"]
    return f"{len(joined)} rows, the same in both", faults + strangers


CHECKS: dict[str, tuple[str, Callable[[Files], Found]]] = {
    "nodes-as-planned": ("every node did what the recipe says, on the pool it says", nodes_as_planned),
    "halves-apart": ("1H and 2H stayed disjoint, by content and by ledger", halves_apart),
    "dense-without-labels": ("no label reached a dense stage", dense_without_labels),
    "evals-not-trained": ("no evaluation problem was trained on", evals_not_trained),
    "budget": ("no more labels were looked at than the budget allows", budget_held),
    "ledger-agrees": ("the ledger's counts are those of the rollouts and the graded texts", ledger_agrees),
    "ledger-joined": ("the joined ledger is the nodes' ledgers", ledger_joined),
}


def to_json(found: list[CheckResult]) -> str:
    """The checks as JSON."""
    return json.dumps([{"holds": one.holds, **asdict(one)} for one in found], ensure_ascii=False)


def to_text(found: list[CheckResult]) -> str:
    """The checks for people: a line each, and the first faults of those that fail."""
    lines = []
    for one in found:
        lines.append(f"{'holds' if one.holds else 'FAILS'}  {one.name:21} {one.claim}: {one.evidence}")
        lines += [f"       {fault}" for fault in one.faults[:SHOWN]]
        if len(one.faults) > SHOWN:
            lines.append(f"       and {len(one.faults) - SHOWN} more")
    return "\n".join(lines)
