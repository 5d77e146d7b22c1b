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
    # atomic write of a file: recipe, plan, node.json, checkpoint state, graded texts, DONE, report, …
    "file.begun": "before a temporary file is written",
    "file.torn": "half of it is written",
    "file.written": "written, not yet synced",
    "file.synced": "synced, not yet renamed",
    "file.renamed": "renamed, its folder not yet synced",
    "file.durable": "its folder is synced too",
    # append to a JSONL file: metrics, ledger, conditions, sums, rollouts
    "append.begun": "before rows are appended",
    "append.torn": "half of the last row is written",
    "append.done": "the rows are written, not synced",
    # atomic write of a folder: checkpoint, model, teacher cache
    "folder.begun": "an empty temporary folder exists",
    "folder.filled": "all its files are written, none synced",
    "folder.synced": "all its files are synced",
    "folder.moved": "the folder that it replaces is moved away",
    "folder.renamed": "the new folder is in its place, its parent not yet synced",
    "folder.durable": "its parent is synced too",
    # a run
    "run.locked": "this process holds the run directory's lock",
    "run.claimed": "recipe.json is written",
    "run.planned": "plan.json is written, no node started",
    "run.ended": "the last node ended",
    "run.joined": "the nodes' ledgers are joined in ledger.jsonl",
    "report.begun": "before the report is written",
    "report.values": "report.json is written",
    "report.labels": "labels.csv is written",
    "report.page": "report.html is written",
    # a node
    "node.begun": "before node.json is written",
    "node.described": "node.json is written",
    "node.worked": "the node's work is finished, DONE not written",
    "node.done": "DONE is written, the stage's checkpoints are still there",
    "node.cleaning": "they have another name and are about to be removed",
    # a training stage
    "stage.loaded": "weights and optimizer are restored from the last checkpoint",
    "stage.cut": "metrics are truncated to the checkpoint, the other files not yet",
    "stage.begun": "all files are truncated to the checkpoint",
    "step.begun": "before a step",
    "rollouts.arrived": "some rollouts are sampled, others not",
    "verdicts.checked": "some rollouts are graded, others not",
    "step.gathered": "all rollouts, verdicts and scores of a step are ready",
    "update.gradient": "the gradient is computed, before the optimizer step",
    "update.stepped": "the weights are updated, nothing written",
    "step.measured": "metrics are written, the ledger not",
    "step.charged": "the ledger is written, the rollouts not",
    "step.kept": "rollouts and their checksum are written",
    "step.evaluated": "an evaluation between two steps is written",
    "step.ended": "everything of a step is written, no checkpoint yet",
    "conditions.measured": "the conditions are written, their cost not",
    "checkpoint.begun": "before a checkpoint; the logs are synced",
    "checkpoint.weights": "the weights are written to a temporary folder",
    "checkpoint.optimizer": "the optimizer state too",
    "checkpoint.sums": "the checksums too",
    "checkpoint.saved": "the checkpoint is in its place, older ones not yet removed",
    "checkpoint.pruned": "older checkpoints are removed",
    "stage.ended": "the last step is taken and its checkpoint written",
    "model.written": "the model's files are written to a temporary folder",
    "model.saved": "the model folder is in its place",
    "evaluation.begun": "before an evaluation",
    "evaluation.written": "graded texts are written, their cost not",
    "evaluation.charged": "their cost is written",
    # a teacher's cache
    "cache.sampled": "the teacher's rollouts are sampled",
    "cache.rollouts": "they are written to a temporary folder",
    "cache.scored": "some of them are scored",
    "cache.written": "the teacher's distributions are written to the temporary folder",
    "cache.saved": "the cache is in its place, its cost not written",
    "cache.released": "its last reader is done; DONE lists no distributions, which are about to be removed",
}
"""Name of each failpoint, in the order of a run -> what has happened when it is reached."""

Fault = Callable[[str], None]
_fault: Fault | None = None


def failpoint(name: str) -> None:
    """Mark a failpoint: calls the armed fault, which may end the process."""
    if _fault is not None:
        _fault(name)


def armed() -> bool:
    """Whether a fault is armed. Files are then written in two halves, so that a fault can hit between them."""
    return _fault is not None


def arm(fault: Fault | None) -> None:
    """Set the function that every failpoint calls; None disarms."""
    global _fault
    _fault = fault


def parse_fault(text: str) -> Fault:
    """Parse `point:count=kind` (HEADWATER_FAULT). Kinds: kill, int, term, full, readonly, error.

    Raises KeyError or ValueError for an invalid fault. Example: `parse_fault("step.begun:3=int")` is Ctrl-C at the third step.
    """
    where, _, kind = text.partition("=")
    name, _, count = where.partition(":")
    target, trigger, hits = int(count), KINDS[kind], Counter[str]()
    if name not in POINTS:
        raise KeyError(name)

    def fault(reached: str) -> None:
        hits[reached] += 1
        if reached == name and hits[name] == target:
            trigger()

    return fault


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal takes a moment to arrive


def _disk(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _error() -> None:
    raise RuntimeError("injected fault")


KINDS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full": _disk(errno.ENOSPC),
    "readonly": _disk(errno.EROFS),
    "error": _error,
}

if os.environ.get("HEADWATER_FAULT"):
    arm(parse_fault(os.environ["HEADWATER_FAULT"]))

if __name__ == "__main__":
    print("\n".join(f"{name:22} {what}" for name, what in POINTS.items()))
