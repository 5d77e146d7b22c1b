"""Run a recipe or a study: what is DONE is left alone, an executor runs the rest; then the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headwater.config.recipe import Recipe
from headwater.doctor.checks import preflight
from headwater.errors import FailedError, UserError
from headwater.report import build as report
from headwater.runs.executors.base import Executor, Failure, Job, describe
from headwater.runs.executors.local import local
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import ProgressDisplay
from headwater.runs.plan import Node, Plan
from headwater.runs.setup import prepared, stop_requests
from headwater.storage import fault_points
from headwater.storage.files import write_rows
from headwater.storage.run_dir import RunDir, write_checked, write_json
from headwater.storage.untrusted import read_plan, refuse_links

SHOWN_TEXT = 4000
"""Characters of a problem that problems.jsonl keeps."""
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


def run(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    progress_display: ProgressDisplay,
    *,
    reuse: Sequence[Path] = (),
    executor: Executor = local,
    processes: int = 1,
) -> dict[str, Any]:
    """Run arms × seeds into a folder and write its report; with the same folder again, go on where it stopped.

    reuse     other run directories, whose finished nodes are taken over where they are the same work
    executor  who runs the nodes; `local` asks `compute.workers`
    processes  how many run each node together

    Returns the report. Raises UserError, RefusedError before anything is written; FailedError when nodes failed, after the
    others were run and the report was written; KeyboardInterrupt when asked to stop (resumable).
    """
    folder, others = RunDir(out), [RunDir(path) for path in reuse]
    refuse_links(out, "--out")
    folder.refuse_other(recipe.model_dump(mode="json"))
    for other in others:
        if not other.recipe.exists():
            raise UserError(f"--reuse {other.path}: holds no run of ours")
        refuse_links(other.path, "--reuse")
    with prepared(recipe, arms, seeds) as (plan, inputs):
        preflight(plan, inputs, out, progress_display.say)
        with folder.locked():
            fault_points.failpoint("run.locked")
            folder.claim(recipe.model_dump(mode="json"))
            fault_points.failpoint("run.claimed")
            write_json(folder.env, environment(inputs.device, processes))
            write_rows(folder.left_out, inputs.left_out)
            write_rows(folder.problems, texts_of(inputs))
            write_checked(folder.plan, with_earlier(plan.written(), folder))
            fault_points.failpoint("run.planned")
            for note in inputs.notes:
                progress_display.say(note)
            take_over(plan, folder, others, progress_display.say)
            mend(plan, folder, progress_display.say)
            todo = {plan.names[node]: node for node in plan.order() if not is_done(node, plan, folder)}
            try:
                with stop_requests() as stopped:
                    job = Job(plan, inputs, arms, folder, todo, progress_display, stopped)
                    failures = executor(job)
                    if stopped():
                        raise KeyboardInterrupt
            finally:
                fault_points.failpoint("run.ended")
                folder.join_ledgers()
            fault_points.failpoint("run.joined")
            found = report.write(out)
    if failures:
        raise failed(job, failures)
    return found


def texts_of(inputs: RunInputs) -> list[dict[str, Any]]:
    """What was asked, by id, so that the report can show a completion under its problem; long ones are cut."""
    asked = [*inputs.problems.values(), *(one for held, _ in inputs.evals.values() for one in held)]
    texts = {one.id: one.text[:SHOWN_TEXT].encode(errors="replace").decode() for one in asked}
    return [{"id": one, "text": text} for one, text in texts.items()]


def is_done(node: Node, plan: Plan, folder: RunDir) -> bool:
    return folder.node(plan.names[node]).is_done(plan.fingerprints[node])


def is_whole(node: Node, plan: Plan, folder: RunDir) -> bool:
    """Whether it is done, and what it holds is what was written."""
    return is_done(node, plan, folder) and folder.node(plan.names[node]).damage() is None


def mend(plan: Plan, folder: RunDir, say: Callable[[str], None]) -> None:
    """Name the damaged files of finished nodes and take DONE from those, so that they are finished again.

    A trained node goes on from its last checkpoint, any other begins again; either way what comes out is the same.
    """
    for node in plan.order():
        held = folder.node(plan.names[node])
        broken = held.damage() if held.done.exists() else None
        if broken is not None:
            say(f"{broken}: is damaged; {describe(node)} is finished again")
            held.done.unlink()


def take_over(plan: Plan, folder: RunDir, others: Sequence[RunDir], say: Callable[[str], None]) -> None:
    """Take from other runs what they have done of this plan; a node's fingerprint says that it is the same work."""
    if not others:
        return
    taken: Counter[Path] = Counter()
    for node in plan.order():
        source = next((other for other in others if is_whole(node, plan, other)), None)
        if source is not None and not is_done(node, plan, folder):
            folder.node(plan.names[node]).take_over(source.node(plan.names[node]))
            taken[source.path] += 1
    parts = ", ".join(f"{count} from {path}" for path, count in taken.items())
    say(f"reuse: {taken.total()} of {len(plan.order())} nodes taken over{': ' if parts else ''}{parts}")


def failed(job: Job, failures: Mapping[str, Failure]) -> FailedError:
    """A sentence for each node that failed, with what was not run because of it, and the first one's exit code."""
    above = {name: {job.plan.names[one] for one in node.ancestry()} - {name} for name, node in job.todo.items()}
    named = [name for name in job.todo if name in failures]
    code, sentences = failures[named[0]].code, []
    for name in named:
        why = failures[name].sentence
        if failures[name].traceback is not None:
            why += f" (traceback in {job.out.node(name).failed})"
        if job.alone:
            return FailedError(why, code)
        on_it = ", ".join(describe(node) for other, node in job.todo.items() if name in above[other])
        sentences.append(f"{describe(job.todo[name])}: {why}" + (f"; not run because of it: {on_it}" if on_it else ""))
    count = f"{len(sentences)} node{'s' if len(sentences) > 1 else ''} failed"
    return FailedError(f"study: {count}: " + "\n".join(sentences), code)


def with_earlier(written: dict[str, Any], folder: RunDir) -> dict[str, Any]:
    """A study adds arms and seeds to what its folder already holds."""
    if not folder.plan.exists():
        return written
    try:
        held = read_plan(folder.plan)
    except UserError as error:
        raise UserError(f"{error}; delete it and name all arms and seeds again: what is done stays done") from None
    arms = {arm: {**held["arms"].get(arm, {}), **seeds} for arm, seeds in (held["arms"] | written["arms"]).items()}
    for arm, seeds in written["arms"].items():
        arms[arm] = {**arms[arm], **seeds}
    return {**written, "seeds": sorted(set(held["seeds"]) | set(written["seeds"])), "arms": arms}


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, and how many processes run a node together; never environment variables, which may hold secrets."""
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
        "processes": processes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": versions,
    }
