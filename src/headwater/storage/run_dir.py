"""Layout of a run directory: the only module that spells its file names (storage/files.py does the writing).

OUT/recipe.json            the resolved recipe
OUT/env.json               versions, device, threads
OUT/day.json               the day that chat templates read as today, if one of them reads the clock
OUT/plan.json              arms × seeds -> node names in order; the last node of an arm is its result; estimated FLOPs of each node
OUT/ledger.jsonl           every node's ledger, joined
OUT/left_out.jsonl         problems removed because they are also in an evaluation set: which, where, why
OUT/report.json report.html
OUT/figures/NAME.svg .csv  each figure of the report, and the numbers in it
OUT/problems.jsonl         {"id", "text"} of every problem, for readers of the report; no answers
OUT/probe.json probe/ledger.jsonl  readiness measures and advice; labels used by the probe
OUT/labels.csv             which problem's label was used by which node, stage, seed and arms
OUT/nodes/NODE/node.json   what the node is: kind, stage, role, seed, parents, fingerprint
               metrics.jsonl            one row per training step
               ledger.jsonl             one row per cost
               rollouts/000001.jsonl    completions and verdicts, one file per step
               evals/WHEN/EVAL.jsonl    one row per graded completion; WHEN is `final` or `step-000020`
               checkpoint/000020/       weights, optimizer, state.json (also how far the logs were), sums.json
               warnings.jsonl           which guard started to warn, at which step, on which value
               conditions.jsonl         divergence of student and teacher, one row per measurement
               sums.jsonl               one row per file of a step: step, sha256
               cache/                   a teacher's rollouts and distributions
               model/                   a plain Hugging Face folder
               DONE                     the node's fingerprint, the checksums of its files, and its own
               FAILED                   {"sentence", "code"} of a node that failed, and the "traceback" of an unexpected error
OUT/attempts/NODE.json     {"worker", "started", "ended"} of each time the node ran, for the report's timeline
OUT/attempts/NODE.now.json what the node does at this moment; removed when it ends
OUT/trackers/ tracked.json files of trackers; last step of each node that was sent to them
OUT/.lock .locks/NODE      locked by the process that runs in the folder, and the one that runs the node
"""

from __future__ import annotations

import contextlib
import shutil
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
    first_difference,
    is_leftover,
    keep_rows,
    lock,
    read_checked,
    read_json,
    read_jsonl,
    remove_leftovers,
    sync,
    write_atomic,
    write_checked,
    write_json,
    writing,
)

__all__ = [  # re-exported for the modules that use file names
    "FREE", "LARGE", "NodeDir", "RunDir", "append_jsonl", "atomic_folder", "first_difference", "keep_rows",
    "read_checked", "read_json", "read_jsonl", "write_atomic", "write_checked", "write_json",
]  # fmt: skip

FREE = dict.fromkeys(("seed", "compute", "guards", "conditions"))
"""Recipe fields in which runs of one study may differ: they change no trained weight."""

LARGE = 256 << 20
"""Size in bytes above which a finished node's file is checked by size when a run starts, and by checksum only when used."""

ENDING_SECONDS = 5.0  # a worker whose parent was killed releases its node within this time

Marks = Mapping[str, Sequence[Any]]
"""Offsets of a node's logs at a checkpoint: file name -> [bytes, sha256 of those bytes]."""


class _Inside:
    """A file or folder as an attribute of the directory object that holds it."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __get__(self, directory: NodeDir | RunDir, kind: object = None) -> Path:
        return directory.path.joinpath(*self._names)


@dataclass(frozen=True)
class NodeDir:
    """The files of one node."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    info = _Inside("node.json")
    metrics = _Inside("metrics.jsonl")
    ledger = _Inside("ledger.jsonl")
    conditions = _Inside("conditions.jsonl")
    warnings = _Inside("warnings.jsonl")
    model = _Inside("model")
    cache = _Inside("cache")
    done = _Inside("DONE")
    failed = _Inside("FAILED")
    sums = _Inside("sums.jsonl")

    @property
    def attempts(self) -> Path:  # beside the nodes, because it says nothing about their results
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

    def is_done(self, fingerprint: str) -> bool:
        """Whether DONE exists with this fingerprint; `damage` checks the files themselves."""
        if not self.done.exists():
            return False
        try:
            return read_checked(self.done).get("fingerprint") == fingerprint
        except UserError:
            return False

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


@dataclass(frozen=True)
class RunDir:
    """The files of one run or study."""

    path: Path

    recipe = _Inside("recipe.json")
    env = _Inside("env.json")
    day = _Inside("day.json")
    plan = _Inside("plan.json")
    ledger = _Inside("ledger.jsonl")
    report_json = _Inside("report.json")
    report_html = _Inside("report.html")
    lock = _Inside(".lock")
    left_out = _Inside("left_out.jsonl")
    problems = _Inside("problems.jsonl")
    figures = _Inside("figures")
    labels = _Inside("labels.csv")
    probe = _Inside("probe.json")
    probe_ledger = _Inside("probe", "ledger.jsonl")
    trackers = _Inside("trackers")
    tracked = _Inside("tracked.json")

    def node(self, name: str) -> NodeDir:
        return NodeDir(self.path / "nodes" / name)

    def nodes(self) -> list[NodeDir]:
        paths = sorted((self.path / "nodes").glob("*"))
        return [NodeDir(path) for path in paths if path.is_dir() and path.name[0] != "."]  # skip temporary folders

    def refuse_other(self, recipe: dict[str, Any]) -> None:
        """Raise UserError when the folder cannot hold this recipe's run; writes nothing.

        The seed may differ: a study adds seeds to the same folder. So may other FREE fields, and the part of a path that the
        working directory decides; what the files hold is part of every node's fingerprint.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--out {self.path}: is a file, not a folder")
            if not self.recipe.exists():
                if self.path.exists() and any(not is_leftover(path) for path in self.path.iterdir()):
                    raise UserError(f"--out {self.path}: the folder is not empty and holds no run of Headwater")
                return
        except OSError as error:  # such as a parent folder without read permission
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        earlier = read_json(self.recipe)
        field = first_difference(earlier | FREE, recipe | FREE) if isinstance(earlier, dict) else "everything"
        if field is not None:
            other = f"holds a run of another recipe (they differ in {field}); use a new folder"
            raise UserError(f"--out {self.path}: {other}")

    def claim(self, recipe: dict[str, Any]) -> None:
        """Write recipe.json, in a new folder or in one that already holds this recipe's run.

        Raises UserError naming the first field that differs when the folder belongs to another recipe.
        """
        self.refuse_other(recipe)
        if not self.recipe.exists() or read_json(self.recipe) != recipe:
            write_json(self.recipe, recipe)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process. The system releases the lock when the process ends.

        Raises UserError when another process holds it, or when the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                free = stack.enter_context(lock(self.lock, 0.0))
            except OSError as error:
                raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
            if not free:
                remedy = "wait until it ends, or use another folder"
                raise UserError(f"--out {self.path}: another process is running there; {remedy}")
            for folder in ("", "nodes", "attempts"):  # in nodes/ a node that was being copied
                remove_leftovers(self.path / folder)
            yield

    def join_ledgers(self) -> None:
        """Rebuild OUT/ledger.jsonl from the nodes' own ledgers."""
        ledgers = [node.ledger.read_text(encoding="utf-8") for node in self.nodes() if node.ledger.exists()]
        write_atomic(self.ledger, "".join(ledgers))
