"""Confine the processes of the Python sandbox: root directory, user, Landlock, resource limits, seccomp filter.

What the kernel does not support is left out and not reported among the layers. The order matters: mounts need privileges that are
then dropped, and the seccomp filter comes last because it forbids the system calls that set up the others.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Collection
from typing import Any

from headwater.tasks import sandbox_filter

LIBC = ctypes.CDLL(None, use_errno=True)
MEGABYTE = 2**20
WORK = "/work"
"""The folder of a solution and its tests, within the private root."""
READABLE_FILES = ("/dev/null", "/etc/localtime")
NEW_ROOT = "/tmp"
"""Mount point of the private root before it becomes the root directory."""
FIRST_USER = 0x70000000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 32, 0x1000, 0x4000, 0x40000


def readable_folders() -> list[str]:
    """Python's standard library and the time zones."""
    folders = [path for path in sys.path if os.path.isdir(path)]
    folders = [path for path in folders if not any(path.startswith(f"{other}/") for other in folders)]
    return [*folders, *filter(os.path.isdir, ["/usr/share/zoneinfo"])]


# The server: namespaces and a root directory that every run shares ----------------------------------------------------


def enter_namespaces() -> list[str]:
    """Enter namespaces of mounts, System V objects and a network without interfaces, within a user namespace if not privileged."""
    new_user, new_net, new_ipc, new_mounts = 0x10000000, 0x40000000, 0x08000000, 0x00020000
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(new_net | new_ipc | new_mounts) == 0:
        return ["network namespace"]
    if LIBC.unshare(new_user | new_net | new_ipc | new_mounts) != 0:
        return []
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError:
            return ["network namespace"]
    return ["user namespace", "network namespace"]


def enter_private_root() -> list[str]:
    """Replace the root directory by a read-only one with the standard library, /dev/null and an empty folder for each run."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None or LIBC.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None) != 0:
        return []
    options = b"size=1m,nr_inodes=4096,mode=755"
    if LIBC.mount(b"tmpfs", NEW_ROOT.encode(), b"tmpfs", _NO_SUID | _NO_DEV, options) != 0:
        return []
    for path in readable_folders():
        os.makedirs(f"{NEW_ROOT}{path}")
        if not _bind(path, f"{NEW_ROOT}{path}", _NO_DEV):
            return []
        for packages in ("site-packages", "dist-packages"):
            if os.path.isdir(hidden := f"{NEW_ROOT}{path}/{packages}"):
                LIBC.mount(b"tmpfs", hidden.encode(), b"tmpfs", _READ_ONLY | _NO_SUID | _NO_DEV, b"size=4k,mode=755")
    for path in filter(os.path.exists, READABLE_FILES):
        os.makedirs(os.path.dirname(f"{NEW_ROOT}{path}"), exist_ok=True)
        with open(f"{NEW_ROOT}{path}", "w", encoding="ascii"):
            pass
        _bind(path, f"{NEW_ROOT}{path}", 0)
    os.mkdir(f"{NEW_ROOT}{WORK}")
    os.chdir(NEW_ROOT)
    if LIBC.syscall(number, b".", b".") != 0 or LIBC.umount2(b".", 2) != 0:  # MNT_DETACH
        return []
    os.chdir("/")
    LIBC.mount(None, b"/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEV, None)
    return ["private root"]


def _bind(source: str, target: str, flags: int) -> bool:
    """Mount a file or folder at another path, read-only."""
    if LIBC.mount(source.encode(), target.encode(), None, _BIND | _RECURSIVE, None) != 0:
        return False
    state = os.statvfs(target).f_flag  # flags of a mount that another user namespace owns must be kept
    kept = state & (_NO_SUID | _NO_DEV | _NO_EXEC | 1024 | 2048) | (0x200000 if state & 4096 else 0)
    flags |= _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | kept
    return LIBC.mount(None, target.encode(), None, flags, None) == 0


def mount_work(megabytes: int) -> None:
    """Mount an empty folder for one run."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=1777".encode()
    if LIBC.mount(b"tmpfs", WORK.encode(), b"tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def unmount_work() -> None:
    LIBC.umount2(WORK.encode(), 2)


# A process of a run ---------------------------------------------------------------------------------------------------


def confine(limits: dict[str, Any], server_layers: list[str], without: Collection[str]) -> list[str]:
    """Apply all layers to this process but those left out; the layers that hold. Raises OSError where a limit cannot be set.

    limits         fields of `sandbox.Limits`, and this process's `memory_mb`
    server_layers  of the server, which this process inherits
    without        names of layers to leave out, for tests of the others: `user`, `landlock`, `seccomp`
    """
    own_root, server = "private root" in server_layers, os.getppid()
    if own_root:
        os.chdir(WORK)
    user = [] if "user" in without else change_user(FIRST_USER + server % 2**24)
    drop_privileges()
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: after drop_privileges, which resets it
    if os.getppid() != server:
        os._exit(1)
    layers = [*server_layers, *user]
    layers += [] if "landlock" in without else restrict_files(own_root)
    counted = bool(user) or "user namespace" in server_layers  # otherwise the kernel counts unrelated processes too
    limit_resources(limits, counted)
    profile = sandbox_filter.Profile(os.getpid(), files=own_root, threads=counted)
    if "seccomp" not in without and sandbox_filter.install(profile):
        layers = ["seccomp", *([] if own_root else ["no files"]), *layers]
    else:
        sys.addaudithook(audit_hook(own_root))
        layers = ["audit hook", *layers]
    return [*layers, "limits"]


def change_user(user: int) -> list[str]:
    """Give up root for a user that owns no file and no other process. Nothing to do for another user."""
    if os.getuid() != 0:
        return []
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:  # a user namespace that maps no such user
        return []
    return ["own user"]


def drop_privileges() -> None:
    """Drop all capabilities and forbid gaining new ones."""
    LIBC.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def limit_resources(limits: dict[str, Any], limit_processes: bool) -> None:
    """Set rlimits."""
    seconds = int(limits["seconds"]) + 1
    memory = limits["memory_mb"] * MEGABYTE
    bounds = [
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * MEGABYTE, limits["file_mb"] * MEGABYTE),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 64, 64),
        (resource.RLIMIT_AS, memory, memory),
    ]
    if limit_processes:
        bounds.append((resource.RLIMIT_NPROC, limits["processes"], limits["processes"]))
    for which, soft, hard in bounds:
        _, maximum = resource.getrlimit(which)
        if maximum != resource.RLIM_INFINITY:
            soft, hard = min(soft, maximum), min(hard, maximum)
        resource.setrlimit(which, (soft, hard))


