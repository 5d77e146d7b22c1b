"""Layout of a run directory: with storage/node_dir.py the only module that spells its file names (storage/files.py does the writing).

OUT/recipe.json            the resolved recipe
OUT/env.json               versions, device, threads
OUT/preflight.json         {"inputs", "nodes"} that passed preflight: a hash of recipe, versions and device, and names of nodes
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
               DONE                     the node's fingerprint, the checksums of its files, and its own; of a cache also how many
                                        rollouts have distributions in it
               FAILED                   {"sentence", "code"} of a node that failed, and the "traceback" of an unexpected error
OUT/attempts/NODE.json     {"worker", "started", "ended"} of each time the node ran, for the report's timeline
OUT/attempts/NODE.now.json what the node does at this moment; removed when it ends
OUT/trackers/ tracked.json files of trackers; last step of each node that was sent to them
OUT/.lock .locks/NODE      locked by the process that runs in the folder, and the one that runs the node
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import UserError
from headwater.storage.files import (
    first_difference,
    is_leftover,
    lock,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
)
from headwater.storage.node_dir import InFolder, NodeDir

FREE = dict.fromkeys(("seed", "compute", "guards", "conditions"))
"""Recipe fields in which runs of one study may differ: they change no trained weight."""


@dataclass(frozen=True)
class RunDir:
    """The files of one run or study."""

    path: Path

    recipe = InFolder("recipe.json")
    env = InFolder("env.json")
    preflight = InFolder("preflight.json")
    day = InFolder("day.json")
    plan = InFolder("plan.json")
    ledger = InFolder("ledger.jsonl")
    report_json = InFolder("report.json")
    report_html = InFolder("report.html")
    lock = InFolder(".lock")
    left_out = InFolder("left_out.jsonl")
    problems = InFolder("problems.jsonl")
    figures = InFolder("figures")
    labels = InFolder("labels.csv")
    probe = InFolder("probe.json")
    probe_ledger = InFolder("probe/ledger.jsonl")
    trackers = InFolder("trackers")
    tracked = InFolder("tracked.json")

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
