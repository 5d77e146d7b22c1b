"""Progress display on stderr: one bar per running node, with rate and time left, and one line per finished node.

Where several nodes run at once, one more bar shows all of them together. A log file has lines with the time of day: one a minute
for each running node, and one when it is finished.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from headwater.printing import PrintableConsole
from headwater.runs.display import ACCURACY, NodeProgress, ProgressDisplay, StudyProgress

if TYPE_CHECKING:
    from headwater.training.update import Metrics

REWARDED = ("reward", "informative", "grad_norm")
"""Metrics of a step with rewards, whose loss says little: it is near 0 by construction."""
DISTILLED = ("kl_student_teacher", "kl_teacher_student", "loss")
"""Metrics of any other step; the first two of these that it has are shown."""
LABELS = {
    "informative": "informative groups",
    "grad_norm": "gradient norm",
    "kl_student_teacher": "KL(student‖teacher)",
    "kl_teacher_student": "KL(teacher‖student)",
}
LOG_SECONDS = 60.0
"""Time between two lines of a running node in a log file."""
FIRST_SHARE = 0.02
"""Share of the units that must be done before the time left is estimated: most completions of a batch end long after its first."""
WIDE = 110
"""Characters of a line with the longest title, without metrics."""


class Rate(ProgressColumn):
    """Units per second since the bar began; nodes differ too much to have a rate."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed or "left" in task.fields else f"{task.speed:.3g}/s", style="dim")


class Count(MofNCompleteColumn):
    """Units done of all; nothing for work that is not counted."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class TimeLeft(TimeRemainingColumn):
    """Time left as estimated by the schedule, or for the remaining units at the rate so far; nothing for work that is not counted."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            left = task.fields["left"]
            return Text.assemble("left ", ("-" if left is None else in_words(left), "cyan"))
        return Text() if task.total is None else Text.assemble("left ", super().render(task))


def progress_display(quiet: bool = False, log_parts: bool = False) -> ProgressDisplay:
    """A display on stderr; with `quiet` it shows nothing.

    log_parts  whether a log file has a line for every part of a task, not only for every group of parts
    """
    bars = Bars(PrintableConsole(stderr=True, quiet=quiet, highlight=False), log_parts)
    return ProgressDisplay(bars.say, bars.node, bars.together, bars.task)


