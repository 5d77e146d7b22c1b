"""The task python: hostile solutions end in time, reach nothing, and never count as correct."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headwater.config.recipe import Source
from headwater.data.validate import validate
from headwater.tasks import python_tests, sandbox
from headwater.tasks.verifier import Verifier

TESTS = "assert f(2) == 4\nassert f(-3) == -6"
RIGHT = "def f(x):\n    return 2 * x"
LIMITS = sandbox.Limits(seconds=5.0)


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\n"


def run(code: str, tests: str = TESTS, limits: sandbox.Limits = LIMITS) -> sandbox.Outcome:
    return sandbox.run(code, tests, limits=limits)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (block(RIGHT), (True, "equal")),
        (block("def f(x): return x") + block(RIGHT), (True, "equal")),
        (block(RIGHT) + block("def f(x): return x"), (False, "different")),
        (block(RIGHT) + "```text\nbye\n```", (True, "equal")),
        ("<think>" + block(RIGHT) + "</think> no idea", (False, "no_answer")),
        (f"```\n{RIGHT}\n```", (True, "equal")),
        (f"```python\n{RIGHT}", (False, "truncated")),
        ("def f(x): return 2 * x", (False, "no_answer")),
        (block("def f(x: return"), (False, "error")),
        (block("def f(x): raise ValueError"), (False, "different")),
        (block("raise ValueError"), (False, "error")),
        (block(RIGHT + "\nif __name__ == '__main__':\n    raise SystemExit(1)"), (True, "equal")),
    ],
)
def test_last_python_block_must_pass_tests(completion: str, verdict: tuple[bool, str]) -> None:
    assert python_tests.grade(TESTS, completion) == verdict


@pytest.mark.parametrize(
    ("tests", "passes"),
    [
        ("def test_f():\n    assert f(2) == 4", True),
        ("def test_f():\n    assert f(2) == 5", False),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 4)", True),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 5)", False),
        ("from solution import f\nassert f(2) == 4", True),
    ],
)
def test_assertions_functions_and_test_cases_are_run(tests: str, passes: bool) -> None:
    assert run(RIGHT, tests).passed is passes


def test_gold_object_has_solution_and_entry_point() -> None:
    gold = json.dumps(
        {"tests": "def check(candidate):\n    assert candidate(2) == 4", "solution": RIGHT, "entry_point": "f"}
    )
    assert python_tests.grade(gold, str(python_tests.as_completion(gold))) == (True, "equal")
    assert python_tests.grade(gold, block("def f(x): return 5")) == (False, "different")
    assert python_tests.as_completion(TESTS) is None


def test_hostile_gold_is_parsed_by_bounded_worker_alone(tmp_path: Path) -> None:
    """So many fields take 20 s to parse."""
    gold = {"tests": "x = f'" + "{1}" * 100_000 + "'", "solution": RIGHT}
    started = time.monotonic()
    assert python_tests.as_completion(json.dumps(gold)) == f"```python\n{RIGHT}\n```"
    assert time.monotonic() - started < 1
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"problem": "p", "answer": gold}) + "\n", encoding="utf-8")
    assert [reason for _, _, reason in validate(Source(path=str(path)), "python", workers=1).failed] == ["timeout"]


ESCAPES = {
    "sys.exit while it loads": "import sys\nsys.exit(0)",
    "os._exit while it loads": "import os\nos._exit(0)",
    "os._exit within a call": "import os\ndef f(x):\n    os._exit(0)",
    "SystemExit within a call": "def f(x):\n    raise SystemExit(0)",
    "a printed verdict": "print('passed')\nprint('{\"proof\": \"passed\"}')\nraise SystemExit(0)",
    "a verdict into every open file": (
        'import os\nfor n in range(64):\n    try: os.write(n, b\'{"at": "end", "proof": "x"}\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 5",
    "killing itself": "import os\nos.kill(os.getpid(), 9)",
    "a crash": "import sys\nsys.setrecursionlimit(10**6)\ndef f(x):\n    return f(x)",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_process_exit_does_not_pass_tests(name: str) -> None:
    assert not run(ESCAPES[name]).passed


REFUSED = {
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "a shell": "import os\nassert os.system('true') == 0",
    "a fork": "import os\nos.fork()",
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "killing the parent's group": "import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGTERM)",
    "the parent's environment": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "a file outside": "open({outside!r}, 'w').write('x')",
    "a file outside, by the back door": "import os\nos.chdir('..')\nopen('evil', 'w').write('x')",
    "removing a file": "import os\nos.remove({victim!r})",
    "reading a file": "open({victim!r}).read()",
    "C": "import ctypes",
    "a new session": "import os\nos.setsid()",
}


@pytest.mark.parametrize("name", REFUSED)
def test_outside_access_is_refused(name: str, tmp_path: Path) -> None:
    victim, outside = tmp_path / "victim", tmp_path / "evil"
    victim.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = REFUSED[name].format(port=server.getsockname()[1], outside=str(outside), victim=str(victim))
        result = run(f"{code}\n{RIGHT}")
        with pytest.raises(TimeoutError):
            server.accept()
    assert (result.passed, result.reason) == (False, "error"), result
    assert victim.read_text() == "secret" and not outside.exists()


def test_environment_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TEST_TOKEN", "secret")
    assert run("import os\ndef f():\n    return dict(os.environ)", "assert 'secret' not in str(f())").passed


def test_sandbox_folder_is_empty_writable_and_removed_afterwards() -> None:
    code = "import os\ndef f(x):\n    assert os.listdir() == []\n    open('a', 'w').write('y' * x)\n    return os.path.getsize('a')"
    tests = "import os\nassert f(4) == 4\nassert open('a').read() == 'yyyy'\nos.rename('a', 'b')\nos.remove('b')\nassert f(2) == 2"
    if "private root" not in sandbox.layers():
        pytest.skip("no memory file system can be mounted here: files of solutions were NOT tested")
    assert run(code, tests).passed and run(code, tests).passed


def test_ordinary_libraries_threads_and_event_loops_work() -> None:
    code = (
        "import asyncio, collections, decimal, hashlib, heapq, itertools, json, random, re, threading, typing, zoneinfo\n"
        "async def later(x): return 2 * x\n"
        "def f(x):\n"
        "    box = []\n"
        "    thread = threading.Thread(target=lambda: box.append(asyncio.run(later(x))))\n"
        "    thread.start(); thread.join()\n"
        "    return box[0]\n"
    )
    assert run(code).passed


def test_text_hashes_are_equal_in_every_run() -> None:
    """A verdict that hangs on the hash seed would be noise in the reward; that of 0 gives this order."""
    code = "def f():\n    return hash('headwater') % 1000"
    first = subprocess.run(
        [sys.executable, "-c", "print(hash('headwater') % 1000)"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        check=True,
    )
    assert run(code, f"assert f() == {int(first.stdout)}").passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "timeout"),
        ("def f(x):\n    while True: pass", "timeout"),
        ("import time\ntime.sleep(100)", "timeout"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile 1: pass",
         "timeout"),
        ("x = 'a' * 10**10", "memory"),
        ("x = [0]\nwhile True: x += x", "memory"),
        ("def f(x):\n    return [0] * 10**10", "memory"),
        ("import os\nwhile True:\n    os.fork()", "error"),
        ("with open('big', 'wb') as file:\n    for _ in range(1000): file.write(b'x' * 10**6)", "error"),
        ("for n in range(1000):\n    with open(str(n), 'wb') as file: file.write(b'x' * 10**6)", "error"),
        ("held = [open(str(n), 'w') for n in range(1000)]", "error"),
    ],
)  # fmt: skip
def test_time_memory_processes_and_files_are_limited(code: str, reason: str) -> None:
    if "str(n), 'wb'" in code and "private root" not in sandbox.layers():
        pytest.skip("no memory file system can be mounted here: the size of all files together was NOT tested")
    started = time.monotonic()
    seconds = 1.0 if reason == "timeout" else 4.0  # on a busy machine it takes a while to fill the memory
    result = run(code, limits=sandbox.Limits(seconds=seconds))
    assert (result.passed, result.reason) == (False, reason), result
    assert time.monotonic() - started < 8


def test_unlimited_threads_are_bounded() -> None:
    code = (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()"
    )
    result = run(code, limits=sandbox.Limits(seconds=3.0, solution_mb=128))
    assert not result.passed
    assert threading.active_count() < 50


def test_verifier_kills_sandbox_with_its_worker() -> None:
    """The child dies with its parent, however that ends; a solution that hangs holds up nothing."""
    before = sandboxes()
    with Verifier("python", workers=1, seconds=1.0) as verifier:
        verdicts = verifier([(TESTS, block("while True: pass")), (TESTS, block(RIGHT))])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "equal"]
    deadline = time.monotonic() + 10
    while sandboxes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandboxes() <= before


def sandboxes() -> set[int]:
    """Processes of sandboxes, servers included."""
    alive = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if sandbox.BOOT.encode() in path.read_bytes():
                alive.add(int(path.parent.name))
        except OSError:
            continue
    return alive


LAYERS = ("namespaces", "private root", "user", "landlock", "seccomp")
FALLBACKS = {
    "seccomp alone": ("namespaces", "user", "landlock"),
    "seccomp and user": ("namespaces", "landlock"),
    "seccomp and landlock": ("namespaces", "user"),
    "seccomp and root": ("user", "landlock"),
    "seccomp and namespaces": ("private root", "user", "landlock"),
    "no seccomp": ("seccomp",),
    "audit hook alone": LAYERS,
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_every_set_of_layers_refuses_outside_access(name: str, tmp_path: Path) -> None:
    """Each layer left out in turn. The audit hook alone stops honest mistakes, not attacks on the interpreter."""
    victim, outside, without = tmp_path / "victim", tmp_path / "evil", FALLBACKS[name]
    victim.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        attacks = [code.format(port=port, outside=str(outside), victim=str(victim)) for key, code in REFUSED.items()
                   if key != "a new session"]  # fmt: skip
        code = (
            f"import os, socket, subprocess\nattacks = {attacks!r}\nfailed = []\nfor attack in attacks:\n"
            "    try: exec(attack, {})\n    except (OSError, ImportError, AssertionError): failed.append(attack)\n"
            "done = [attack for attack in attacks if attack not in failed]\n"
        )
        result = sandbox.run(code, "assert done == [], done", limits=LIMITS, without=without)
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.passed, result
    assert victim.read_text() == "secret" and not outside.exists()
    assert ("seccomp" in result.layers) is ("seccomp" not in without) is not ("audit hook" in result.layers)
    assert ("private root" in result.layers) is not bool({"namespaces", "private root"} & set(without))


def test_without_private_root_solutions_have_common_modules_but_no_files() -> None:
    code = (
        "import collections, json, re, statistics, xml.etree.ElementTree\ndef f(x):\n    return 2 * x\n"
        "def files():\n    open('/dev/null')\ndef look():\n    import os\n    os.stat('/')"
    )
    tests = (
        "assert f(2) == 4\nfor g in (files, look):\n    try: g()\n    except PermissionError: pass\n    else: assert 0"
    )
    result = sandbox.run(code, tests, limits=LIMITS, without=("namespaces",))
    assert result.passed and "no files" in result.layers, result


def test_validate_runs_solutions_and_names_empty_tests(tmp_path: Path) -> None:
    golds = [
        TESTS,
        {"tests": TESTS, "solution": RIGHT},
        {"tests": TESTS, "solution": "def f(x): return x"},
        "assert (",
        "def helper(): pass",
        "# nothing",
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{n}", "answer": gold}) + "\n" for n, gold in enumerate(golds)))
    report = validate(Source(path=str(path)), "python", workers=1)
    assert report.total == 6
    assert [reason for _, _, reason in report.failed] == ["different", "error", "passes_blank", "error"]
