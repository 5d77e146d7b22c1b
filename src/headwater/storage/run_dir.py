"""The only module that knows file names, and what a folder that was left anywhere still holds. `files` does the writing.

OUT/recipe.json            the resolved recipe
OUT/env.json               versions, device, threads
OUT/plan.json              arms × seeds -> node names in order; the last node of an arm is its result
OUT/ledger.jsonl           every node's ledger, joined
OUT/left_out.jsonl         problems taken out because they also stand in an evaluation: which, where, why
OUT/report.json report.html
OUT/figures/NAME.svg .csv  each figure of the report, and the numbers in it
OUT/problems.jsonl         {"id", "text"} of every problem, for readers of the report; no answers
OUT/probe.json             readiness before the run, and what it advises
OUT/probe/ledger.jsonl     its looks at labels
OUT/labels.csv             which problem's label was looked at by which node, stage, seed and arms
OUT/nodes/NODE/node.json   what the node is: kind, stage, role, seed, parents, fingerprint
               metrics.jsonl            a row a training step
               ledger.jsonl             a row for every spend
               rollouts/000001.jsonl    what was sampled and said of it, a file a step
               evals/WHEN/EVAL.jsonl    a row for every graded text; WHEN is `final` or `step-000020`
               checkpoint/000020/       weights, optimizer, state.json (also how far the logs were), sums.json
               warnings.jsonl           which guard of training began to warn, at which step, on which figure
               conditions.jsonl         how far student and teacher stand apart, a row a measurement
               sums.jsonl               a row for every file of a step: which step, its sha256
               cache/                   a teacher's rollouts and distributions
               model/                   a plain Hugging Face folder
               DONE                     the node's fingerprint, the checksums of its files, and its own
               FAILED                   {"sentence", "code"} of a node that failed, and the "traceback" of an unexpected error
OUT/.lock                  held by the process that is at work in the folder
OUT/.locks/NODE            held by the process that is at work on the node
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
    copy_tree,
    cut_back,
    file_sum,
    first_changed,
    first_difference,
    is_leftover,
    lock,
    read_checked,
    read_json,
    read_jsonl,
    sweep_up,
    sync,
    write_atomic,
    write_checked,
    write_json,
    writing,
    written_aside,
)

__all__ = [  # the rest of the program finds what writes files where it finds their names
    "FREE", "LARGE", "NodeDir", "RunDir", "append_jsonl", "cut_back", "first_difference", "read_checked",
    "read_json", "read_jsonl", "write_atomic", "write_checked", "write_json", "written_aside",
]  # fmt: skip

FREE = dict.fromkeys(("seed", "compute", "guards"))
"""Fields of a recipe in which runs of one study may differ: how they go on, but not what comes out."""

LARGE = 256 << 20
"""Bytes past which a finished node's file is known by its size when a run starts, and read whole only where it is used."""

ENDING_SECONDS = 5.0  # a worker whose parent was killed lets go of its node within a moment

Marks = Mapping[str, Sequence[Any]]
"""How far a node's logs were at a checkpoint: file name -> [bytes, sha256 of those bytes]."""


