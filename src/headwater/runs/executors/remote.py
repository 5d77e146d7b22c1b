"""Run a node in another process: messages from the worker, and how the driver shows and records them.

A message is a JSON object. While a node runs: {"begun": NODE}, and the arguments of the functions of `NodeProgress`:
{"start": [done, total, unit]}, {"advance": [count, metrics]}, {"warn": [sentence]}, {"say": [line]}. At its end: {"done": NODE},
{"stopped": NODE}, {"failed": NODE, "failure": {…}}, or {"broken": NODE, "failure": {…}} where the worker could not make the same plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.config.recipe import Recipe
from headwater.errors import FailedError, UserError
from headwater.runs.display import NodeProgress
from headwater.runs.executors.base import Failure, describe, start_node
from headwater.runs.executors.schedule import Schedule
from headwater.runs.inputs import RunInputs
from headwater.runs.node import Node
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.runs.setup import prepared, recorded_day
from headwater.storage.run_dir import RunDir
from headwater.training.update import Metrics

Message = dict[str, Any]
Send = Callable[[Message], None]

SEND_SECONDS = 0.1
"""Minimum time between two progress messages of a node."""

# In the worker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """The plan and inputs of a worker process, which runs nodes by name."""

    plan: Plan
    inputs: RunInputs
    out: RunDir

    @classmethod
    @contextlib.contextmanager
    def prepare(cls, setup: dict[str, Any]) -> Iterator[Worker]:
        """Make the driver's plan from `Job.worker_setup`. Raises UserError."""
        recipe, out = Recipe.model_validate(setup["recipe"]), RunDir(Path(setup["out"]))
        with prepared(recipe, setup["arms"], setup["seeds"], recorded_day(out)) as (plan, inputs):
            yield cls(plan, inputs, out)

    def node(self, name: str) -> Node:
        """Node of that name. Raises UserError if this process has made another plan."""
        node = next((node for node in self.plan.order() if self.plan.names[node] == name), None)
        if node is None:
            raise UserError(f"{name}: data, models or code changed while the study ran; run it again")
        return node

    def run(self, name: str, send: Send, should_stop: Callable[[], bool]) -> Message:
        """Run a node and send its progress; returns the message about its end. Raises UserError for an unknown node."""
        node = self.node(name)
        progress, flush = sending_progress(send, should_stop)
        try:
            if should_stop():
                raise KeyboardInterrupt
            send({"begun": name})
            start_node(node, NodeContext(self.plan, self.inputs, self.out, progress))
        except KeyboardInterrupt:
            if not should_stop():
                raise
            return {"stopped": name}
        except Exception as error:
            return {"failed": name, "failure": Failure.of(error).to_json()}
        flush()
        return {"done": name}


def sending_progress(send: Send, should_stop: Callable[[], bool]) -> tuple[NodeProgress, Callable[[], None]]:
    """Progress that is sent in few messages, and a function that sends what is left."""
    count, metrics, sent = 0, {}, 0.0  # type: int, Metrics, float

    def start(done: int, total: int, unit: str) -> None:
        flush()
        send({"start": [done, total, unit]})

    def advance(more: int, step_metrics: Metrics) -> None:
        nonlocal count, metrics
        count, metrics = count + more, step_metrics or metrics
        if time.monotonic() - sent > SEND_SECONDS:
            flush()

    def flush() -> None:
        nonlocal count, metrics, sent
        if count:
            send({"advance": [count, metrics]})
        count, metrics, sent = 0, {}, time.monotonic()

    def warn(sentence: str) -> None:
        send({"warn": [sentence]})

    def say(line: str) -> None:
        send({"say": [line]})

    return NodeProgress(start, advance, should_stop, warn, say), flush


# In the driver ---------------------------------------------------------------------------------------------------------


class RemoteNode:
    """A node that runs in another process: shows its progress and tells the schedule how it ended."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.name = name
        self._schedule = schedule
        self._job = schedule.job
        self._display = contextlib.ExitStack()
        self._progress: NodeProgress | None = None

    def receive(self, message: Message) -> bool:
        """Handle a message; True when the node has ended. Raises UserError when the worker has come to another plan."""
        if "begun" in message:
            if self._progress is not None:
                self.close(KeyboardInterrupt())
                self._job.progress_display.say(
                    f"{describe(self._job.todo[self.name])}: its process died; resuming it in another process"
                )
            self._progress = self._display.enter_context(self._job.show(self.name))
        elif "done" in message:
            self._schedule.mark_done(self.name)
            self.close(None)
        elif "stopped" in message:
            self.close(KeyboardInterrupt())
        elif "failure" in message:
            failure = Failure(**message["failure"])
            self.close(FailedError(failure.sentence, failure.code))
            if "broken" in message and failure.code == UserError.exit_code:
                raise UserError(failure.sentence)
            self._schedule.mark_failed(self.name, failure)
        elif self._progress is not None:
            for name, arguments in message.items():
                getattr(self._progress, name)(*arguments)
        return bool(message.keys() & {"done", "stopped", "failure"})

    def close(self, error: BaseException | None) -> None:
        """Close the progress display as if the node had run in this process and had raised `error`."""
        self._progress = None
        self._display.__exit__(None if error is None else type(error), error, None)
