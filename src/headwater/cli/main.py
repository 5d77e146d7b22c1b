"""The verbs. Every expected end is one sentence and an exit code: 2 the user's mistake, 3 refused, 4 stopped, 130 interrupted."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.experiments import science
from headwater.cli.options import (  # fmt: skip
    Arms,
    Device,
    DryRun,
    ExecutorName,
    Json,
    MeanTokens,
    On,
    Out,
    RecipeName,
    Reuse,
    Seeds,
    Set,
    Sized,
    Track,
    Workers,
    arms_in,
    changed,
    launched,
    listed,
    resumable,
    seeds_in,
    sized,
)
from headwater.cli.tools import tools
from headwater.errors import FailedError, HeadwaterError, RefusedError, UserError

if TYPE_CHECKING:
    from headwater.runs.executors.base import Executor

app = typer.Typer(
    name="headwater",
    help="Post-train language models when labels are scarce: sparse reward upstream, dense supervision downstream.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(science)
app.add_typer(tools)


@app.command()
def init(name: Annotated[str, typer.Argument(help="Which recipe to start from.")] = "pocket") -> None:
    """Print a commented recipe to start from."""
    from headwater.config.builtin import builtin_text

    print(builtin_text(name), end="")


@app.command()
def run(
    recipe: RecipeName,
    arm: Annotated[str, typer.Option("--arm", help="Which arm; the default is the whole recipe.")] = "bridge_rl",
    out: Out = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Training seed.")] = None,
    set_: Set = None,
    device: Device = None,
    workers: Workers = None,
    reuse: Reuse = None,
    executor: ExecutorName = "local",
    track: Track = None,
    dry_run: DryRun = False,
    on: On = None,
    mean_tokens: MeanTokens = None,
    json_: Json = False,
) -> None:
    """Run one arm to its end: teacher RL -> warm-up -> OPD -> student RL by default."""
    changes = changed(set_, device, workers)
    _go(
        recipe,
        [arm],
        None if seed is None else [seed],
        out,
        changes,
        reuse,
        track,
        sized(dry_run, on, mean_tokens),
        json_,
        executor,
    )


@app.command()
def study(
    recipe: RecipeName,
    arms: Arms = None,
    seeds: Seeds = None,
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    workers: Workers = None,
    reuse: Reuse = None,
    executor: ExecutorName = "local",
    track: Track = None,
    dry_run: DryRun = False,
    on: On = None,
    mean_tokens: MeanTokens = None,
    json_: Json = False,
) -> None:
    """Run many arms × seeds as one plan, shared nodes once, then report."""
    from headwater.config.arms import DEFAULT_STUDY

    chosen = list(DEFAULT_STUDY) if arms is None else arms_in(arms)
    _go(
        recipe,
        chosen,
        seeds_in(seeds),
        out,
        changed(set_, device, workers),
        reuse,
        track,
        sized(dry_run, on, mean_tokens),
        json_,
        executor,
    )


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option("--seed", help="Training seed.")] = 0,
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """The pocket study: the paper's recipe and its controls, in minutes on two cores."""
    from headwater.config.arms import DEFAULT_STUDY

    changes = changed(None, None, workers)
    _go("pocket", list(DEFAULT_STUDY), [seed], out or Path("runs/demo"), changes, None, None, None, json_)


