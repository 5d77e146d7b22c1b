"""The executor that runs a study's nodes on a Ray cluster: `--executor ray`, extra `ray`. Ray itself is imported here alone.

Every node is a Ray task with the resources of `compute.ray`; Ray decides where it runs, and begins it again in another process when
its own one dies. A task lays out the plan from the recipe, as a worker process does (`worker`), and goes on from the node's last
checkpoint, so the output folder must stand on a file system that all machines share. What it says goes through one actor, the board.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from headwater.config.recipe import Recipe, Resources
from headwater.errors import FailedError, UserError
from headwater.runs.executors.base import Failure, Job, describe, run_marked
from headwater.runs.executors.local_worker import telling
from headwater.runs.executors.schedule import Standing, relayed
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Node, Plan
from headwater.runs.setup import prepared
from headwater.storage.run_dir import RunDir

LISTEN_SECONDS = 0.2
"""How often the driver looks at the board, and a node whether it was asked to stop."""


class Board:
    """What nodes have to say, and whether they should stop: a Ray actor of no resources."""

    def __init__(self) -> None:
        self._said: list[tuple[str, dict[str, Any]]] = []
        self._stop = False

    def tell(self, name: str, message: dict[str, Any]) -> None:
        self._said.append((name, message))

    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        """Everything since the last time."""
        found, self._said = self._said, []
        return found

    def ask_to_stop(self) -> None:
        self._stop = True

    def stopped(self) -> bool:
        return self._stop


def on_ray(job: Job) -> dict[str, Failure]:
    """The executor. RAY_ADDRESS names the cluster; without it one is started on this machine, of `compute.workers` CPUs or all.

    Raises UserError where Ray is not installed, does not answer, or has no machine with the resources that a node asks for.
    """
    with connected(job) as ray, job.progress_display.together(len(job.plan.order())) as stand:
        refuse_impossible(job, ray.cluster_resources())
        board = ray.remote(num_cpus=0)(Board).remote()
        with contextlib.closing(_Driver(ray, board, Standing(job, stand), setup_of(job))) as driver:
            while driver.turn():
                pass
            return driver.standing.failures


@contextlib.contextmanager
def connected(job: Job) -> Iterator[Any]:
    """The library, connected to a cluster; where this process was not before, it is let go of at the end."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: Ray is not installed; pip install 'headwater[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    here: dict[str, Any] = {} if address else {"num_cpus": job.plan.recipe.compute.workers, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run leaves the cluster
    heard = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
        with contextlib.suppress(ValueError):  # off the main thread there are no signals to hear
            signal.signal(signal.SIGTERM, heard)  # Ray puts a handler of its own in place of the one that stops a run
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--executor ray: {address or 'a local cluster'} does not answer ({error})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def wanted(job: Job, node: Node) -> Resources:
    """What a node asks of the cluster: the stage's own resources, or those of every node."""
    asked = job.plan.recipe.compute.ray
    return asked.stages.get(node.stage, asked.node)


def gpus_of(resources: Resources, job: Job) -> float:
    return resources.gpus if resources.gpus is not None else float(job.plan.recipe.compute.device == "cuda")


def refuse_impossible(job: Job, there: dict[str, float]) -> None:
    """Raises UserError for resources that the whole cluster does not have: a task that asks for them would wait for ever."""
    for node in job.todo.values():
        resources = wanted(job, node)
        for what, asked, held in (
            ("cpus", resources.cpus, there.get("CPU", 0.0)),
            ("gpus", gpus_of(resources, job), there.get("GPU", 0.0)),
            ("memory_gib", resources.memory_gib or 0.0, there.get("memory", 0.0) / 2**30),
        ):
            if asked > held:
                raise UserError(
                    f"compute.ray: {describe(node)} asks for {what} {asked:g}, and the cluster has {held:g}"
                )


def setup_of(job: Job) -> dict[str, Any]:
    """What another process needs to lay out the same plan."""
    return {
        "path": [entry or os.getcwd() for entry in sys.path],
        "cwd": os.getcwd(),
        **job.told,
        "out": str(job.out.path.resolve()),
    }


