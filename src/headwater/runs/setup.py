"""Prepare a process for a run: threads and determinism, inputs and plan, stop signals."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date

import torch

from headwater.config.compute import Compute
from headwater.config.recipe import Recipe
from headwater.errors import UserError
from headwater.models.oom import keep_freed_memory
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Plan, make_plan
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir


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


def recorded_day(folder: RunDir) -> date | None:
    """The day of a run's first start; None if its templates read no clock, or it was made before days were recorded."""
    if not folder.day.exists():
        return None
    try:
        return date.fromisoformat(read_json(folder.day)["day"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{folder.day}: is not {{"day": "YYYY-MM-DD"}}; write the day on which the run began') from None


def prompt_day(folder: RunDir, reuse: Sequence[RunDir] = ()) -> date | None:
    """The day that a run's templates read as today: its first, so that a resumed run renders equal prompts.

    A new run takes that of the first run that it reuses nodes of, else today's. None in a folder whose nodes have no day.
    """
    for run in (folder, *(() if folder.nodes() else reuse)):
        if (day := recorded_day(run)) is not None:
            return day
    return None if folder.nodes() else date.today()


@contextlib.contextmanager
def prepared(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], day: date | None = None
) -> Iterator[tuple[Plan, RunInputs]]:
    """Read the data and make the plan, which `doctor.checks.preflight` checks. Raises UserError; nothing is written.

    day  see `RunInputs`
    """
    set_up(recipe.compute)
    with RunInputs(recipe, day=day) as inputs:
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
