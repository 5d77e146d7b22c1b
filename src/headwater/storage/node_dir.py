"""The files of one node of a run directory; `storage.run_dir` has the whole layout."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import UserError
from headwater.storage import fault_points
from headwater.storage.files import (
    append_jsonl,
    atomic_folder,
    copy_tree,
    file_sum,
    first_damaged,
    keep_rows,
    lock,
    read_checked,
    read_json,
    read_jsonl,
    remove_leftovers,
    sync,
    write_atomic,
    write_checked,
    writing,
)

DISTRIBUTIONS = "distributions.safetensors"
"""File of a teacher cache that is large and can be computed again from its rollouts."""

LARGE = 256 << 20
"""Size in bytes above which a finished node's file is checked by size when a run starts, and by checksum only when used."""

ENDING_SECONDS = 5.0  # a worker whose parent was killed releases its node within this time

Marks = Mapping[str, Sequence[Any]]
"""Offsets of a node's logs at a checkpoint: file name -> [bytes, sha256 of those bytes]."""


class InFolder:
    """Path of the file or folder of that name in the owner's `path`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type[Any]) -> Path:
        path: Path = owner.path / self.name
        return path


@dataclass(frozen=True)
class NodeDir:
    """The files of one node."""

    path: Path

    info = InFolder("node.json")
    metrics = InFolder("metrics.jsonl")
    ledger = InFolder("ledger.jsonl")
    conditions = InFolder("conditions.jsonl")
    warnings = InFolder("warnings.jsonl")
    model = InFolder("model")
    cache = InFolder("cache")
    done = InFolder("DONE")
    failed = InFolder("FAILED")
    sums = InFolder("sums.jsonl")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def attempts(self) -> Path:  # next to the nodes' folders, because it says nothing about their results
        return self.path.parent.parent / "attempts" / f"{self.name}.json"

    @property
    def now(self) -> Path:
        return self.attempts.with_suffix(".now.json")

    @property
    def logs(self) -> tuple[Path, ...]:
        """Append-only files with rows for each step."""
        return (self.metrics, self.ledger, self.conditions, self.warnings, self.sums)

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step:06d}.jsonl"

    def evaluation(self, when: str, eval_name: str) -> Path:
        return self.path / "evals" / when / f"{eval_name}.jsonl"

    def keep(self, step: int, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write a file of a step, and its checksum to sums.jsonl."""
        path.unlink(missing_ok=True)  # another run may share it
        append_jsonl(path, rows)
        append_jsonl(self.sums, [{"step": step, "file": str(path.relative_to(self.path)), "sha256": file_sum(path)}])

    def has_kept(self, path: Path) -> bool:
        """Whether the logs hold a file of a step."""
        return any(row["file"] == str(path.relative_to(self.path)) for row in read_jsonl(self.sums))

    def is_done(self, fingerprint: str) -> bool:
        """Whether DONE exists with this fingerprint; `damage` checks the files themselves."""
        if not self.done.exists():
            return False
        try:
            return read_checked(self.done).get("fingerprint") == fingerprint
        except UserError:
            return False

    @property
    def scored_rollouts(self) -> int:
        """Rollouts of a finished teacher cache whose distributions it holds; all of them where DONE does not say."""
        return int(read_checked(self.done).get("scored", sys.maxsize))

    def remove_distributions(self) -> None:
        """Delete a finished cache's distributions: first from DONE, so that a killed process leaves no damage."""
        path = self.cache / DISTRIBUTIONS
        if path.exists() and self.done.exists():
            done = read_checked(self.done)
            done["sums"].pop(str(path.relative_to(self.path)), None)
            write_checked(self.done, {**done, "scored": 0})
            fault_points.failpoint("cache.released")
            path.unlink(missing_ok=True)  # another worker's stage may have ended at the same time

    def finish(self, value: Mapping[str, Any]) -> None:
        """Write DONE with the checksums of all files except checkpoints (which have their own) and files of a step."""
        for path in (*self.logs, self.path):
            if path.exists():
                sync(path)
        paths = [path for path in sorted(self.path.rglob("*")) if path.is_file() and self._counts(path)]
        sums = {str(path.relative_to(self.path)): [path.stat().st_size, file_sum(path)] for path in paths}
        write_checked(self.done, {**value, "sums": sums})

    def _counts(self, path: Path) -> bool:
        top, *rest = path.relative_to(self.path).parts
        apart = top in ("checkpoint", "rollouts", "DONE", "FAILED") or path.name.startswith(".")
        return not apart and (top != "evals" or rest[0] == "final")

    def damage(self, *below: str, whole: bool = False) -> Path | None:
        """First file of a finished node that is missing or changed; None if there is none.

        below  check only files whose names start with one of these, and no files of a step
        whole  verify checksums of files over LARGE too, instead of their size
        """
        try:
            done = read_checked(self.done)
        except UserError:
            return self.done
        sums = {name: sum_ for name, sum_ in done.get("sums", {}).items() if name.startswith(below or "")}
        broken = first_damaged(self.path, sums, None if whole else LARGE)
        return broken if broken or below else self._damaged_step(read_jsonl(self.sums))

    def _damaged_step(self, rows: Iterator[dict[str, Any]]) -> Path | None:
        return first_damaged(self.path, {row["file"]: (None, row["sha256"]) for row in rows}, None)

    def refuse_damage(self, *below: str) -> None:
        """Raise UserError that names a damaged file of a finished node before it is used. The node then counts as unfinished."""
        broken = self.damage(*below, whole=True) if self.done.exists() else None
        if broken is not None:
            self.done.unlink(missing_ok=True)
            raise UserError(
                f"{broken}: is damaged (it changed after it was written); the same command computes it again"
            )

    def damaged_before(self, marks: Marks) -> Path | None:
        """First log or step file that a checkpoint refers to and that has changed since."""
        for name, (size, sum_) in marks.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size < size or file_sum(path, size) != sum_:
                return path
        size = marks[self.sums.name][0] if self.sums.name in marks else 0
        return self._damaged_step(read_jsonl(self.sums, size))

    def copy_from(self, other: NodeDir) -> None:
        """Copy a finished node of another run, as hard links where possible.

        Shared files are safe: a node's file is replaced or removed, and appended to only after it has been replaced.
        """
        with atomic_folder(self.path) as aside:
            copy_tree(other.path, aside)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoint" / f"{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted((self.path / "checkpoint").glob("[0-9]*"), reverse=True)

    def sync_steps(self, since: int, step: int) -> None:
        """Sync the logs and the files of the steps after `since` up to `step` to disk, before a checkpoint refers to them."""
        steps = range(since + 1, step + 1)
        evals = [path for number in steps for path in self.evaluation(f"step-{number:06d}", "").parent.glob("*")]
        files = [path for path in (*self.logs, *map(self.rollouts, steps), *evals) if path.exists()]
        with writing(self.path):
            for path in (*files, *sorted({path.parent for path in files})):
                sync(path)

    def cut_back_to(self, step: int) -> None:
        """Delete everything written after `step` (-1: everything); the resumed run writes the same again.

        The step's checkpoint holds the log offsets; without one, each row's own step decides.
        """
        state = self.checkpoint(step) / "state.json"
        marks = read_json(state).get("logs") if state.exists() else None
        for path in self.logs:
            if step < 0 or (marks is not None and path.name not in marks):
                path.unlink(missing_ok=True)
            elif marks is None:
                keep_rows(path, lambda row: row.get("step", 0) <= step)
            else:
                write_atomic(path, path.read_bytes()[: marks[path.name][0]])  # not in place: another run may share it
            fault_points.failpoint("stage.cut")
        for path in (self.path / "rollouts").glob("*.jsonl"):
            if int(path.stem) > step:
                path.unlink()
        for path in (self.path / "evals").glob("*"):
            if path.name == "final" or (path.name.startswith("step-") and int(path.name[5:]) > step):
                shutil.rmtree(path)
        for path in [path for path in self.checkpoints() if int(path.name) > step]:
            shutil.rmtree(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the node for this process; waits briefly for a worker whose parent was killed. Raises UserError."""
        path = self.path.parent.parent / ".locks" / self.name
        with contextlib.ExitStack() as stack:
            with writing(path):
                free = stack.enter_context(lock(path, ENDING_SECONDS))
            if not free:
                raise UserError(f"{self.path}: another process is running there; wait until it ends")
            for folder in (self.path, *filter(Path.is_dir, self.path.rglob("*"))):
                remove_leftovers(folder)
            yield
