"""Fuzz cases of the Python sandbox: programs of system calls and tricks of Python, which change nothing outside and never pass."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.tasks import sandbox

SECONDS = 3.0
SECRET = "a value that only the tests know"
PRELUDE = """
import sys
def ctypes_of_frames():
    frame = sys._getframe()
    while frame is not None and "ctypes" not in frame.f_globals:
        frame = frame.f_back
    return frame.f_globals["ctypes"]
def call(number, *values):
    ctypes = ctypes_of_frames()
    kept = [ctypes.create_string_buffer(value, 4096) if isinstance(value, bytes) else value for value in values]
    raw = [ctypes.addressof(value) if not isinstance(value, int) else value for value in kept]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *[ctypes.c_long(value) for value in raw])
"""
TRICKS = (
    "import os; os.kill({pid}, {signal})",
    "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "import os; os.sched_setaffinity({pid}, [0])",
    "import os; os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE, (64, 64))",
    "import os; os.{chmod}({path!r}, 0o777)",
    "import os; os.{times}({path!r})",
    "import os; os.setxattr({path!r}, 'user.x', b'x')",
    "import os; os.{remove}({path!r})",
    "import os; os.stat({path!r}) and os._exit(0)",
    "open({path!r}, {mode!r}).write('x')",
    "import os; os.rename({path!r}, '/work/x')",
    "import os; os.{link}({path!r}, '/work/l'); open('/work/l', 'w').write('x')",
    "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {pid}); fcntl.fcntl(r, {setsig}, {signal}); "
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')",
    "import os; [os.write(os.memfd_create('m'), bytes(10**8)) for _ in range(20)]",
    "import mmap; kept = [mmap.mmap(-1, 10**8) for _ in range(20)]; [m.write(bytes(10**8)) for m in kept]",
    "from multiprocessing import shared_memory; shared_memory.SharedMemory(create=True, size=10**9)",
    "call({shmget}, 0, 1 << 30, 0o1666)",
    "import _posixsubprocess, os; _posixsubprocess.fork_exec([b'/bin/true'], [b'/bin/true'], True, (), None, None, -1, -1, -1, -1, -1, "
    "-1, *os.pipe(), False, False, 0, None, None, None, -1, None, False)",
    "import os; os.fork()",
    "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 60'], {{}})",
    "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "import socket; socket.socket().connect(('127.0.0.1', 22))",
    "import importlib.machinery as m, sys; sys.modules['c'] = m.ExtensionFileLoader('_ctypes', __import__('math').__file__)",
    "import sys; sys.modules.clear()",
    "import sys, types; sys.modules['json'] = types.ModuleType('json')",
    "import builtins; builtins.{builtin} = lambda *a, **k: True",
    "import atexit, os; atexit.register(os._exit, 0)",
    "import os; os._exit(0)",
    "raise SystemExit(0)",
    "import sys; sys.setrecursionlimit(10**9)\ndef g(): return g()\ng()",
    'print(\'{{"passed": true, "reason": "equal"}}\')',
    'import os\nfor n in range(64):\n    try: os.write(n, b\'{{"passed": true, "reason": "equal", "detail": ""}}\')\n'
    "    except OSError: pass",
    "import os, struct\nfor n in range(3, 64):\n    try: os.write(n, struct.pack('!I', 13) + b'{{\"value\": {n}}}   ')\n"
    "    except OSError: pass",
    "import os; os.closerange({n}, 64)",
    "import os; os.dup2({n}, 3)",
    "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, str) and 'only the tests' in thing: ANSWER = thing",
    "import sys\nframe = sys._getframe()\nwhile frame:\n    for value in frame.f_locals.values():\n"
    "        if isinstance(value, str) and 'only the tests' in value: ANSWER = value\n    frame = frame.f_back",
    "class Equal:\n    def __eq__(self, other): return True\n    def __str__(self): return ANSWER\nANSWER = Equal()",
    "class Text(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\nANSWER = Text('x')",
    "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass",
    "import signal, os; signal.setitimer(signal.ITIMER_REAL, 0.01); signal.signal(signal.SIGALRM, lambda *a: os._exit(0))",
    "import threading, time; [threading.Thread(target=time.sleep, args=(60,), daemon=True).start() for _ in range(200)]",
    "import os\nfor n in range(100): os.mkdir(f'/work/{{n}}')\nopen('/work/x', 'wb').write(bytes(10**8))",
    "x = [0]\nwhile True: x += x",
    "while True: pass",
    "import marshal, types; exec(compile('1', 'x', 'exec').replace(co_code=bytes([{n}, 0] * 20)))",
)
PLACES = (
    "{code}",
    "try:\n{inner}\nexcept BaseException: pass",
    "import threading\ndef run():\n{inner}\nthreading.Thread(target=run, daemon=True).start()",
    "class Last:\n    def __del__(self):\n{deep}\nlast = Last()\ndel last",
    "import atexit\ndef run():\n{inner}\natexit.register(run)",
    "OLD = f\ndef f(x):\n{inner}\n    return OLD(x)",
)


def program(draw: random.Random, path: Path) -> str:
    """A program of one to six tricks and raw system calls."""
    parts = [PRELUDE, "ANSWER = 'x'\ndef f(x): return ANSWER"]
    fields: dict[str, Any] = {
        "pid": os.getpid(), "path": str(path), "shmget": 29 if os.uname().machine == "x86_64" else 194,
        "chmod": "chmod", "link": draw.choice(["link", "symlink"]), "remove": draw.choice(["remove", "unlink", "truncate"]),
        "times": draw.choice(["utime", "rmdir", "mkfifo", "listdir"]), "mode": draw.choice(["w", "a", "r+", "x"]),
        "signal": draw.choice([1, 9, 15, 29]), "setsig": 10, "n": draw.randrange(3, 256),
        "builtin": draw.choice(["isinstance", "len", "type", "getattr", "str", "ValueError", "BaseException", "print", "vars"]),
    }  # fmt: skip
    for _ in range(draw.randint(1, 6)):
        if draw.random() < 0.4:
            values = [draw.choice([0, 1, 2, 9, -1, -100, os.getpid(), 2**63 - 1, 0x7FFFFFFF, 4096, str(path).encode(), bytes(64)])
                      for _ in range(draw.randint(0, 6))]  # fmt: skip
            number = draw.choice(
                [draw.randrange(470), draw.randrange(0x40000000, 0x40000000 + 600), draw.getrandbits(32)]
            )
            code = f"call({', '.join(map(repr, [number, *values]))})"
        else:
            code = draw.choice(TRICKS).format(**fields)
        inner = textwrap.indent(code, "    ")
        parts.append(draw.choice(PLACES).format(code=code, inner=inner, deep=textwrap.indent(code, " " * 8)))
    return "\n".join(parts)


def state(folder: Path) -> list[Any]:
    """What a program could change of this process and its files."""
    process = os.getpid()
    files = sorted((path.name, path.read_bytes(), tuple(path.stat())[:7], path.stat().st_mtime_ns, tuple(os.listxattr(path)))
                   for path in folder.iterdir())  # fmt: skip
    return [
        files, os.getpriority(os.PRIO_PROCESS, process), sorted(os.sched_getaffinity(process)), os.sched_getscheduler(process),
        [resource.getrlimit(number) for number in range(16)], tuple(folder.stat())[:7], os.getsid(process),
    ]  # fmt: skip


@contextlib.contextmanager
def signals_counted() -> Iterator[list[int]]:
    received: list[int] = []
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGIO)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def sandboxed(draw: random.Random, folder: Path) -> str:
    """Run a program with or without some layers but never without seccomp; the reason of its verdict."""
    victim = folder / "victim"
    victim.write_text("secret", encoding="utf-8")
    victim.chmod(0o644)
    without = draw.choice([(), (), (), ("user", "landlock"), ("namespaces", "user", "landlock")])
    before = state(folder)
    tests = f"answer = f(2)\nassert answer == {SECRET!r} and str(answer) == {SECRET!r}"
    with signals_counted() as received:
        result = sandbox.run(program(draw, victim), tests, limits=sandbox.Limits(seconds=SECONDS), without=without)
    server = sandbox._servers[without].process.pid
    left = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii")
    assert not result.passed, result
    assert (state(folder), received, left) == (before, [], ""), result
    return result.reason
