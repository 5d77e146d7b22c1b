"""Audit a run directory: check from its files which labels were used where. Reads files only and never imports torch.

Each check compares files that were written independently: what a stage was to do (recipe.json and the plan made from it),
what it recorded (node.json, ledger.jsonl, metrics.jsonl), and what it left (rollouts, caches, graded evaluations). Problem
ids are hashes of the problem's content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headwater.config.arms import ARMS, OWN_STAGES, arm_of
from headwater.config.recipe import Recipe, parse_recipe
from headwater.data.labels import half_of
from headwater.errors import UserError, shortened
from headwater.report.label_use import labels_shown
from headwater.report.study import Node, require_run
from headwater.runs.node import CacheNode, EvaluateNode, StageNode, TrainNode
from headwater.runs.node import Node as PlannedNode
from headwater.runs.plan import last_node
from headwater.storage.files import read_json, read_jsonl
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan

SHOWN_FAULTS = 3
VERDICT_FIELDS = ("correct", "reason", "advantage")
HALVES = {"first_half": 0, "second_half": 1}
BASE_ROLES: dict[str, Literal["student", "teacher"]] = {"base_student": "student", "base_teacher": "teacher"}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: what was counted, and the faults, each naming the file and the ids.

    Example: `CheckResult("budget", "at most 256 distinct labels", "256 used by 9 nodes", ())`.
    """

    name: str
    claim: str
    evidence: str
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


def audit_run(path: Path) -> list[CheckResult]:
    """Run every check of CHECKS on a run directory.

    Raises UserError for a folder that holds no run, or whose recipe or plan cannot be read.
    """
    files = read_files(RunDir(Path(path)))
    return [_result(check, files) for check in CHECKS]


