"""File writes: atomic, durable, checked on reading, with errors that name the file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from headwater.errors import DiskError, UserError
from headwater.storage import files
from headwater.storage.files import (
    Logs,
    append_jsonl,
    atomic_folder,
    disk_errno,
    file_sum,
    first_damaged,
    lock,
    read_checked,
    read_jsonl,
    read_rows_from,
    remove_leftovers,
    write_atomic,
    write_checked,
)
from headwater.storage.untrusted import refuse_links


def test_atomic_write_syncs_folder_after_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), real_sync(number))
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), real_replace(self, to)))
    write_atomic(tmp_path / "a.json", "{}")
    assert done[1:] == ["rename", str(tmp_path)] and Path(done[0]).name.startswith(".a.json.")
    done.clear()
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "b").mkdir()
        (aside / "b" / "c").write_text("x")
    assert {Path(done_row).name for done_row in done[:3]} == {"c", "b", ".folder.tmp"} and done[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "to"), [("", ""), ('"ab"', '"ac"'), ('"check"', '"chebk"'), ('"check": "', '"check": "0'), ("}", "")]
)
def test_checked_file_is_accepted_only_unchanged(change: str, to: str, tmp_path: Path) -> None:
    path = tmp_path / "DONE"
    write_checked(path, {"fingerprint": "ab", "count": 1})
    if not change:
        assert read_checked(path) == {"fingerprint": "ab", "count": 1}
        return
    assert change in path.read_text()
    path.write_text(path.read_text().replace(change, to))
    with pytest.raises(UserError, match="DONE"):
        read_checked(path)


def test_checked_file_detects_every_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    value = {"recipe": "r", "seeds": [0, 1], "arms": {"bridge": {"0": ["a.s0.1"]}}}
    write_checked(path, value)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert read_checked(path) == value
            except UserError:
                continue


def test_unchecked_file_of_earlier_version_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "DONE"
    path.write_text('{"fingerprint": "ab"}')
    assert read_checked(path) == {"fingerprint": "ab"}


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.ENOENT, "x"), None),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (
            SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "…" })'),
            errno.ENOSPC,
        ),
        (RuntimeError("os error 280"), None),
        (ValueError("28"), None),
    ],
)
def test_disk_errno_recognizes_disk_errors_only(error: Exception, number: int | None) -> None:
    assert disk_errno(error) == number


def test_full_disk_error_names_file_and_keeps_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, "old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskError, match=r"report\.json: no space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_running_checksums_equal_whole_file_checksums(tmp_path: Path) -> None:
    path, logs = tmp_path / "metrics.jsonl", Logs([tmp_path / "metrics.jsonl", tmp_path / "none.jsonl"])
    assert logs.marks() == {}
    for step in range(5):
        append_jsonl(path, [{"step": step}])
        assert logs.marks() == {"metrics.jsonl": [path.stat().st_size, file_sum(path)]}
    size = path.stat().st_size
    append_jsonl(path, [{"step": 5}])
    assert file_sum(path, size) != file_sum(path)
    assert [row["step"] for row in read_jsonl(path, size)] == [0, 1, 2, 3, 4]


def test_new_rows_are_read_from_end_of_last_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows_from(path, 0) == ([], 0)
    append_jsonl(path, [{"step": 1}, {"step": 2}])
    rows, size = read_rows_from(path, 0)
    assert [row["step"] for row in rows] == [1, 2] and size == path.stat().st_size
    append_jsonl(path, [{"step": 3}])
    with path.open("a") as file:
        file.write('{"step": 4')
    rows, more = read_rows_from(path, size)
    assert [row["step"] for row in rows] == [3] and read_rows_from(path, more) == ([], more)


@pytest.mark.parametrize("after", ['{"step": 1}\n', '{"step": 1}\n{"step": 2, "seconds": 0.25}\n{"step": 3}\n'])
def test_file_cut_back_and_grown_is_read_from_start(after: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    _, size = read_rows_from(path, 0)
    path.write_text(after)  # a resumed node writes other seconds, so that its rows have other lengths
    rows, more = read_rows_from(path, size)
    assert rows == [json.loads(line) for line in after.splitlines()] and more == len(after)


def test_changed_missing_and_longer_files_are_detected(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    sums = {name: [1, file_sum(tmp_path / name)] for name in ("a", "b")}
    assert first_damaged(tmp_path, sums, None) is None
    (tmp_path / "b").write_text("c")
    assert first_damaged(tmp_path, sums, None) == tmp_path / "b"
    assert first_damaged(tmp_path, sums, 0) is None  # past the limit the size decides
    (tmp_path / "b").write_text("bb")
    assert first_damaged(tmp_path, sums, 0) == tmp_path / "b"
    (tmp_path / "b").unlink()
    assert first_damaged(tmp_path, sums, 0) == tmp_path / "b"


def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / f".a.json.{os.getpid()}.tmp").write_text("x")
    (tmp_path / ".b.json.999999999.tmp").write_text("x")
    (tmp_path / "c.json").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a.json.{os.getpid()}.tmp", "c.json"]


def test_lock_has_one_holder_and_is_free_after_release(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    with lock(path, 0.0) as ours:
        assert ours
        with lock(path, 0.1) as second_lock:
            assert not second_lock
    with lock(path, 0.0) as again:
        assert again


def test_row_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"text": "αβ"}])
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "αβ"}


@pytest.mark.parametrize(
    "read", [files.read_json, lambda path: list(read_jsonl(path)), lambda path: read_rows_from(path, 0)]
)
def test_pipe_in_place_of_run_file_is_refused_without_waiting(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no regular file"):
        read(tmp_path / "metrics.jsonl")


def test_run_directory_with_pipe_or_huge_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    log = tmp_path / "nodes" / "metrics.jsonl"
    with log.open("wb") as file:
        file.truncate(5 << 30)  # no block of it is on the disk
    with pytest.raises(UserError, match=r"--out .*: nodes/metrics\.jsonl has 5,368,709,120 bytes"):
        refuse_links(tmp_path, "--out")
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match=r"--out .*: nodes/metrics\.jsonl is no regular file"):
        refuse_links(tmp_path, "--out")
