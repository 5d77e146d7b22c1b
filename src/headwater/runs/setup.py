"""Prepare a process for a run: threads and determinism, inputs and plan, stop signals."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from headwater.config.recipe import Compute, Recipe
from headwater.models.oom import keep_freed_memory
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Plan, make_plan


def set_up(compute: Compute) -> None:
    """Set threads, memory handling and determinism of torch for the whole process."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    if compute.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    if compute.deterministic and compute.device != "cuda":
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        # No uninitialized memory is ever read, so filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def prepared(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Plan, RunInputs]]:
    """Read the data and make the plan, which `doctor.checks.preflight` checks. Raises UserError; nothing is written."""
    set_up(recipe.compute)
    with RunInputs(recipe) as inputs:
        yield make_plan(recipe, arms, seeds, inputs.content()), inputs


@contextlib.contextmanager
def stop_requests(aloud: bool = True) -> Iterator[Callable[[], bool]]:
    """On SIGINT or SIGTERM request a stop at the next step; a second signal interrupts at once. `aloud` tells the user."""
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        if aloud:
            print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    previous = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