class Bars:
    """The bars on a terminal, or the lines of a log file."""

    def __init__(self, console: PrintableConsole, log_parts: bool) -> None:
        self.console, self.log_parts, self.to_log = console, log_parts, not console.is_terminal
        # Disabled in a log, where it would leave blank lines.
        self.shown = Progress(
            *columns(console.width >= WIDE), console=console, expand=True, transient=True, disable=self.to_log
        )
        self.warned: set[str] = set()
        self.study_state = ""

    def say(self, line: str) -> None:
        clock = f"{time.strftime('%H:%M:%S')} " if self.to_log else ""
        self.console.print(clock + line, markup=False, soft_wrap=True)

    def warn(self, head: str, warning: str) -> None:
        """Show a warning once, not again for every seed and every time that it begins anew; `watch` and the report list all."""
        without_numbers = re.sub(r"\d[\d.]*", "", warning)
        if without_numbers not in self.warned:
            self.warned.add(without_numbers)
            self.say(f"{head}: warning {warning}")

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
        """Show a bar; the function that is yielded updates it, or with `restart` begins it anew."""
        self.shown.start()  # without effect where another bar is shown
        task = self.shown.add_task(title, total=total, unit=unit, metrics="")

        def change(restart: bool = False, **fields: Any) -> None:
            (self.shown.reset if restart else self.shown.update)(task, **fields)

        try:
            yield change
        finally:
            self.shown.remove_task(task)
            if not self.shown.tasks:
                self.shown.stop()

    @contextlib.contextmanager
    def node(self, title: str, number: int, total: int) -> Iterator[NodeProgress]:
        head, text, began = f"[{number}/{total}] {title}", "", time.perf_counter()
        log = Log(head, began)
        with self.bar(head) as change:

            def start(done: int, units: int, unit: str) -> None:
                change(restart=True, total=units, completed=done, unit=unit, metrics=text)
                log.start(done, units, unit, time.perf_counter())

            def advance(count: int, metrics: Metrics) -> None:
                nonlocal text
                text = metrics_text(metrics) or text
                change(advance=count, metrics=text)
                line = log.advance(count, text, time.perf_counter())
                if self.to_log and line:
                    self.say(line)

            def part(name: str) -> None:
                change(description=f"{head}: {name}" if name else head)

            yield NodeProgress(start, advance, warn=partial(self.warn, head), part=part)
        self.say(f"{head}: {time.perf_counter() - began:.1f} s  {text}{self.study_state}".rstrip())

    @contextlib.contextmanager
    def task(self, title: str) -> Iterator[Callable[[str, str], None]]:
        began, last_group = time.perf_counter(), ""
        self.say(f"{title} …")
        with self.bar(title) as change:

            def tell(group: str, part: str) -> None:
                nonlocal last_group
                change(description=f"{title}: {part}")
                if group != last_group:
                    self.say(f"{title}: {group} …")
                if self.to_log and self.log_parts:
                    self.say(f"{title}: {part}")
                last_group = group

            yield tell
        self.say(f"{title}: done in {time.perf_counter() - began:.1f} s")

    @contextlib.contextmanager
    def together(self, total: int) -> Iterator[StudyProgress]:
        with self.bar("all nodes", total, "nodes") as change:
            change(left=None)

            def update(done: int, left: float | None) -> None:
                change(completed=done, left=left)
                time_left = "" if left is None else f", {in_words(left)} left"
                self.study_state = f"  ({done} of {total} nodes done{time_left})"

            yield update


@dataclass
class Log:
    """The lines of a running node in a log file.

    began  seconds on the clock of `start` and `advance`, when the units now counted began
    """

    head: str
    began: float
    done: int = 0
    total: int = 0
    unit: str = ""
    first: int = 0
    last_line: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_line = self.began

    def start(self, done: int, total: int, unit: str, now: float) -> None:
        self.done = self.first = done
        self.total, self.unit, self.began = total, unit, now

    def advance(self, count: int, metrics: str, now: float) -> str | None:
        """The line to write at this moment, such as `[3/6] opd: step 12 of 80, about 4 min left  loss 0.1`; None if none is due."""
        self.done += count
        if now - self.last_line < LOG_SECONDS or self.done == self.total:
            return None
        self.last_line = now
        done = self.done - self.first
        known = done > 0 and done >= FIRST_SHARE * (self.total - self.first)
        left = f", {in_words((self.total - self.done) * (now - self.began) / done)} left" if known else ""
        return f"{self.head}: {self.done} of {self.total} {self.unit}{left}  {metrics}".rstrip()


def columns(wide: bool) -> list[ProgressColumn]:
    """Columns of a progress bar; a narrow terminal has no room for bar, rate and metrics. One column takes the remaining width."""
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    counts = [Count(), TextColumn("{task.fields[unit]}")]
    times = [TimeElapsedColumn(table_column=Column(min_width=7, no_wrap=True)), TimeLeft()]
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
    """Example: `reward 0.875  informative groups 25 %  gradient norm 1.2`."""
    known = [name for name in (REWARDED if "reward" in metrics else DISTILLED) if name in metrics]
    shown = known if "reward" in metrics else known[:2]
    shown += [name for name in metrics if name.startswith(ACCURACY)]
    return "  ".join(
        f"{LABELS.get(name, name)} {100 * metrics[name]:.0f} %"
        if name == "informative" or name.startswith(ACCURACY)
        else f"{LABELS.get(name, name)} {metrics[name]:.3g}"
        for name in shown
    )
