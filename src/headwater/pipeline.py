"""Run a recipe or a study: skip nodes that are DONE, run the others with an executor, write the report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headwater.config.recipe import Recipe, canonical_json
from headwater.doctor.checks import CHECKS, MACHINE_CHECKS, preflight
from headwater.errors import FailedError, UserError
from headwater.report import build as report
from headwater.runs.display import ProgressDisplay
from headwater.runs.estimate import estimates
from headwater.runs.executors.base import Executor, Failure, Job, describe
from headwater.runs.executors.local import run_in_workers
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Plan
from headwater.runs.run_node import remove_unneeded
from headwater.runs.setup import prepared, prompt_day, stop_requests
from headwater.storage import fault_points
from headwater.storage.files import read_checked, write_checked, write_json, write_rows
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan, refuse_links

SHOWN_TEXT = 4000
"""Characters of a problem in problems.jsonl."""
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
    executor: Executor | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Run arms × seeds into a folder and write its report; with the same folder again, resume.

    reuse      other run directories whose finished nodes are copied where their fingerprints match
    executor   runs the nodes; `run_in_workers` by default
    processes  how many processes run each node together

    Returns the report. Raises UserError or RefusedError before anything is written; FailedError when nodes failed, after the
    others have run and the report is written; KeyboardInterrupt when asked to stop (resumable).
    """
    folder, others = RunDir(out), [RunDir(path) for path in reuse]
    say = progress_display.say
    refuse_links(out, "--out")
    folder.refuse_other(recipe.model_dump(mode="json"))
    for other in others:
        if not other.recipe.exists():
            raise UserError(f"--reuse {other.path}: holds no run of Headwater")
        refuse_links(other.path, "--reuse")
    day = prompt_day(folder, others)
    with contextlib.ExitStack() as stack:
        with progress_display.task("checking recipe, models and data") as tell:
            plan, inputs = stack.enter_context(prepared(recipe, arms, seeds, day))
            env = environment(inputs.device, processes)
            passed, earlier = what_preflight_judges(plan, env), passed_earlier(folder)
            known = passed["inputs"] == earlier["inputs"] and set(passed["nodes"]) <= set(earlier["nodes"])
            if known:
                say(
                    "recipe, models and data passed preflight when this run began; only memory, disk and servers are checked again"
                )
            preflight(plan, inputs, out, say, tell, MACHINE_CHECKS if known else CHECKS)
        with folder.locked():
            fault_points.failpoint("run.locked")
            folder.claim(recipe.model_dump(mode="json"))
            fault_points.failpoint("run.claimed")
            if any(inputs.template_day(node.role) for node in plan.order()):
                write_json(folder.day, {"day": str(day)})
            if not known and plan.unfinished(folder):  # of a finished run not everything was judged
                also = earlier["nodes"] if passed["inputs"] == earlier["inputs"] else []
                write_checked(folder.preflight, {**passed, "nodes": sorted({*passed["nodes"], *also})})
            write_json(folder.env, env)
            write_rows(folder.left_out, inputs.left_out)
            write_rows(folder.problems, problem_texts(inputs))
            flops = {row.name: row.flops for row in estimates(plan, inputs)}
            write_checked(folder.plan, merged_with_earlier({**plan.to_json(), "flops": flops}, folder))
            fault_points.failpoint("run.planned")
            reuse_nodes(plan, folder, others, say)
            reopen_damaged_nodes(plan, folder, say)
            todo = {plan.names[node]: node for node in plan.unfinished(folder)}
            for node in plan.order():
                if plan.names[node] not in todo:  # its process may have been killed before it had removed them
                    remove_unneeded(node, plan, folder)
            interrupted = False
            try:
                with stop_requests() as stopped:
                    job = Job(plan, inputs, arms, folder, todo, progress_display, stopped)
                    failures = (executor or run_in_workers)(job)
                    interrupted = stopped()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                fault_points.failpoint("run.ended")
                folder.join_ledgers()
            fault_points.failpoint("run.joined")
            if not interrupted:
                result = report.write(out)
        if interrupted:
            report.write(out)  # once the folder is free, since the page says whether the run is still going on
            raise KeyboardInterrupt
    if failures:
        raise study_error(job, failures)
    return result