def _result(check: Check, files: RunFiles) -> CheckResult:
    try:
        evidence, faults = check.count(files)
    except UserError as error:
        evidence, faults = "a file cannot be read", [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # An edited file may have any content. What cannot be recounted is not proved.
        evidence, faults = "a row lacks fields that a run writes", [f"{type(error).__name__}: {error}"]
    return CheckResult(check.name, check.claim, evidence, tuple(faults))


def to_json(results: list[CheckResult]) -> str:
    return json.dumps([{"holds": result.holds, **asdict(result)} for result in results], ensure_ascii=False)


def to_text(results: list[CheckResult]) -> str:
    """One line per check, followed by the first faults of those that fail."""
    lines = []
    for result in results:
        lines.append(f"{'holds' if result.holds else 'FAILS'}  {result.name:21} {result.claim}: {result.evidence}")
        lines += [f"       {fault}" for fault in result.faults[:SHOWN_FAULTS]]
        if len(result.faults) > SHOWN_FAULTS:
            lines.append(f"       and {len(result.faults) - SHOWN_FAULTS} more")
    return "\n".join(lines)


# The files of a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFiles:
    """A run directory: `nodes` by name, each with the node that the recipe plans in its place, and `arms` as lists of names."""

    out: RunDir
    recipe: Recipe
    arms: tuple[tuple[str, ...], ...]
    nodes: dict[str, tuple[Node, PlannedNode]]
    faults: tuple[str, ...]
    """What is wrong with plan.json and the node.json files themselves."""

    @cached_property
    def eval_ids(self) -> set[str]:
        ids: set[str] = set()
        for node, _ in self.nodes.values():
            ids.update(row["problem_id"] for _, _, rows in _evaluations(node) for row in rows)
            ids.update(label for row in node.ledger_rows if row["purpose"] == "eval" for label in row["labels"])
        return ids


def read_files(out: RunDir) -> RunFiles:
    """Raises UserError for a folder that holds no run, or whose recipe or plan cannot be read."""
    require_run(out)
    recipe = parse_recipe(read_json(out.recipe), str(out.recipe))
    arms: list[tuple[str, ...]] = []
    nodes: dict[str, tuple[Node, PlannedNode]] = {}
    faults: list[str] = []
    for arm, by_seed in read_plan(out.plan)["arms"].items():
        for seed, names in by_seed.items():
            arms.append(tuple(names))
            planned = planned_nodes(arm, recipe, int(seed))
            if len(planned) != len(names):
                faults.append(f"plan.json: arm {arm}, seed {seed}: {len(names)} nodes are not what the recipe asks for")
                continue
            for name, planned_node in zip(names, planned, strict=True):
                if name not in nodes:
                    nodes[name] = _read_node(out, name, faults), planned_node
    return RunFiles(out, recipe, tuple(arms), nodes, tuple(faults))


def _read_node(out: RunDir, name: str, faults: list[str]) -> Node:
    folder = out.node(name)
    try:
        info = read_json(folder.info) if folder.info.exists() else {}
    except UserError as error:
        faults.append(str(error))
        info = {}
    return Node(name, folder, folder.done.exists(), info)


def planned_nodes(arm: str, recipe: Recipe, seed: int) -> list[PlannedNode]:
    """The nodes that the recipe gives an arm, parents first; empty for an unknown arm."""
    if arm in BASE_ROLES:
        return [EvaluateNode(arm, BASE_ROLES[arm], seed, BASE_ROLES[arm])]
    known = arm in ARMS or arm == OWN_STAGES
    return list(last_node(arm_of(arm, recipe), recipe, seed).lineage()) if known else []


def _evaluations(node: Node) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield (when, evaluation name, graded rows) in the order of the ledger."""
    for path in sorted((node.dir.path / "evals").glob("*/*.jsonl")):
        yield path.parent.name, path.stem, list(read_jsonl(path))


def _problems_sampled(node: Node) -> set[str]:
    return {row["problem_id"] for rows in node.rollouts.values() for row in rows}


# The checks: each returns what it counted and the faults --------------------------------------------------------------

Counted = tuple[str, list[str]]


def _few(names: set[str]) -> str:
    return shortened(sorted(names), SHOWN_FAULTS)


def _sampled(settings: Any) -> Any:
    """The settings that a teacher cache is made with."""
    if not isinstance(settings, dict) or not isinstance(settings.get("dense"), dict):
        return settings
    return [settings.get("group_size"), settings.get("sampling"), settings["dense"].get("top_k")]


def nodes_as_planned(files: RunFiles) -> Counted:
    faults, started, done = list(files.faults), 0, 0
    for node, planned in files.nodes.values():
        if not node.dir.info.exists():
            if node.dir.path.exists() and any(node.dir.path.iterdir()):
                faults.append(f"{node.name}: has files but no node.json")
            continue
        started += 1
        expected = {key: getattr(planned, key) for key in ("kind", "stage", "role", "seed")}
        expected["settings"] = planned.settings.model_dump(mode="json") if isinstance(planned, StageNode) else None
        info = dict(node.info)
        if isinstance(planned, CacheNode):  # several stages read it: node.json has the settings of the last one
            info["settings"], expected["settings"] = (_sampled(row.get("settings")) for row in (info, expected))
        wrong = [key for key in expected if info.get(key) != expected[key]]
        faults += [f"{node.name}: {key} is not what the recipe says" for key in wrong]
        labels = node.info.get("labels")
        if isinstance(planned, TrainNode) and (labels is None or labels["pool"] != planned.pool):
            faults.append(f"{node.name}: its labels are not of the pool that the recipe says ({planned.pool})")
        if node.done:
            done += 1
            if read_json(node.dir.done).get("fingerprint") != node.info.get("fingerprint"):
                faults.append(f"{node.name}: DONE and node.json have different fingerprints")
    unknown = {folder.name for folder in files.out.nodes()} - files.nodes.keys()
    faults += [f"{name}: is in no arm of plan.json" for name in sorted(unknown)]
    return f"{len(files.nodes)} nodes planned, {started} started, {done} done", faults


def halves_apart(files: RunFiles) -> Counted:
    faults: list[str] = []
    uses = 0
    by_half: tuple[set[str], set[str]] = (set(), set())
    for node, planned in files.nodes.values():
        if not isinstance(planned, StageNode) or planned.pool not in HALVES:
            continue
        half = HALVES[planned.pool]
        graded = {row["problem_id"] for rows in node.rollouts.values() for row in rows if "correct" in row}
        labels = node.labels_used | graded
        uses += len(labels)
        by_half[half].update(labels)
        wrong_labels = {label for label in labels if half_of(label) != half}
        if wrong_labels:
            faults.append(f"{node.name}: used labels of the other half ({_few(wrong_labels)})")
        wrong_prompts = {problem for problem in _problems_sampled(node) if half_of(problem) != half} - wrong_labels
        if wrong_prompts and files.recipe.data.unlabeled is None and planned.settings.prompts != "every":
            faults.append(f"{node.name}: sampled on problems of the other half ({_few(wrong_prompts)})")
    both = by_half[0] & by_half[1]
    if both:
        faults.append(f"stages on 1H and stages on 2H used the same labels ({_few(both)})")
    sizes = f"{len(by_half[0])} labels in 1H, {len(by_half[1])} in 2H, {len(both)} in both"
    return f"{sizes}; each id's half recomputed for {uses} uses", faults


def dense_without_labels(files: RunFiles) -> Counted:
    faults, nodes, rollouts, uses_shown = [], 0, 0, 0
    privileged = files.recipe.prompt.teacher is not None and files.recipe.prompt.teacher.privileged is not None
    for node, planned in files.nodes.values():
        if isinstance(planned, TrainNode) and planned.settings.needs_labels:
            continue
        nodes += 1
        ledger_rows = [row for row in node.ledger_rows if row["purpose"] in ("train", "measure")]
        checks = sum(row["checks"] for row in ledger_rows)
        labels = {label for row in ledger_rows for label in row["labels"]}
        shown = labels_shown(node.rollouts) if isinstance(planned, TrainNode) else _problems_sampled(node)
        uses_shown += len(labels & shown) if privileged else 0
        if (labels - shown if privileged else labels) or checks:
            faults.append(f"{node.name}: its ledger has {len(labels)} labels and {checks} checks")
        if node.labels_allowed and not privileged:
            faults.append(f"{node.name}: node.json allows it {node.labels_allowed} labels")
        for step, rows in node.rollouts.items():
            rollouts += len(rows)
            if any(field in row for row in rows for field in VERDICT_FIELDS):
                faults.append(f"{node.name}: its rollouts of step {step} carry verdicts")
    seen = f"; {uses_shown} uses of labels that the teacher read in its contexts" if uses_shown else ""
    return f"{nodes} nodes without sparse reward, {rollouts} rollouts without a verdict{seen}", faults


def evals_not_trained(files: RunFiles) -> Counted:
    faults, rollouts = [], 0
    for node, _ in files.nodes.values():
        rollouts += sum(map(len, node.rollouts.values()))
        for use, ids in (("trained on", _problems_sampled(node)), ("used labels of", node.labels_used)):
            if shared := ids & files.eval_ids:
                faults.append(f"{node.name}: {use} {len(shared)} evaluation problems ({_few(shared)})")
    return f"{len(files.eval_ids)} evaluation problems, none in {rollouts} rollouts", faults


def budget_held(files: RunFiles) -> Counted:
    faults = []
    for node, _ in files.nodes.values():
        if node.labels_allowed is not None and len(node.labels_used) > node.labels_allowed:
            faults.append(f"{node.name}: used {len(node.labels_used)} labels, {node.labels_allowed} were allowed")
    total = len(set().union(*(node.labels_used for node, _ in files.nodes.values())))
    budget = files.recipe.labels.budget
    if budget is not None and total > budget:
        faults.append(f"all nodes together used {total} labels; labels.budget is {budget}")
    per_arm = [
        len(set().union(*(files.nodes[name][0].labels_used for name in names if name in files.nodes)))
        for names in files.arms
    ]
    limit = "no budget set" if budget is None else f"budget {budget}"
    return f"{limit}; {total} labels over all arms and seeds, at most {max(per_arm, default=0)} in one", faults


def ledger_agrees(files: RunFiles) -> Counted:
    faults: list[str] = []
    steps = graded = 0
    for node, planned in files.nodes.values():
        if isinstance(planned, TrainNode):
            steps += len(node.train_rows)
            faults += _step_faults(node, planned)
        elif isinstance(planned, CacheNode) and node.train_rows:
            tokens = sum(len(row["completion_ids"]) for row in node.rollouts.get(0, []))
            if sum(row["tokens_sampled"] for row in node.train_rows) != tokens:
                faults.append(f"{node.name}: the ledger's tokens are not those of the cache")
        for when, name, ledger_row, rows in _charged_evaluations(node, planned, files.recipe):
            graded += len(rows)
            faults += [f"{node.name}, evals/{when}/{name}: {fault}" for fault in _eval_faults(ledger_row, rows)]
    return f"{steps} training steps and {graded} graded evaluation texts recounted", faults


def _step_faults(node: Node, planned: TrainNode) -> Iterator[str]:
    """Each step must be in the ledger once, with the labels, checks and tokens of its rollouts."""
    steps = [row["step"] for row in node.train_rows]
    if steps != list(range(1, len(steps) + 1)):
        yield f"{node.name}: the ledger's steps are not 1 to {len(steps)}, each once"
    if set(steps) != node.rollouts.keys():
        yield f"{node.name}: {len(steps)} steps in the ledger, rollouts of {len(node.rollouts)}"
    metrics = {row["step"]: row for row in read_jsonl(node.dir.metrics)}
    if set(steps) != metrics.keys():
        yield f"{node.name}: {len(steps)} steps in the ledger, {len(metrics)} in metrics.jsonl"
    settings = planned.settings
    # Dynamic sampling charges the ledger for groups that it discards, so the ledger may then have more than the rollouts.
    exact = settings.sparse.dynamic_sampling == 0
    for row in node.train_rows:
        where = f"{node.name}, step {row['step']}"
        rollouts = node.rollouts.get(row["step"], [])
        graded = [rollout for rollout in rollouts if "correct" in rollout]
        labels, ids = set(row["labels"]), {r["problem_id"] for r in graded} | labels_shown({0: rollouts})
        if not (labels == ids if exact else labels >= ids):
            yield f"{where}: the ledger's labels are not the rollouts' ({_few(labels ^ ids)})"
        if not (row["checks"] == len(graded) if exact else row["checks"] >= len(graded)):
            yield f"{where}: {row['checks']} checks in the ledger, {len(graded)} verdicts"
        sampled, tokens = row["tokens_sampled"], sum(rollout["tokens"] for rollout in rollouts)
        if settings.on_policy and not (sampled == tokens if exact else sampled >= tokens):
            yield f"{where}: {sampled} tokens in the ledger, {tokens} in the rollouts"
        trained = metrics.get(row["step"], {}).get("tokens_trained")
        if trained != row["tokens_trained"]:
            yield f"{where}: {row['tokens_trained']} tokens trained on, metrics.jsonl has {trained}"


Evaluation = tuple[str, str, dict[str, Any] | None, list[dict[str, Any]]]


def _charged_evaluations(node: Node, planned: PlannedNode, recipe: Recipe) -> Iterator[Evaluation]:
    """Yield (when, name, ledger row or None, graded rows). The ledger has one row per evaluation, in the recipe's order."""
    last = max((row["step"] for row in node.train_rows), default=0)
    names = list(recipe.data.evals)
    charged: dict[tuple[int, str], dict[str, Any]] = {}
    counts: dict[int, int] = {}
    for row in node.ledger_rows:
        if row["purpose"] == "eval":
            index = counts.get(row["step"], 0)
            counts[row["step"]] = index + 1
            charged[row["step"], names[index] if index < len(names) else f"evaluation {index + 1}"] = row
    for when, name, rows in _evaluations(node):
        step = (last if isinstance(planned, TrainNode) else 0) if when == "final" else int(when.removeprefix("step-"))
        yield when, name, charged.pop((step, name), None), rows
    for (step, name), row in charged.items():
        yield f"step {step}", name, row, []


def _eval_faults(ledger_row: dict[str, Any] | None, rows: list[dict[str, Any]]) -> Iterator[str]:
    if ledger_row is None:
        yield "its graded texts are in no row of the ledger"
        return
    if set(ledger_row["labels"]) != {row["problem_id"] for row in rows}:
        yield "the ledger's problems are not those of the graded texts"
    if ledger_row["checks"] != len(rows):
        yield f"{ledger_row['checks']} checks in the ledger, {len(rows)} graded texts"
    if ledger_row["tokens_sampled"] != (tokens := sum(row["tokens"] for row in rows)):
        yield f"{ledger_row['tokens_sampled']} tokens in the ledger, {tokens} in the graded texts"


def ledger_joined(files: RunFiles) -> Counted:
    def lines(path: Path) -> list[str]:
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []

    own = [line for node in files.out.nodes() for line in lines(node.ledger)]
    joined = lines(files.out.ledger)
    faults = [] if own == joined else [f"ledger.jsonl has {len(joined)} rows that are not the nodes' {len(own)}"]
    faults += [
        f"{node.name}: row {number} of its ledger is another node's"
        for node, planned in files.nodes.values()
        for number, row in enumerate(node.ledger_rows, 1)
        if (row["node"], row["seed"]) != (node.name, planned.seed)
    ]
    return f"{len(joined)} rows, the same in both", faults


@dataclass(frozen=True)
class Check:
    """A claim about a run, and the function that recounts it: files -> (evidence, faults)."""

    name: str
    claim: str
    count: Callable[[RunFiles], Counted]


CHECKS = (
    Check("nodes-as-planned", "every node did what the recipe says, on the pool it says", nodes_as_planned),
    Check("halves-apart", "1H and 2H stayed disjoint, by content and by ledger", halves_apart),
    Check("dense-without-labels", "no label reached a dense stage", dense_without_labels),
    Check("evals-not-trained", "no evaluation problem was trained on", evals_not_trained),
    Check("budget", "no more labels were used than the budget allows", budget_held),
    Check("ledger-agrees", "the ledger's counts are those of the rollouts and the graded texts", ledger_agrees),
    Check("ledger-joined", "the joined ledger is the nodes' ledgers", ledger_joined),
)
