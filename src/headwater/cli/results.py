"""Commands on results and models: report, watch, eval, merge and push."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import EvalOptions, Json, examples, say_loading, with_options
from headwater.errors import RefusedError, UserError

commands = typer.Typer()


@commands.command(epilog=examples("headwater report runs/my", "headwater report runs/seed0 runs/seed1 --out runs/both"))
def report(
    dirs: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories: of one recipe, or to compare.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; the first DIR by default.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Recount label use from the run's files; exit 3 if a check fails.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve a local page that refreshes while runs grow; writes nothing.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 8765,
    json_: Json = False,
) -> None:
    """Rebuild the report from run directories, audit them, or serve it while they grow. Different recipes: side by side."""
    from headwater.report import build, side_by_side
    from headwater.report.serve import serve as serve_report

    folder = out or dirs[0]
    if audit:
        _audit(dirs, json_)
    elif serve:
        serve_report(dirs, port, lambda address: print(f"report: {address} (Ctrl-C ends it)", flush=True))
    elif side_by_side.of_one_recipe(dirs):
        print_report(build.write(folder, dirs), folder, json_)
    else:
        print_comparison(side_by_side.write(folder, dirs), folder, json_)


def _audit(dirs: list[Path], as_json: bool) -> None:
    from headwater.report import audit

    failed: list[str] = []
    for folder in dirs:
        checks = audit.audit_run(folder)
        print(audit.to_json(checks) if as_json else f"{folder}\n{audit.to_text(checks)}")
        failed += [f"{folder}: {check.name} ({check.faults[0]})" for check in checks if not check.holds]
    if failed:
        raise RefusedError(f"audit: {'; '.join(failed)}")


def print_report(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print report.json, or the terminal table and where the page is."""
    from headwater.report.format import console
    from headwater.report.result import Result
    from headwater.report.terminal import terminal_table

    if as_json:
        print(json.dumps(report))
        return
    screen = console()
    screen.print(terminal_table(report, screen.width))
    students = [path for arm in Result(folder, report).arms.values() for path in arm.student_folders.values()]
    if len(students) == 1:
        is_adapter = (students[0] / "adapter_config.json").exists()
        note = " (an adapter; `headwater merge` with this folder writes a whole model)" if is_adapter else ""
        print(f"student: {students[0]}{note}")
    print(f"report: {folder / 'report.html'}")


def print_comparison(values: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print compare.json, or its tables and where the page is."""
    from headwater.report.format import console
    from headwater.report.side_by_side import tables
    from headwater.report.terminal import rich_table

    if as_json:
        print(json.dumps(values))
        return
    for table in tables(values):
        console().print(rich_table(table))
    print(f"comparison: {folder / 'compare.html'}")


@commands.command(epilog=examples("headwater watch runs/my", "headwater watch runs/my --once"))
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, running or not.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two refreshes.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and exit; the default if the output is not a terminal.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show the progress of a run: stage, pool, arms, step, rate, time left, key metrics, warnings by name."""
    from rich.live import Live

    from headwater.report.format import console
    from headwater.report.watch import read_status, status_table

    status = read_status(folder)
    screen = console()
    if json_:
        print(json.dumps(status.to_json()))
    elif once or not screen.is_terminal:
        screen.print(status_table(status, width=screen.width))
    else:
        with Live(status_table(status, screen.height, screen.width), console=screen, auto_refresh=False) as live:
            while status.running:
                time.sleep(every)
                status = read_status(folder)
                live.update(status_table(status, screen.height, screen.width), refresh=True)


@commands.command(
    "eval",
    epilog=examples(
        "headwater eval ./model --data test.jsonl --samples 4",
        "headwater eval ./a ./b --data test.jsonl --temperature 0 --save both.json",
        "headwater eval --compare before.json after.json",
    ),
)
@with_options
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Model folders, hub ids or pocket:NAME.")],
    options: EvalOptions,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data file (JSONL, CSV, Parquet, …), `datasets` folder or hub id; repeat for several."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare two result files of --save or --json instead, problem by problem."),
    ] = False,
) -> None:
    """Evaluate models: avg@k, pass@k and maj@k with 95 % intervals; or compare two evaluations, paired by problem."""
    from headwater.runs.progress import progress_display

    display = progress_display(quiet=options.json_)
    if not compare and data:
        say_loading(f"evaluating {', '.join(models)}", display)
    from headwater import evaluation, evaluation_files

    if compare:
        if len(models) != 2:
            raise UserError(f"eval --compare: needs two result files, not {len(models)}")
        comparisons = evaluation_files.compare(*map(Path, models))
        print(
            json.dumps([asdict(row) for row in comparisons])
            if options.json_
            else evaluation_files.comparison_text(comparisons)
        )
        return
    if not data:
        raise UserError("eval: --data is missing: name the file of problems with answers")
    names = [field.name for field in fields(evaluation.EvaluationSettings)]
    settings = evaluation.EvaluationSettings(**{name: getattr(options, name) for name in names})
    evaluations = evaluation.evaluate_models(models, data, settings, display)
    if options.save is not None:
        evaluation_files.write(options.save, evaluations)
    print(json.dumps(evaluation_files.to_json(evaluations)) if options.json_ else evaluation_files.text(evaluations))


@commands.command(epilog=examples("headwater merge runs/my/nodes/opd.s0.1a2b3c4d/model ./merged"))
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder, such as a node's model/.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the merged model; must not exist.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: dtype of the merged weights.")] = "bfloat16",
) -> None:
    """Merge an adapter into its base model: a plain model folder that loads anywhere."""
    from headwater.models.save import merge_adapter

    merge_adapter(adapter, out, dtype)
    print(out)


@commands.command(epilog=examples("headwater push runs/my --to me/my-model --private"))
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory, or the model/ folder of one of its nodes.")
    ],
    to: Annotated[str, typer.Option(metavar="ID", help="Repository on the hub: owner/name.")],
    arm: Annotated[str | None, typer.Option(help="Which arm's student, if the run has several arms.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a finished model to the hub with a card: recipe, labels used, results with intervals."""
    from huggingface_hub import HfApi

    from headwater.cli import push as hub
    from headwater.storage.hub import HUB_ID

    if not HUB_ID.match(to):
        raise UserError(f"push --to {to}: must be owner/name")
    print(hub.push(hub.find(folder, arm), to, private, HfApi()))
