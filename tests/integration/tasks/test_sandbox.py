"""Sandbox of the task python: escapes and resource exhaustion beyond tests/integration/tasks/test_python_tests.py."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from headwater.tasks import sandbox

GOOD = "def f(x):\n    return 2 * x"
ESCAPES = {
    "a link to a secret": "import os\nos.symlink({victim!r}, 'l')\nopen('l').read()",
    "a hard link to a secret": "import os\nos.link({victim!r}, 'l')\nopen('l').read()",
    "a path of dots": "open('../../../../../../../..' + {victim!r}).read()",
    "writing through /proc": "open('/proc/self/cwd/../' + 'evil', 'w').write('x')",
    "writing through a folder by number": (
        "import os\nd = os.open('.', os.O_RDONLY)\nf = os.open('../evil', os.O_CREAT | os.O_WRONLY, dir_fd=d)\nos.write(f, b'x')"
    ),
    "its own memory": "open('/proc/self/mem', 'r+b').read(1)",
    "the parent's memory": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb').read(1)",
    "a parent's open file": "import os\nos.listdir(f'/proc/{{os.getppid()}}/fd')",
    "the list of processes": "import os\nassert any(n.isdigit() and n != str(os.getpid()) for n in os.listdir('/proc'))",
    "a new process": "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})",
    "a program": "import os\nos.execv('/bin/true', ['true'])",
    "a datagram": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', 9))",
    "a name server": "import socket\nsocket.getaddrinfo('example.com', 80)[0]",
    "a request": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1/', timeout=1)",
    "a signal to everybody": "import os, signal\nos.kill(-1, signal.SIGTERM)",
    "a lower priority of others": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "raised limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50))",
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "mounting": "import os\nopen('/proc/self/mountinfo').read()",
    "an interpreter of C": "import _ctypes",
    "a terminal": "import pty\npty.spawn('/bin/true')",
    "a device": "open('/dev/tty', 'w').write('x')",
    "the configuration folder": "import os\nassert 'passwd' in os.listdir('/etc')",
    "the state of a file": "import os\nos.stat({victim!r})",
    "the mode of a file": "import os\nos.chmod({victim!r}, 0o777)",
    "the times of a file": "import os\nos.utime({victim!r}, (0, 0))",
    "an attribute of a file": "import os\nos.setxattr({victim!r}, 'user.x', b'x')",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=1)",
    "a memory file": "import os\nos.memfd_create('x')",
    "signals on input and output": ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())"),
    "asynchronous input and output": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)",
    "the scheduler": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "processors of others": "import os\nos.sched_setaffinity(os.getppid(), [0])",
    "packages in their folder": (
        "import os\nassert any(os.listdir(os.path.dirname(os.__file__) + '/' + n) for n in ('site-packages', 'dist-packages'))"
    ),
    "packages that are installed": "import torch",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_sandbox_solution_reaches_nothing_outside(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("secret", encoding="utf-8")
    code = ESCAPES[name].format(victim=str(victim))
    result = sandbox.run(f"{code}\n{GOOD}", "assert f(2) == 4", limits=sandbox.Limits(seconds=5.0))
    assert (result.passed, result.reason) == (False, "error"), result
    assert victim.read_text(encoding="utf-8") == "secret" and not list(tmp_path.glob("evil"))


TO_EVERY_FILE = """
import os
while True:
    for n in range(3, 12):
        try: os.write(n, b'x' * 10**6)
        except OSError: pass
"""
DEAF = """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
BURDENS = {
    "output without end": "while True: print('x' * 10**6, flush=True)",
    "a report without end": TO_EVERY_FILE,
    "an error with a huge text": "raise ValueError('x' * 10**8)",
    "an error with a hostile name": "E = type('x' * 10**6, (Exception,), {})\nraise E",
    "recursion": "def g(): return g()\ng()",
    "processor time in C": "sum(range(10**13))",
    "a regular expression": "import re\nre.match('(a+)+b', 'a' * 60)",
    "a long number": "str(10**(10**8))",
    "ignored signals": DEAF,
    "closed files": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "compressed data": "import zlib\nx = zlib.compress(bytes(10**8))\ny = [zlib.decompress(x) for _ in range(50)]",
    "a deep program": "x = " + "(" * 150 + ")" * 150 + "\n" + "-" * 50_000 + "1",
}


@pytest.mark.parametrize("name", BURDENS)
def test_sandbox_stops_resource_exhaustion_and_grades_wrong(name: str) -> None:
    started = time.monotonic()
    result = sandbox.run(f"{BURDENS[name]}\n{GOOD}", "assert f(2) == 4", limits=sandbox.Limits(seconds=2.0))
    assert not result.passed and len(result.detail) <= 400
    assert time.monotonic() - started < 12


def test_sandbox_kills_fork_bomb() -> None:
    bomb = "import os, threading\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    result = sandbox.run(bomb, "pass", limits=sandbox.Limits(seconds=1.5))
    assert not result.passed
    server = sandbox._servers[()].process.pid
    assert Path(f"/proc/{server}/task/{server}/children").read_text() == ""
    assert shutil.which("true")  # and the machine still starts programs
