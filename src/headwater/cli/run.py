"""Commands that train: run, study, demo and sweep."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwater.cli.options import (
    ArmName,
    Arms,
    ExecutionOptions,
    Json,
    Out,
    RecipeName,
    RunOptions,
    Seed,
    Seeds,
    Workers,
    dry_run_options,
    examples,
    launched_by_torchrun,
    parse_arms,
    parse_list,
    parse_seeds,
    resumable,
    say_loading,
    with_options,
)
from headwater.config.arms import DEFAULT_STUDY
from headwater.errors import FailedError, UserError, printable

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe
    from headwater.runs.display import ProgressDisplay
    from headwater.runs.executors.base import Executor, Failure, Job

commands = typer.Typer()


@commands.command(
    epilog=examples(
        "headwater run pocket --set stages.opd.steps=20", "headwater run my.yaml --arm bridge_rl --dry-run --on h100"
    )
)
@with_options
def run(
    recipe: RecipeName,
    options: RunOptions,
    execution: ExecutionOptions,
    arm: ArmName = None,
    seed: Seed = None,
) -> None:
    """Run one arm, by default bridge: GRPO on the teacher with all labels, then warm-up and OPD of the student."""
    run_study(recipe, None if arm is None else [arm], None if seed is None else [seed], options, execution)


@commands.command(
    epilog=examples(
        "headwater study pocket --arms direct_grpo,bridge", "headwater study my.yaml --arms all --seeds 0,1,2 --dry-run"
    )
)
@with_options
def study(
    recipe: RecipeName, options: RunOptions, execution: ExecutionOptions, arms: Arms = None, seeds: Seeds = None
) -> None:
    """Run several arms and seeds, their common stages once, then write the report.

    Without --arms: direct_grpo, raw_teacher, bridge, bridge_1h, bridge_rl and replay.
    """
    run_study(recipe, DEFAULT_STUDY if arms is None else parse_arms(arms), parse_seeds(seeds), options, execution)


@commands.command(epilog=examples("headwater demo --out runs/demo"))
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Training seed.")] = 0,
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """Run the pocket study: the paper's recipe and its controls, in minutes on two cores."""
    options = RunOptions(out=out or Path("runs/demo"), workers=workers, json_=json_)
    run_study("pocket", DEFAULT_STUDY, [seed], options, ExecutionOptions())


@commands.command(
    epilog=examples(
        "headwater sweep pocket --vary labels --values 64,128,256",
        "headwater sweep my.yaml --vary stages.opd.optim.lr --values 1e-5,3e-5",
    )
)
@with_options
def sweep(
    recipe: RecipeName,
    vary: Annotated[
        str, typer.Option(metavar="WHAT", help="labels, teacher, lambda, or a field: stages.opd.optim.lr.")
    ],
    options: RunOptions,
    values: Annotated[
        str | None, typer.Option(help="Values, separated by commas; labels, teacher and lambda have defaults.")
    ] = None,
    arms: Arms = None,
    seeds: Seeds = None,
) -> None:
    """Run a study at every value of one field, common stages once; then one plot, one table, one page."""
    from headwater.runs.progress import progress_display
    from headwater.runs.sweep import lay_out

    plan = lay_out(
        recipe,
        vary,
        None if values is None else parse_list(values, "--values"),
        None if arms is None else parse_arms(arms),
        parse_seeds(seeds),
        options.changes,
    )
    display = progress_display(quiet=options.json_)
    say_loading(f"laying out a sweep of {recipe} by {vary}", display)
    from headwater import sweeps
    from headwater.report.format import console
    from headwater.report.sweep_page import dry_run_table, terminal_table

    if options.dry_run:
        rows = sweeps.dry_run(plan, display.say)
        if options.json_:
            print(json.dumps(rows))
        else:
            console().print(dry_run_table(plan.vary, rows))
        return
    folder = options.out or Path("runs") / f"{plan.title}-by-{plan.vary}"
    with resumable(folder):
        summary, failed = sweeps.run(plan, folder, display, options.reuse or [])
    if options.json_:
        print(json.dumps(summary))
    else:
        console().print(terminal_table(summary))
        print(f"plot and page: {folder / 'sweep.png'}, {folder / 'sweep.html'}")
    if failed:
        first = next(iter(failed.values()))
        names = ", ".join(f"{plan.vary} {name}" for name in failed)
        raise FailedError(f"sweep: {len(failed)} of {len(summary['points'])} points failed: {names}", first.exit_code)


