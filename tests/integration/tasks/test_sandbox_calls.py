"""Every system call is tried in the sandbox on the files, processes, sockets, timers, memory and keys of a victim beside it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater.tasks import sandbox, sandbox_filter

MACHINE = platform.machine()
pytestmark = pytest.mark.skipif(
    MACHINE not in sandbox_filter.ARCHITECTURES, reason="no seccomp filter for this machine"
)

VICTIM = """
import ctypes, json, mmap, os, resource, signal, socket, sys
path, seconds = sys.argv[1], 3000
libc = ctypes.CDLL(None, use_errno=True)
numbers = json.loads(sys.argv[2])
for name in os.listdir(path):
    os.setxattr(f"{path}/{name}", "user.owner", b"victim")
received = []
for number in set(range(1, 65)) - {9, 19, 32, 33, signal.SIGCHLD}:
    signal.signal(number, lambda number, frame: received.append(number))
signal.setitimer(signal.ITIMER_REAL, seconds, 7)
server = socket.create_server(("127.0.0.1", 0))
server.setblocking(False)
memory = ctypes.create_string_buffer(b"memory of the victim")
key = libc.syscall(numbers["add_key"], b"user", b"headwater-victim", b"secret", 6, -5)
segment = libc.shmget(0, 4096, 0o1600)
libc.shmat.restype = ctypes.c_void_p
address = libc.shmat(segment, None, 0) if segment >= 0 else -1
if segment >= 0:
    ctypes.memmove(address, b"shared memory", 13)

def state():
    names = sorted(os.listdir(path))
    files = {name: [open(f"{path}/{name}").read(), *list(os.stat(f"{path}/{name}"))[:7], os.stat(f"{path}/{name}").st_mtime_ns,
             {x: os.getxattr(f"{path}/{name}", x).hex() for x in os.listxattr(f"{path}/{name}")}] for name in names}
    secret = ctypes.create_string_buffer(16)
    read = libc.syscall(numbers["keyctl"], 11, key, secret, 16)
    try:
        visitors = str(server.accept())
    except BlockingIOError:
        visitors = ""
    left, again = signal.getitimer(signal.ITIMER_REAL)
    return {
        "files": files, "folder": list(os.stat(path))[:7], "signals": received, "visitors": visitors, "memory": memory.value.decode(),
        "timer": [left > seconds - 1000, again], "key": [read, secret.raw[:6].decode()],
        "shared": ctypes.string_at(address, 13).decode() if segment >= 0 else "", "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)), "policy": os.sched_getscheduler(0), "session": [os.getsid(0), os.getpgid(0)],
        "limits": [resource.getrlimit(n) for n in range(16)], "input": libc.syscall(numbers["ioprio_get"], 1, 0),
        "dumpable": libc.prctl(3), "folder of work": os.getcwd(), "mask": os.umask(0o22),
        "files open": sorted(os.listdir("/proc/self/fd")), "score": open("/proc/self/oom_score_adj").read(),
        "threads": len(os.listdir("/proc/self/task")),
    }

state()
print(json.dumps({"pid": os.getpid(), "port": server.getsockname()[1], "key": key, "segment": segment,
                  "address": ctypes.addressof(memory)}), flush=True)
for line in sys.stdin:
    print(json.dumps(state()), flush=True)
"""

ATTACK = """
import errno, struct, sys
frame = sys._getframe()
while "ctypes" not in frame.f_globals:
    frame = frame.f_back
ctypes = frame.f_globals["ctypes"]

libc = ctypes.CDLL(None, use_errno=True)

