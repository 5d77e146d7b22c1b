"""Inside the sandbox: apply the restrictions one by one, then run a solution and its tests.

Started by path in a fresh interpreter (`sandbox.run`); imports only the standard library. Restrictions that the kernel does
not support are skipped, and the applied ones are reported. The order matters: namespaces need privileges that are then
dropped, and the seccomp filter comes last because it forbids the system calls that set up the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
MEGABYTE = 2**20

# Namespaces and privileges --------------------------------------------------------------------------------------------


def enter_namespaces(folder: str, megabytes: int) -> list[str]:
    """Enter a network namespace without interfaces and mount a small tmpfs over the folder, as far as permitted."""
    new_user, new_net, new_ipc, new_mounts = 0x10000000, 0x40000000, 0x08000000, 0x00020000
    uid, gid = os.getuid(), os.getgid()
    if not hasattr(LIBC, "unshare"):
        return []
    if LIBC.unshare(new_user | new_net | new_ipc | new_mounts) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            try:
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
            except OSError:
                return ["network namespace"]
    elif LIBC.unshare(new_net | new_ipc | new_mounts) != 0:
        return []
    recursive_private, nosuid_nodev_noexec = 0x4000 | 0x40000, 2 | 4 | 8
    LIBC.mount(b"none", b"/", None, recursive_private, None)
    options = f"size={megabytes}m,nr_inodes=4096,mode=700".encode()
    if LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", nosuid_nodev_noexec, options) != 0:
        return ["network namespace"]
    os.chdir(folder)
    return ["network namespace", "memory folder"]


def drop_privileges() -> None:
    """Drop all capabilities and forbid gaining new ones."""
    if hasattr(LIBC, "capset"):
        LIBC.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def limit_resources(setup: dict[str, Any], limit_processes: bool) -> None:
    """Set rlimits. NPROC only if `limit_processes`: for root outside a namespace the kernel counts unrelated processes."""
    seconds, memory = int(setup["seconds"]) + 1, setup["memory_mb"] * MEGABYTE
    limits = [
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, setup["file_mb"] * MEGABYTE, setup["file_mb"] * MEGABYTE),
        (resource.RLIMIT_NOFILE, setup["open_files"], setup["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_AS, memory, memory),
    ]
    if limit_processes:
        limits.append((resource.RLIMIT_NPROC, setup["processes"], setup["processes"]))
    for which, soft, hard in limits:
        _, maximum = resource.getrlimit(which)
        if maximum != resource.RLIM_INFINITY:
            soft, hard = min(soft, maximum), min(hard, maximum)
        resource.setrlimit(which, (soft, hard))


# Landlock: access to files and signals to other processes -------------------------------------------------------------


def readable_paths() -> list[str]:
    """The standard library and the shared libraries that its modules load."""
    paths = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib"]
    return [*paths, "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom"]


def restrict_files(folder: str) -> list[str]:
    """Landlock: read the standard library, write the folder, nothing else; newer kernels: no TCP, no signals to others."""
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
    allowed = [(path, read_file | read_dir) for path in readable_paths()]
    allowed += [(folder, handled & ~devices_and_programs), ("/dev/null", read_file | write_file | truncate)]
    for path, rights in allowed:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= read_file | write_file | truncate
        LIBC.syscall(445, rules, 1, struct.pack("=Qi", rights & handled, descriptor), 0)
        os.close(descriptor)
    restricted = LIBC.syscall(446, rules, 0) == 0
    os.close(rules)
    return [f"landlock {version}"] if restricted else []


# seccomp: filter of system calls -------------------------------------------------------------------------------------

# (architecture, refused calls, calls with rules of their own). Refused: sockets, new processes and programs, signals, debugging,
# namespaces and mounts, keys, kernel modules, io_uring, leaving the process group.
_X86 = (0xC000003E, (41, 57, 58, 59, 322, 62, 200, 129, 297, 434, 424, 438, 101, 310, 311, 272, 308, 165, 166, 155, 161,
        321, 298, 248, 249, 250, 323, 425, 175, 313, 169, 112, 109, 157, 304), (56, 234, 302))  # fmt: skip
_ARM = (0xC00000B7, (198, 221, 281, 129, 130, 138, 240, 434, 424, 438, 117, 270, 271, 97, 268, 40, 39, 41, 51,
        280, 241, 217, 218, 219, 282, 425, 105, 273, 142, 157, 154, 167, 265), (220, 131, 261))  # fmt: skip
CALLS = {"x86_64": _X86, "aarch64": _ARM}


def restrict_calls() -> list[str]:
    """Install the seccomp filter on the two architectures listed above."""
    if platform.machine() not in CALLS or struct.calcsize("P") != 8:
        return []
    architecture, refused, (clone, tgkill, prlimit) = CALLS[platform.machine()]
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (ret, 0, 0, refuse),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 ABI's numbers
        (ret, 0, 0, refuse),
    ]
    for number in refused:
        lines += [(equal, 0, 1, number), (ret, 0, 0, refuse)]
    lines += [(equal, 0, 1, 435), (ret, 0, 0, unknown)]  # clone3 has its flags in memory; libc falls back to clone
    # Allowed: threads (not processes), signals to this process, limits of this process.
    lines += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000), (ret, 0, 0, allow), (ret, 0, 0, refuse)]
    for number, own in ((tgkill, os.getpid()), (prlimit, 0)):
        lines += [(equal, 0, 4, number), (load, 0, 0, 16), (equal, 0, 1, own), (ret, 0, 0, allow), (ret, 0, 0, refuse)]
    lines.append((ret, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    packed = struct.pack("@HP", len(lines), ctypes.addressof(program))
    return ["seccomp"] if LIBC.prctl(22, 2, packed, 0, 0) == 0 else []


# Audit hook: the same restrictions in Python, for kernels without the above --------------------------------------------


def audit_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Audit hook that raises PermissionError. Its state is in the closure, out of reach of monkeypatching."""
    readable = tuple(path.rstrip("/") for path in [*readable_paths(), "/dev/null", folder])
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
            refused = not within(args[0], (folder, "/dev/null") if flags & writing else readable)
        elif event in path_events:
            roots = readable if event in ("os.listdir", "os.scandir") else (folder,)
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


