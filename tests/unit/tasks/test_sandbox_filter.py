"""The seccomp filter's program, run by an interpreter of BPF on every call number of both architectures."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from headwater.tasks import sandbox_filter
from headwater.tasks.sandbox_filter import (
    ALLOW,
    ARCHITECTURES,
    ENOSYS,
    EPERM,
    KILL,
    Profile,
    program,
    rules,
)

PROFILES = {
    "files": Profile(pid=1234, files=True, threads=True),
    "no files": Profile(pid=1234, files=False, threads=False),
}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
X32 = 0x40000000


def verdict(
    lines: list[sandbox_filter.Instruction], number: int, arguments: tuple[int, ...] = (), architecture: int = 0
) -> int:
    """What the kernel would decide for a call: classic BPF over `struct seccomp_data`."""
    padded = [value % 2**64 for value in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    place = accumulator = 0
    while True:
        code, if_true, if_false, operand = lines[place]
        place += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x15:
            place += if_true if accumulator == operand else if_false
        else:
            assert code == 0x06
            return operand


def kernel_numbers(machine: str) -> dict[str, int]:
    """Call numbers of the kernel's own header."""
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed: numbers of {machine} were NOT compared with the kernel's")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", HEADERS[machine].read_text(), re.MULTILINE)
    names = {"fstatat": "newfstatat"} if machine == "aarch64" else {}
    return {names.get(name, name): int(number) for name, number in reversed(defined)}


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_call_numbers_are_those_of_kernel_header(machine: str) -> None:
    kernel = kernel_numbers(machine)
    listed = {name: number for name, number, _ in rules(machine, PROFILES["files"])}
    assert listed == {name: kernel[name] for name in listed}


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_filter_allows_listed_calls_and_no_other(machine: str, profile: Profile) -> None:
    lines, architecture = program(machine, profile), ARCHITECTURES[machine]
    unconditional = {number for _, number, operands in rules(machine, profile) if not operands}
    conditional = {number for _, number, operands in rules(machine, profile) if operands}
    for number in [*range(1200), *range(X32, X32 + 1200), 2**31, 2**32 - 1]:
        expected = ENOSYS if number == 435 else ALLOW if number in unconditional else EPERM
        if number not in conditional:
            assert verdict(lines, number, (), architecture) == expected, number
            assert verdict(lines, number, (2**64 - 1,) * 6, architecture) == expected, number
        else:
            assert verdict(lines, number, (2**64 - 1,) * 6, architecture) == EPERM, number
    for other in {0, 0x40000003, *ARCHITECTURES.values()} - {architecture}:
        assert {verdict(lines, number, (), other) for number in range(600)} == {KILL}


MUST_BE_REFUSED = """
add_key bind bpf capset chmod chown chroot clone3 connect execve execveat fchmod fchmodat fchown fchownat fanotify_init fork
fsetxattr futimesat get_robust_list getpriority getsid init_module inotify_init1 io_setup io_uring_enter io_uring_register
io_uring_setup ioprio_set kcmp keyctl kexec_load kill landlock_restrict_self lchown link linkat listen lsetxattr mbind
memfd_create memfd_secret migrate_pages mknod mknodat mlock mlock2 mlockall mount move_pages mount_setattr move_mount
mq_open msgget msgsnd name_to_handle_at open_by_handle_at open_tree perf_event_open personality pidfd_getfd pidfd_open
pidfd_send_signal pivot_root pkey_alloc process_madvise process_mrelease process_vm_readv process_vm_writev ptrace quotactl
reboot recvmsg remap_file_pages request_key rt_sigqueueinfo rt_tgsigqueueinfo sched_setaffinity sched_setattr sched_setparam
sched_setscheduler seccomp semget semop sendmmsg sendmsg setdomainname setgid sethostname setns setpgid setpriority
setresuid setrlimit setsid setsockopt settimeofday setuid setxattr shmat shmctl shmget signalfd4 socket splice statfs swapon
symlink symlinkat sync syslog tee timer_create timerfd_create tkill umount2 unshare userfaultfd utime utimensat utimes vfork
vmsplice wait4 waitid
"""


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_dangerous_calls_are_refused_by_name(machine: str) -> None:
    kernel = kernel_numbers(machine)
    lines = program(machine, PROFILES["files"])
    present = {name: kernel[name] for name in MUST_BE_REFUSED.split() if name in kernel}
    assert len(present) > 110
    allowed = [name for name, number in present.items() if verdict(lines, number, (), ARCHITECTURES[machine]) == ALLOW]
    assert allowed == []


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("mmap", (0, 4096, 3, 0x22, -1, 0), True),
        ("mmap", (0, 4096, 3, 0x22 | 0x40000, -1, 0), False),  # MAP_HUGETLB
        ("mremap", (0, 0, 4096, 1), True),
        ("mremap", (0, 0, 4096, 3), False),  # MREMAP_FIXED
        ("mremap", (0, 0, 4096, 1 | 2**32), False),
        ("madvise", (0, 0, 4), True),
        ("madvise", (0, 0, 14), False),  # MADV_HUGEPAGE
        ("futex", (0, 128 | 256 | 9), True),
        ("futex", (0, 6), False),  # FUTEX_LOCK_PI
        ("fcntl", (3, 4, 0x800), True),
        ("fcntl", (3, 4, 0x2000), False),  # O_ASYNC
        ("fcntl", (3, 8, 1), False),  # F_SETOWN
        ("fcntl", (3, 10, 9), False),  # F_SETSIG
        ("fcntl", (3, 15, 0), False),  # F_SETOWN_EX
        ("fcntl", (3, 1031, 1 << 20), False),  # F_SETPIPE_SZ
        ("ioctl", (3, 0x5421), True),
        ("ioctl", (3, 0x5452), False),  # FIOASYNC
        ("ioctl", (3, 0x8901), False),  # FIOSETOWN
        ("ioctl", (0, 0x5412), False),  # TIOCSTI
        ("socketpair", (1, 1, 0), True),
        ("socketpair", (16, 3, 0), False),  # AF_NETLINK
        ("sendto", (3, 0, 1, 0, 0, 0), True),
        ("sendto", (3, 0, 1, 0, 2**32, 16), False),
        ("tgkill", (1234, 1235, 6), True),
        ("tgkill", (1, 1, 9), False),
        ("tgkill", (-1, 1, 9), False),
        ("prlimit64", (0, 7, 0), True),
        ("prlimit64", (0, 7, 2**40), False),
        ("prlimit64", (1, 7, 0), False),
        ("prctl", (15, 0), True),
        ("prctl", (1, 0), False),
        ("sched_getaffinity", (0, 8), True),
        ("sched_getaffinity", (1, 8), False),
        ("clone", (0x3D0F00,), True),
        ("clone", (0x11,), False),  # fork
        ("clone", (0x3D0F00 | 0x10000000,), False),  # CLONE_NEWUSER
    ],
)
@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_conditional_calls_depend_on_arguments(
    machine: str, name: str, arguments: tuple[int, ...], allowed: bool
) -> None:
    number = sandbox_filter.numbers(sandbox_filter._CONDITIONAL, machine)[name]
    lines = program(machine, PROFILES["files"])
    assert (verdict(lines, number, arguments, ARCHITECTURES[machine]) == ALLOW) is allowed