def run_study(
    name: str, arms: Sequence[str] | None, seeds: Sequence[int] | None, options: RunOptions, execution: ExecutionOptions
) -> None:
    """Run arms × seeds of a recipe by name or file, or print what that would cost; then print the report.

    arms  None for the one arm that `choose_arm` names
    """
    from headwater.config.builtin import find_recipe

    execute(partial(find_recipe, name, options.changes), arms, seeds, options, execution)


def execute(
    read: Callable[[], Recipe],
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    options: RunOptions,
    execution: ExecutionOptions,
) -> None:
    """Run arms × seeds of the recipe that `read` returns."""
    from headwater.config.arms import arm_of
    from headwater.runs.default_arm import choose_arm
    from headwater.runs.progress import progress_display

    display = progress_display(quiet=options.json_)
    assumptions = dry_run_options(options.dry_run, execution.on, execution.mean_tokens)
    with _executor(execution.executor, display) as (executor, processes):
        recipe = read()
        folder = options.out or Path("runs") / recipe.name
        if arms is None:
            choice = choose_arm(recipe, folder)
            arms = [choice.arm]
            print(printable(choice.sentence), file=sys.stderr)
        for arm in arms:
            arm_of(arm, recipe)
        seeds = seeds or [recipe.seed]
        if len(set(seeds)) != len(seeds):
            raise UserError("--seeds: a seed is named twice")
        if len(set(arms)) != len(arms):
            raise UserError(f"--arms {','.join(arms)}: an arm is named twice")
        say_loading(f"checking recipe {recipe.name}", display)
        from headwater import pipeline
        from headwater.cli.results import print_report
        from headwater.storage.files import read_json
        from headwater.storage.run_dir import RunDir

        if assumptions is not None:
            from headwater.cli.dry_run import print_dry_run

            print_dry_run(recipe, arms, seeds, assumptions, options.json_)
            return
        from headwater.runs.trackers import tracked

        trackers = [] if execution.track is None else parse_list(execution.track, "--track")
        try:
            with resumable(folder), tracked(display, folder, trackers) as tracking_display:
                report = pipeline.run(
                    recipe,
                    arms,
                    seeds,
                    folder,
                    tracking_display,
                    reuse=options.reuse or [],
                    executor=executor,
                    processes=processes,
                )
        except FailedError:
            if len(arms) * len(seeds) > 1:  # the other arms and seeds have a report
                print_report(read_json(RunDir(folder).report_json), folder, options.json_)
            print(
                f"report: {printable(str(RunDir(folder).report_html))}; run the command again to resume from the last checkpoint, "
                "also with changed guards",
                file=sys.stderr,
            )
            raise
        print_report(report, folder, options.json_)


@contextlib.contextmanager
def _executor(name: str, display: ProgressDisplay) -> Iterator[tuple[Executor | None, int]]:
    """Yield the executor (None: that of `pipeline.run`), and the number of processes that run each node together.

    Under torchrun, ranks > 0 work here until rank 0 is done, and exit.
    """
    if name not in ("local", "ray"):
        raise UserError(f"--executor {name}: unknown executor; choose local or ray")
    if not launched_by_torchrun():
        yield (_run_on_ray if name == "ray" else None), 1
        return
    if name != "local":
        raise UserError(f"--executor {name}: torchrun has already started the processes; use one of the two")
    if os.environ["RANK"] == "0":
        say_loading("joining the processes of torchrun", display)
    from headwater.distributed.process_group import init_process_group
    from headwater.runs.executors.torchrun import broadcast_exit_code, run_on_ranks, run_worker_rank

    ranks = init_process_group()
    if not ranks.is_main:
        sys.exit(run_worker_rank(ranks))
    with broadcast_exit_code(ranks):
        yield partial(run_on_ranks, ranks=ranks), ranks.size


def _run_on_ray(job: Job) -> dict[str, Failure]:
    from headwater.runs.executors.ray import run_on_ray

    return run_on_ray(job)
