"""Failpoints: named places where tests kill the process, fill the disk or send a signal. Unarmed they cost one comparison.

`HEADWATER_FAULT=checkpoint.saved:2=kill` kills the process when it reaches that point for the second time; `docs/reliability.md`
says what then holds. `POINTS` is the list; `python -m headwater.storage.fault_points` prints it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable

POINTS = {
    # one file, written aside and renamed: recipe, plan, node.json, checkpoint's state, graded texts, DONE, report, …
    "file.begun": "before a file is written aside",
    "file.torn": "half of it is written",
    "file.written": "written, not yet synced",
    "file.synced": "synced, not yet renamed",
    "file.renamed": "renamed, its folder not yet synced",
    "file.durable": "its folder is synced too",
    # rows added to a file: metrics, ledger, conditions, sums, rollouts
    "append.begun": "before rows are added",
    "append.torn": "half of the last row is written",
    "append.done": "the rows are there, not synced",
    # a folder, filled aside and renamed: checkpoint, model, teacher cache
    "folder.begun": "an empty folder stands aside",
    "folder.filled": "all its files are written, none synced",
    "folder.synced": "all its files are synced",
    "folder.moved": "what stood in its place is moved away",
    "folder.renamed": "the new folder stands there, the one above not yet synced",
    "folder.durable": "the one above is synced too",
    # a run
    "run.locked": "the folder is this process's",
    "run.claimed": "recipe.json is written",
    "run.planned": "plan.json is written, nothing begun",
    "run.ended": "the last node ended",
    "run.joined": "ledger.jsonl is joined",
    "report.begun": "before the report is written",
    "report.values": "report.json is written",
    "report.labels": "labels.csv is written",
    "report.page": "report.html is written",
    # a node
    "node.begun": "before node.json is written",
    "node.described": "node.json is written",
    "node.worked": "its work is over, DONE not written",
    "node.done": "DONE is written",
    # a stage of training
    "stage.loaded": "weights and optimizer are as the last checkpoint left them",
    "stage.cut": "metrics are cut back to it, the other files not yet",
    "stage.begun": "all files are cut back to it",
    "step.begun": "before a step",
    "rollouts.arrived": "a few rollouts are sampled, the rest not",
    "verdicts.checked": "a few verdicts are there",
    "step.gathered": "all rollouts, verdicts and scores of a step are there",
    "update.gradient": "the gradient is there, before the optimizer's step",
    "update.stepped": "the weights are changed, nothing written",
    "step.measured": "metrics are written, the ledger not",
    "step.charged": "the ledger is written, the rollouts not",
    "step.kept": "rollouts and their sum are written",
    "step.evaluated": "an evaluation between two steps is written",
    "step.ended": "all of a step is written, no checkpoint yet",
    "conditions.measured": "the conditions are written, their cost not",
    "checkpoint.begun": "before a checkpoint; the logs are synced",
    "checkpoint.weights": "its weights are written aside",
    "checkpoint.optimizer": "its optimizer too",
    "checkpoint.sums": "its checksums too",
    "checkpoint.saved": "it is in its place, older ones not yet removed",
    "checkpoint.pruned": "the older ones are removed",
    "stage.ended": "the last step is taken and its checkpoint written",
    "model.written": "the model's files are written aside",
    "model.saved": "the model folder is in its place",
    "evaluation.begun": "before an evaluation",
    "evaluation.written": "graded texts are written, their cost not",
    "evaluation.charged": "their cost is written",
    # a teacher's cache
    "cache.sampled": "the teacher's rollouts are there",
    "cache.rollouts": "they are written aside",
    "cache.scored": "some of them are scored",
    "cache.written": "its distributions are written aside",
    "cache.saved": "the cache is in its place, its cost not written",
}
"""Every point, and what has happened there and what not."""

WRITES = frozenset(name for name in POINTS if name.split(".")[0] in ("file", "append", "folder")) - {
    "file.durable", "append.done", "folder.durable",
} | {"checkpoint.weights", "checkpoint.optimizer", "checkpoint.sums", "model.written", "cache.rollouts", "cache.written"}  # fmt: skip
"""Those within a write, where a disk can be full."""

Strike = Callable[[str], None]
_strike: Strike | None = None


def failpoint(name: str) -> None:
    """Mark a failpoint: calls the armed fault, which may end the process."""
    if _strike is not None:
        _strike(name)


def armed() -> bool:
    """Whether a fault is armed. Files are then written in two halves, so that a fault can hit between them."""
    return _strike is not None


def arm(strike: Strike | None) -> None:
    """Set the function that every failpoint calls; None disarms."""
    global _strike
    _strike = strike


def struck(fault: str) -> Strike:
    """Parse `point:count=kind` (HEADWATER_FAULT). Kinds: kill, int, term, full, readonly, error.

    Raises KeyError or ValueError for an invalid fault. Example: `struck("step.begun:3=int")` is Ctrl-C at the third step.
    """
    where, _, kind = fault.partition("=")
    name, _, count = where.partition(":")
    wanted, do, seen = int(count), KINDS[kind], Counter[str]()
    if name not in POINTS:
        raise KeyError(name)

    def strike(arrived: str) -> None:
        seen[arrived] += 1
        if arrived == name and seen[name] == wanted:
            do()

    return strike


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal takes a moment to arrive


def _disk(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _error() -> None:
    raise RuntimeError("a fault was asked for")


KINDS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full": _disk(errno.ENOSPC),
    "readonly": _disk(errno.EROFS),
    "error": _error,
}

if os.environ.get("HEADWATER_FAULT"):
    arm(struck(os.environ["HEADWATER_FAULT"]))

if __name__ == "__main__":
    print("\n".join(f"{name:22} {what}" for name, what in POINTS.items()))
