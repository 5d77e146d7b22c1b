"""The executor that runs independent nodes side by side on one machine, in worker processes.

Workers are started by `subprocess`, so that no start method, main module or thread matters. Each lays out the same plan from
the recipe once (`worker`), then runs the nodes that it is handed by name. A line of JSON is a message:

    to a worker      {"run": NODE}; {"stop": true} asks for an end at the next step; the end of the pipe ends the process
    from a worker    {"begun": NODE}; {"start": [done, total, unit]}, {"advance": count, "metrics": {…}}, {"warn": sentence} of it;
                     {"say": LINE};
                     {"ended": NODE, "failure": null or {…}}, {"stopped": NODE}, {"broken": {…}} when it cannot work at all
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwater.config.recipe import Compute
from headwater.errors import FailedError, UserError
from headwater.runs.executors.base import Failure, Job, in_process
from headwater.runs.executors.schedule import Standing, relayed
from headwater.runs.node_context import NodeProgress

LISTEN_SECONDS = 0.2  # how soon a request to stop is passed on
# A worker takes its parent's import path before it imports anything of ours.
BOOT = (
    "import sys, json; setup = json.loads(sys.stdin.buffer.readline()); sys.path[:] = setup['path']; "
    "from headwater.runs.executors.local_worker import serve; serve(setup)"
)


def local(job: Job) -> dict[str, Failure]:
    """The executor of one machine: in this process, or in as many others as the recipe, the cores and the plan allow."""
    count = workers_for(job)
    return in_process(job) if count == 1 else Processes(count)(job)


def workers_for(job: Job) -> int:
    """`compute.workers` or what the cores allow, but never more than there are ends to run towards side by side.

    Example: the arms `bridge` and `direct_grpo` at 3 seeds have 6 ends; one arm at one seed has 1.
    """
    inner = {parent for name in job.todo for parent in job.parents(name)}
    ends = sum(node.kind == "train" and name not in inner for name, node in job.todo.items())
    return max(1, min(allowed(job.plan.recipe.compute, job.inputs.device, cores()), ends))


def allowed(compute: Compute, device: torch.device, cores: int) -> int:
    """Worker processes that a machine with so many cores bears. Example: 8 cores at 2 threads each are 4."""
    if compute.workers is not None:
        return compute.workers
    return 1 if device.type == "cuda" or compute.threads is None else max(1, cores // compute.threads)


def cores() -> int:
    """CPU cores that this process may use: its affinity, and its container's quota where there is one."""
    found = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        found = min(found, int(quota) / int(period))  # a quota of "max" is no number: no limit
    return max(1, int(found))


@dataclass(frozen=True)
class Processes:
    """An executor with so many long-lived workers; each is started when there is a first node for it.

    A worker that dies is noticed, and its node goes on in a fresh one, once. None outlives this process.

    command  what starts a worker

    Raises UserError when a worker does not come to the same plan, such as when the data were changed meanwhile.
    """

    workers: int
    command: Sequence[str] = (sys.executable, "-c", BOOT)

    def __call__(self, job: Job) -> dict[str, Failure]:
        pool: list[_Worker] = []
        with job.progress_display.together(len(job.plan.order())) as stand:
            standing = Standing(job, stand)
            try:
                while True:
                    if not job.stopped():
                        self._hand_out(standing, pool)
                    busy = [worker for worker in pool if worker.name is not None]
                    if not busy:
                        return standing.failures
                    self._listen(standing, pool, busy)
            finally:
                for worker in pool:
                    worker.end()

    def _listen(self, standing: Standing, pool: list[_Worker], busy: Sequence[_Worker]) -> None:
        if standing.job.stopped():
            for worker in busy:
                worker.ask_to_stop()
        heard, _, _ = select.select(busy, [], [], LISTEN_SECONDS)
        for worker in heard:
            worker.listen(standing)
            if worker.dead:
                pool.remove(worker)

    def _hand_out(self, standing: Standing, pool: list[_Worker]) -> None:
        for name in standing.ready():
            idle = next((worker for worker in pool if worker.name is None and worker.alive()), None)
            if idle is None:
                for dead in [worker for worker in pool if worker.name is None]:
                    dead.end()
                    pool.remove(dead)
                if len(pool) == self.workers:
                    return
                idle = _Worker(self.command, standing.job)
                pool.append(idle)
            standing.waiting.remove(name)
            idle.begin(name)


class _Worker:
    """The parent's end of one worker process, and of the node that it is at."""

    def __init__(self, command: Sequence[str], job: Job) -> None:
        self.name: str | None = None
        self.dead = False
        self._job = job
        self._asked = False
        self._heard = b""
        self._shown = contextlib.ExitStack()
        self._watch = NodeProgress(lambda done, total, unit: None, lambda count, metrics: None, lambda: False)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's to pass on
        )
        self._tell({"path": [entry or os.getcwd() for entry in sys.path], **job.told})

    def fileno(self) -> int:
        """What `select` waits for."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def alive(self) -> bool:
        return self._process.poll() is None

    def begin(self, name: str) -> None:
        self.name = name
        self._tell({"run": name})

    def ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            self._tell({"stop": True})

    def listen(self, standing: Standing) -> None:
        """Take in what the worker has to say; sets `dead` when it will say nothing more."""
        data = os.read(self.fileno(), 65536)
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            self._hear(json.loads(line), standing)
        if not data:
            self.dead = True
            name, self.name = self.name, None
            how = ended_how(self._process.wait())
            self._close(KeyboardInterrupt())
            if name is not None and not standing.job.stopped():
                standing.died(name, how)

    def _hear(self, said: dict[str, Any], standing: Standing) -> None:
        assert self.name is not None
        if "begun" in said:  # it may have taken a while to get ready
            self._watch = self._shown.enter_context(self._job.shown(self.name))
        elif "broken" in said:
            failure = Failure(**said["broken"])
            if failure.code == UserError.exit_code:
                raise UserError(failure.sentence)
            raise RuntimeError(f"a worker process could not begin: {failure.traceback or failure.sentence}")
        elif not relayed(said, self._watch, self._job):
            name, self.name = self.name, None
            if "stopped" in said:
                self._close(KeyboardInterrupt())
            elif said["failure"] is None:
                standing.done(name)
                self._close(None)
            else:
                failure = Failure(**said["failure"])
                self._close(FailedError(failure.sentence, failure.code))
                standing.failed(name, failure)

    def _close(self, error: BaseException | None) -> None:
        """Leave the narrator's watch over the node as if it had been run here, with or without an error."""
        self._shown.__exit__(None if error is None else type(error), error, None)

    def end(self) -> None:
        """At once, wherever it is: all that counts is on disk."""
        self._process.kill()
        self._process.wait()
        self._close(KeyboardInterrupt())
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows itself when it is listened to
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()


def ended_how(code: int) -> str:
    """Example: -9 is `was killed by SIGKILL`, which the system also sends for want of memory; 1 is `ended with code 1`."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")