def restrict_files(own_root: bool) -> list[str]:
    """Landlock: read the private root and write its folder, or no file at all; newer kernels: no TCP, no signals to others."""
    version = LIBC.syscall(444, None, 0, 1)
    if version < 1:
        return []
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << bits) - 1
    fields = [handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = LIBC.syscall(444, struct.pack("=QQQ", *fields), size, 0)
    if rules < 0:
        return []
    read_file, read_dir, write_file, truncate = 1 << 2, 1 << 3, 1 << 1, 1 << 14
    devices_and_programs = 1 | 1 << 6 | 1 << 11
    null = ("/dev/null", read_file | write_file | truncate)
    allowed = [("/", read_file | read_dir), (WORK, handled & ~devices_and_programs), null] if own_root else []
    for path, rights in allowed:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        LIBC.syscall(445, rules, 1, struct.pack("=Qi", rights & handled, descriptor), 0)
        os.close(descriptor)
    restricted = LIBC.syscall(446, rules, 0) == 0
    os.close(rules)
    return [f"landlock {version}"] if restricted else []


# Audit hook: the restrictions in Python, for machines without the seccomp filter ---------------------------------------


def audit_hook(own_root: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """Audit hook that raises PermissionError. Its state is in the closure, out of reach of monkeypatching."""
    folder = WORK if own_root else ""
    writable = ("/dev/null", *([WORK] if own_root else []))
    readable = (*writable, *readable_folders())
    refused_prefixes = ("socket.", "ctypes.", "subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "gc.get_",
                        "pty.")  # fmt: skip
    refused_events = frozenset({"os.system", "os.kill", "os.killpg", "os.link", "os.symlink", "os.putenv", "sys._current_frames",
                       "signal.pthread_kill", "os.setxattr", "fcntl.ioctl", "resource.prlimit"})  # fmt: skip
    path_events = frozenset({"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
                       "os.utime", "os.chdir", "os.listdir", "os.scandir", "os.mkfifo", "os.mknod"})  # fmt: skip
    refused_modules = frozenset({"ctypes", "_ctypes"})
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    fspath, error, kinds = os.fspath, PermissionError, (str, bytes, os.PathLike)

    def within(value: Any, roots: tuple[str, ...]) -> bool:
        if not isinstance(value, kinds):
            return True  # a file descriptor or no path at all
        text = fspath(value)
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        parts: list[str] = []
        for part in (text if text.startswith("/") else f"{folder}/{text}").split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts = [*parts, part]
        path = "/" + "/".join(parts)
        return any(path == root or path.startswith(root + "/") for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            refused = not within(args[0], writable if flags & writing else readable)
        elif event in path_events:
            roots = readable if event in ("os.listdir", "os.scandir") else writable
            refused = not all(within(arg, roots) for arg in args)
        elif event == "socket.__new__":
            refused = args[1] != 1  # allow AF_UNIX: asyncio's event loop needs a socket pair
        elif event == "import":
            refused = args[0] in refused_modules
        else:
            refused = event in refused_events or event.startswith(refused_prefixes)
        if refused:
            raise error(1, f"the sandbox refuses {event}")

    return hook
