"""Run nodes on a Ray cluster: `--executor ray`, extra `ray`. No other module imports Ray.

Every node is a Ray task with the resources of `compute.ray`. Ray places it, and restarts it in another process when its process
dies. A task makes the plan from the recipe and resumes from the node's last checkpoint, so the output folder must be on a file
system that all machines share. Messages go through one actor, the board.
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
from typing import Any

from headwater.config.compute import Resources
from headwater.errors import UserError, error_text
from headwater.runs.executors.base import Failure, Job, describe
from headwater.runs.executors.remote import Message, RemoteNode, Worker
from headwater.runs.executors.schedule import Schedule
from headwater.runs.node import Node

LISTEN_SECONDS = 0.2
"""How often the driver reads the board, and a node asks it whether to stop."""


class Board:
    """Messages of the nodes, and whether they should stop: a Ray actor without resources."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, Message]] = []
        self._stop = False

    def post(self, name: str, message: Message) -> None:
        self._messages.append((name, message))

    def drain(self) -> list[tuple[str, Message]]:
        """All messages since the last call, with the names of their nodes."""
        messages, self._messages = self._messages, []
        return messages

    def request_stop(self) -> None:
        self._stop = True

    def stopped(self) -> bool:
        return self._stop


def run_on_ray(job: Job) -> dict[str, Failure]:
    """Run nodes on the cluster that RAY_ADDRESS names, or on one started here with `compute.workers` CPUs (all by default).

    Raises UserError where Ray is not installed, does not answer, or has no machine with the resources that a node needs.
    """
    with connected(job) as ray, job.progress_display.together(len(job.plan.order())) as study_progress:
        refuse_impossible(job, ray.cluster_resources())
        board = start_board(ray)
        schedule, setup = Schedule(job, study_progress), json.dumps(job.worker_setup())
        running: dict[Any, RemoteNode] = {}
        stop_requested = False
        try:
            while True:
                if not job.stopped():
                    for name in schedule.ready():
                        schedule.start(name)
                        task = task_for(ray, job, job.todo[name])
                        running[task.remote(setup, name, board)] = RemoteNode(schedule, name)
                elif not stop_requested:
                    stop_requested = True
                    board.request_stop.remote()
                if not running:
                    return schedule.failures
                ended, _ = ray.wait(list(running), timeout=LISTEN_SECONDS)
                nodes = {node.name: node for node in running.values()}
                for name, message in ray.get(board.drain.remote()):
                    if name in nodes:
                        nodes[name].receive(message)
                for task in ended:
                    running.pop(task).receive(result_of(ray, job, task))
        finally:
            for task, node in running.items():
                ray.cancel(task, force=True)  # the node's state is on disk
                node.close(KeyboardInterrupt())


def start_board(ray: Any) -> Any:
    """Start the Board actor on the driver's node, so that losing another node does not lose it."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        node_id=ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


def result_of(ray: Any, job: Job, task: Any) -> Message:
    """The message that an ended task returned, or a failure where Ray lost its process."""
    try:
        message: Message = ray.get(task)
    except ray.exceptions.RayError as error:
        tries = 1 + job.plan.recipe.compute.ray.retries
        reason = f"{type(error).__name__}: {error_text(error)}"
        return {"failure": Failure(f"its process was lost {tries} times ({reason})", 1).to_json()}
    return message


@contextlib.contextmanager
def connected(job: Job) -> Iterator[Any]:
    """Connect the library to a cluster, and disconnect at the end unless this process was connected before."""
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
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
        with contextlib.suppress(ValueError):  # only the main thread may set signal handlers
            signal.signal(signal.SIGTERM, handler)  # Ray replaces the handler that stops a run
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--executor ray: {address or 'a local cluster'} does not answer ({error})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def resources_of(job: Job, node: Node) -> Resources:
    """Resources of the node's stage, or those of every node; `gpus` is set."""
    settings = job.plan.recipe.compute.ray
    resources = settings.stages.get(node.stage, settings.node)
    gpus = float(job.plan.recipe.compute.device == "cuda") if resources.gpus is None else resources.gpus
    return resources.model_copy(update={"gpus": gpus})


def task_for(ray: Any, job: Job, node: Node) -> Any:
    """The Ray task of a node, with its resources."""
    resources = resources_of(job, node)
    return ray.remote(run_on_worker).options(
        name=describe(node),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=None if resources.memory_gib is None else int(resources.memory_gib * 2**30),
        max_retries=job.plan.recipe.compute.ray.retries,
    )


def refuse_impossible(job: Job, cluster: dict[str, float]) -> None:
    """Raises UserError for resources that the whole cluster lacks: such a task would wait forever."""
    for node in job.todo.values():
        resources = resources_of(job, node)
        for field, needed, available in (
            ("cpus", resources.cpus, cluster.get("CPU", 0.0)),
            ("gpus", resources.gpus or 0.0, cluster.get("GPU", 0.0)),
            ("memory_gib", resources.memory_gib or 0.0, cluster.get("memory", 0.0) / 2**30),
        ):
            if needed > available:
                raise UserError(
                    f"compute.ray: {describe(node)} asks for {field} {needed:g}, and the cluster has {available:g}"
                )


# On the cluster -------------------------------------------------------------------------------------------------------


def run_on_worker(setup: str, name: str, board: Any) -> Message:
    """Run one node in a process of the cluster; returns the message about its end."""
    import ray

    posted: list[Any] = []

    def send(message: Message) -> None:
        posted[:] = [board.post.remote(name, message)]

    try:
        end = worker_of(setup).run(name, send, polled(lambda: bool(ray.get(board.stopped.remote()))))
    except Exception as error:
        return {"broken": name, "failure": Failure.of(error).to_json()}
    ray.get(posted)  # the last message is on the board before the task ends
    return end


@cache
def worker_of(setup: str) -> Worker:
    """The plan and inputs, made once in a process that runs several nodes."""
    fields = json.loads(setup)
    sys.path += [entry for entry in fields["path"] if entry not in sys.path]
    with contextlib.suppress(OSError):  # relative paths of a recipe start where the run was started
        os.chdir(fields["cwd"])
    return _open_for_process.enter_context(Worker.prepare(fields))


_open_for_process = contextlib.ExitStack()


def polled(stopped: Callable[[], bool]) -> Callable[[], bool]:
    """Call `stopped` at most every LISTEN_SECONDS, and not again once it was true."""
    last, answer = 0.0, False

    def should_stop() -> bool:
        nonlocal last, answer
        if not answer and time.monotonic() - last > LISTEN_SECONDS:
            last, answer = time.monotonic(), stopped()
        return answer

    return should_stop
