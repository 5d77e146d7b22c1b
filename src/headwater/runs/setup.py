"""Prepare a process for a run: threads and determinism, data and plan, stop signals."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from headwater.config.recipe import Compute, Recipe
from headwater.models.oom import keep_freed_memory
from headwater.runs.checks import check_plan
from headwater.runs.inputs import RunInputs, load_inputs
from headwater.runs.plan import Plan, make_plan
from headwater.tasks.verifier import Verifier


def set_up(compute: Compute) -> None:
    """Threads, memory and determinism of the tensor library, for the whole process."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    if compute.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    if compute.deterministic and compute.device != "cuda":
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        # Nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def prepared(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Plan, RunInputs]]:
    """Read the data, lay out the nodes and check both. Raises UserError; nothing has been written then."""
    compute = recipe.compute
    set_up(compute)
    with Verifier(recipe.task, workers=compute.grader_workers, seconds=compute.grader_seconds) as grade:
        inputs = load_inputs(recipe, grade)
        plan = make_plan(recipe, arms, seeds, inputs.content())
        check_plan(plan, inputs)
        yield plan, inputs


@contextlib.contextmanager
def stop_requests(aloud: bool = True) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second one stops at once. `aloud` says so to the user."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if aloud:
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
