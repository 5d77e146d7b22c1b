"""Executors run the nodes of a plan: their input and output, and the one that runs all nodes in this process.

An executor runs the nodes that are not done, parents before children, and returns those that failed. A failed node skips
only its descendants.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.errors import DiskError, HeadwaterError, UserError, error_text
from headwater.runs.display import NodeProgress, ProgressDisplay
from headwater.runs.inputs import RunInputs
from headwater.runs.node import Node, StageNode
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.runs.run_node import run_node
from headwater.storage.files import read_json, write_json
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.training.update import Metrics

PROGRESS_SECONDS = 2.0
"""Least time between two notes of what a node does, for `headwater watch`."""


@dataclass(frozen=True)
class Failure:
    """Why a node failed: a sentence, the exit code, and for unexpected errors the traceback.

    Example: `Failure("teacher_rl, step 3 of 10: the loss is not finite; …", 4)`.
    """

    sentence: str
    code: int
    traceback: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """A HeadwaterError keeps its message and exit code; any other exception has its type's name and code 1."""
        if isinstance(error, HeadwaterError):
            return cls(str(error), error.exit_code)
        return cls(f"{type(error).__name__}: {error_text(error, 400)}", 1, "".join(traceback.format_exception(error)))

    def to_json(self) -> dict[str, Any]:
        """Contents of the node's FAILED file."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Job:
    """Input of an executor.

    arms     requested arms
    todo     nodes that are not done, by name, parents first
    stopped  whether the user asked for a stop: no node starts then, and running ones end at their next step
    """

    plan: Plan
    inputs: RunInputs
    arms: Sequence[str]
    out: RunDir
    todo: Mapping[str, Node]
    progress_display: ProgressDisplay
    stopped: Callable[[], bool]

    @property
    def single(self) -> bool:
        """Whether one arm with one seed was requested, so that its first failure ends the run."""
        return len(self.arms) * len(self.plan.seeds) == 1

    def worker_setup(self) -> dict[str, Any]:
        """What a worker process needs to make the same plan, as JSON."""
        return {
            "path": [entry or os.getcwd() for entry in sys.path],
            "cwd": os.getcwd(),
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "arms": list(self.arms),
            "seeds": list(self.plan.seeds),
            "out": str(self.out.path.resolve()),
        }

    def runnable(self, failures: Mapping[str, Failure]) -> Iterator[str]:
        """Nodes in the plan's order, without descendants of nodes that have failed by then, until a stop is requested."""
        skipped: set[str] = set()
        for name in self.todo:
            if self.stopped():
                return
            if self.parents(name) & (skipped | failures.keys()):
                skipped.add(name)
            else:
                yield name

    def parents(self, name: str) -> set[str]:
        """Names of a node's parents that are not done."""
        return {self.plan.names[parent] for parent in self.todo[name].parents} & self.todo.keys()

    @contextlib.contextmanager
    def show(self, name: str) -> Iterator[NodeProgress]:
        """Show the progress of a node that starts; the node stops when the user asks for it."""
        names = [self.plan.names[node] for node in self.plan.order()]
        title, number = describe(self.todo[name]), names.index(name) + 1
        with self.progress_display.node(title, number, len(names)) as progress:
            yield replace(progress, should_stop=self.stopped, say=self.progress_display.say)

    def fail(self, name: str, failure: Failure) -> None:
        """Write the node's FAILED file, which its next start removes; report it unless the run ends with it anyway."""
        with contextlib.suppress(DiskError):  # a full disk may be why it failed
            write_json(self.out.node(name).failed, failure.to_json())
        if not self.single:
            self.progress_display.say(f"{describe(self.todo[name])} failed: {failure.sentence}")


Executor = Callable[[Job], dict[str, Failure]]
"""Runs `job.todo` and returns the failed nodes. When asked to stop, it returns once no node is running."""


def run_in_process(job: Job) -> dict[str, Failure]:
    """Run the nodes one after the other in this process; with a single arm and seed, up to the first failure.

    Raises KeyboardInterrupt when a node was asked to stop; it has left a checkpoint.
    """
    failures: dict[str, Failure] = {}
    for name in job.runnable(failures):
        try:
            with job.show(name) as progress:
                start_node(job.todo[name], NodeContext(job.plan, job.inputs, job.out, progress))
        except Exception as error:
            failures[name] = Failure.of(error)
            job.fail(name, failures[name])
            if job.single:
                break
    return failures


def start_node(node: Node, context: NodeContext) -> None:
    """Lock the node's folder, remove an earlier FAILED file, and run the node."""
    folder = context.node_dir(node)
    with folder.locked(), recorded_attempt(folder), recorded_progress(folder, context.progress) as progress:
        folder.failed.unlink(missing_ok=True)
        run_node(node, replace(context, progress=progress))


@contextlib.contextmanager
def recorded_attempt(folder: NodeDir) -> Iterator[None]:
    """Record when the node ran and in which process, also where it fails. An attempt that is killed is not recorded."""
    started = time.time()
    try:
        yield
    finally:
        with contextlib.suppress(DiskError, UserError):  # the node, or its own error, matters more
            earlier = list(read_json(folder.attempts)) if folder.attempts.exists() else []
            worker = f"{socket.gethostname()}, process {os.getpid()}"
            write_json(folder.attempts, [*earlier, {"worker": worker, "started": started, "ended": time.time()}])


@contextlib.contextmanager
def recorded_progress(folder: NodeDir, progress: NodeProgress) -> Iterator[NodeProgress]:
    """Progress that also writes what the node does now to a file, for `headwater watch`; the file goes when the node ends.

    It says nothing about results, so it is not synced, and a disk that cannot take it is left to the node's own files.
    """
    work: dict[str, Any] = {"part": "", "done": 0, "total": 0, "unit": "", "first": 0, "started": time.time()}
    written = 0.0

    def write(**changes: Any) -> None:
        nonlocal written
        work.update(changes)
        if "done" not in changes or "total" in changes or time.monotonic() - written > PROGRESS_SECONDS:
            written = time.monotonic()
            with contextlib.suppress(OSError):
                folder.now.parent.mkdir(exist_ok=True)
                folder.now.write_text(json.dumps({**work, "at": time.time()}), encoding="utf-8")

    def start(done: int, total: int, unit: str) -> None:
        progress.start(done, total, unit)
        write(done=done, total=total, unit=unit, first=done, started=time.time())

    def advance(count: int, metrics: Metrics) -> None:
        progress.advance(count, metrics)
        write(done=work["done"] + count)

    def part(title: str) -> None:
        progress.part(title)
        write(part=title)

    try:
        yield replace(progress, start=start, advance=advance, part=part)
    finally:
        with contextlib.suppress(OSError):
            folder.now.unlink(missing_ok=True)


def describe(node: Node) -> str:
    """A node's title for users. Example: `teacher_rl on first half (seed 0)`."""
    where = f" on {node.pool.replace('_', ' ')}" if isinstance(node, StageNode) else ""
    return f"{node.stage}{where} (seed {node.seed})"
