"""Status of a run for `headwater watch`, read from its files alone.

Works from another terminal while the run goes on, and on what an interrupted run left behind.

read_status(path)      state, step and remaining time of each node of the plan
status_table(status)   the same as a rich table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater.errors import UserError
from headwater.report.format import duration, plain_table
from headwater.report.render import clean
from headwater.report.stages import stage_name
from headwater.report.study import Node, is_finite_number
from headwater.storage.run_dir import NodeDir, RunDir, read_json, read_jsonl
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

    Example: `NodeStatus("opd.s0.1a2b3c4d", "On-policy distillation", "student", 0, "at work", 12, 80, 34.0, 120.0,
    {"kl_student_teacher": 0.08, …}, ())`.
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
        """Remaining time of all unfinished nodes run one after the other; None if one of them has no estimate."""
        left = [node.seconds_left for node in self.nodes if node.state in ("at work", "waiting", "stopped")]
        return (
            None
            if any(seconds is None for seconds in left)
            else sum(seconds for seconds in left if seconds is not None)
        )

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
        names = dict.fromkeys(name for seeds in plan["arms"].values() for nodes in seeds.values() for name in nodes)
        running = is_locked(run.lock)
        statuses = [_node_status(run.node(name), running) for name in names]
        return RunStatus(clean(str(plan.get("recipe", ""))), running, _with_estimates(statuses, run))


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
    times = [row["seconds"] for row in node.metrics[-RECENT_STEPS:] if is_finite_number(row.get("seconds"))]
    step_seconds = sum(times) / len(times) if times else None
    left = (int(steps) - step) * step_seconds if step_seconds is not None and steps is not None else None
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
        warnings=tuple(clean(str(row["sentence"])) for row in node.warnings),
    )


def _with_estimates(nodes: Sequence[NodeStatus], run: RunDir) -> tuple[NodeStatus, ...]:
    """Estimate nodes without step times by the mean time of the finished nodes of the same stage."""
    finished: dict[str, list[float]] = {}
    for node in nodes:
        if node.state == "done":
            rows = read_jsonl(run.node(node.node).ledger)
            seconds = sum(row["seconds"] for row in rows if is_finite_number(row.get("seconds")))
            finished.setdefault(node.node.split(".")[0], []).append(seconds)
    estimate = {stage: sum(seconds) / len(seconds) for stage, seconds in finished.items()}
    return tuple(
        replace(node, seconds_left=estimate.get(node.node.split(".")[0])) if node.seconds_left is None else node
        for node in nodes
    )


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file. Reads /proc/locks, because trying to lock could turn a run away."""
    if not path.exists():
        return False
    inode = str(path.stat().st_ino)
    try:
        rows = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return False
    return any(
        words[1] == "FLOCK" and words[5].split(":")[2] == inode for row in rows if len(words := row.split()) >= 8
    )


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
MIN_WARNINGS = 2
OTHER_LINES = 8 + MIN_WARNINGS
"""Lines of the table that are not nodes: title, heads, the summary and at least MIN_WARNINGS warnings."""


def status_table(status: RunStatus, height: int | None = None) -> RenderableType:
    """One line per node, a summary line and the warnings. `height` limits the number of lines."""
    warnings = [f"! {node.stage}, seed {node.seed}: {text}" for node in status.nodes for text in node.warnings]
    room = len(status.nodes) + len(warnings) if height is None else max(3, height - OTHER_LINES)
    shown = most_urgent(status.nodes, room)
    shown_warnings = warnings[-(MIN_WARNINGS + room - len(shown)) :]
    table = plain_table(f"{status.name} · {'running' if status.running else 'not running'}")
    for head in ("", "stage", "seed", "step", "", "/min", "left", "metrics"):
        table.add_column(
            head,
            no_wrap=head != "metrics" or height is not None,
            justify="right" if head in ("step", "/min", "left") else "left",
        )
    for node in shown:
        _add_row(table, node)
    summary = f"{status.done} of {len(status.nodes)} nodes done"
    if status.done < len(status.nodes):
        left = status.seconds_left
        summary += ", remaining time unknown" if left is None else f", {duration(left)} left in sequence"
    hidden = [(len(status.nodes) - len(shown), "nodes"), (len(warnings) - len(shown_warnings), "warnings")]
    summary += "".join(f"; {count} {name} are not listed here" for count, name in hidden if count)
    return Group(table, Text(summary), *(Text(warning, style="yellow") for warning in shown_warnings))


def most_urgent(nodes: Sequence[NodeStatus], limit: int) -> list[NodeStatus]:
    """Select at most `limit` nodes by PRIORITY, then by plan order, and return them in plan order."""
    indices = sorted(range(len(nodes)), key=lambda index: PRIORITY[nodes[index].state])[:limit]
    return [nodes[index] for index in sorted(indices)]


def _add_row(table: Table, node: NodeStatus) -> None:
    mark, style = MARKS[node.state]
    at_work = node.state == "at work"
    steps = f"{node.step}/{node.steps}" if node.steps else "–"
    bar: RenderableType = ProgressBar(node.steps, node.step, width=16) if at_work and node.steps else ""
    rate = f"{node.steps_a_minute:.3g}" if at_work and node.steps_a_minute else ""
    left = duration(node.seconds_left) if node.seconds_left and node.state != "done" else ""
    metrics = "  ".join(node.metrics_text) + (f"  ({node.state})" if node.state in ("failed", "stopped") else "")
    table.add_row(Text(mark, style=style), Text(node.stage), str(node.seed), steps, bar, rate, left, Text(metrics))