def what_preflight_judges(plan: Plan, env: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of preflight.json: a hash of recipe, versions and device, and the nodes, whose names hash data and weights."""
    inputs = {"recipe": plan.recipe.model_dump(mode="json"), "versions": env["versions"], "device": env["device"]}
    digest = hashlib.sha256(canonical_json(inputs).encode()).hexdigest()
    return {"inputs": digest, "nodes": sorted(set(plan.names.values()))}


def passed_earlier(folder: RunDir) -> dict[str, Any]:
    """What preflight.json says; nothing where it is missing or damaged, so that everything is judged again."""
    nothing: dict[str, Any] = {"inputs": None, "nodes": []}
    try:
        return {**nothing, **read_checked(folder.preflight)} if folder.preflight.exists() else nothing
    except UserError:
        return nothing


def problem_texts(inputs: RunInputs) -> list[dict[str, Any]]:
    """Rows of problems.jsonl: the texts by id, so that the report can show a completion's problem; long ones are cut."""
    evals = [problem for problems, _ in inputs.evals.values() for problem in problems]
    texts = {
        problem.id: problem.text[:SHOWN_TEXT].encode(errors="replace").decode()
        for problem in [*inputs.problems.values(), *evals]
    }
    return [{"id": id_, "text": text} for id_, text in texts.items()]


def reopen_damaged_nodes(plan: Plan, folder: RunDir, say: Callable[[str], None]) -> None:
    """Remove DONE from nodes with damaged files and name the files, so that these nodes run again.

    A trained node resumes from its last checkpoint if it kept one, any other starts anew; the result is the same.
    """
    for node in plan.order():
        node_dir = folder.node(plan.names[node])
        damaged = node_dir.damage() if node_dir.done.exists() else None
        if damaged is not None:
            say(f"{damaged}: is damaged; {describe(node)} runs again")
            node_dir.done.unlink()


def reuse_nodes(plan: Plan, folder: RunDir, others: Sequence[RunDir], say: Callable[[str], None]) -> None:
    """Copy undamaged finished nodes with this plan's fingerprints from other runs."""
    if not others:
        return
    counts: Counter[Path] = Counter()
    for node in plan.unfinished(folder):
        name = plan.names[node]
        source = next((o for o in others if plan.is_done(node, o) and o.node(name).damage() is None), None)
        if source is not None:
            folder.node(name).copy_from(source.node(name))
            counts[source.path] += 1
    parts = ", ".join(f"{count} from {path}" for path, count in counts.items())
    say(f"reuse: {counts.total()} of {len(plan.order())} nodes taken over{': ' if parts else ''}{parts}")


def study_error(job: Job, failures: Mapping[str, Failure]) -> FailedError:
    """One sentence per failed node with the descendants that it skipped, and the exit code of the first."""
    ancestors = {
        name: {job.plan.names[ancestor] for ancestor in node.ancestry()} - {name} for name, node in job.todo.items()
    }
    failed = [name for name in job.todo if name in failures]
    code, sentences = failures[failed[0]].code, []
    for name in failed:
        sentence = failures[name].sentence
        if failures[name].traceback is not None:
            sentence += f" (traceback in {job.out.node(name).failed})"
        if job.single:
            return FailedError(sentence, code)
        skipped = ", ".join(describe(node) for other, node in job.todo.items() if name in ancestors[other])
        suffix = f"; not run because of it: {skipped}" if skipped else ""
        sentences.append(f"{describe(job.todo[name])}: {sentence}{suffix}")
    count = f"{len(sentences)} node{'s' if len(sentences) > 1 else ''} failed"
    return FailedError(f"study: {count}: " + "\n".join(sentences), code)


def merged_with_earlier(plan: dict[str, Any], folder: RunDir) -> dict[str, Any]:
    """The plan with the arms and seeds that the folder already holds."""
    if not folder.plan.exists():
        return plan
    try:
        earlier = read_plan(folder.plan)
    except UserError as error:
        raise UserError(f"{error}; delete it and name all arms and seeds again; finished nodes are kept") from None
    names = earlier["arms"] | plan["arms"]
    arms = {arm: {**earlier["arms"].get(arm, {}), **plan["arms"].get(arm, {})} for arm in names}
    flops = {**earlier.get("flops", {}), **plan["flops"]}
    return {**plan, "seeds": sorted({*earlier["seeds"], *plan["seeds"]}), "arms": arms, "flops": flops}


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, hardware and number of processes; never environment variables, which may hold secrets."""
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
