"""Verifier: a verdict within the time limit, whatever the grader does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.errors import UserError
from headwater.tasks.registry import TASKS, find_task
from headwater.tasks.verifier import Verifier

GRADERS = """
import ctypes, os, time

def misbehave(gold, completion):
    if completion == "sleep": time.sleep(60)
    if completion == "spin":
        while True: pass
    if completion == "bigint": return (9**9**9) == 1
    if completion == "allocate": return len(bytearray(8 * 2**30)) == 0
    if completion == "hoard":
        held = []
        while True: held.append(bytearray(2**24))
    if completion == "exit": os._exit(3)
    if completion == "quit": raise SystemExit(0)
    if completion == "raise": raise ValueError("no")
    if completion == "recurse": return misbehave(gold, completion)
    if completion == "segfault": ctypes.string_at(0)
    if completion == "junk": return "yes"
    if completion == "number": return 1
    if completion == "pair": return True, "nearly"
    if completion == "noise":
        print("{"); os.write(1, b"noise\\n"); os.write(2, b"noise\\n")
    return gold == completion

def pid(gold, completion):
    return True, str(os.getpid())

not_callable = 3
"""


@pytest.fixture
def graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "wild_graders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("wild_graders", None)
    yield "wild_graders"
    sys.modules.pop("wild_graders", None)


def test_verifier_reports_reason_for_each_failure_and_keeps_other_verdicts(graders: str) -> None:
    wild = {
        "sleep": "timeout", "spin": "timeout", "bigint": "timeout", "allocate": "memory", "hoard": "memory",
        "exit": "error", "quit": "error", "raise": "error", "recurse": "error", "segfault": "error",
        "junk": "no verdict: str", "number": "no verdict: int",
    }  # fmt: skip
    pairs = [pair for kind in wild for pair in (("good", kind), ("good", "good"), ("good", f"bad{kind}"))]
    with Verifier(f"{graders}:misbehave", seconds=1.0, memory_mb=128) as verifier:
        verdicts = verifier(pairs)
    for place, (kind, reason) in enumerate(wild.items()):
        bad, good, other = verdicts[3 * place : 3 * place + 3]
        assert (bad.correct, bad.reason) == (False, reason), kind
        assert bad.seconds < 1.8
        assert (good.correct, good.reason) == (True, "equal")
        assert (other.correct, other.reason) == (False, "different")


def test_verifier_keeps_custom_reasons_and_ignores_prints(graders: str) -> None:
    with Verifier(f"{graders}:misbehave") as verifier:
        verdicts = verifier([("noise", "noise"), ("x", "pair"), ("a", "b")])
    assert [(verdict.correct, verdict.reason) for verdict in verdicts] == [
        (True, "equal"),
        (True, "nearly"),
        (False, "different"),
    ]


def test_verifier_is_not_delayed_by_hanging_answer(graders: str) -> None:
    with Verifier(f"{graders}:misbehave", workers=2, seconds=1.0) as verifier:
        verifier([("a", "a")])  # the workers are up
        started = time.perf_counter()
        verdicts = verifier([("0", "sleep"), *((str(n), str(n)) for n in range(100))])
        assert time.perf_counter() - started < 3.5
    assert verdicts[0].reason == "timeout"
    assert all(verdict.correct for verdict in verdicts[1:])


def test_verifier_reuses_workers_and_stops_them_at_close(graders: str) -> None:
    with Verifier(f"{graders}:pid", workers=1) as verifier:
        pids = {int(verifier([("g", str(n))])[0].reason) for n in range(5)}
    assert len(pids) == 1 and pids != {os.getpid()}
    with pytest.raises(ProcessLookupError):
        os.kill(pids.pop(), 0)


def test_verifier_is_thread_safe_without_signals() -> None:
    results: dict[int, list[bool]] = {}
    with Verifier("maths") as verifier:

        def work(name: int) -> None:
            pairs = [(f"{name}x+{k}", f"\\boxed{{{k}+{name}x}}") for k in range(1, 5)]
            results[name] = [verdict.correct for verdict in verifier([*pairs, ("1", "\\boxed{x+2}")])]

        threads = [threading.Thread(target=work, args=(name,)) for name in (2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {name: [True] * 4 + [False] for name in (2, 3, 4)}


def test_verifier_workers_end_with_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from headwater.tasks.verifier import Verifier\n"
        "verifier = Verifier('maths', workers=1)\n"
        "verifier([('x+1', r'\\boxed{1+x}')])\n"
        "print(verifier._pool[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and nobody has asked for its exit status
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_verifier_grades_equal_questions_once(graders: str) -> None:
    with Verifier(f"{graders}:misbehave", workers=1, seconds=0.5) as verifier:
        verdicts = verifier([("a", "sleep")] * 20)
        started = time.perf_counter()
        assert [verdict.reason for verdict in verifier([("a", "sleep")] * 20)] == ["timeout"] * 20
        assert time.perf_counter() - started < 0.2
    assert [verdict.reason for verdict in verdicts] == ["timeout"] * 20


def test_verifier_keeps_order_of_questions() -> None:
    pairs = [(str(n), f"\\boxed{{{n if n % 3 else n + 1}}}") for n in range(300)]
    pairs[5:5] = [("x^2-1", "\\boxed{(x-1)(x+1)}"), ("x^2-1", "\\boxed{(x-1)(x+2)}")]
    with Verifier("maths") as verifier:
        correct = [verdict.correct for verdict in verifier(pairs)]
    assert correct == [bool(n % 3) for n in range(5)] + [True, False] + [bool(n % 3) for n in range(5, 300)]


def test_verifier_settles_plain_answers_without_worker() -> None:
    with Verifier("maths") as verifier:
        verdicts = verifier([("1,080", "#### 1080"), ("5", "The answer is 6."), ("7", "no idea")])
        assert verifier._pool == []
    assert [verdict.reason for verdict in verdicts] == ["equal", "different", "no_answer"]


def test_verifier_accepts_lone_surrogates_and_control_characters() -> None:
    with Verifier("maths", workers=1) as verifier:
        verdicts = verifier([("x+1", "\\boxed{\ud800+x}"), ("x+1", "\0\\boxed{1+x}\x1b")])
    assert [verdict.correct for verdict in verdicts] == [False, True]


def test_sums_are_graded_in_process() -> None:
    with Verifier("sums") as verifier:
        assert [verdict.reason for verdict in verifier([("47", "17+30=47"), ("47", "=48"), ("47", "?")])] == [
            "equal", "different", "no_answer",
        ]  # fmt: skip
        assert verifier._pool == []
    task = TASKS["sums"]
    assert task.extract is not None
    assert task.extract("17+30=47") == "47" and task.extract("17") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chemistry", "unknown"),
        ("no_such_module:grade", "does not import"),
        ("wild_graders:missing", "no function missing"),
        ("wild_graders:not_callable", "no function not_callable"),
        ("wild_graders:", "unknown"),
    ],
)
def test_unknown_task_is_refused_in_one_sentence(graders: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find_task(name)
    assert "\n" not in str(caught.value)


def test_verifier_and_workers_import_no_torch() -> None:
    script = (
        "import sys, headwater.tasks.verifier, headwater.data.validate, headwater.data.sources\n"
        "from headwater.tasks.registry import TASKS\n"
        "TASKS['maths'].grade(*TASKS['maths'].warm_up)\n"
        "assert 'sympy' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


ONCE = """
import os, signal
from pathlib import Path

def once(gold, completion):
    mark = Path(os.environ["HEADWATER_TEST_MARK"] + completion)
    if completion.startswith("kill") and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short, or anyone with a reason
    return gold == completion
"""


def test_verifier_retries_after_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graders_once.py").write_text(ONCE)
    monkeypatch.setenv("HEADWATER_TEST_MARK", f"{tmp_path}/mark-")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pairs = [(text, text) for text in ("a", "kill1", "b", "kill2", "c")] + [("x", "kill3"), ("x", "d")]
    with Verifier("graders_once:once", workers=2) as verifier:
        verdicts = verifier(pairs)
    assert [verdict.correct for verdict in verdicts] == [True] * 5 + [False] * 2
    assert {verdict.reason for verdict in verdicts} == {"equal", "different"}
    assert len(list(tmp_path.glob("mark-kill*"))) == 3
