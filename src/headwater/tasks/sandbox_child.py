"""Server of sandboxed runs: a warm interpreter that forks two processes for each run, one for the solution and one for its tests.

Started in a fresh interpreter by `sandbox.Server`; uses the standard library only. It runs no code of a solution or test itself.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import types
from typing import Any, NoReturn

from headwater.tasks import sandbox_confine
from headwater.tasks.sandbox_data import EndedError, Link
from headwater.tasks.sandbox_solution import Session
from headwater.tasks.sandbox_tests import Solution, SolutionModule, namespace

COMMON_MODULES = """
abc argparse array ast asyncio base64 binascii bisect builtins bz2 calendar cmath cmd codecs collections collections.abc
colorsys concurrent.futures concurrent.futures.thread contextlib contextvars copy csv dataclasses datetime decimal
difflib dis doctest enum errno fnmatch fractions functools glob graphlib hashlib heapq hmac html inspect io ipaddress
itertools json keyword linecache locale logging lzma marshal math numbers operator os pathlib pickle platform pprint
queue random re reprlib sched secrets select selectors shlex shutil signal socket sqlite3 stat statistics string struct
sys tempfile textwrap threading time timeit token tokenize traceback types typing unicodedata unittest
unittest.async_case unittest.mock urllib.parse uuid warnings weakref xml.etree.ElementTree zipfile zlib zoneinfo
_strptime encodings.ascii encodings.latin_1 encodings.utf_8_sig encodings.utf_16 encodings.utf_32 encodings.cp1252
encodings.idna encodings.hex_codec encodings.base64_codec encodings.rot_13 encodings.unicode_escape
encodings.raw_unicode_escape
"""
"""Modules that solutions import. They are loaded before anything is refused: without a private root no other can be imported."""


def load(code: str) -> types.ModuleType:
    """Run a program as the module `solution`."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    return module


def run_tests(tests: str, entry_point: str | None, solution: Solution) -> None:
    """Execute the tests, then the test_ functions, TestCases and `check` that they define."""
    tree = ast.parse(tests)
    given = namespace(solution, tree, entry_point)
    sys.modules["solution"] = SolutionModule(solution)
    values = {**given, "__name__": "tests"}
    exec(compile(tree, "tests.py", "exec"), values)
    defined = [value for name, value in list(values.items()) if name not in given or given[name] is not value]
    for value in defined:
        if isinstance(value, types.FunctionType) and value.__name__.startswith("test_"):
            value()
    unittest = sys.modules["unittest"]
    cases = [value for value in defined if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    for case in cases:
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        if not (result.wasSuccessful() and result.testsRun):
            messages = "".join(text for _, text in [*result.errors, *result.failures])
            raise MemoryError if "MemoryError" in messages else AssertionError(messages[-150:])
    if entry_point is not None:
        values["check"](values[entry_point])


def judge(job: dict[str, Any], link: Link) -> dict[str, Any]:
    """Verdict on a program: `passed`, or the reason and the name of what was raised."""
    solution = Solution(link)
    at, error = "solution", None
    try:
        solution.load(job["code"])
        at = "tests"
        run_tests(job["tests"], job["entry_point"], solution)
    except BaseException as raised:
        error = raised
    if solution.failures:
        reason, detail = solution.failures[0]
    elif error is None:
        return {"passed": True, "reason": "equal", "detail": ""}
    else:
        ended = at == "solution" or isinstance(error, SystemExit)
        reason = "memory" if isinstance(error, MemoryError) else "error" if ended else "different"
        detail = f"{type(error).__name__}: {error}"[:200]
    return {"passed": False, "reason": reason, "detail": detail}


def start(role: str, channel: int, link: int, job: dict[str, Any]) -> int:
    """Fork a confined process of a run and return its process id. The child exits when its role ends, and never returns."""
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        kept = sorted({0, 1, 2, link, channel if role == "tests" else link})
        for low, high in zip(kept, [*kept[1:], 1_000_000], strict=True):
            os.closerange(low + 1, high)
        limits = {**job["limits"], "memory_mb": job["limits"][f"{role}_mb"]}
        layers = sandbox_confine.confine(limits, job["layers"], job["without"])
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("headwater", "ctypes", "_ctypes", "__main__")
        ]:
            sys.modules.pop(name)
        sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # type: ignore[assignment]
        if role == "tests":
            _be_tests(channel, Link(link), layers)
        else:
            with contextlib.suppress(EndedError):
                Session(Link(link), load).serve()
    except BaseException:
        os._exit(1)
    finally:
        os._exit(0)


def _be_tests(channel: int, link: Link, layers: list[str]) -> None:
    """Read the program and its tests, and report the verdict."""
    sys.argv[:] = ["tests.py"]
    with open(channel, "rb", closefd=False) as file:
        job = json.loads(file.read(int(file.read(12))))
    report = {"layers": layers, **judge(job, link)}
    os.write(channel, json.dumps(report).encode())


def serve() -> NoReturn:
    """Run one job at a time until the control socket, descriptor 0, is closed."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    sys.argv[:] = ["solution.py"]
    for name in COMMON_MODULES.split():
        with contextlib.suppress(ImportError):  # parts that a build of Python may lack
            importlib.import_module(name)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")  # glibc loads it to end a thread
    without = json.loads(control.recv(10_000))["without"]
    layers = [] if "namespaces" in without else sandbox_confine.enter_namespaces()
    if layers and "private root" not in without:
        layers += sandbox_confine.enter_private_root()
    os.chdir("/")
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 10_000, 1)
        if not message:
            os._exit(0)
        _run(control, {**json.loads(message), "layers": layers, "without": without}, descriptors[0])


def _run(control: socket.socket, job: dict[str, Any], channel: int) -> None:
    """Start a run's processes, end them when the control socket says so, and send their exit statuses."""
    own_root = "private root" in job["layers"]
    if own_root:
        sandbox_confine.mount_work(job["limits"]["folder_mb"])
    links = socket.socketpair()
    processes = [
        start(role, channel, end.fileno(), job) for role, end in zip(("solution", "tests"), links, strict=True)
    ]
    os.close(channel)
    for end in links:
        end.close()
    closed = not control.recv(1)
    statuses = []
    for process in processes:
        for kill in (os.killpg, os.kill):  # the group may not exist yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(process, signal.SIGKILL)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    if own_root:
        sandbox_confine.unmount_work()
    if closed:
        os._exit(0)
    control.send(json.dumps(statuses).encode())