class _Driver:
    """Hands out nodes to the cluster, and shows what it hears of them."""

    def __init__(self, ray: Any, board: Any, standing: Standing, setup: dict[str, Any]) -> None:
        self.ray, self.board, self.standing, self.job = ray, board, standing, standing.job
        self.setup = json.dumps(setup)
        self.shown: dict[str, _Shown] = {}
        self.tasks: dict[Any, str] = {}
        self.asked = False

    def turn(self) -> bool:
        """Hand out, wait a moment, listen; False when nothing is at work any more."""
        if not self.job.stopped():
            for name in self.standing.ready():
                self.standing.waiting.remove(name)
                self.tasks[self._begin(name)] = name
        elif not self.asked:
            self.asked = True
            self.board.ask_to_stop.remote()
        if not self.tasks:
            return False
        ended, _ = self.ray.wait(list(self.tasks), timeout=LISTEN_SECONDS)
        for name, message in self.ray.get(self.board.heard.remote()):
            self._hear(name, message)
        for task in ended:
            self._end(task, self.tasks.pop(task))
        return True

    def _begin(self, name: str) -> Any:
        node = self.job.todo[name]
        resources = wanted(self.job, node)
        return (
            self.ray.remote(run_one)
            .options(
                name=describe(node),
                num_cpus=resources.cpus,
                num_gpus=gpus_of(resources, self.job),
                memory=None if resources.memory_gib is None else int(resources.memory_gib * 2**30),
                max_retries=self.job.plan.recipe.compute.ray.retries,
            )
            .remote(self.setup, name, self.board)
        )

    def _hear(self, name: str, message: dict[str, Any]) -> None:
        if "begun" in message:
            if name in self.shown:
                self.shown.pop(name).close(KeyboardInterrupt())
                self.job.progress_display.say(
                    f"{describe(self.job.todo[name])}: its process is gone; it goes on in another one"
                )
            self.shown[name] = _Shown(self.job, name)
        elif name in self.shown:
            self.shown[name].hear(message)

    def _end(self, task: Any, name: str) -> None:
        shown = self.shown.pop(name, None) or _Shown(self.job, name)
        try:
            found = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            tries = 1 + self.job.plan.recipe.compute.ray.retries
            said = " ".join(str(error).split())[:200]
            found = {
                "failure": {
                    "sentence": f"its process was lost {tries} times ({type(error).__name__}: {said})",
                    "code": 1,
                }
            }
        if found.get("stopped"):
            shown.close(KeyboardInterrupt())
        elif found["failure"] is None:
            self.standing.done(name)
            shown.close(None)
        else:
            failure = Failure(**found["failure"])
            shown.close(FailedError(failure.sentence, failure.code))
            if found.get("broken") and failure.code == UserError.exit_code:
                raise UserError(failure.sentence)
            self.standing.failed(name, failure)

    def close(self) -> None:
        """At once, wherever the nodes are: all that counts is on disk."""
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        for shown in self.shown.values():
            shown.close(KeyboardInterrupt())


class _Shown:
    """The narrator's watch over a node that runs elsewhere."""

    def __init__(self, job: Job, name: str) -> None:
        self._job = job
        self._open = contextlib.ExitStack()
        self._watch = self._open.enter_context(job.shown(name))

    def hear(self, message: dict[str, Any]) -> None:
        relayed(message, self._watch, self._job)

    def close(self, error: BaseException | None) -> None:
        self._open.__exit__(None if error is None else type(error), error, None)


# On the cluster -------------------------------------------------------------------------------------------------------


def run_one(setup: str, name: str, board: Any) -> dict[str, Any]:
    """Run one node in a process of the cluster: {"failure": null or what failed}, or {"stopped": true}."""
    import ray

    told: list[Any] = []

    def tell(message: dict[str, Any]) -> None:
        told[:] = [board.tell.remote(name, message)]

    try:
        plan, inputs, out = laid_out(setup)
        nodes = {plan.names[node]: node for node in plan.order()}
        if name not in nodes:
            raise UserError(f"{name}: data, models or code changed while the study ran; run it again")
    except Exception as error:
        return {"failure": Failure.of(error).written(), "broken": True}
    watch, flush = telling(tell, asked(lambda: bool(ray.get(board.stopped.remote()))))
    tell({"begun": name})
    found: dict[str, Any] = {"failure": None}
    try:
        if watch.should_stop():
            raise KeyboardInterrupt
        run_marked(nodes[name], NodeContext(plan, inputs, out, watch))
    except KeyboardInterrupt:
        found = {"stopped": True}
    except Exception as error:
        found = {"failure": Failure.of(error).written()}
    flush()
    ray.get(told)  # the last word is on the board before the node counts as ended
    return found


@cache
def laid_out(setup: str) -> tuple[Plan, RunInputs, RunDir]:
    """The plan and what its nodes share, once in the life of a process, which runs several nodes."""
    held = json.loads(setup)
    sys.path += [entry for entry in held["path"] if entry not in sys.path]
    with contextlib.suppress(OSError):  # paths of a recipe are meant from where it was started
        os.chdir(held["cwd"])
    open_as_long_as_the_process = contextlib.ExitStack()
    plan, inputs = open_as_long_as_the_process.enter_context(
        prepared(Recipe.model_validate(held["recipe"]), held["arms"], held["seeds"])
    )
    _held.append(open_as_long_as_the_process)
    return plan, inputs, RunDir(Path(held["out"]))


_held: list[contextlib.ExitStack] = []


def asked(stopped: Callable[[], bool]) -> Callable[[], bool]:
    """The same question, put at most every LISTEN_SECONDS; once it was answered with yes it is not put again."""
    last, answer = 0.0, False

    def found() -> bool:
        nonlocal last, answer
        if not answer and time.monotonic() - last > LISTEN_SECONDS:
            last, answer = time.monotonic(), stopped()
        return answer

    return found
