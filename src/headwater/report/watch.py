"""Status of a run for `headwater watch`, read from its files alone.

Works from another terminal while the run goes on, and on what an interrupted run left behind.

read_status(path)      state, step and remaining time of each node of the plan
status_table(status)   the same as a rich table
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from headwater.config.arms import BASE_MODELS
from headwater.config.recipe import Recipe
from headwater.errors import UserError
from headwater.report.audit import planned_nodes
from headwater.report.format import duration, plain_table
from headwater.report.render import clean
from headwater.report.stages import stage_name
from headwater.report.study import Node, finite_values, is_finite_number
from headwater.runs.node import Node as PlannedNode
from headwater.runs.node import StageNode, TrainNode
from headwater.storage.files import is_locked, read_json, read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan, refuse_malformed_files

State = Literal["done", "failed", "at work", "stopped", "waiting"]
KEY_METRICS = ("reward", "informative", "kl_student_teacher", "kl_teacher_student", "entropy", "truncated", "loss")
"""Metrics of the last step by importance; the first three that a stage has are shown."""
METRIC_LABELS = {"kl_student_teacher": "KL(S‖T)", "kl_teacher_student": "KL(T‖S)"}
RECENT_STEPS = 20
"""Steps over which the time per step is averaged."""


@dataclass(frozen=True)
class NodeStatus:
    """Status of one node. `seconds_left` is None if it cannot be estimated; `numbers` are metrics of the last step.

    pool  what it trains on or samples from, in words; empty if it trains nothing, and where the recipe cannot be read
    arms  the arms that it is part of
    warnings  sentences of the guards, and of a failed node why it failed
    work  what a running node does besides its steps; empty otherwise. Example: `12 of 40 completions`, `measuring C2`

    Example: `NodeStatus("opd.s0.1a2b3c4d", "On-policy distillation", "student", 0, "at work", 12, 80, 34.0, 120.0,
    {"kl_student_teacher": 0.08, …}, (), "all prompts", ("bridge", "warmup_only"))`.
    """

    node: str
    stage: str
    role: str
    seed: int
    state: State
    step: int
    steps: int | None
    steps_a_minute: float | None
    seconds_left: float | None
    numbers: dict[str, float]
    warnings: tuple[str, ...]
    pool: str = ""
    arms: tuple[str, ...] = ()
    work: str = ""

    @property
    def metrics_text(self) -> list[str]:
        """Example: `["reward 0.812", "KL(S‖T) 0.0106"]`."""
        return [f"{METRIC_LABELS.get(name, name)} {value:.3g}" for name, value in self.numbers.items()]


@dataclass(frozen=True)
class RunStatus:
    """Status of a run. `running` says whether a process is working on it."""

    name: str
    running: bool
    nodes: tuple[NodeStatus, ...]

    @property
    def seconds_left(self) -> float | None:
        """Remaining time of all unfinished nodes, with as many at once as now; None if one of them has no estimate."""
        left = [node.seconds_left for node in self.nodes if node.state in ("at work", "waiting", "stopped")]
        known = [seconds for seconds in left if seconds is not None]
        return None if len(known) < len(left) else sum(known) / max(1, self.at_work)

    @property
    def at_work(self) -> int:
        return sum(node.state == "at work" for node in self.nodes)

    @property
    def done(self) -> int:
        return sum(node.state == "done" for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        nodes = [asdict(node) for node in self.nodes]
        return {"recipe": self.name, "running": self.running, "seconds_left": self.seconds_left, "nodes": nodes}


def read_status(path: Path) -> RunStatus:
    """Read the status of a run directory. Raises UserError for a folder without a run and for malformed files."""
    run = RunDir(path)
    if not run.plan.exists():
        raise UserError(f"{path}: holds no run ({run.plan.name} is missing)")
    with refuse_malformed_files(path):
        plan = read_plan(run.plan)
        arms: dict[str, tuple[str, ...]] = {}
        for arm, by_seed in plan["arms"].items():
            for name in dict.fromkeys(name for nodes in by_seed.values() for name in nodes):
                arms[name] = (*arms.get(name, ()), clean(arm))
        planned, running = _planned_nodes(run, plan["arms"]), is_locked(run.lock)
        statuses = [
            replace(_node_status(run.node(name), running), pool=_pool(planned.get(name)), arms=arms[name])
            for name in arms
        ]
        flops = {name: float(value) for name, value in plan.get("flops", {}).items()}
        return RunStatus(clean(str(plan.get("recipe", ""))), running, _with_estimates(statuses, run, flops))


def _planned_nodes(run: RunDir, arms: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, PlannedNode]:
    """The nodes as the recipe plans them, by name; none where this version cannot read the recipe or plans other nodes."""
    nodes: dict[str, PlannedNode] = {}
    try:
        recipe = Recipe.model_validate(read_json(run.recipe))
        for arm, by_seed in arms.items():
            for seed, names in by_seed.items():
                nodes |= dict(zip(names, planned_nodes(arm, recipe, int(seed)), strict=True))
    except (OSError, ValueError, UserError):
        return {}
    return nodes


def _pool(node: PlannedNode | None) -> str:
    """What a node trains on or samples from. Example: `all labels` for RL, `all prompts` for OPD, `first half`."""
    if not isinstance(node, StageNode):
        return ""
    labels = node.settings.needs_labels and isinstance(node, TrainNode)
    return {"all": "all labels" if labels else "all prompts"}.get(node.pool, node.pool.replace("_", " "))


def _node_status(folder: NodeDir, running: bool) -> NodeStatus:
    info = read_json(folder.info) if folder.info.exists() else {}
    node = Node(folder.name, folder, folder.done.exists(), info)
    last = node.metrics[-1] if node.metrics else {}
    step, steps = int(last.get("step", 0)), info.get("steps")
    if node.done:
        state: State = "done"
    elif folder.failed.exists():
        state = "failed"
    elif info:
        state = "at work" if running else "stopped"
    else:
        state = "waiting"
    times = finite_values(node.metrics[-RECENT_STEPS:], "seconds")
    step_seconds = sum(times) / len(times) if times else None
    left = (int(steps) - step) * step_seconds if step_seconds is not None and steps is not None else None
    work = _work(folder) if state == "at work" else Work()
    left = left if work.left is None else work.left
    if steps is None and work.total:
        step, steps = work.done, work.total
    _, *rest = node.name.split(".")
    return NodeStatus(
        node=node.name,
        stage=stage_name(node.stage, node.objective),
        role=node.role,
        seed=int(info.get("seed", rest[0].lstrip("s") if rest else 0)),
        state=state,
        step=step,
        steps=None if steps is None else int(steps),
        steps_a_minute=60.0 / step_seconds if step_seconds else None,
        seconds_left=0.0 if state in ("done", "failed") else left,
        numbers={key: float(last[key]) for key in [key for key in KEY_METRICS if is_finite_number(last.get(key))][:3]},
        warnings=tuple(clean(str(row["sentence"])) for row in (*node.warnings, node.failure) if row is not None),
        work=work.text,
    )


@dataclass(frozen=True)
class Work:
    """What a node does besides its steps: in words, units done and in all, seconds until that is done."""

    text: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None


def _work(folder: NodeDir) -> Work:
    """Nothing where the node has not begun, trains, or its file is just being written."""
    try:
        now = json.loads(folder.now.read_text(encoding="utf-8"))
        done, total, first = int(now["done"]), int(now["total"]), int(now["first"])
        seconds, part, unit = float(now["at"]) - float(now["started"]), clean(str(now["part"])), clean(str(now["unit"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Work()
    if part or unit in ("", "steps"):
        return Work(part)
    kind = unit.split()[0]
    verb = "evaluating" if kind == "completions" else "making"
    left = seconds / (done - first) * (total - done) if done > first else None
    return Work(f"{verb} {done} of {total} {kind}", done, total, left)


def _with_estimates(nodes: Sequence[NodeStatus], run: RunDir, flops: Mapping[str, float]) -> tuple[NodeStatus, ...]:
    """Estimate nodes without step times.

    By the mean time of the finished nodes of the same stage, else by the node's estimated FLOPs at the rate of all steps and
    nodes so far.
    """
    finished: dict[str, list[float]] = {}
    worked_seconds = worked_flops = 0.0
    for node in nodes:
        if node.state == "done":
            seconds = sum(finite_values(read_jsonl(run.node(node.node).ledger), "seconds"))
            finished.setdefault(node.node.split(".")[0], []).append(seconds)
            share = 1.0
        elif node.steps and node.steps_a_minute:
            seconds, share = 60.0 * node.step / node.steps_a_minute, node.step / node.steps
        else:
            continue
        if node.node in flops:
            worked_seconds, worked_flops = worked_seconds + seconds, worked_flops + share * flops[node.node]
    estimate = {stage: sum(seconds) / len(seconds) for stage, seconds in finished.items()}

    def whole(node: NodeStatus) -> float | None:
        stage = node.node.split(".")[0]
        if stage in estimate:
            return estimate[stage]
        return flops[node.node] * worked_seconds / worked_flops if node.node in flops and worked_flops > 0 else None

    return tuple(replace(node, seconds_left=whole(node)) if node.seconds_left is None else node for node in nodes)


# The table for the terminal -------------------------------------------------------------------------------------------

MARKS: dict[State, tuple[str, str]] = {
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
    "at work": ("▶", "cyan"),
    "stopped": ("‖", "yellow"),
    "waiting": ("·", "dim"),
}
PRIORITY: dict[State, int] = {"at work": 0, "failed": 1, "stopped": 1, "waiting": 2, "done": 3}
"""Which nodes are listed first if there is no room for all."""
HEADS = ("", "stage", "pool", "arms", "seed", "step", "left")
UNKNOWN = "unknown yet"
BAR, METRICS = 16, 30
"""Characters of a bar, and of metrics that it leaves room for."""
MIN_WARNINGS = 2
OTHER_LINES = 8 + MIN_WARNINGS
"""Lines of the table that are not nodes: title, heads, the summary and at least MIN_WARNINGS warnings."""


def status_table(status: RunStatus, height: int | None = None, width: int = 110) -> RenderableType:
    """One line per node, a summary line and the warnings. `height` limits the number of lines, `width` the bars and metrics."""
    warnings = [f"! {node.stage}, seed {node.seed}: {text}" for node in status.nodes for text in node.warnings]
    room = len(status.nodes) + len(warnings) if height is None else max(3, height - OTHER_LINES)
    shown = most_urgent(status.nodes, room)
    shown_warnings = warnings[-(MIN_WARNINGS + room - len(shown)) :]
    arms = dict.fromkeys(arm for node in status.nodes for arm in node.arms if arm not in BASE_MODELS)
    title = f"{status.name} · {'running' if status.running else 'not running'}"
    table = plain_table(f"{title} · arm {next(iter(arms))}" if len(arms) == 1 else title)
    rows = [_cells(node) for node in shown]
    heads = [head for head in HEADS if head != "arms" or len(arms) > 1]
    left_over = width - sum(2 + max(map(len, (head, *(row[head] for row in rows)))) for head in heads)
    has_metrics, has_bars = left_over >= len("metrics"), left_over >= BAR + METRICS
    for head in heads:
        right = head in ("step", "left")
        table.add_column(head, no_wrap=head != "stage" or height is not None, justify="right" if right else "left")
    for head in (*[""] * has_bars, *["metrics"] * has_metrics):
        table.add_column(head, no_wrap=True)
    for node, row in zip(shown, rows, strict=True):
        cells: list[RenderableType] = [Text(row[head], style="" if head else MARKS[node.state][1]) for head in heads]
        if has_bars:
            at_work = node.state == "at work" and node.steps
            cells.append(ProgressBar(node.steps, node.step, width=BAR) if at_work else "")
        if has_metrics:
            cells.append(_fitting(node, left_over - (BAR + 2) * has_bars - 1))
        table.add_row(*cells)
    summary = f"{status.done} of {len(status.nodes)} nodes done"
    failed = sum(node.state == "failed" for node in status.nodes)
    summary += f", {failed} failed" if failed else ""
    if status.done + failed < len(status.nodes):
        left = status.seconds_left
        summary += f", time left: {UNKNOWN if left is None else duration(left)}"
        summary += f" with {status.at_work} nodes at once" if left is not None and status.at_work > 1 else ""
    hidden = [(len(status.nodes) - len(shown), "nodes"), (len(warnings) - len(shown_warnings), "warnings")]
    summary += "".join(f"; {count} {name} are not listed here" for count, name in hidden if count)
    return Group(table, Text(summary), *(Text(warning, style="yellow") for warning in shown_warnings))


def most_urgent(nodes: Sequence[NodeStatus], limit: int) -> list[NodeStatus]:
    """Select at most `limit` nodes by PRIORITY, then by plan order, and return them in plan order."""
    indices = sorted(range(len(nodes)), key=lambda index: PRIORITY[nodes[index].state])[:limit]
    return [nodes[index] for index in sorted(indices)]


def _cells(node: NodeStatus) -> dict[str, str]:
    """The cells of a node under HEADS."""
    arms = [arm for arm in node.arms if arm not in BASE_MODELS]
    more = f" +{len(arms) - 1}" if len(arms) > 1 else ""
    left = UNKNOWN if node.seconds_left is None else duration(node.seconds_left) if node.seconds_left else ""
    steps = f"{node.step}/{node.steps}" if node.steps else "–"
    cells = (MARKS[node.state][0], node.stage, node.pool, "".join(arms[:1]) + more, str(node.seed), steps, left)
    return dict(zip(HEADS, cells, strict=True))


def _fitting(node: NodeStatus, room: int) -> str:
    """The state of a node that does not work, else what it does or its steps per minute, then as many of its metrics as have room."""
    rate = f"{node.steps_a_minute:.3g}/min" if node.state == "at work" and node.steps_a_minute else ""
    text = f"({node.state})" if node.state in ("failed", "stopped") else node.work or rate
    for metric in node.metrics_text:
        longer = f"{text}  {metric}" if text else metric
        text = longer if len(longer) <= room else text
    return text
