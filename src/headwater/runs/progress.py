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
from typing import TYPE_CHECKING

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
    console = PrintableConsole(stderr=True, quiet=quiet, highlight=False)
    bars = Progress(
        *columns(console.width >= WIDE), console=console, expand=True, transient=True, disable=not console.is_terminal
    )  # in a log it would leave blank lines
    warned: set[str] = set()
    study_state = ""
    to_log = not console.is_terminal

    @contextlib.contextmanager
    def bar(title: str, total: int | None, unit: str) -> Iterator[TaskID]:
        bars.start()  # without effect where another bar is shown
        task = bars.add_task(title, total=total, unit=unit, metrics="")
        try:
            yield task
        finally:
            bars.remove_task(task)
            if not bars.tasks:
                bars.stop()

    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[NodeProgress]:
        head, text, began = f"[{number}/{total}] {title}", "", time.perf_counter()
        logged = Log(head, began)
        with bar(head, None, "") as task:

            def start(done: int, units: int, unit: str) -> None:
                bars.reset(task, total=units, completed=done, unit=unit, metrics=text)
                logged.start(done, units, unit, time.perf_counter())

            def advance(count: int, metrics: Metrics) -> None:
                nonlocal text
                text = metrics_text(metrics) or text
                bars.update(task, advance=count, metrics=text)
                line = logged.advance(count, text, time.perf_counter())
                if to_log and line:
                    say(line)

            def part(name: str) -> None:
                bars.update(task, description=f"{head}: {name}" if name else head)

            yield NodeProgress(start, advance, warn=partial(warn, head), part=part)
        end = f"{head}: {time.perf_counter() - began:.1f} s  {text}{study_state}"
        say(end.rstrip())

    def warn(head: str, warning: str) -> None:
        """Show a warning once, not again for every seed and every time that it begins anew; `watch` and the report list all."""
        without_numbers = re.sub(r"\d[\d.]*", "", warning)
        if without_numbers not in warned:
            warned.add(without_numbers)
            say(f"{head}: warning {warning}")

    @contextlib.contextmanager
    def task(title: str) -> Iterator[Callable[[str, str], None]]:
        began, last_group = time.perf_counter(), ""
        say(f"{title} …")
        with bar(title, None, "") as shown:

            def tell(group: str, part: str) -> None:
                nonlocal last_group
                bars.update(shown, description=f"{title}: {part}")
                if group != last_group:
                    say(f"{title}: {group} …")
                if to_log and log_parts:
                    say(f"{title}: {part}")
                last_group = group

            yield tell
        say(f"{title}: done in {time.perf_counter() - began:.1f} s")

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
        console.print(f"{time.strftime('%H:%M:%S')} {line}" if to_log else line, markup=False, soft_wrap=True)

    return ProgressDisplay(say, node, together, task)


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
