"""Options that several verbs share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headwater.config.arms import ARMS
from headwater.errors import UserError
from headwater.runs.hardware import DEVICES

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a built-in recipe.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; run again with the same one and it resumes.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a field: path=value, such as stages.opd.steps=5.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the nodes and what they would cost at most; run nothing.")
]
Track = Annotated[
    str | None,
    typer.Option("--track", help="Trackers to keep up to date: tensorboard, wandb, trackio; commas between."),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", help="With --dry-run: a device to give hours for, such as rtx4090, or several, such as 16xh200."
    ),
]
MeanTokens = Annotated[
    float | None,
    typer.Option("--mean-tokens", min=1.0, help="With --dry-run: the mean length of a completion, where you know it."),
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


@dataclass(frozen=True)
class Sized:
    """What a dry run is asked beside the recipe: on which devices, how many of them, and how long completions are on average."""

    device: str | None
    count: int
    mean_tokens: float | None


def sized(dry_run: bool, on: str | None, mean_tokens: float | None) -> Sized | None:
    """The dry run's options; None where none is asked for. Raises UserError."""
    if not dry_run:
        if on is not None or mean_tokens is not None:
            raise UserError(f"{'--on' if on is not None else '--mean-tokens'}: belongs to --dry-run")
        return None
    if on is None:
        return Sized(None, 1, mean_tokens)
    count, times, name = on.partition("x") if on[:1].isdigit() else ("1", "", on)
    if name not in DEVICES or not count.isdigit() or not 1 <= int(count) <= 100_000 or (on[:1].isdigit() and not times):
        raise UserError(
            f"--on {on}: not a device that is known; there are {', '.join(DEVICES)}, and 8xh100 is eight of one"
        )
    return Sized(name, int(count), mean_tokens)


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
