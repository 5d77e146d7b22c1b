"""`headwater watch`: how far a run is, from its files alone. It may run in another terminal, or on what a dead process left.

look(run)   what each node of the plan is doing
frame(it)   the same for a terminal
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater.errors import UserError
from headwater.report.read import is_number
from headwater.report.render import clean
from headwater.report.stage_table import stage_name
from headwater.report.text import duration, plain_table
from headwater.storage.run_dir import NodeDir, RunDir, read_json, read_jsonl
from headwater.storage.untrusted import as_written, read_plan

State = Literal["done", "failed", "at work", "stopped", "waiting"]
MATTERS = ("reward", "informative", "kl_student_teacher", "kl_teacher_student", "entropy", "truncated", "loss")
"""What matters of a step, most first; three of them are shown."""
SHORT = {"kl_student_teacher": "KL(S‖T)", "kl_teacher_student": "KL(T‖S)"}
RECENT = 20
"""Steps whose time says how long the next ones take."""


@dataclass(frozen=True)
class NodeNow:
    """One node. `seconds_left` is None where nothing says how long it will take; `numbers` are of its last step.

    Example: `NodeNow("opd.s0.1a2b3c4d", "On-policy distillation", "student", 0, "at work", 12, 80, 34.0, 120.0,
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


@dataclass(frozen=True)
class Look:
    """A run as it stands. `running` says whether a process is at work on it."""

    name: str
    running: bool
    nodes: tuple[NodeNow, ...]

    @property
    def seconds_left(self) -> float | None:
        """Of the nodes at work and waiting, one after the other; None where one of them is without a guide."""
        left = [node.seconds_left for node in self.nodes if node.state in ("at work", "waiting", "stopped")]
        return None if any(one is None for one in left) else sum(one for one in left if one is not None)

    def written(self) -> dict[str, Any]:
        nodes = [asdict(node) for node in self.nodes]
        return {"recipe": self.name, "running": self.running, "seconds_left": self.seconds_left, "nodes": nodes}


def look(path: Path) -> Look:
    """Raises UserError for a folder that holds no run, and for one whose files are not of a run's shape."""
    run = RunDir(path)
    if not run.plan.exists():
        raise UserError(f"{path}: holds no run of ours (no {run.plan.name} in it)")
    with as_written(path):
        plan = read_plan(run.plan)
        names = list(dict.fromkeys(name for seeds in plan["arms"].values() for run_ in seeds.values() for name in run_))
        running = is_held(run.lock)
        nodes = [_node_now(run.node(name), running) for name in names]
        return Look(clean(str(plan.get("recipe", ""))), running, tuple(_with_guides(nodes, run)))


def _node_now(node: NodeDir, running: bool) -> NodeNow:
    info = read_json(node.info) if node.info.exists() else {}
    rows = list(read_jsonl(node.metrics))
    last = rows[-1] if rows else {}
    step, steps = int(last.get("step", 0)), info.get("steps")
    if node.done.exists():
        state: State = "done"
    elif node.failed.exists():
        state = "failed"
    elif info:
        state = "at work" if running else "stopped"
    else:
        state = "waiting"
    times = [row["seconds"] for row in rows[-RECENT:] if is_number(row.get("seconds"))]
    each = sum(times) / len(times) if times else None
    left = (int(steps) - step) * each if each is not None and steps is not None else None
    objective = str((info.get("settings") or {}).get("objective") or "")
    parts = node.name.split(".")
    return NodeNow(
        node=node.name,
        stage=stage_name(str(info.get("stage") or parts[0]), objective),
        role=str(info.get("role") or ""),
        seed=int(info.get("seed", parts[1].lstrip("s") if len(parts) > 1 else 0)),
        state=state,
        step=step,
        steps=None if steps is None else int(steps),
        steps_a_minute=60.0 / each if each else None,
        seconds_left=0.0 if state in ("done", "failed") else left,
        numbers={key: float(last[key]) for key in [key for key in MATTERS if is_number(last.get(key))][:3]},
        warnings=tuple(clean(str(row["sentence"])) for row in read_jsonl(node.warnings)),
    )


def _with_guides(nodes: list[NodeNow], run: RunDir) -> Iterator[NodeNow]:
    """Nodes that have no steps of their own yet take as long as finished ones of their stage did on average."""
    took: dict[str, list[float]] = {}
    for one in nodes:
        if one.state == "done":
            spent = sum(
                row["seconds"] for row in read_jsonl(run.node(one.node).ledger) if is_number(row.get("seconds"))
            )
            took.setdefault(one.node.split(".")[0], []).append(spent)
    for one in nodes:
        like = took.get(one.node.split(".")[0])
        if one.seconds_left is None and like:
            yield NodeNow(**{**asdict(one), "seconds_left": sum(like) / len(like), "warnings": one.warnings})
        else:
            yield one


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file; asks the system's table of locks, so that nobody who wants it is turned away."""
    if not path.exists():
        return False
    inode = str(path.stat().st_ino)
    try:
        rows = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:  # another system: what is not known to be held counts as at work while its files grow
        return False
    return any(
        words[1] == "FLOCK" and words[5].split(":")[2] == inode for row in rows if len(words := row.split()) >= 8
    )


MARKS: dict[State, tuple[str, str]] = {
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
    "at work": ("▶", "cyan"),
    "stopped": ("‖", "yellow"),
    "waiting": ("·", "dim"),
}


AROUND, WARNINGS = 10, 2
"""Lines of a frame that are no nodes: heads, the sentence for the whole and as many warnings as have room at least."""
URGENT: dict[State, int] = {"at work": 0, "failed": 1, "stopped": 1, "waiting": 2, "done": 3}
"""Which nodes are shown where not all have room: these first."""


def frame(found: Look, height: int | None = None) -> RenderableType:
    """A line a node, a line for the whole, and the warnings by name. With `height`, no more of each than so many lines hold."""
    warnings = [f"! {one.stage}, seed {one.seed}: {warning}" for one in found.nodes for warning in one.warnings]
    room = len(found.nodes) + len(warnings) if height is None else max(3, height - AROUND)
    shown = most_urgent(found.nodes, room)
    told = warnings[-(WARNINGS + room - len(shown)) :]
    table = plain_table(f"{found.name} · {'at work' if found.running else 'nobody at work'}")
    for head in ("", "stage", "seed", "step", "", "a minute", "left", "what matters"):
        table.add_column(
            head,
            no_wrap=head != "what matters" or height is not None,
            justify="right" if head in ("step", "a minute", "left") else "left",
        )
    for one in shown:
        _add(table, one)
    done = sum(one.state == "done" for one in found.nodes)
    left = found.seconds_left
    said = f", {duration(left)} left one after the other" if left is not None else ", time left not known yet"
    said = "" if done == len(found.nodes) else said
    hidden = [(len(found.nodes) - len(shown), "nodes"), (len(warnings) - len(told), "warnings")]
    said += "".join(f"; {count} {what} are not listed here" for count, what in hidden if count)
    return Group(
        table,
        Text(f"{done} of {len(found.nodes)} nodes done{said}"),
        *(Text(warning, style="yellow") for warning in told),
    )


def most_urgent(nodes: Sequence[NodeNow], room: int) -> list[NodeNow]:
    """As many nodes as there is room for, in the order of the plan: those at work first, then failed ones, then what comes next."""
    places = sorted(range(len(nodes)), key=lambda place: URGENT[nodes[place].state])[:room]
    return [nodes[place] for place in sorted(places)]


def _add(table: Table, one: NodeNow) -> None:
    mark, style = MARKS[one.state]
    steps = "–" if not one.steps else f"{one.step}/{one.steps}"
    bar: RenderableType = (
        ProgressBar(one.steps or 1, one.step, width=16) if one.state == "at work" and one.steps else ""
    )
    rate = f"{one.steps_a_minute:.3g}" if one.steps_a_minute and one.state == "at work" else ""
    left = duration(one.seconds_left) if one.seconds_left and one.state != "done" else ""
    numbers = "  ".join(f"{SHORT.get(name, name)} {value:.3g}" for name, value in one.numbers.items())
    numbers += f"  ({one.state})" if one.state in ("failed", "stopped") else ""
    table.add_row(Text(mark, style=style), Text(one.stage), str(one.seed), steps, bar, rate, left, Text(numbers))
