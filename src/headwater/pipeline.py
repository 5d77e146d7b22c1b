"""Run a recipe or a study: nodes in order, those that are DONE skipped, an interrupted one resumed; then the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwater import report
from headwater.config import Compute, Recipe
from headwater.doctor import preflight
from headwater.materials import Materials, check_plan, gather_materials
from headwater.plan import Node, Plan, make_plan
from headwater.rundir import RunDir, read_json, write_json, write_rows
from headwater.stages import run_node
from headwater.verifier import Verifier
from headwater.workplace import Watch, Workplace

VERSIONS_OF = (
    "headwater",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "math-verify",
    "numpy",
    "scipy",
    "pydantic",
)


@dataclass(frozen=True)
class Narrator:
    """Who is told what happens: `say` for lines, `node` for a context manager that watches one node."""

    say: Callable[[str], None]
    node: Callable[[str, int, int], contextlib.AbstractContextManager[Watch]]


def set_up(compute: Compute) -> None:
    """Threads and determinism of the tensor library, for the whole process."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    if compute.deterministic and compute.device != "cuda":
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


@contextlib.contextmanager
def prepared(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Plan, Materials]]:
    """Read the data, lay out the nodes and check both. Raises UserError; nothing has been written then."""
    compute = recipe.compute
    set_up(compute)
    with Verifier(recipe.task, workers=compute.grader_workers, seconds=compute.grader_seconds) as grade:
        materials = gather_materials(recipe, grade)
        plan = make_plan(recipe, arms, seeds, materials.content())
        check_plan(plan, materials)
        yield plan, materials


def run(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    narrator: Narrator,
    *,
    reuse: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run arms × seeds into a folder and write its report; with the same folder again, go on where it stopped.

    Returns the report. Raises UserError, RefusedError before anything is written, TrainingStoppedError, or KeyboardInterrupt
    when asked to stop (resumable).
    """
    folder = RunDir(out)
    with prepared(recipe, arms, seeds) as (plan, materials):
        preflight(plan, materials, out, narrator.say)
        folder.claim(recipe.model_dump(mode="json"))
        write_json(folder.env, environment(materials.device))
        write_rows(folder.left_out, materials.left_out)
        write_json(folder.plan, with_earlier(plan.written(), folder))
        for note in materials.notes:
            narrator.say(note)
        with stop_requests() as stopped:
            for number, node in enumerate(plan.order(), 1):
                run_one(node, number, plan, materials, folder, narrator, stopped)
                if stopped():
                    raise KeyboardInterrupt
    folder.join_ledgers()
    return report.write(out)


def run_one(
    node: Node,
    number: int,
    plan: Plan,
    materials: Materials,
    folder: RunDir,
    narrator: Narrator,
    stopped: Callable[[], bool],
) -> None:
    if folder.node(plan.names[node]).is_done(plan.fingerprints[node]):
        return
    try:
        with narrator.node(describe(node), number, len(plan.order())) as watch:
            run_node(node, Workplace(plan, materials, folder, Watch(watch.start, watch.advance, stopped)))
    finally:
        folder.join_ledgers()


def describe(node: Node) -> str:
    where = "" if node.pool is None else f" on {node.pool.replace('_', ' ')}"
    return f"{node.stage}{where} (seed {node.seed})"


def with_earlier(written: dict[str, Any], folder: RunDir) -> dict[str, Any]:
    """A study adds arms and seeds to what its folder already holds."""
    if not folder.plan.exists():
        return written
    held = read_json(folder.plan)
    arms = {arm: {**held["arms"].get(arm, {}), **seeds} for arm, seeds in (held["arms"] | written["arms"]).items()}
    for arm, seeds in written["arms"].items():
        arms[arm] = {**arms[arm], **seeds}
    return {**written, "seeds": sorted(set(held["seeds"]) | set(written["seeds"])), "arms": arms}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware; never environment variables, which may hold secrets."""
    versions = {}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": versions,
    }


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second one stops at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    held = {}
    with contextlib.suppress(ValueError):  # off the main thread there are no signals to hear
        for number in (signal.SIGINT, signal.SIGTERM):
            held[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
