"""Schedule of nodes that run in parallel: which may start, which are done or failed, estimated time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from headwater.runs.display import StudyProgress
from headwater.runs.estimate import estimates
from headwater.runs.executors.base import Failure, Job, describe

TRIES = 2  # another node may have used up the memory; a node that loses two workers is the cause itself
SHOW_TIME_LEFT_FROM = 0.05  # share of the work after which the estimate is worth showing


class Schedule:
    """State of a job's nodes."""

    def __init__(self, job: Job, study_progress: StudyProgress) -> None:
        self.job = job
        self.failures: dict[str, Failure] = {}
        self._flops = {row.name: row.flops for row in estimates(job.plan, job.inputs)}
        self._waiting = critical_path_first(job, self._flops)
        self._parents = {name: job.parents(name) for name in job.todo}
        self._done: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._began = time.perf_counter()
        self._study_progress = study_progress
        self._show()

    def ready(self) -> list[str]:
        """Nodes that may start now, the one with the most work behind it first."""
        return [name for name in self._waiting if self._parents[name] <= self._done]

    def start(self, name: str) -> None:
        self._waiting.remove(name)

    def mark_done(self, name: str) -> None:
        self._done.add(name)
        self._show()

    def mark_failed(self, name: str, failure: Failure) -> None:
        self.failures[name] = failure
        self.job.fail(name, failure)

    def worker_died(self, name: str, how: str) -> None:
        """Requeue the node of a dead worker once, then count it as failed. `how` is what `exit_reason` says."""
        self._deaths[name] += 1
        if self._deaths[name] < TRIES:
            node = describe(self.job.todo[name])
            self.job.progress_display.say(f"{node}: its process {how}; resuming it in another process")
            self._waiting.insert(0, name)
        else:
            self.mark_failed(name, Failure(f"its process {how}, for the second time", 1))

    def _show(self) -> None:
        """Show how many nodes are done, and the time left if the rest runs at the FLOP rate so far."""
        done = sum(self._flops[name] for name in self._done)
        rest = sum(self._flops[name] for name in self.job.todo if name not in self._done)
        before = len(self.job.plan.order()) - len(self.job.todo)
        known = done > SHOW_TIME_LEFT_FROM * (done + rest)
        seconds_left = (time.perf_counter() - self._began) * rest / done if known else None
        self._study_progress(before + len(self._done), seconds_left)


def critical_path_first(job: Job, flops: Mapping[str, float]) -> list[str]:
    """Nodes that are not done, by the FLOPs of the longest chain of work that starts with them; ties in the plan's order."""
    chain = dict.fromkeys(job.todo, 0.0)
    for name in reversed(list(job.todo)):  # children come first in this order, so the chain behind a node is known
        chain[name] += flops[name]
        for parent in job.parents(name):
            chain[parent] = max(chain[parent], chain[name])
    return sorted(job.todo, key=lambda name: -chain[name])