# A solution and its tests ---------------------------------------------------------------------------------------------


def load(code: str) -> types.ModuleType:
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    exec(compile(code, "solution.py", "exec"), solution.__dict__)
    return solution


def run_tests(tests: str, entry_point: str | None, solution: types.ModuleType) -> None:
    """Execute the tests in the solution's namespace, then the test_ functions, TestCases and `check` that they define."""
    namespace = {**solution.__dict__, "__name__": "tests"}
    exec(compile(tests, "tests.py", "exec"), namespace)
    defined = [value for name, value in list(namespace.items()) if solution.__dict__.get(name) is not value]
    for value in defined:
        if isinstance(value, types.FunctionType) and value.__name__.startswith("test_"):
            value()
    if "unittest" in sys.modules:
        import unittest

        cases = [value for value in defined if isinstance(value, type) and issubclass(value, unittest.TestCase)]
        for case in cases:
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
            if not (result.wasSuccessful() and result.testsRun):
                messages = "".join(text for _, text in [*result.errors, *result.failures])
                raise MemoryError if "MemoryError" in messages else AssertionError(case.__name__)
    if entry_point is not None:
        namespace["check"](namespace[entry_point])


def main() -> None:
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)

    def read(count: int) -> str:
        data = b""
        while len(data) < count and (more := os.read(source, count - len(data))):
            data += more
        return data.decode("utf-8", "surrogatepass")

    setup = json.loads(read(int(read(8))))
    folder = os.getcwd()
    layers = enter_namespaces(folder, setup["folder_mb"])
    drop_privileges()
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: after drop_privileges, which resets it
    if os.getppid() != setup["parent"]:
        os._exit(1)
    layers += restrict_files(folder)
    limit_resources(setup, limit_processes=bool(layers) or os.getuid() != 0)
    layers += restrict_calls()
    sys.argv[:] = ["solution.py"]
    for name in ("ctypes", "_ctypes", "ctypes._endian", "__main__"):
        sys.modules.pop(name, None)
    sys.addaudithook(audit_hook(folder))
    report: dict[str, Any] = {"layers": [*layers, "audit hook", "limits"], "at": "solution"}
    solution = None
    try:
        # The tests are read only after the solution has loaded, the proof only after the tests have passed.
        solution = load(read(setup["code"]))
        report["at"] = "tests"
        run_tests(read(setup["tests"]), setup["entry_point"], solution)
        report |= {"at": "end", "proof": read(32)}
    except MemoryError:
        solution, report["failed"] = None, "MemoryError"
    except BaseException as error:
        report["failed"] = type(error).__name__
    os.write(sink, json.dumps(report).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