@app.command()
def doctor(
    recipe: RecipeName,
    arms: Annotated[
        str, typer.Option("--arms", "--arm", help="Arms to be run, separated by commas, or `all`.")
    ] = "bridge_rl",
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Everything that can be wrong before time is spent; exit 3 with named findings. `run` and `study` ask it first."""
    from headwater.config.builtin import find_recipe
    from headwater.doctor.checks import diagnose

    found_recipe = find_recipe(recipe, changed(set_, device))
    chosen = arms_in(arms)
    from headwater.runs.setup import set_up

    set_up(found_recipe.compute)
    found = diagnose(found_recipe, chosen, [found_recipe.seed], out or Path("runs") / found_recipe.name)
    print(json.dumps(found.as_json()) if json_ else found.text())
    if found.errors:
        raise RefusedError(f"refused: {found.error_names}")


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories of one recipe.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; the first DIR by default.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Prove from the files where labels went; exit 3 if not.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it on a page of this machine that refreshes; writes nothing.")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of --serve; 0 takes a free one.")] = 8765,
    json_: Json = False,
) -> None:
    """Rebuild the report from run directories, audit them, or show it while they grow."""
    if audit:
        _audit(dirs, json_)
        return
    if serve:
        from headwater.report.serve import serve as served

        served(dirs, port, lambda address: print(f"report: {address} (Ctrl-C ends it)", flush=True))
        return
    from headwater.report import build as reports

    _show(reports.write(out or dirs[0], dirs), out or dirs[0], json_)


@contextlib.contextmanager
def _nodes_by(executor: str) -> Iterator[tuple[Callable[[], Executor], int]]:
    """What makes the executor, and how many processes run a node: this one, or those that a launcher started, of which the others
    do not come back from here."""
    if executor not in ("local", "ray"):
        raise UserError(f"--executor {executor}: there are local and ray")
    if not launched():
        yield partial(_executor, executor), 1
        return
    if executor != "local":
        raise UserError(f"--executor {executor}: torchrun has started the processes already; leave one of the two out")
    from headwater.distributed.process_group import init_process_group
    from headwater.runs.executors.torchrun import TorchrunExecutor, broadcast_exit_code, run_worker_rank

    ranks = init_process_group()
    if not ranks.is_main:
        sys.exit(run_worker_rank(ranks))
    with broadcast_exit_code(ranks):
        yield lambda: TorchrunExecutor(ranks), ranks.size


def _executor(name: str) -> Executor:
    if name == "ray":
        from headwater.runs.executors.ray import RayExecutor

        return RayExecutor()
    from headwater.runs.executors.local import LocalExecutor

    return LocalExecutor()


def _go(
    name: str,
    arms: list[str],
    seeds: list[int] | None,
    out: Path | None,
    changes: list[str],
    reuse: list[Path] | None,
    track: str | None,
    dry_run: Sized | None,
    as_json: bool,
    executor: str = "local",
) -> None:
    """`run` and `study`."""
    from headwater.config.arms import arm_of
    from headwater.config.builtin import find_recipe

    with _nodes_by(executor) as (make, processes):
        recipe = find_recipe(name, changes)
        for arm in arms:
            arm_of(arm, recipe)
        chosen = seeds or [recipe.seed]
        if len(set(chosen)) != len(chosen):
            raise UserError("--seeds: a seed stands there twice")
        if len(set(arms)) != len(arms):
            raise UserError(f"--arms {','.join(arms)}: an arm stands there twice")
        from headwater import pipeline
        from headwater.runs.progress import progress_display
        from headwater.storage.run_dir import RunDir, read_json

        if dry_run is not None:
            from headwater.cli.dry_run import dry_run as shown

            shown(recipe, arms, chosen, dry_run, as_json)
            return
        from headwater.runs.trackers import tracked

        folder, trackers = out or Path("runs") / recipe.name, [] if track is None else listed(track, "--track")
        try:
            with resumable(folder), tracked(progress_display(quiet=as_json), folder, trackers) as tell:
                found = pipeline.run(
                    recipe, arms, chosen, folder, tell, reuse=reuse or [], executor=make(), processes=processes
                )
        except FailedError:
            if len(arms) * len(chosen) > 1:  # the rest of the study has been reported on
                _show(read_json(RunDir(folder).report_json), folder, as_json)
            raise
        _show(found, folder, as_json)


def _audit(dirs: list[Path], as_json: bool) -> None:
    from headwater.report import audit as audits

    failed: list[str] = []
    for folder in dirs:
        found = audits.audit_run(folder)
        print(audits.to_json(found) if as_json else f"{folder}\n{audits.to_text(found)}")
        failed += [f"{folder}: {one.name} ({one.faults[0]})" for one in found if not one.holds]
    if failed:
        raise RefusedError(f"audit: {'; '.join(failed)}")


def _show(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    from headwater.report.format import console
    from headwater.report.terminal import terminal_table

    if as_json:
        print(json.dumps(found))
        return
    console().print(terminal_table(found))
    print(f"report: {folder / 'report.html'}")


def main() -> None:
    """The program: `headwater …` and `python -m headwater …`."""
    try:
        if launched() and not {"run", "study", "demo"} & set(sys.argv[1:2]):
            raise UserError("torchrun: only run, study and demo are run by several processes together")
        app()
    except HeadwaterError as error:
        print(f"headwater: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
