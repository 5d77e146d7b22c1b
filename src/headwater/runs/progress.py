"""What the user sees while something runs: lines, and progress bars with rate and time left. All of it on stderr.

A line for each node at work; where several are, one more for all of them together. In a log file only the lines that stay:
one for each node that ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from headwater.runs.node_context import NodeProgress, ProgressDisplay
from headwater.training.update import Metrics

SHOWN = ("reward", "informative", "kl_student_teacher", "kl_teacher_student", "loss")
WIDE = 110  # characters: a line with its longest title, without the facts


class Rate(ProgressColumn):
    """Units a second since the bar began; nodes are too unlike each other to have a rate."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed or "left" in task.fields else f"{task.speed:.3g}/s", style="dim")


class Left(TimeRemainingColumn):
    """Time left: what was said of it, or else the units left at the rate so far."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            left = task.fields["left"]
            return Text("-" if left is None else in_words(left), style="cyan")
        return super().render(task)


def progress_display(quiet: bool = False) -> ProgressDisplay:
    console = Console(stderr=True, quiet=quiet, highlight=False)
    bars = Progress(
        *columns(console.width >= WIDE), console=console, expand=True, transient=True, disable=not console.is_terminal
    )  # in a log it would leave blank lines
    shown: set[TaskID] = set()
    standing = ""

    @contextlib.contextmanager
    def line(title: str, total: int | None, unit: str) -> Iterator[TaskID]:
        if not shown:
            bars.start()
        task = bars.add_task(title, total=total, unit=unit, facts="")
        shown.add(task)
        try:
            yield task
        finally:
            bars.remove_task(task)
            shown.remove(task)
            if not shown:
                bars.stop()

    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[NodeProgress]:
        head, facts, began = f"[{number}/{total}] {title}", "", time.perf_counter()
        with line(head, None, "") as task:

            def start(done: int, units: int, unit: str) -> None:
                bars.reset(task, total=units, completed=done, unit=unit, facts=facts)

            def advance(count: int, metrics: Metrics) -> None:
                nonlocal facts
                facts = facts_of(metrics) or facts
                bars.update(task, advance=count, facts=facts)

            yield NodeProgress(start, advance, lambda: False, lambda said: say(f"{head}: warning {said}"))
        say(f"{head}: {time.perf_counter() - began:.1f} s  {facts}{standing}")

    @contextlib.contextmanager
    def together(total: int) -> Iterator[Callable[[int, float | None], None]]:
        with line("all nodes", total, "nodes") as task:
            bars.update(task, left=None)

            def stand(done: int, left: float | None) -> None:
                nonlocal standing
                bars.update(task, completed=done, left=left)
                said = "" if left is None else f", {in_words(left)} left"
                standing = f"  ({done} of {total} nodes done{said})"

            yield stand

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    return ProgressDisplay(say, node, together)


def columns(wide: bool) -> list[ProgressColumn]:
    """Of a progress line; a narrow terminal has no room for the bar, the rate and the facts. One column takes what is left."""
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    counts = [MofNCompleteColumn(), TextColumn("{task.fields[unit]}")]
    times = [TimeElapsedColumn(), TextColumn("left"), Left()]
    if not wide:
        return [TextColumn("{task.description}", table_column=rest), *counts, *times]
    facts = TextColumn("[dim]{task.fields[facts]}", table_column=rest)
    return [TextColumn("{task.description}"), BarColumn(bar_width=18), *counts, Rate(), *times, facts]


def in_words(seconds: float) -> str:
    """Example: `about 4 min` for 230 seconds."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


def facts_of(metrics: Metrics) -> str:
    """The few numbers worth a line: those of SHOWN that the step measured."""
    return " ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics)[:72]
