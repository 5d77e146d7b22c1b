"""Train the pocket or desk models from scratch: `python -m tools.pretrain pocket` or `desk`, in a checkout of the source."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import torch
import typer

from headwater.cli.options import Device, exit_codes, parse_list
from headwater.errors import UserError
from headwater.models.device import device_of
from headwater.runs.display import NodeProgress
from headwater.runs.progress import progress_display
from tools.pretrain.desk import pretrain_desk
from tools.pretrain.desk_models import DESK, with_steps
from tools.pretrain.pocket import OTHER_TOKENIZERS, POCKET, pretrain_pocket

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Models = Annotated[str | None, typer.Option("--models", help="Some of the models, separated by commas.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the models.")]


@app.command()
def pocket(out: Out = Path("pocket"), models: Models = None) -> None:
    """Train the pocket models, which ship with the package, or those of other tokenizers; minutes each on one CPU thread."""
    specs = POCKET | OTHER_TOKENIZERS
    names = list(POCKET) if models is None else selected(models, specs, "pocket")
    torch.set_num_threads(1)  # the shipped models were trained with one; with several, sums round differently
    display = progress_display()
    for number, name in enumerate(names, 1):
        with display.node(name, number, len(names)) as progress:
            progress.start(0, specs[name].steps, "steps")
            stats = pretrain_pocket(name, out, progress=report_to(progress))
        print(f"{out / name}: pass rate {stats.pass_rate:.1%}, {stats.worked_share:.0%} of samples show their work")


@app.command()
def desk(
    out: Out = Path("desk"),
    models: Models = None,
    steps: Annotated[int | None, typer.Option("--steps", min=2, help="Train for so many steps instead.")] = None,
    device: Device = None,
) -> None:
    """Train the desk models, 15 to 127 million parameters; hours on a GPU. An interrupted one resumes."""
    names, where = selected(models, DESK, "desk"), device_of(device or "auto")
    workers = min(8, (os.cpu_count() or 2) - 1) if where.type == "cuda" else 0
    display = progress_display()
    for number, name in enumerate(names, 1):
        spec = DESK[name] if steps is None else with_steps(DESK[name], steps)
        with display.node(name, number, len(names)) as progress:
            progress.start(0, spec.steps, "steps")
            stats = pretrain_desk(name, out, spec, where, progress=report_to(progress), workers=workers)
        rates = ", ".join(f"{measured.pass_rate:.1%} of {difficulty}" for difficulty, measured in stats.items())
        print(f"{out / name}: solves {rates}")


def selected(models: str | None, known: Collection[str], family: str) -> list[str]:
    """The models that `--models` names, or all of them. Raises UserError for an unknown name."""
    names = list(known) if models is None else parse_list(models, "--models")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--models {unknown[0]}: no such {family} model; there are {', '.join(known)}")
    return names


def report_to(progress: NodeProgress) -> Callable[[int, int, float], None]:
    """A callback (steps done, steps in all, loss) that advances the bar; a resumed training starts past step 1."""
    shown = 0

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal shown
        progress.advance(step - shown, {"loss": loss})
        shown = step

    return report


def main() -> None:
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
