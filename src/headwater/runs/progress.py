"""Progress display on stderr: one bar per running node, with rate and time left, and one line per finished node.

Where several nodes run at once, one more bar shows all of them together. A log file has the lines only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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

from headwater.runs.node_context import NodeProgress, ProgressDisplay, StudyProgress
from headwater.training.update import Metrics

SHOWN = ("reward", "informative", "kl_student_teacher", "kl_teacher_student", "loss")
"""Metrics to show, where a step has them."""
WIDE = 110
"""Characters of a line with the longest title, without metrics."""


class Rate(ProgressColumn):
    """Units per second since the bar began; nodes differ too much to have a rate."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed or "left" in task.fields else f"{task.speed:.3g}/s", style="dim")


class TimeLeft(TimeRemainingColumn):
    """Time left as estimated by the schedule, or for the remaining units at the rate so far."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            left = task.fields["left"]
            return Text("-" if left is None else in_words(left), style="cyan")
        return super().render(task)


def progress_display(quiet: bool = False) -> ProgressDisplay:
    """A display on stderr; with `quiet` it shows nothing."""
    console = Console(stderr=True, quiet=quiet, highlight=False)
    bars = Progress(
        *columns(console.width >= WIDE), console=console, expand=True, transient=True, disable=not console.is_terminal
    )  # in a log it would leave blank lines
    open_tasks: set[TaskID] = set()
    study_state = ""

    @contextlib.contextmanager
    def bar(title: str, total: int | None, unit: str) -> Iterator[TaskID]:
        if not open_tasks:
            bars.start()
        task = bars.add_task(title, total=total, unit=unit, metrics="")
        open_tasks.add(task)
        try:
            yield task
        finally:
            bars.remove_task(task)
            open_tasks.remove(task)
            if not open_tasks:
                bars.stop()

    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[NodeProgress]:
        head, text, began = f"[{number}/{total}] {title}", "", time.perf_counter()
        with bar(head, None, "") as task:

            def start(done: int, units: int, unit: str) -> None:
                bars.reset(task, total=units, completed=done, unit=unit, metrics=text)

            def advance(count: int, metrics: Metrics) -> None:
                nonlocal text
                text = metrics_text(metrics) or text
                bars.update(task, advance=count, metrics=text)

            yield NodeProgress(start, advance, lambda: False, lambda warning: say(f"{head}: warning {warning}"))
        say(f"{head}: {time.perf_counter() - began:.1f} s  {text}{study_state}")

    @contextlib.contextmanager
    def together(total: int) -> Iterator[StudyProgress]:
        with bar("all nodes", total, "nodes") as task:
            bars.update(task, left=None)

            def update(done: int, left: float | None) -> None:
                nonlocal study_state
                bars.update(task, completed=done, left=left)
                time_left = "" if left is None else f", {in_words(left)} left"
                study_state = f"  ({done} of {total} nodes done{time_left})"

            yield update

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    return ProgressDisplay(say, node, together)


def columns(wide: bool) -> list[ProgressColumn]:
    """Columns of a progress bar; a narrow terminal has no room for bar, rate and metrics. One column takes the remaining width."""
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    counts = [MofNCompleteColumn(), TextColumn("{task.fields[unit]}")]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeLeft()]
    if not wide:
        return [TextColumn("{task.description}", table_column=rest), *counts, *times]
    metrics = TextColumn("[dim]{task.fields[metrics]}", table_column=rest)
    return [TextColumn("{task.description}"), BarColumn(bar_width=18), *counts, Rate(), *times, metrics]


def in_words(seconds: float) -> str:
    """Example: `about 4 min` for 230 seconds."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


def metrics_text(metrics: Metrics) -> str:
    """The metrics of SHOWN that the step has."""
    return " ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics)[:72]
