"""Bounded grading: whatever a completion holds, a verdict comes back in time and nothing else is held up.

Expensive graders run in worker processes that are started by `subprocess` (so no start method, main module or thread
matters), import nothing but `headwater.tasks`, and are killed and replaced when an answer takes too long, too much
memory, or crashes them. The parent uses no signal, so any thread may grade.
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
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from headwater.errors import UserError
from headwater.tasks.registry import Task, find_task
from headwater.types import Verdict

CHUNK = 16  # answers handed to a worker at once: enough to hide the pipe's latency, few to redo after a kill
CACHED = 20_000  # verdicts kept; a digest and a verdict are about 200 bytes, and a run of weeks should hold no more
START_SECONDS = 120.0  # a worker imports sympy; on a loaded machine that takes a while and is not the answer's fault
GRACE_SECONDS = 0.05  # for the message's way back
# The child takes the parent's import path before it imports anything of ours.
BOOT = (
    "import sys, json; setup = json.loads(sys.stdin.buffer.readline()); sys.path[:] = setup['path']; "
    "from headwater.tasks.verifier import serve; serve(setup)"
)

Pair = tuple[str, str]


class Verifier:
    """Grades (gold, completion) pairs, in order; it is a `labels.Grade`.

    Verdicts are cached by task, gold and completion. `seconds` bounds each answer by the wall clock, `memory_mb` is
    what grading may use beyond what the worker holds when it is ready. Use it as a context manager, or `close` it;
    workers also end by themselves when their parent is gone.

    Raises UserError for an unknown task.

    Example:
        with Verifier("maths") as verifier:
            verifier([("1/2", r"\\boxed{0.5}")])  # [Verdict(correct=True, reason="equal", seconds=…)]
    """

    def __init__(self, task_name: str, workers: int = 2, seconds: float = 2.0, memory_mb: int = 1024) -> None:
        self.task: Task = find_task(task_name)
        self.workers = workers
        self.seconds = seconds
        self.memory_mb = memory_mb
        self._cache: dict[bytes, Verdict] = {}
        self._pool: list[_Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; grading again starts new ones."""
        with self._lock:
            self._end_workers()

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        with self._lock:
            verdicts: dict[int, Verdict] = {}
            waiting: dict[bytes, list[int]] = {}
            for index, (gold, completion) in enumerate(pairs):
                started = time.perf_counter()
                key = self._key(gold, completion)
                known = self._cache.get(key)
                if known is not None:
                    verdicts[index] = Verdict(known.correct, known.reason)
                    continue
                outcome = self._here(gold, completion)
                if outcome is None:
                    waiting.setdefault(key, []).append(index)
                else:
                    verdicts[index] = Verdict(*outcome, time.perf_counter() - started)
                    self._remember(key, verdicts[index])
            if waiting:
                asked = [pairs[indices[0]] for indices in waiting.values()]
                for (key, indices), verdict in zip(waiting.items(), self._ask_workers(asked), strict=True):
                    self._remember(key, verdict)
                    verdicts.update(dict.fromkeys(indices, verdict))
            return [verdicts[index] for index in range(len(pairs))]

    def _here(self, gold: str, completion: str) -> tuple[bool, str] | None:
        """The outcome where no worker is needed for it. No text may bring the caller down, so nothing is raised."""
        try:
            if not self.task.bounded:
                return self.task.grade(gold, completion)
            return self.task.quick(gold, completion) if self.task.quick else None
        except Exception:
            return False, "error"

    def _key(self, gold: str, completion: str) -> bytes:
        text = f"{self.task.name}\0{len(gold)}\0{gold}\0{completion}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        if len(self._cache) >= CACHED:
            del self._cache[next(iter(self._cache))]  # dicts keep their order: the oldest goes
        self._cache[key] = verdict

    def _ask_workers(self, pairs: list[Pair]) -> list[Verdict]:
        if self._owner != os.getpid():  # after a fork the pipes are still the parent's
            self._pool, self._owner = [], os.getpid()
        verdicts: dict[int, Verdict] = {}
        todo, crashed = deque(range(len(pairs))), set[int]()
        try:
            while len(verdicts) < len(pairs):
                self._pool = [worker for worker in self._pool if worker.asked or worker.alive()]
                busy = sum(bool(worker.asked) for worker in self._pool)
                while len(self._pool) < min(self.workers, busy + len(todo)):
                    self._pool.append(_Worker(self.task.name, self.seconds, self.memory_mb))
                for worker in self._pool:
                    if worker.ready and not worker.asked and todo:
                        share = max(1, min(CHUNK, len(todo) // (2 * self.workers)))
                        worker.ask([todo.popleft() for _ in range(share)], pairs)
                self._listen(verdicts, todo, crashed)
        except BaseException:
            self._end_workers()  # half-asked workers would answer the next call with this one's verdicts
            raise
        return [verdicts[index] for index in range(len(pairs))]

    def _listen(self, verdicts: dict[int, Verdict], todo: deque[int], crashed: set[int]) -> None:
        """Take in what the workers have to say, until something was said or a limit is reached.

        crashed  answers at which a worker died once: it may have been killed from outside, so they are tried again
        """
        busy = [worker for worker in self._pool if worker.asked or not worker.ready]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        heard, _, _ = select.select([worker.out for worker in busy], [], [], patience)
        for worker in busy:
            lost: str | None = None
            if worker.out in heard:
                verdicts.update(worker.hear())
                if worker.retired:
                    lost = "retired"
                elif worker.gone:
                    lost = "error"
            elif time.monotonic() >= worker.deadline:
                lost = "timeout"
            if lost is None:
                continue
            if not worker.ready:
                raise UserError(f"task {self.task.name}: a grading worker did not start ({worker.complaint or lost})")
            if lost == "error" and worker.asked and worker.asked[0] not in crashed:
                crashed.add(worker.asked[0])
            elif worker.asked and not worker.retired:  # the answer it was at is to blame
                verdicts[worker.asked.popleft()] = Verdict(False, lost, time.monotonic() - worker.since)
            todo.extendleft(reversed(worker.asked))  # those behind it are asked again
            worker.end()
            self._pool.remove(worker)

    def _end_workers(self) -> None:
        for worker in self._pool:
            worker.end()
        self._pool = []


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, task_name: str, seconds: float, memory_mb: int) -> None:
        self.seconds = seconds
        self.ready = False
        self.gone = False
        self.retired = False  # it said itself that it should be replaced
        self.complaint = ""
        self.asked: deque[int] = deque()
        self.since = time.monotonic()
        self.deadline = self.since + START_SECONDS
        self._heard = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One thread each: BLAS pools would reserve address space and fight over the cores.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in = self._process.stdin
        self.out = self._process.stdout.fileno()
        path = [entry or os.getcwd() for entry in sys.path]
        self._tell({"path": path, "task": task_name, "seconds": seconds, "memory_mb": memory_mb, "parent": os.getpid()})

    def ask(self, indices: list[int], pairs: list[Pair]) -> None:
        self.asked = deque(indices)
        self._tell([pairs[index] for index in indices])
        self._next_limit()

    def hear(self) -> list[tuple[int, Verdict]]:
        """The verdicts that have arrived; sets `ready` and `gone`."""
        data = os.read(self.out, 65536)
        self.gone = not data
        *lines, self._heard = (self._heard + data).split(b"\n")
        verdicts = []
        for line in lines:
            said = json.loads(line)
            if "ready" in said:
                self.ready, self.complaint = said["ready"], said.get("why", "")
                self.gone = self.gone or not self.ready
            else:
                self.retired = said["last"]
                verdicts.append((self.asked.popleft(), Verdict(said["correct"], said["reason"], said["seconds"])))
        self._next_limit()
        return verdicts

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _next_limit(self) -> None:
        if self.ready:
            self.since = time.monotonic()
            self.deadline = self.since + self.seconds + GRACE_SECONDS

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows itself when it is listened to
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()


def serve(setup: dict[str, Any]) -> NoReturn:
    """The worker's life: read a chunk, write a verdict a line, until the parent is gone. Runs in the worker only."""
    source, sink = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # whatever graders and libraries print must not mix with verdicts
        os.dup2(nowhere, standard)

    def say(message: dict[str, Any]) -> None:
        os.write(sink, json.dumps(message).encode() + b"\n")

    try:
        task = find_task(setup["task"])
        if task.warm_up:
            task.grade(*task.warm_up)
    except Exception as error:
        say({"ready": False, "why": str(error)})
        os._exit(1)
    _limit_memory(setup["memory_mb"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    say({"ready": True})
    waiting = b""
    while True:
        while b"\n" not in waiting:
            # The parent's end of the pipe may live on in a process that it forked: look at the parent as well.
            if not select.select([source], [], [], 5.0)[0]:
                if os.getppid() != setup["parent"]:
                    os._exit(0)
                continue
            data = os.read(source, 1 << 20)
            if not data:
                os._exit(0)
            waiting += data
        line, _, waiting = waiting.partition(b"\n")
        for gold, completion in json.loads(line):
            # The parent kills at `seconds`. Should it be gone by then, the kernel ends this process soon after.
            signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + 2.0)
            started = time.perf_counter()
            correct, reason, spoiled = _outcome(task, gold, completion)
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.perf_counter() - started
            say({"correct": correct, "reason": reason, "seconds": seconds, "last": spoiled})
            if spoiled:
                os._exit(0)  # a process that ran out of memory cannot be trusted with the next answer


def _outcome(task: Task, gold: str, completion: str) -> tuple[bool, str, bool]:
    """(correct, reason, whether this process should end)."""
    try:
        return *task.grade(gold, completion), False
    except MemoryError:
        return False, "memory", True
    except BaseException:  # SystemExit from a user's grader is an error of that answer too
        return False, "error", False


def _limit_memory(memory_mb: int) -> None:
    """Bound the address space to what is in use now and `memory_mb` more."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file behind
