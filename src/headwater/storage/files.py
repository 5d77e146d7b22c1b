"""Atomic, durable file writes, append-only JSONL, checksums and locks.

A file is written to a temporary name, synced and renamed, and its folder is synced: even after a power cut it is the old or the new
one. Rows are appended without a sync; a checkpoint syncs them before it refers to them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.errors import DiskError, UserError
from headwater.storage import fault_points

NO_MORE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM}
ASIDE = ".tmp"
"""Suffix of temporary files and folders; their names begin with a dot."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, read-only, no permission) into a DiskError that names the file."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = disk_errno(error)
        if number is None:
            raise
        named = getattr(error, "filename", None) or path
        reason = os.strerror(number).lower()
        raise DiskError(f"{named}: {reason}; once it can be written, the same command resumes from here") from None


def disk_errno(error: Exception) -> int | None:
    """errno of a write that failed for lack of space or permission; None for any other error.

    The libraries that write weights and tokenizers are not Python: their errors carry the number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in NO_MORE else None
    message = str(error)
    return next((code for code in NO_MORE if f"os error {code})" in message or f"code: {code}," in message), None)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically and durably: readers see the old or the new content, never a part."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fault_points.failpoint("file.begun")
            with aside.open("wb") as file:
                if fault_points.armed():
                    file.write(data[: len(data) // 2])
                    file.flush()
                    fault_points.failpoint("file.torn")
                    data = data[len(data) // 2 :]
                file.write(data)
                file.flush()
                fault_points.failpoint("file.written")
                os.fsync(file.fileno())
            fault_points.failpoint("file.synced")
            aside.replace(path)
            fault_points.failpoint("file.renamed")
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
    fault_points.failpoint("file.durable")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def refuse_irregular(path: Path) -> None:
    """Raises UserError for a pipe, a device or a folder in the place of a file: reading it may never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file")


def read_json(path: Path) -> Any:
    """Read JSON. Raises UserError that names the file when it is missing or malformed."""
    refuse_irregular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


CHECK = "check"


def write_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of its own values."""
    write_json(path, {**value, CHECK: _check(value)})


def read_checked(path: Path) -> dict[str, Any]:
    """Read what `write_checked` wrote. Raises UserError that names the file when it is missing, malformed or changed.

    A file without a checksum comes from an earlier version and is accepted.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged (it holds no JSON object)")
    checksum = value.pop(CHECK, None)
    # A file whose checksum key is damaged must not pass for one without a checksum.
    early = checksum is None and not any(isinstance(item, str) and len(item) == 64 for item in value.values())
    if checksum != _check(value) and not early:
        raise UserError(f"{path}: is damaged (its checksum differs)")
    return value


