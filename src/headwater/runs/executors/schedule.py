"""Where a study stands whose nodes run side by side: which may begin, which are done, which failed, how long the rest will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from headwater.runs.estimate import estimates
from headwater.runs.executors.base import Failure, Job, describe
from headwater.runs.node_context import NodeProgress, StudyProgress

TRIES = 2  # a worker may be killed for want of memory that another one took; a node that kills two is to blame itself
SOON = 0.05  # the share of the work after which the time left is worth saying


class Standing:
    """What has become of a job's nodes so far."""

    def __init__(self, job: Job, stand: StudyProgress) -> None:
        self.job = job
        self.stand = stand
        self.costs = {row.name: row.flops for row in estimates(job.plan, job.inputs)}
        self.waiting = by_longest_chain(job, self.costs)
        self.failures: dict[str, Failure] = {}
        self._parents = {name: job.parents(name) for name in job.todo}
        self._done: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._began = time.perf_counter()
        self._tell()

    def ready(self) -> list[str]:
        """Nodes that may begin now, the one with the most work behind it first."""
        return [name for name in self.waiting if self._parents[name] <= self._done]

    def done(self, name: str) -> None:
        self._done.add(name)
        self._tell()

    def failed(self, name: str, failure: Failure) -> None:
        self.failures[name] = failure
        self.job.fail(name, failure)

    def died(self, name: str, how: str) -> None:
        """The worker that was at a node is gone."""
        self._deaths[name] += 1
        if self._deaths[name] < TRIES:
            self.job.progress_display.say(
                f"{describe(self.job.todo[name])}: its process {how}; it goes on in another one"
            )
            self.waiting.insert(0, name)
        else:
            self.failed(name, Failure(f"its process {how}, for the second time", 1))

    def _tell(self) -> None:
        """Where the study stands; the time left is right if the rest goes as fast as what is done, measured in FLOPs."""
        done = sum(self.costs[name] for name in self._done)
        rest = sum(self.costs[name] for name in self.job.todo if name not in self._done)
        before = len(self.job.plan.order()) - len(self.job.todo)
        known = done > SOON * (done + rest)
        left = (time.perf_counter() - self._began) * rest / done if known else None
        self.stand(before + len(self._done), left)


def relayed(said: Mapping[str, Any], watch: NodeProgress, job: Job) -> bool:
    """Pass on what a node that runs in another process says of its progress (`worker.telling`); whether it was that."""
    if "start" in said:
        watch.start(*said["start"])
    elif "advance" in said:
        watch.advance(said["advance"], said["metrics"])
    elif "warn" in said:
        watch.warn(said["warn"])
    elif "say" in said:
        job.progress_display.say(said["say"])
    else:
        return False
    return True


def by_longest_chain(job: Job, costs: Mapping[str, float]) -> list[str]:
    """The nodes still to be done, the one that the most costly chain of work hangs on first; ties in the plan's order."""
    chain = dict.fromkeys(job.todo, 0.0)
    for name in reversed(list(job.todo)):  # parents come after their children here, so the chain behind a node is known
        chain[name] += costs[name]
        for parent in job.parents(name):
            chain[parent] = max(chain[parent], chain[name])
    return sorted(job.todo, key=lambda name: -chain[name])
