"""The verbs that measure: readiness before labels are spent, and how the outcome moves with one thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.options import (  # fmt: skip
    Arms,
    Device,
    DryRun,
    Json,
    Out,
    RecipeName,
    Reuse,
    Seeds,
    Set,
    Workers,
    arms_in,
    changed,
    listed,
    resumable,
    seeds_in,
)
from headwater.errors import FailedError

science = typer.Typer()


@science.command()
def probe(
    recipe: RecipeName,
    problems: Annotated[
        int | None, typer.Option("--problems", min=2, help="Labelled problems to sample; 128 by default.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, help="Completions a problem; 8 or the group size by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run to come: keeps the answer and the looks at labels.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Names the sample of problems and every draw.")] = None,
    set_: Set = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Measure how ready student and teacher are, and say where the labels should go, and why."""
    from headwater.cli.probe_table import text
    from headwater.config.builtin import find_recipe
    from headwater.doctor import probe as probes
    from headwater.report.format import console
    from headwater.runs.progress import progress_display

    chosen = find_recipe(recipe, changed(set_, device))
    number = chosen.seed if seed is None else seed
    found = probes.probe(chosen, problems, samples, number, out, progress_display(quiet=json_))
    if json_:
        print(json.dumps(found))
    else:
        console().print(text(found))


@science.command()
def sweep(
    recipe: RecipeName,
    vary: Annotated[
        str, typer.Option("--vary", metavar="WHAT", help="labels, teacher, lambda, or a field: stages.opd.optim.lr.")
    ],
    values: Annotated[
        str | None,
        typer.Option("--values", help="Its values, separated by commas; the three named ones have defaults."),
    ] = None,
    arms: Arms = None,
    seeds: Seeds = None,
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    workers: Workers = None,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """A study at every value of one thing, what they share run once; then one plot, one table, one page."""
    from headwater.runs.sweep import lay_out

    asked = lay_out(
        recipe,
        vary,
        None if values is None else listed(values, "--values"),
        None if arms is None else arms_in(arms),
        seeds_in(seeds),
        changed(set_, device, workers),
    )
    from headwater import sweeps
    from headwater.report.format import console
    from headwater.report.sweep import dry_run_table, terminal_table
    from headwater.runs.progress import progress_display

    told = progress_display(quiet=json_)
    if dry_run:
        rows = sweeps.dry_run(asked, told.say)
        if json_:
            print(json.dumps(rows))
        else:
            console().print(dry_run_table(asked.vary, rows))
        return
    folder = out or Path("runs") / f"{asked.title}-by-{asked.vary}"
    with resumable(folder):
        found, failed = sweeps.run(asked, folder, told, reuse or [])
    if json_:
        print(json.dumps(found))
    else:
        console().print(terminal_table(found))
        print(f"plot and page: {folder / 'sweep.png'}, {folder / 'sweep.html'}")
    if failed:
        first = next(iter(failed.values()))
        names = ", ".join(f"{asked.vary} {name}" for name in failed)
        raise FailedError(f"sweep: {len(failed)} of {len(found['points'])} points failed: {names}", first.exit_code)