def _check(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fault_points.failpoint("append.begun")
        with path.open("ab") as file:
            if fault_points.armed():
                cut = max(0, len(data) - 9)
                file.write(data[:cut])
                file.flush()
                fault_points.failpoint("append.torn")
                data = data[cut:]
            file.write(data)
    fault_points.failpoint("append.done")


def read_jsonl(path: Path, size: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of an append-only file, or of its first `size` bytes; a last line cut short by a crash is skipped."""
    refuse_irregular(path)
    if not path.exists():
        return
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:  # bytes: a crash may cut within a character
        for number, line in enumerate(file, 1):
            left -= len(line)
            if left < 0:
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    raise UserError(f"{path}: row {number} is not JSON") from None
                return
            yield row


def read_rows_from(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of an append-only file from byte `start` on, and the offset after the last complete row.

    All rows where no row begins at `start`: the file was cut back to a checkpoint and has grown again.
    """
    refuse_irregular(path)
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(max(0, start - 1))
        if start and file.read(1) != b"\n":
            file.seek(start := 0)
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole) + bool(whole)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only some rows of an append-only file: a resumed run writes the others again."""
    if path.exists():
        write_rows(path, [row for row in read_jsonl(path) if keep(row)])


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder atomically: fill the yielded temporary folder; it is then synced and renamed to `target`."""
    aside, old = (target.with_name(f".{target.name}{what}{ASIDE}") for what in ("", ".old"))
    with writing(target):
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            fault_points.failpoint("folder.begun")
            yield aside
            fault_points.failpoint("folder.filled")
            for path in sorted(aside.rglob("*"), reverse=True):  # a folder's contents before the folder
                sync(path)
            sync(aside)
            fault_points.failpoint("folder.synced")
            if target.exists():
                target.rename(old)
                fault_points.failpoint("folder.moved")
            aside.rename(target)
            fault_points.failpoint("folder.renamed")
            sync(target.parent)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for left in (aside, old):
                shutil.rmtree(left, ignore_errors=True)
    fault_points.failpoint("folder.durable")


def is_leftover(path: Path) -> bool:
    """Whether a killed process may have left this file: a lock or a temporary file."""
    return path.name.startswith(".") and path.name.endswith((".lock", ASIDE))


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that no longer exist."""
    for path in folder.glob(f".*{ASIDE}"):
        number = path.name.split(".")[-2]
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not (number.isdigit() and Path("/proc", number).exists()):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, timeout: float) -> Iterator[bool]:
    """Try to take a file lock for `timeout` seconds; yields whether it was taken. The system releases it when the process ends.

    Raises OSError when the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + timeout
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                yield False
                return
            except OSError:
                pass  # some network file systems have no locks
            yield True
            return


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file. Reads /proc/locks, because trying to lock could turn a run away."""
    if not path.exists():
        return False
    inode = str(path.stat().st_ino)
    try:
        rows = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return False
    return any(
        words[1] == "FLOCK" and words[5].split(":")[2] == inode for row in rows if len(words := row.split()) >= 8
    )


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder's files, as hard links where the file system has them."""
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def file_sum(path: Path, size: int | None = None) -> str:
    """sha256 of a file, or of its first `size` bytes, read in blocks."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while part := file.read(1 << 20 if left is None else min(1 << 20, left)):
            digest.update(part)
            left = None if left is None else left - len(part)
    return digest.hexdigest()


def file_sums(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): file_sum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


Sum = Sequence[Any]
"""[bytes or None where they are not known, sha256]"""


def first_damaged(folder: Path, sums: Mapping[str, Sum], limit: int | None) -> Path | None:
    """First file below a folder that is missing or differs from its checksum; files over `limit` bytes are compared by size only."""
    for name, (size, sum_) in sums.items():
        path = folder / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            return path
        if (limit is None or path.stat().st_size <= limit) and file_sum(path) != sum_:
            return path
    return None


class Logs:
    """Running checksums of append-only files; each byte is read once."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._digests = {path: hashlib.sha256() for path in paths}
        self._sizes = dict.fromkeys(paths, 0)

    def marks(self) -> dict[str, list[Any]]:
        """[bytes, sha256] of each non-empty file, by name."""
        for path in filter(Path.exists, self._sizes):
            with path.open("rb") as file:
                file.seek(self._sizes[path])
                while part := file.read(1 << 20):
                    self._digests[path].update(part)
                    self._sizes[path] += len(part)
        return {path.name: [size, self._digests[path].hexdigest()] for path, size in self._sizes.items() if size}


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Dotted name of the first field in which two recipes as plain values differ; None when they are equal.

    A field that is missing on one side and null on the other counts as equal: an older version did not have it. So do two paths
    that may be one file as seen from two working directories; node fingerprints hold what the files contain.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            difference = first_difference(a.get(key), b.get(key), f"{path}{key}.")
            if difference is not None:
                return difference
        return None
    names_files = path.endswith(".path.") or path.startswith("models.")
    if names_files and isinstance(a, str) and isinstance(b, str) and _may_be_same_file(a, b):
        return None
    return None if a == b else path.rstrip(".")


def _may_be_same_file(a: str, b: str) -> bool:
    """Whether the parts of one path end the other's. Example: `train.jsonl` and `../data/train.jsonl`."""
    parts = [[p for p in Path(os.path.normpath(path)).parts if p not in ("..", os.sep)] for path in (a, b)]
    shorter = min(map(len, parts))
    return shorter > 0 and parts[0][-shorter:] == parts[1][-shorter:]
