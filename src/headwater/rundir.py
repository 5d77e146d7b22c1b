"""The only module that knows file names. Writes are atomic; append-only files can be cut back to a step.

OUT/recipe.json            the resolved recipe
OUT/env.json               versions, device, threads
OUT/plan.json              arms × seeds -> node names in order; the last node of an arm is its result
OUT/ledger.jsonl           every node's ledger, joined
OUT/left_out.jsonl         problems taken out because they also stand in an evaluation: which, where, why
OUT/report.json report.html
OUT/probe.json             readiness before the run, and what it advises
OUT/probe/ledger.jsonl     its looks at labels
OUT/labels.csv             which problem's label was looked at by which node, stage, seed and arms
OUT/nodes/NODE/node.json   what the node is: kind, stage, role, seed, parents, fingerprint
               metrics.jsonl            a row a training step
               ledger.jsonl             a row for every spend
               rollouts/000001.jsonl    what was sampled and said of it, a file a step
               evals/WHEN/EVAL.jsonl    a row for every graded text; WHEN is `final` or `step-000020`
               checkpoint/000020/       weights, optimizer, state.json, sums.json
               warnings.jsonl           which guard of training began to warn, at which step, on which figure
               conditions.jsonl         how far student and teacher stand apart, a row a measurement
               cache/                   a teacher's rollouts and distributions
               model/                   a plain Hugging Face folder
               DONE                     the node's fingerprint and totals
               FAILED                   {"sentence", "code"} of a node that failed, and the "traceback" of an unexpected error
OUT/.lock                  held by the process that is at work in the folder

A sweep's folder holds a run directory for every value, and sweep.json sweep.csv sweep.svg sweep.png sweep.html.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import UserError

FREE = dict.fromkeys(("seed", "compute", "guards"))
"""Fields of a recipe in which runs of one study may differ: how they go on, but not what comes out."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


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


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an append-only file; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:  # bytes: a crash may cut within a character
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    raise UserError(f"{path}: row {number} is not JSON") from None
                return
            yield row


def cut_back(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of an append-only file that a resumed run will write again."""
    if path.exists():
        rows = [row for row in read_jsonl(path) if keep(row)]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the one yielded, it is synced and renamed to `target`."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def file_sums(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step:06d}.jsonl"

    def evaluation(self, when: str, eval_name: str) -> Path:
        return self.path / "evals" / when / f"{eval_name}.jsonl"

    def is_done(self, fingerprint: str) -> bool:
        return self.done.exists() and read_json(self.done).get("fingerprint") == fingerprint

    def take_over(self, other: NodeDir) -> None:
        """Become a finished node of another run. The two share their files where the file system has hard links.

        Sharing is safe: a file of a node is replaced or removed, and appended to only after `cut_back` has replaced it.
        """
        with written_aside(self.path) as aside:
            shutil.copytree(other.path, aside, copy_function=_link_or_copy, dirs_exist_ok=True)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoint" / f"{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, newest first."""
        folder = self.path / "checkpoint"
        found = [path for path in folder.glob("[0-9]*") if (path / "sums.json").exists()] if folder.exists() else []
        return sorted(found, reverse=True)

    def cut_back_to(self, step: int) -> None:
        """Forget what was written after `step`: the resumed run writes it again, the same."""
        for path in (self.metrics, self.ledger, self.conditions, self.warnings):
            cut_back(path, lambda row: row.get("step", 0) <= step)
        for path in (self.path / "rollouts").glob("*.jsonl"):
            if int(path.stem) > step:
                path.unlink()
        for path in (self.path / "evals").glob("*"):
            if path.name == "final" or (path.name.startswith("step-") and int(path.name[5:]) > step):
                shutil.rmtree(path)


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
    def labels(self) -> Path:
        return self.path / "labels.csv"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def probe_ledger(self) -> Path:
        return self.path / "probe" / "ledger.jsonl"

    def node(self, name: str) -> NodeDir:
        return NodeDir(self.path / "nodes" / name)

    def nodes(self) -> list[NodeDir]:
        folder = self.path / "nodes"
        found = sorted(folder.iterdir()) if folder.exists() else []
        return [
            NodeDir(path) for path in found if path.is_dir() and not path.name.startswith(".")
        ]  # no half-written one

    def refuse_other(self, recipe: dict[str, Any]) -> None:
        """Raise UserError where the folder could not become, or go on being, this recipe's; writes nothing.

        The seed may differ: a study adds seeds to the same folder. So may `compute` and `guards`, which decide how a run
        goes on but not what comes out.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file, not a folder")
        if not self.recipe.exists():
            if self.path.exists() and any(path != self.lock for path in self.path.iterdir()):
                raise UserError(f"--out {self.path}: the folder is not empty and holds no run of ours")
            return
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
        try:
            write_json(self.recipe, recipe)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. The system lets go of it when the process ends, however it does.

        Raises UserError when another process holds it, or when it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("w")
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--out {self.path}: another process is at work there; wait until it ends, or use another folder"
                ) from None
            except OSError:
                pass  # some network file systems have no locks
            yield

    def join_ledgers(self) -> None:
        """Rebuild OUT/ledger.jsonl from the nodes' own ledgers."""
        parts = [node.ledger.read_text(encoding="utf-8") for node in self.nodes() if node.ledger.exists()]
        write_atomic(self.ledger, "".join(parts))


@dataclass(frozen=True)
class SweepDir:
    """The files of a sweep: a run directory for every value, and what is said and drawn of all of them."""

    path: Path

    def point(self, name: str) -> RunDir:
        return RunDir(self.path / name)

    @property
    def json(self) -> Path:
        return self.path / "sweep.json"

    @property
    def csv(self) -> Path:
        return self.path / "sweep.csv"

    @property
    def svg(self) -> Path:
        return self.path / "sweep.svg"

    @property
    def png(self) -> Path:
        return self.path / "sweep.png"

    @property
    def html(self) -> Path:
        return self.path / "sweep.html"


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
