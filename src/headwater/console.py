"""What the user sees while something runs: lines, and a progress bar with rate and time left. All of it on stderr."""

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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from headwater.pipeline import Narrator
from headwater.train import Metrics
from headwater.workplace import Watch

SHOWN = ("reward", "informative", "kl_student_teacher", "kl_teacher_student", "loss")


class Rate(ProgressColumn):
    """Units a second since the bar began."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g}/s", style="dim")


def narrator(quiet: bool = False) -> Narrator:
    console = Console(stderr=True, quiet=quiet, highlight=False)

    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[Watch]:
        head = f"[{number}/{total}] {title}"
        began = time.perf_counter()
        last: dict[str, str] = {"unit": "", "facts": ""}
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=18), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[facts]}"),
            console=console, transient=True, disable=not console.is_terminal,  # in a log it would leave blank lines
        ) as bar:  # fmt: skip
            task = bar.add_task(head, total=None, unit="", facts="")

            def start(done: int, units: int, unit: str) -> None:
                bar.reset(task, total=units, completed=done, unit=unit, facts=last["facts"])

            def advance(count: int, metrics: Metrics) -> None:
                facts = facts_of(metrics) or last["facts"]
                last["facts"] = facts
                bar.update(task, advance=count, facts=facts)

            yield Watch(start, advance, lambda: False)
        seconds = time.perf_counter() - began
        console.print(f"{head}: {seconds:.1f} s  {last['facts']}", markup=False, soft_wrap=True)

    say: Callable[[str], None] = lambda line: console.print(line, markup=False, soft_wrap=True)  # noqa: E731
    return Narrator(say, node)


def facts_of(metrics: Metrics) -> str:
    """The few numbers worth a line: those of SHOWN that the step measured."""
    return " ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics)[:72]