def attack(victim, numbers):
    pid, key, segment, address = (victim[name] for name in ("pid", "key", "segment", "address"))
    paths = [ctypes.create_string_buffer(path.encode()) for path in victim["paths"]]
    file, other, folder = map(ctypes.addressof, paths)
    zeros = ctypes.create_string_buffer(4096)
    name = ctypes.create_string_buffer(b"user.owner")
    mask = ctypes.create_string_buffer(struct.pack("Q", 1) + bytes(120))
    home = ctypes.create_string_buffer(struct.pack("=HHI8x", 2, ((victim["port"] & 255) << 8) | victim["port"] >> 8, 0x0100007F))
    local = ctypes.create_string_buffer(bytes(4096))
    vector = ctypes.create_string_buffer(struct.pack("QQQQ", ctypes.addressof(local), 8, address, 8))
    zero, attribute, one, target, io = map(ctypes.addressof, (zeros, name, mask, home, vector))
    patterns = [
        (pid, 9), (pid, 0), (pid, pid, 9), (pid, 8, one), (pid, 7, zero, 0), (pid, 5, zero), (pid, zero), (0, pid, 19),
        (1, pid, 3 << 13),
        (16, pid, 0, 0), (pid, io, 1, io + 16, 1, 0), (0x4206, pid, 0, 0), (file, 0o777), (file, 0, 0, 0), (file, zero, zero, zero),
        (file, attribute, zero, 6, 0), (file, other), (folder, 0o777), (-100, file, 0o777, 0), (-100, file, zero, 0x1000),
        (-100, file, 1, 0, 0), (-100, file, -100, other, 0), (-100, file, 0, 0, 0x200), (other, file, 0), (3, target, 16),
        (segment, 0, 0), (segment, zero, 0), (3, key, zero, 6), (5, key, 0), (2, key, zero, 6), (11, key, zero, 16),
        (2, 1, 0), (2, 2, 0), (16, 3, 0), (1, 1, 0, zero), (4, 8, pid), (4, 10, 9), (4, 15, zero), (address, 4096, 0),
        (0, 4096, 7, 0x40022, -1, 0),
        (attribute, 1), (0x10000000,), (0x11, 0, 0, 0, 0), (-1, 9), (zero, 88, 0), (zero, 1),
    ]
    reached = {}
    for number in numbers:
        for pattern in patterns:
            values = [ctypes.c_long(value) for value in (*pattern, 0, 0, 0, 0, 0, 0)[:6]]
            ctypes.set_errno(0)
            result = libc.syscall(ctypes.c_long(number), *values)
            code = ctypes.get_errno() if result == -1 else 0
            if code not in (errno.EPERM, errno.ENOSYS):
                reached.setdefault(number, set()).add(code)
    return sorted(reached)
"""


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("file", "other"):
        (folder / name).write_text("secret")
    numbers = {
        "x86_64": {"add_key": 248, "keyctl": 250, "ioprio_get": 252},
        "aarch64": {"add_key": 217, "keyctl": 219, "ioprio_get": 31},
    }
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(folder), json.dumps(numbers[MACHINE])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize(
    "without",
    [(), ("user", "landlock"), ("namespaces", "user", "landlock")],
    ids=["every layer", "same user", "seccomp alone"],
)
def test_every_system_call_leaves_victim_unchanged(
    without: tuple[str, ...], victim: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert victim.stdout is not None
    described = json.loads(victim.stdout.readline())
    described["paths"] = [str(tmp_path / "victim" / name) for name in ("file", "other", "")]
    before = answer(victim)
    rules = sandbox_filter.rules(MACHINE, sandbox_filter.Profile(0, files=True, threads=True))
    plain = {*sandbox_filter.numbers(sandbox_filter._PLAIN, MACHINE), "sendto"}  # it would write to the tests' process
    own = {number for name, number, _ in rules if name in plain}
    own |= (
        {335, 336} if MACHINE == "x86_64" else set()
    )  # uretprobe, uprobe: Linux does not filter them; they end the caller
    numbers = [*range(600), *range(0x40000000, 0x40000000 + 600)]
    tried = [
        number for number in numbers if number not in own
    ]  # those act on the process itself, and some end or block it
    tests = f"reached = attack({described!r}, {tried!r})\nopen('/dev/null').close()\nassert reached == []"
    if "namespaces" in without:
        tests = tests.replace("open('/dev/null').close()\n", "")
    listed = {number for _, number, _ in rules}
    tests = tests.replace("reached == []", f"set(reached) <= {listed!r}, reached")
    result = sandbox.run(ATTACK, tests, limits=sandbox.Limits(seconds=60.0), without=without)
    assert result.passed, result
    assert "seccomp" in result.layers and len(tried) > 1100
    assert answer(victim) == before
    assert before["memory"] == "memory of the victim" and before["files"]["file"][0] == "secret"


@pytest.mark.skipif(MACHINE != "x86_64", reason="int 0x80 is of x86")
def test_calls_of_another_architecture_end_process() -> None:
    code = """
    import sys
    del sys.modules["ctypes"], sys.modules["_ctypes"]
    import ctypes, mmap
    def f(x):
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(bytes.fromhex("b814000000" "cd80" "c3"))  # getpid of the 32-bit table
        return ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
    """
    program = "\n".join(line[4:] for line in code.splitlines())
    result = sandbox.run(program, "assert f(1)")
    assert (result.passed, result.reason) == (False, "error"), result
    harmless = program.replace('"b814000000" "cd80" "c3"', '"b814000000" "c3"')
    assert sandbox.run(harmless, "assert f(1) == 20").passed
