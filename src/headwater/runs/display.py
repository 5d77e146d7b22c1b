"""Interface between a run and its progress display; torch-free, so that the first line appears at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater.errors import StopRequested

if TYPE_CHECKING:
    from headwater.training.update import Metrics

ACCURACY = "accuracy "
"""Prefix of the name of an evaluation set, as the name of its accuracy among a node's metrics."""


@dataclass(frozen=True)
class NodeProgress:
    """Progress of one node; by default it shows nothing and asks for no stop.

    start        (steps already done, total, unit)
    advance      (count, metrics of the step)
    should_stop  whether the user asked for a stop
    warn, say    show a warning, a line
    part         name what is done between steps, such as `measuring C2`; empty when it is over
    """

    start: Callable[[int, int, str], None] = lambda done, total, unit: None
    advance: Callable[[int, Metrics], None] = lambda count, metrics: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda sentence: None
    say: Callable[[str], None] = lambda line: None
    part: Callable[[str], None] = lambda title: None

    def advance_or_stop(self, count: int) -> None:
        """Advance work that leaves no partial files when interrupted. Raises StopRequested when asked to stop."""
        self.advance(count, {})
        self.check_stop()

    def check_stop(self) -> None:
        """Raise StopRequested when asked to stop."""
        if self.should_stop():
            raise StopRequested


StudyProgress = Callable[[int, float | None], None]
"""(nodes done, seconds left or None)"""


@dataclass(frozen=True)
class ProgressDisplay:
    """Shows a run's progress to the user.

    say       show a line
    node      context manager that shows one node (title, its number, number of nodes); several may be open at once
    together  context manager that shows a study with several nodes running (number of nodes)
    task      context manager that shows other work (title); call what it yields with the group and the part in progress
    """

    say: Callable[[str], None]
    node: Callable[[str, int, int], contextlib.AbstractContextManager[NodeProgress]]
    together: Callable[[int], contextlib.AbstractContextManager[StudyProgress]] = lambda total: contextlib.nullcontext(
        lambda done, seconds_left: None
    )
    task: Callable[[str], contextlib.AbstractContextManager[Callable[[str, str], None]]] = lambda title: (
        contextlib.nullcontext(lambda group, part: None)
    )
