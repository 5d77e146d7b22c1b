"""Files that survive: written whole or not at all, synced, named when the disk takes no more. Knows no file's name.

A file is written aside, synced and renamed, then the folder above is synced; so after a power cut, too, it is the old one or
the new one. Rows are appended without a sync: a checkpoint syncs them before it counts on them.
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
"""How the names of half-written files and folders end; they begin with a dot."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskError that names the file where the disk refuses what is written within."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = disk_trouble(error)
        if number is None:
            raise
        named = getattr(error, "filename", None) or path
        said = os.strerror(number).lower()
        raise DiskError(f"{named}: {said}; once it can be written, the same command goes on from here") from None


def disk_trouble(error: Exception) -> int | None:
    """The system's error number where a write failed for want of room or rights; None for anything else.

    The libraries that write weights and tokenizers are not Python and raise errors of their own, with the number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in NO_MORE else None
    said = str(error)
    return next((one for one in NO_MORE if f"os error {one})" in said or f"code: {one}," in said), None)


def sync(path: Path) -> None:
    """Flush a file or a folder (the names in it) to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write aside, flush to disk, rename, flush the folder: a reader sees the old file or the new one, never a part."""
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
    """A JSONL file, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises UserError that names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


CHECK = "check"


def write_checked(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object that carries the checksum of its own values."""
    write_json(path, {**value, CHECK: _check(value)})


def read_checked(path: Path, strict: bool = False) -> dict[str, Any]:
    """What `write_checked` wrote. Raises UserError that names the file when it is missing, broken or changed.

    A file without a checksum comes from an earlier version: taken as it is, unless `strict`.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged (it holds no JSON object)")
    held = value.pop(CHECK, None)
    # A damaged name of the checksum must not make the file look like one that has none.
    early = held is None and not any(isinstance(one, str) and len(one) == 64 for one in value.values())
    if held != _check(value) and (strict or not early):
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
    """Rows of an append-only file, or of its first `size` bytes; a last line that a crash cut short is left out."""
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


def rows_from(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of an append-only file from a byte on, and the byte after the last of them."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole) + bool(whole)


def cut_back(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of an append-only file that a resumed run will write again."""
    if path.exists():
        write_rows(path, [row for row in read_jsonl(path) if keep(row)])


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the one yielded, it is synced and renamed to `target`."""
    aside, old = (target.with_name(f".{target.name}{what}{ASIDE}") for what in ("", ".old"))
    with writing(target):
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            fault_points.failpoint("folder.begun")
            yield aside
            fault_points.failpoint("folder.filled")
            for path in sorted(aside.rglob("*"), reverse=True):  # what a folder holds before the folder
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
    """Whether a writer that was killed may have left this: a lock, or what it was writing aside."""
    return path.name.startswith(".") and path.name.endswith((".lock", ASIDE))


def sweep_up(folder: Path) -> None:
    """Remove from a folder what writers that are gone left aside in it."""
    for path in folder.glob(f".*{ASIDE}"):
        number = path.name.split(".")[-2]
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not (number.isdigit() and Path("/proc", number).exists()):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, patience: float) -> Iterator[bool]:
    """Whether the file's lock is ours, waiting for it so many seconds. The system lets go of it when the process ends,
    however it does. Raises OSError where the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
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


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder's files into another one; the two share them where the file system has hard links."""
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def file_sum(path: Path, size: int | None = None) -> str:
    """sha256 of a file, or of its first `size` bytes; never all of it in memory."""
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


def first_changed(folder: Path, sums: Mapping[str, Sum], limit: int | None) -> Path | None:
    """The first file below a folder that is missing or not what its checksum says; past `limit` bytes by its size alone."""
    for name, (size, sum_) in sums.items():
        path = folder / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            return path
        if (limit is None or path.stat().st_size <= limit) and file_sum(path) != sum_:
            return path
    return None


class Logs:
    """The checksums of files that only grow; each byte is read once."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._digests = {path: hashlib.sha256() for path in paths}
        self._sizes = dict.fromkeys(paths, 0)

    def marks(self) -> dict[str, list[Any]]:
        """[bytes, sha256] of each that holds something, by name."""
        for path in filter(Path.exists, self._sizes):
            with path.open("rb") as file:
                file.seek(self._sizes[path])
                while part := file.read(1 << 20):
                    self._digests[path].update(part)
                    self._sizes[path] += len(part)
        return {path.name: [size, self._digests[path].hexdigest()] for path, size in self._sizes.items() if size}


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """The dotted name of the first field in which two plain values differ; None when equal.

    A field that is missing on one side and null on the other is no difference: an older version did not know it yet.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            found = first_difference(a.get(key), b.get(key), f"{path}{key}.")
            if found is not None:
                return found
        return None
    return None if a == b else path.rstrip(".")
