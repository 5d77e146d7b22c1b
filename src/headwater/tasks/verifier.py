"""Grading in worker processes with time and memory limits per answer.

Workers are started by `subprocess` (independent of start method, main module and threads), import only `headwater.tasks`,
and are killed and replaced when an answer exceeds its time or memory or crashes them. The parent uses no signals, so any
thread may grade.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

from headwater.errors import UserError
from headwater.tasks.registry import NO_VERDICT, Task, find_task
from headwater.types import Verdict

CHUNK = 16  # answers per message: enough to hide pipe latency, few to redo after a kill
MAX_CACHED = 20_000  # verdicts, about 200 bytes each; bounds the memory of long runs
START_SECONDS = 120.0  # importing sympy can take long on a loaded machine
GRACE_SECONDS = 0.05  # for the reply to arrive
# The child sets the parent's import path before its first import from this package.
BOOT = (
    "import sys, json; setup = json.loads(sys.stdin.buffer.readline()); sys.path[:] = setup['path']; "
    "from headwater.tasks.verifier import serve; serve(setup)"
)

Pair = tuple[str, str]


class Verifier:
    """Grade (gold, completion) pairs, in order; implements `labels.Grade`.

    Verdicts are cached by task, gold and completion. `seconds` limits the wall time per answer, `memory_mb` the memory
    beyond what the worker uses when it is ready. Use it as a context manager, or call `close`; workers also exit when
    their parent is gone.

    `sandbox="optional"` grades a task also on a machine that cannot confine its programs.

    Raises UserError for an unknown task, and on use for one whose programs this machine cannot confine.

    Example:
        with Verifier("maths") as verifier:
            verifier([("1/2", r"\\boxed{0.5}")])  # [Verdict(correct=True, reason="equal", seconds=…)]
    """

    def __init__(
        self,
        task_name: str,
        workers: int = 2,
        seconds: float = 2.0,
        memory_mb: int = 1024,
        sandbox: Literal["required", "optional"] = "required",
    ) -> None:
        self.task: Task = find_task(task_name)
        self.workers = workers
        self.seconds = seconds
        self.memory_mb = memory_mb
        self.sandbox = sandbox
        self._cache: dict[bytes, Verdict] = {}
        self._pool: list[_Worker] = []
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; a later call starts new ones."""
        with self._lock:
            self._end_workers()

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        with self._lock:
            verdicts: dict[int, Verdict] = {}
            pending: dict[bytes, list[int]] = {}
            for index, (gold, completion) in enumerate(pairs):
                started = time.perf_counter()
                key = self._key(gold, completion)
                cached = self._cache.get(key)
                if cached is not None:
                    verdicts[index] = Verdict(cached.correct, cached.reason)
                    continue
                outcome = self._grade_in_process(gold, completion)
                if outcome is None:
                    pending.setdefault(key, []).append(index)
                else:
                    verdicts[index] = Verdict(*outcome, time.perf_counter() - started)
                    self._add_to_cache(key, verdicts[index])
            if pending:
                distinct = [pairs[indices[0]] for indices in pending.values()]
                for (key, indices), verdict in zip(pending.items(), self._grade_in_workers(distinct), strict=True):
                    self._add_to_cache(key, verdict)
                    verdicts.update(dict.fromkeys(indices, verdict))
            return [verdicts[index] for index in range(len(pairs))]

    def same_gold(self, first: str, second: str) -> bool:
        """Whether two gold answers are the same answer: each, written as a completion, is correct for the other.

        Example: `Verifier("maths").same_gold("1/2", "0.5")` is True.
        """
        if not self.task.one_answer:
            return first == second
        pairs = [(gold, self.task.as_completion(other)) for gold, other in ((first, second), (second, first))]
        verdicts = self([(gold, completion) for gold, completion in pairs if completion is not None])
        return len(verdicts) == 2 and all(verdict.correct for verdict in verdicts)

    def refuse_no_verdict(self, verdicts: Iterable[Verdict]) -> None:
        """Raise UserError if a user's grader returned anything but a verdict, naming the type and the grader's file."""
        for verdict in verdicts:
            if verdict.reason.startswith(NO_VERDICT):
                raise UserError(
                    f"task {self.task.name}: the grader in {self.task.file} returned {verdict.reason.removeprefix(NO_VERDICT)}; "
                    "it must return True, False, or a pair of a bool and a reason"
                )

    def _grade_in_process(self, gold: str, completion: str) -> tuple[bool, str] | None:
        """The outcome if no worker is needed, else None. Never raises: no text may crash the caller."""
        try:
            if not self.task.bounded:
                return self.task.grade(gold, completion)
            return self.task.quick(gold, completion) if self.task.quick else None
        except Exception:
            return False, "error"

    def _key(self, gold: str, completion: str) -> bytes:
        text = f"{self.task.name}\0{len(gold)}\0{gold}\0{completion}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def _add_to_cache(self, key: bytes, verdict: Verdict) -> None:
        if len(self._cache) >= MAX_CACHED:
            del self._cache[next(iter(self._cache))]  # the oldest: dicts keep insertion order
        self._cache[key] = verdict

    def _grade_in_workers(self, pairs: list[Pair]) -> list[Verdict]:
        if self._owner_pid != os.getpid():  # after a fork the pipes belong to the parent
            self._pool, self._owner_pid = [], os.getpid()
        refusal = self.task.refusal() if self.task.refusal and self.sandbox == "required" else None
        if refusal is not None:
            raise UserError(f"task {self.task.name}: {refusal}")
        verdicts: dict[int, Verdict] = {}
        queue, crashed = deque(range(len(pairs))), set[int]()
        try:
            while len(verdicts) < len(pairs):
                self._pool = [worker for worker in self._pool if worker.assigned or worker.alive()]
                busy = sum(bool(worker.assigned) for worker in self._pool)
                while len(self._pool) < min(self.workers, busy + len(queue)):
                    self._pool.append(_Worker(self.task.name, self.seconds, self.memory_mb))
                for worker in self._pool:
                    if worker.ready and not worker.assigned and queue:
                        share = max(1, min(CHUNK, len(queue) // (2 * self.workers)))
                        worker.assign([queue.popleft() for _ in range(share)], pairs)
                self._collect(verdicts, queue, crashed)
        except BaseException:
            self._end_workers()  # workers with unread replies would mix them into the next call
            raise
        return [verdicts[index] for index in range(len(pairs))]

    def _collect(self, verdicts: dict[int, Verdict], queue: deque[int], crashed: set[int]) -> None:
        """Wait until a worker replies or reaches its deadline; store verdicts and remove workers that ended or hang.

        crashed  answers that crashed a worker once. They are retried, since the worker may have been killed from outside.
        """
        busy = [worker for worker in self._pool if worker.assigned or not worker.ready]
        wait = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        readable, _, _ = select.select([worker.out for worker in busy], [], [], wait)
        for worker in busy:
            failure: str | None = None
            if worker.out in readable:
                verdicts.update(worker.receive())
                if worker.retired:
                    failure = "retired"
                elif worker.exited:
                    failure = "error"
            elif time.monotonic() >= worker.deadline:
                failure = "timeout"
            if failure is None:
                continue
            if not worker.ready:
                reason = worker.start_error or failure
                raise UserError(f"task {self.task.name}: a grading worker did not start ({reason})")
            if failure == "error" and worker.assigned and worker.assigned[0] not in crashed:
                crashed.add(worker.assigned[0])
            elif worker.assigned and not worker.retired:  # the answer in progress is the cause
                verdicts[worker.assigned.popleft()] = Verdict(False, failure, time.monotonic() - worker.since)
            queue.extendleft(reversed(worker.assigned))  # the answers after it are graded again
            worker.end()
            self._pool.remove(worker)

    def _end_workers(self) -> None:
        for worker in self._pool:
            worker.end()
        self._pool = []


class _Worker:
    """Parent-side handle of one worker process."""

    def __init__(self, task_name: str, seconds: float, memory_mb: int) -> None:
        self.seconds = seconds
        self.ready = False
        self.exited = False
        self.retired = False  # the worker itself asked to be replaced
        self.start_error = ""
        self.assigned: deque[int] = deque()
        self.since = time.monotonic()
        self.deadline = self.since + START_SECONDS
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One thread per worker: BLAS thread pools reserve address space and compete for cores.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # the parent handles Ctrl-C
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in = self._process.stdin
        self.out = self._process.stdout.fileno()
        path = [entry or os.getcwd() for entry in sys.path]
        self._send({"path": path, "task": task_name, "seconds": seconds, "memory_mb": memory_mb, "parent": os.getpid()})

    def assign(self, indices: list[int], pairs: list[Pair]) -> None:
        self.assigned = deque(indices)
        self._send([pairs[index] for index in indices])
        self._reset_deadline()

    def receive(self) -> list[tuple[int, Verdict]]:
        """Read the verdicts that have arrived; updates `ready`, `retired` and `exited`."""
        data = os.read(self.out, 65536)
        self.exited = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        verdicts = []
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self.ready, self.start_error = message["ready"], message.get("why", "")
                self.exited = self.exited or not self.ready
            else:
                self.retired = message["last"]
                verdict = Verdict(message["correct"], message["reason"], message["seconds"])
                verdicts.append((self.assigned.popleft(), verdict))
        self._reset_deadline()
        return verdicts

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        with contextlib.suppress(OSError), self._process:  # closes the pipes and waits
            self._process.kill()

    def _reset_deadline(self) -> None:
        if self.ready:
            self.since = time.monotonic()
            self.deadline = self.since + self.seconds + GRACE_SECONDS

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` notices a dead worker
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()


def serve(setup: dict[str, Any]) -> NoReturn:
    """Main loop of a worker process: read chunks, write one verdict per line, exit when the parent is gone."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # keep output of graders and libraries out of the verdicts
        os.dup2(null, standard)

    def send(message: dict[str, Any]) -> None:
        os.write(sink, json.dumps(message).encode() + b"\n")

    try:
        task = find_task(setup["task"])
        if task.warm_up:
            task.grade(*task.warm_up)
    except Exception as error:
        send({"ready": False, "why": str(error)})
        os._exit(1)
    _limit_memory(setup["memory_mb"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    send({"ready": True})
    buffer = b""
    while True:
        while b"\n" not in buffer:
            # A forked process may keep the pipe open after the parent has died: check the parent as well.
            if not select.select([source], [], [], 5.0)[0]:
                if os.getppid() != setup["parent"]:
                    os._exit(0)
                continue
            data = os.read(source, 1 << 20)
            if not data:
                os._exit(0)
            buffer += data
        line, _, buffer = buffer.partition(b"\n")
        for gold, completion in json.loads(line):
            # The parent kills this process at `seconds`; the alarm does it if the parent is gone.
            signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + 2.0)
            started = time.perf_counter()
            correct, reason, out_of_memory = _grade(task, gold, completion)
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.perf_counter() - started
            send({"correct": correct, "reason": reason, "seconds": seconds, "last": out_of_memory})
            if out_of_memory:
                os._exit(0)  # its state is no longer reliable


def _grade(task: Task, gold: str, completion: str) -> tuple[bool, str, bool]:
    """(correct, reason, whether memory ran out)."""
    try:
        return *task.grade(gold, completion), False
    except MemoryError:
        return False, "memory", True
    except BaseException:  # including SystemExit from a user's grader
        return False, "error", False


def _limit_memory(memory_mb: int) -> None:
    """Limit the address space to its current size plus `memory_mb`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps
