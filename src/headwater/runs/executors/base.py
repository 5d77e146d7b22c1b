"""Running the nodes of a plan: what an executor is handed, what it hands back, and the simplest one.

An executor runs the nodes that are still to be done, parents before children, and returns those that failed. A failed node
takes along only what stands on it. `in_process` runs them one after the other, `processes` side by side; to the pipeline
they are the same.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.errors import DiskError, HeadwaterError
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import NodeContext, NodeProgress, ProgressDisplay
from headwater.runs.plan import Node, Plan
from headwater.runs.run_node import run_node
from headwater.storage.run_dir import RunDir, write_json


@dataclass(frozen=True)
class Failure:
    """Why a node failed: one sentence, the exit code that goes with it, and the traceback of what nobody expected.

    Example: `Failure("teacher_rl, step 3 of 10: the loss is not finite; …", 4)`.
    """

    sentence: str
    code: int
    traceback: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """An expected end speaks for itself; anything else is named, and code 1."""
        if isinstance(error, HeadwaterError):
            return cls(str(error), error.exit_code)
        said = " ".join(str(error).split())
        return cls(f"{type(error).__name__}: {said}"[:400], 1, "".join(traceback.format_exception(error)))

    def written(self) -> dict[str, Any]:
        """What the node's FAILED file holds."""
        held = {"sentence": self.sentence, "code": self.code}
        return held if self.traceback is None else {**held, "traceback": self.traceback}


@dataclass(frozen=True)
class Job:
    """What an executor is handed.

    arms     those that were asked for
    todo     the nodes that are not done, by name, parents first
    stopped  whether the user asked for a stop: no node is begun then, and those at work end at their next step
    """

    plan: Plan
    inputs: RunInputs
    arms: Sequence[str]
    out: RunDir
    todo: Mapping[str, Node]
    progress_display: ProgressDisplay
    stopped: Callable[[], bool]

    @property
    def alone(self) -> bool:
        """Whether one arm with one seed was asked for: there is then no rest that a failure should spare."""
        return len(self.arms) * len(self.plan.seeds) == 1

    @property
    def told(self) -> dict[str, Any]:
        """What another process needs to lay out the same plan."""
        return {
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "arms": list(self.arms),
            "seeds": list(self.plan.seeds),
            "out": str(self.out.path),
        }

    def due(self, failures: Mapping[str, Failure]) -> Iterator[str]:
        """The nodes in the plan's order, without those that stand on one that has failed by then, until a stop is asked for."""
        barred: set[str] = set()
        for name in self.todo:
            if self.stopped():
                return
            if self.parents(name) & (barred | failures.keys()):
                barred.add(name)
            else:
                yield name

    def parents(self, name: str) -> set[str]:
        """The names of the nodes still to be done that a node waits for."""
        return {self.plan.names[parent] for parent in self.todo[name].parents} & self.todo.keys()

    def shown(self, name: str) -> contextlib.AbstractContextManager[NodeProgress]:
        """The narrator's watch over a node that begins."""
        names = [self.plan.names[node] for node in self.plan.order()]
        return self.progress_display.node(describe(self.todo[name]), names.index(name) + 1, len(names))

    def fail(self, name: str, failure: Failure) -> None:
        """Mark a node as failed, and say so where others go on. The mark goes when the node is begun again."""
        with contextlib.suppress(DiskError):  # a full disk may be why it failed
            write_json(self.out.node(name).failed, failure.written())
        if not self.alone:
            self.progress_display.say(f"{describe(self.todo[name])} failed: {failure.sentence}")


Executor = Callable[[Job], dict[str, Failure]]
"""Runs `job.todo` and returns the nodes that failed. Asked to stop, it returns when nothing is at work any more."""


def in_process(job: Job) -> dict[str, Failure]:
    """One node after the other in the plan's order, in this process; of one arm alone, up to the first failure.

    Raises KeyboardInterrupt from a node that was asked to stop; it has left a checkpoint.
    """
    failures: dict[str, Failure] = {}
    for name in job.due(failures):
        try:
            with job.shown(name) as watch:
                run_marked(job.todo[name], NodeContext(job.plan, job.inputs, job.out, watch_of(watch, job)))
        except Exception as error:
            failures[name] = Failure.of(error)
            job.fail(name, failures[name])
            if job.alone:
                break
    return failures


def run_marked(node: Node, context: NodeContext) -> None:
    """Run a node that carries no mark of an earlier failure any more."""
    folder = context.node_dir(node)
    with folder.held():
        folder.failed.unlink(missing_ok=True)
        run_node(node, context)


def watch_of(watch: NodeProgress, job: Job) -> NodeProgress:
    return replace(watch, should_stop=job.stopped, say=job.progress_display.say)


def describe(node: Node) -> str:
    """What a node is called where people read. Example: `teacher_rl on first half (seed 0)`."""
    where = "" if node.pool is None else f" on {node.pool.replace('_', ' ')}"
    return f"{node.stage}{where} (seed {node.seed})"
