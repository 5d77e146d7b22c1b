"""Run nodes on this machine: in this process, or independent ones in parallel in worker processes.

Workers are started by `subprocess`, so the caller's start method, main module and threads do not matter. Each line of JSON on a
pipe is a message: {"run": NODE} and {"stop": true} (end at the next step) to a worker, those of `remote` from it. A worker
makes the plan once, runs the nodes that it is sent, and ends when its input is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from headwater.config.compute import Compute
from headwater.runs.executors.base import Failure, Job, run_in_process
from headwater.runs.executors.remote import Message, RemoteNode, Worker
from headwater.runs.executors.schedule import Schedule
from headwater.runs.node import TrainNode

LISTEN_SECONDS = 0.2  # delay at most until a requested stop is passed on
# A worker takes over its parent's import path before it imports headwater.
BOOT = (
    "import sys, json; setup = json.loads(sys.stdin.buffer.readline()); sys.path[:] = setup['path']; "
    "from headwater.runs.executors.local import serve; serve(setup)"
)


def run_in_workers(
    job: Job,
    workers: int | None = None,
    command: Sequence[str] = (sys.executable, "-c", BOOT),
    gpus: Sequence[str] | None = None,
) -> dict[str, Failure]:
    """Run nodes in long-lived worker processes, or with one worker in this process.

    workers  None for what the recipe, the cores and the plan allow (`worker_count`)
    command  starts a worker process
    gpus     as CUDA_VISIBLE_DEVICES names them; each worker sees one of them. None for those that this process sees

    A node whose worker dies is run once more, in a new worker. No worker outlives this process. Raises UserError when a
    worker comes to another plan, for instance because the data changed meanwhile.
    """
    limit = workers or worker_count(job)
    if limit == 1:
        return run_in_process(job)
    pool: list[_WorkerProcess] = []
    gpus = visible_gpus(job.inputs.device, os.environ) if gpus is None else gpus
    if 0 < len(gpus) < limit:
        job.progress_display.say(f"{limit} workers share {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")
    with job.progress_display.together(len(job.plan.order())) as study_progress:
        schedule = Schedule(job, study_progress)
        try:
            while True:
                for name in schedule.ready() if not job.stopped() else ():
                    worker = _idle_worker(pool)
                    if worker is None:
                        if len(pool) == limit:
                            break
                        gpu = least_used(gpus, [other.gpu for other in pool])
                        worker = _WorkerProcess(command, job.worker_setup(), gpu)
                        pool.append(worker)
                    schedule.start(name)
                    worker.run(RemoteNode(schedule, name))
                busy = [worker for worker in pool if worker.node is not None]
                if not busy:
                    return schedule.failures
                if job.stopped():
                    for worker in busy:
                        worker.request_stop()
                readable, _, _ = select.select(busy, [], [], LISTEN_SECONDS)
                for worker in readable:
                    if not worker.read(schedule):
                        pool.remove(worker)
        finally:
            for worker in pool:
                worker.kill()


def _idle_worker(pool: list[_WorkerProcess]) -> _WorkerProcess | None:
    """A living worker without a node; dead ones leave the pool."""
    for worker in [worker for worker in pool if worker.node is None]:
        if worker.alive():
            return worker
        worker.kill()
        pool.remove(worker)
    return None


def worker_count(job: Job) -> int:
    """`compute.workers` or what the cores allow, but at most one per last trained node of an arm.

    Example: the arms `bridge` and `direct_grpo` at 3 seeds have 6 last nodes; one arm at one seed has 1.
    """
    parents = {parent for name in job.todo for parent in job.parents(name)}
    last = sum(isinstance(node, TrainNode) and name not in parents for name, node in job.todo.items())
    return max(1, min(worker_limit(job.plan.recipe.compute, job.inputs.device, cores()), last))


def worker_limit(compute: Compute, device: torch.device, cores: int) -> int:
    """Most worker processes; 1 on a GPU or without compute.threads. Example: 4 for 8 cores at 2 threads each."""
    if compute.workers is not None:
        return compute.workers
    return 1 if device.type == "cuda" or compute.threads is None else max(1, cores // compute.threads)


def visible_gpus(device: torch.device, environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process sees, each as a value of CUDA_VISIBLE_DEVICES; none if the run does not use GPUs.

    Entries that are set already (numbers, UUIDs, MIG ids) stay as they are.
    """
    if device.type != "cuda":
        return []
    count = torch.cuda.device_count()  # CUDA ignores what follows an entry that names no device
    entries = environment.get("CUDA_VISIBLE_DEVICES")
    return (
        [entry.strip() for entry in entries.split(",")][:count] if entries else [str(index) for index in range(count)]
    )


def least_used(gpus: Sequence[str], used: Sequence[str | None]) -> str | None:
    """The first GPU with the fewest workers, where `used` are the workers' GPUs; None without GPUs."""
    return min(gpus, key=used.count, default=None)


def cores() -> int:
    """CPU cores that this process may use: its affinity, limited by its container's quota."""
    count = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        count = min(count, int(quota) / int(period))  # a quota of "max" is no number: no limit
    return max(1, int(count))


class _WorkerProcess:
    """A worker process, the node that it runs, and the only GPU that it sees (None for all)."""

    def __init__(self, command: Sequence[str], setup: dict[str, Any], gpu: str | None) -> None:
        self.node: RemoteNode | None = None
        self.gpu = gpu
        self._stop_requested = False
        self._unread = b""
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=None if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            start_new_session=True,  # this process decides what Ctrl-C does to workers
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._send(setup)

    def fileno(self) -> int:
        """For `select`."""
        return self._output.fileno()

    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, node: RemoteNode) -> None:
        self.node = node
        self._send({"run": node.name})

    def request_stop(self) -> None:
        if not self._stop_requested:
            self._stop_requested = True
            self._send({"stop": True})

    def read(self, schedule: Schedule) -> bool:
        """Handle the messages that have arrived; False when the worker is dead."""
        data = os.read(self.fileno(), 65536)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if self.node is not None and self.node.receive(json.loads(line)):
                self.node = None
        if data:
            return True
        reason = exit_reason(self._process.wait())
        if self.node is not None:
            self.node.close(KeyboardInterrupt())
            if not schedule.job.stopped():
                schedule.worker_died(self.node.name, reason)
        return False

    def kill(self) -> None:
        """Kill the process wherever it is: the node's state is on disk."""
        self._process.kill()
        self._process.wait()
        if self.node is not None:
            self.node.close(KeyboardInterrupt())
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `read` notices a dead worker
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()


def exit_reason(code: int) -> str:
    """Example: 1 is `ended with code 1`; -9 is `was killed by SIGKILL`, which the system also sends when memory runs out."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")


# In the worker ---------------------------------------------------------------------------------------------------------


def serve(setup: dict[str, Any]) -> NoReturn:
    """Main function of a worker: run the nodes that the driver sends until it closes the pipe."""
    sink = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the messages
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, inbox, stop), daemon=True).start()

    def send(message: Message) -> None:
        os.write(sink, json.dumps(message).encode() + b"\n")

    name = ""
    try:
        with Worker.prepare(setup) as worker:
            while True:
                name = inbox.get()
                send(worker.run(name, send, stop.is_set))
    except Exception as error:
        send({"broken": name, "failure": Failure.of(error).to_json()})
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # a normal exit would wait for the thread that reads


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[str], stop: threading.Event) -> None:
    for line in source:
        message = json.loads(line)
        if "run" in message:
            inbox.put(message["run"])
        else:
            stop.set()
    os._exit(0)  # the driver is gone, so this process must not write to the folder any more
