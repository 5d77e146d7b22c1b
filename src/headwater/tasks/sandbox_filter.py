"""Allow-list of system calls of the Python sandbox, assembled to a seccomp filter (classic BPF) for x86-64 and ARM64.

A call that is not listed fails with EPERM. A call of another architecture's table, such as `int 0x80` on x86-64, ends the process; the
numbers of the x32 ABI are not in the table.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from dataclasses import dataclass
from typing import NamedTuple

_PLAIN = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, close_range 436 436, lseek 8 62, dup 32 23,
dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fstat 5 80, munmap 11 215, mprotect 10 226, brk 12 214, set_robust_list 273 99,
rseq 334 293, sched_yield 24 124, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, uname 63 160,
getcpu 309 168, getrandom 318 278, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103,
restart_syscall 219 128, recvfrom 45 207, shutdown 48 210, getsockname 51 204, getsockopt 55 209, epoll_create 213 -,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, exit 60 93, exit_group 231 94
"""
_FILES = """
open 2 -, openat 257 56, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45, ftruncate 77 46, fsync 74 82,
fdatasync 75 83
"""
"""Allowed only within a root directory that holds nothing of the user's: most of these take a path that no filter can read."""
_CONDITIONAL = """
mmap 9 222, mremap 25 216, madvise 28 233, futex 202 98, fcntl 72 25, ioctl 16 29, socketpair 53 199, sendto 44 206, tgkill 234 131,
prlimit64 302 261, prctl 157 167, sched_getaffinity 204 123, clone 56 220
"""
CLONE3 = 435
"""Its flags are in memory: it fails with ENOSYS, and libc falls back to clone."""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class Operand(NamedTuple):
    """Condition on an argument of a call: its lower 32 bits, masked, are one of the values; `wide` requires that the others are 0."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


@dataclass(frozen=True)
class Profile:
    """What a filter depends on besides the architecture.

    pid      the process that may be signalled
    files    whether calls that take paths are allowed
    threads  whether threads may be started
    """

    pid: int
    files: bool
    threads: bool


def numbers(table: str, machine: str) -> dict[str, int]:
    """Numbers of a table's calls on a machine. Example: `numbers("read 0 63, pause 34 -", "aarch64")` is `{"read": 63}`."""
    column = 1 + list(ARCHITECTURES).index(machine)
    rows = [row.split() for row in table.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def rules(machine: str, profile: Profile) -> list[tuple[str, int, tuple[Operand, ...]]]:
    """(name, number, conditions on the arguments) of every allowed call; a name occurs once for each alternative."""
    allowed = numbers(_PLAIN, machine) | (numbers(_FILES, machine) if profile.files else {})
    huge_locked_growing = 0x40000 | 0x2000 | 0x100
    own, nothing = (0, profile.pid), Operand(4, (0,), wide=True)
    wait_and_wake = Operand(1, (0, 1, 3, 4, 5, 9, 10), mask=0xFFFFFFFF & ~(128 | 256))  # none that lends a priority
    conditions: list[tuple[str, tuple[Operand, ...]]] = [
        ("mmap", (Operand(3, (0,), mask=huge_locked_growing),)),
        ("mremap", (Operand(3, (1,), wide=True),)),  # MREMAP_MAYMOVE
        ("madvise", (Operand(2, (0, 1, 2, 3, 4, 8)),)),
        ("futex", (wait_and_wake,)),
        ("fcntl", (Operand(1, (0, 1, 2, 3, 1030)),)),
        ("fcntl", (Operand(1, (4,)), Operand(2, (0,), mask=0x2000))),  # F_SETFL without O_ASYNC
        ("ioctl", (Operand(1, (0x5421, 0x541B, 0x5450, 0x5451)),)),  # FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
        ("socketpair", (Operand(0, (1,)),)),
        ("sendto", (nothing,)),  # no address
        ("tgkill", (Operand(0, (profile.pid,)),)),
        ("prlimit64", (Operand(0, own), Operand(2, (0,), wide=True))),  # reads limits
        ("prctl", (Operand(0, (15,)),)),  # PR_SET_NAME
        ("sched_getaffinity", (Operand(0, own),)),
    ]
    if profile.threads:
        conditions.append(("clone", (Operand(0, (0x3D0F00, 0x7D0F00)),)))  # glibc's and musl's flags of a thread
    number = numbers(_CONDITIONAL, machine)
    every: list[tuple[str, int, tuple[Operand, ...]]] = [(name, value, ()) for name, value in allowed.items()]
    return every + [(name, number[name], operands) for name, operands in conditions]


Instruction = tuple[int, int, int, int]
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000


def program(machine: str, profile: Profile) -> list[Instruction]:
    """The filter as (code, jump if true, jump if false, operand) instructions of classic BPF (linux/filter.h)."""
    lines: list[Instruction] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, KILL)]
    for _, number, operands in [*rules(machine, profile), ("clone3", CLONE3, ())]:
        verdict = ENOSYS if number == CLONE3 else ALLOW
        body: list[Instruction] = []
        for operand in reversed(operands):
            body = _condition(operand, len(body) + 1) + body
        body.append((_RETURN, 0, 0, verdict))
        lines += [(_LOAD, 0, 0, 0), (_EQUAL, 0, len(body), number), *body]
    return [*lines, (_RETURN, 0, 0, EPERM)]


def _condition(operand: Operand, rest: int) -> list[Instruction]:
    """Instructions that continue if a condition holds and skip the `rest` instructions after them if not."""
    offset = 16 + 8 * operand.argument
    lines = [(_LOAD, 0, 0, offset), (_AND, 0, 0, operand.mask)]
    *others, last = operand.values
    lines += [(_EQUAL, len(others) - place, 0, value) for place, value in enumerate(others)]
    lines.append((_EQUAL, 0, rest + 2 if operand.wide else rest, last))
    if operand.wide:
        lines += [(_LOAD, 0, 0, offset + 4), (_EQUAL, 0, rest, 0)]
    return lines


def install(profile: Profile) -> bool:
    """Install the filter in this thread for ever; False if the kernel or the architecture does not support it."""
    machine = platform.machine()
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    lines = program(machine, profile)
    data = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    packed = struct.pack("@HP", len(lines), ctypes.addressof(data))
    return ctypes.CDLL(None).prctl(22, 2, packed, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
