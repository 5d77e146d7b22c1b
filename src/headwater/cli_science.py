"""The verbs that measure: readiness before labels are spent, and how the outcome moves with one thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli_options import Device, DryRun, Json, Out, RecipeName, Reuse, Set, Workers, changed, listed
from headwater.errors import FailedError, UserError

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
    from headwater import probe as probes
    from headwater.console import narrator
    from headwater.probe_words import text
    from headwater.recipes import find_recipe
    from headwater.report_words import console

    chosen = find_recipe(recipe, changed(set_, device))
    number = chosen.seed if seed is None else seed
    found = probes.probe(chosen, problems, samples, number, out, narrator(quiet=json_))
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
    arms: Annotated[str | None, typer.Option("--arms", help="Arms, separated by commas, or `all`.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Training seeds, separated by commas.")] = None,
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    workers: Workers = None,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """A study at every value of one thing, what they share run once; then one plot, one table, one page."""
    from headwater.recipes import ARMS
    from headwater.sweep import lay_out

    chosen = None if arms is None else list(ARMS) if arms == "all" else listed(arms, "--arms")
    try:
        numbers = None if seeds is None else [int(one) for one in listed(seeds, "--seeds")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: must be whole numbers separated by commas") from None
    asked = lay_out(
        recipe,
        vary,
        None if values is None else listed(values, "--values"),
        chosen,
        numbers,
        changed(set_, device, workers),
    )
    from headwater import sweep_run
    from headwater.console import narrator
    from headwater.report_words import console
    from headwater.sweep_words import dry_run_table, terminal_table

    told = narrator(quiet=json_)
    if dry_run:
        rows = sweep_run.dry_run(asked, told.say)
        if json_:
            print(json.dumps(rows))
        else:
            console().print(dry_run_table(asked.vary, rows))
        return
    folder = out or Path("runs") / f"{asked.title}-by-{asked.vary}"
    try:
        found, failed = sweep_run.run(asked, folder, told, reuse or [])
    except KeyboardInterrupt:
        print(f"headwater: interrupted; the same command with --out {folder} goes on from here", file=sys.stderr)
        sys.exit(130)
    if json_:
        print(json.dumps(found))
    else:
        console().print(terminal_table(found))
        print(f"plot and page: {folder / 'sweep.png'}, {folder / 'sweep.html'}")
    if failed:
        first = next(iter(failed.values()))
        names = ", ".join(f"{asked.vary} {name}" for name in failed)
        raise FailedError(f"sweep: {len(failed)} of {len(found['points'])} points failed: {names}", first.exit_code)
