"""Options that several verbs share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from headwater.errors import UserError
from headwater.recipes import ARMS

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a built-in recipe.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; run again with the same one and it resumes.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a field: path=value, such as stages.opd.steps=5.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the nodes and what they would cost at most; run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON where a machine reads it.")]
Arms = Annotated[str | None, typer.Option("--arms", help="Arms, separated by commas, or `all`.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Training seeds, separated by commas.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes that run independent nodes; by default what the cores allow."),
]
ExecutorName = Annotated[
    str, typer.Option("--executor", help="Who runs the nodes: local, or ray for a Ray cluster (RAY_ADDRESS).")
]
Reuse = Annotated[
    list[Path] | None,
    typer.Option("--reuse", help="Another run's folder, whose finished nodes count where they are the same work."),
]


def changed(set_: list[str] | None, device: str | None, workers: int | None = None) -> list[str]:
    """The options that change a field of the recipe, as `path=value`."""
    named = {"compute.device": device, "compute.workers": workers}
    return [*(set_ or []), *(f"{path}={value}" for path, value in named.items() if value is not None)]


def arms_in(text: str) -> list[str]:
    """What `--arms` names; every arm there is for `all`."""
    return list(ARMS) if text == "all" else listed(text, "--arms")


def seeds_in(text: str | None) -> list[int] | None:
    """What `--seeds` names; None where it is not given. Raises UserError."""
    try:
        return None if text is None else [int(one) for one in listed(text, "--seeds")]
    except ValueError:
        raise UserError(f"--seeds {text}: must be whole numbers separated by commas") from None


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Exit 130 when asked to stop by SIGINT or SIGTERM, and say how to go on."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    held = None
    with contextlib.suppress(ValueError):  # off the main thread there are no signals to hear
        held = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print(f"headwater: interrupted; the same command with --out {folder} goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        if held is not None:
            signal.signal(signal.SIGTERM, held)


def listed(text: str, option: str) -> list[str]:
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise UserError(f"{option}: names nothing")
    return found