@dataclass(frozen=True)
class NodeDir:
    """The files of one node."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def info(self) -> Path:
        return self.path / "node.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def conditions(self) -> Path:
        return self.path / "conditions.jsonl"

    @property
    def warnings(self) -> Path:
        return self.path / "warnings.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def failed(self) -> Path:
        """Why the node failed when it was last tried: {"sentence", "code"}, for an unexpected error also "traceback"."""
        return self.path / "FAILED"

    @property
    def sums(self) -> Path:
        return self.path / "sums.jsonl"

    @property
    def logs(self) -> tuple[Path, ...]:
        """What is appended to, a row or more a step."""
        return (self.metrics, self.ledger, self.conditions, self.warnings, self.sums)

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step:06d}.jsonl"

    def evaluation(self, when: str, eval_name: str) -> Path:
        return self.path / "evals" / when / f"{eval_name}.jsonl"

    def keep(self, step: int, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write a file of a step, and its checksum among the logs."""
        path.unlink(missing_ok=True)  # another run may share it
        append_jsonl(path, rows)
        append_jsonl(self.sums, [{"step": step, "file": str(path.relative_to(self.path)), "sha256": file_sum(path)}])

    def is_done(self, fingerprint: str) -> bool:
        """Whether it says so; `damage` tells whether what it then holds is what was written."""
        if not self.done.exists():
            return False
        try:
            return read_checked(self.done).get("fingerprint") == fingerprint
        except UserError:
            return False

    def finish(self, value: Mapping[str, Any]) -> None:
        """Write DONE, with the checksums of all that stands here but checkpoints (which have their own) and files of a step."""
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
        """The first file of a finished node that is missing or not what was written; None if there is none.

        below  beginnings of names: look at these files only, and not at those of each step
        whole  read files past LARGE too, which else are known by their size
        """
        try:
            held = read_checked(self.done)
        except UserError:
            return self.done
        sums = {name: sum_ for name, sum_ in held.get("sums", {}).items() if name.startswith(below or "")}
        broken = first_changed(self.path, sums, None if whole else LARGE)
        return broken if broken or below else self._damaged_step(read_jsonl(self.sums))

    def _damaged_step(self, rows: Iterator[dict[str, Any]]) -> Path | None:
        return first_changed(self.path, {row["file"]: (None, row["sha256"]) for row in rows}, None)

    def refuse_damage(self, *below: str) -> None:
        """Raise UserError that names a damaged file of a finished node, before it is used. The node then counts as unfinished."""
        broken = self.damage(*below, whole=True) if self.done.exists() else None
        if broken is not None:
            self.done.unlink(missing_ok=True)
            raise UserError(f"{broken}: is damaged (it is not what was written); the same command makes it again")

    def damaged_before(self, marks: Marks) -> Path | None:
        """The first file on which a checkpoint rests that is no longer what it was then."""
        for name, (size, sum_) in marks.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size < size or file_sum(path, size) != sum_:
                return path
        size = marks[self.sums.name][0] if self.sums.name in marks else 0
        return self._damaged_step(read_jsonl(self.sums, size))

    def take_over(self, other: NodeDir) -> None:
        """Become a finished node of another run. The two share their files where the file system has hard links.

        That is safe: a file of a node is replaced or removed, and appended to only after it has been replaced."""
        with written_aside(self.path) as aside:
            copy_tree(other.path, aside)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoint" / f"{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.path / "checkpoint").glob("[0-9]*"), reverse=True)

    def sync_steps(self, since: int, step: int) -> None:
        """Flush the logs, and what was written of the steps after `since` up to `step`, before a checkpoint counts on them."""
        steps = range(since + 1, step + 1)
        evals = [path for one in steps for path in self.evaluation(f"step-{one:06d}", "").parent.glob("*")]
        files = [path for path in (*self.logs, *map(self.rollouts, steps), *evals) if path.exists()]
        with writing(self.path):
            for path in (*files, *sorted({path.parent for path in files})):
                sync(path)

    def cut_back_to(self, step: int) -> None:
        """Forget what was written after `step`, -1 for all: the resumed run writes it again, the same.

        The step's checkpoint knows how far the logs were; where there is none, a row's own step decides.
        """
        state = self.checkpoint(step) / "state.json"
        marks = read_json(state).get("logs") if state.exists() else None
        for path in self.logs:
            if step < 0 or (marks is not None and path.name not in marks):
                path.unlink(missing_ok=True)
            elif marks is None:
                cut_back(path, lambda row: row.get("step", 0) <= step)
            else:
                write_atomic(path, path.read_bytes()[: marks[path.name][0]])  # not in place: another run may share it
            fault_points.failpoint("stage.cut")
        for path in (self.path / "rollouts").glob("*.jsonl"):
            if int(path.stem) > step:
                path.unlink()
        for path in (self.path / "evals").glob("*"):
            if path.name == "final" or (path.name.startswith("step-") and int(path.name[5:]) > step):
                shutil.rmtree(path)
        for path in self.checkpoints():
            if int(path.name) > step:
                shutil.rmtree(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the node for this process; wait a moment for a worker whose parent was killed. Raises UserError."""
        path = self.path.parent.parent / ".locks" / self.name
        with contextlib.ExitStack() as stack:
            with writing(path):
                free = stack.enter_context(lock(path, ENDING_SECONDS))
            if not free:
                raise UserError(f"{self.path}: another process is at work there; wait until it ends")
            for folder in (self.path, *filter(Path.is_dir, self.path.rglob("*"))):
                sweep_up(folder)
            yield


@dataclass(frozen=True)
class RunDir:
    """The files of one run or study."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def left_out(self) -> Path:
        return self.path / "left_out.jsonl"

    @property
    def problems(self) -> Path:
        return self.path / "problems.jsonl"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def labels(self) -> Path:
        return self.path / "labels.csv"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def probe_ledger(self) -> Path:
        return self.path / "probe" / "ledger.jsonl"

    @property
    def trackers(self) -> Path:
        """Where trackers that write files write them."""
        return self.path / "trackers"

    @property
    def tracked(self) -> Path:
        """Which step of each node trackers were told last."""
        return self.path / "tracked.json"

    def node(self, name: str) -> NodeDir:
        return NodeDir(self.path / "nodes" / name)

    def nodes(self) -> list[NodeDir]:
        folder = self.path / "nodes"
        found = sorted(folder.iterdir()) if folder.exists() else []
        return [NodeDir(path) for path in found if path.is_dir() and path.name[0] != "."]  # no half-written one

    def refuse_other(self, recipe: dict[str, Any]) -> None:
        """Raise UserError where the folder could not become, or go on being, this recipe's; writes nothing.

        The seed may differ: a study adds seeds to the same folder. So may `compute` and `guards`, which decide how a run
        goes on but not what comes out.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--out {self.path}: is a file, not a folder")
            if not self.recipe.exists():
                if self.path.exists() and any(not is_leftover(path) for path in self.path.iterdir()):
                    raise UserError(f"--out {self.path}: the folder is not empty and holds no run of ours")
                return
        except OSError as error:  # such as a folder above it that may not be looked into
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        held = read_json(self.recipe)
        field = first_difference(held | FREE, recipe | FREE) if isinstance(held, dict) else "everything"
        if field is not None:
            raise UserError(
                f"--out {self.path}: holds a run of another recipe (they differ in {field}); use a new folder"
            )

    def claim(self, recipe: dict[str, Any]) -> None:
        """Make the folder this recipe's, or go on with it if it is already; the recipe written down is the latest.

        Raises UserError naming the first field that differs when the folder belongs to another recipe.
        """
        self.refuse_other(recipe)
        if self.recipe.exists() and read_json(self.recipe) == recipe:
            return
        write_json(self.recipe, recipe)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. The system lets go of it when the process ends, however it does.

        Raises UserError when another process holds it, or when it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                free = stack.enter_context(lock(self.lock, 0.0))
            except OSError as error:
                raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
            if not free:
                raise UserError(
                    f"--out {self.path}: another process is at work there; wait until it ends, or use another folder"
                )
            sweep_up(self.path)
            sweep_up(self.path / "nodes")  # a node that was being taken over
            yield

    def join_ledgers(self) -> None:
        """Rebuild OUT/ledger.jsonl from the nodes' own ledgers."""
        parts = [node.ledger.read_text(encoding="utf-8") for node in self.nodes() if node.ledger.exists()]
        write_atomic(self.ledger, "".join(parts))
