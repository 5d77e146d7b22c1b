"""Commands before training: explain, doctor, probe, grade and validate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.options import (
    AnswerColumn,
    Device,
    Json,
    Out,
    ProblemColumn,
    RecipeName,
    Set,
    TaskName,
    examples,
    parse_arms,
    recipe_changes,
    say_loading,
)
from headwater.config.builtin import builtin_names
from headwater.errors import CONTROL_CHARACTERS, RefusedError, UserError, printable

commands = typer.Typer()


@commands.command(
    epilog=examples(
        "headwater explain stages.opd.optim.lr",
        "headwater explain stages.opd",
        "headwater explain --schema > recipe.schema.json",
    )
)
def explain(
    field: Annotated[
        str, typer.Argument(metavar="FIELD", help="A field or section of the recipe; all sections without it.")
    ] = "",
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema of recipes, for editors.")] = False,
) -> None:
    """Explain a field of the recipe: type, default, unit and meaning; of a section every field."""
    from headwater.config import reference
    from headwater.report.format import console

    if schema:
        print(json.dumps(reference.json_schema(), indent=2, ensure_ascii=False))
    else:
        print(reference.explain(field, min(100, console().width)))


@commands.command(epilog=examples("headwater doctor my.yaml", "headwater doctor my.yaml --arms all --json"))
def doctor(
    recipe: RecipeName,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms", "--arm", help="Arms that will run, separated by commas, or `all`; by default that of `run`."
        ),
    ] = None,
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List the checks that were done.")] = False,
    json_: Json = False,
) -> None:
    """Check everything that could fail or spoil a run; exit 3 with named findings. `run` and `study` do this first."""
    from headwater.config.builtin import find_recipe
    from headwater.runs.default_arm import choose_arm
    from headwater.runs.progress import progress_display

    resolved = find_recipe(recipe, recipe_changes(set_, device))
    folder = out or Path("runs") / resolved.name
    names = [choose_arm(resolved, folder).arm] if arms is None else parse_arms(arms)
    display = progress_display(quiet=json_, log_parts=True)
    say_loading(f"checking {recipe}", display)
    from headwater.doctor.checks import diagnose
    from headwater.runs.setup import set_up

    set_up(resolved.compute)
    with display.task("checking") as tell:
        diagnosis = diagnose(resolved, names, [resolved.seed], folder, tell)
    print(json.dumps(diagnosis.as_json()) if json_ else diagnosis.text(verbose))
    if diagnosis.errors:
        raise RefusedError(f"refused: {diagnosis.error_names}")


@commands.command(
    epilog=examples("headwater probe my.yaml", "headwater probe my.yaml --problems 64 --samples 16 --out runs/my")
)
def probe(
    recipe: RecipeName,
    problems: Annotated[int | None, typer.Option(min=2, help="Labelled problems to sample; 128 by default.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Completions per problem; 8 or the group size by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the later run: stores the result and the label checks.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampled problems and of every draw.")] = None,
    set_: Set = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Measure how ready student and teacher are, and recommend where to spend the labels, with reasons."""
    from headwater.cli.probe_table import probe_tables
    from headwater.config.builtin import find_recipe
    from headwater.report.format import console
    from headwater.runs.progress import progress_display

    resolved = find_recipe(recipe, recipe_changes(set_, device))
    display = progress_display(quiet=json_)
    say_loading(f"probing the models of {recipe}", display)
    from headwater.doctor import probe as probes

    seed = resolved.seed if seed is None else seed
    result = probes.probe(resolved, problems, samples, seed, out, display)
    if json_:
        print(json.dumps(dict(result)))
    else:
        console().print(probe_tables(result.report))


@commands.command(epilog=examples("headwater grade --data completions.jsonl --task maths"))
def grade(
    data: Annotated[Path, typer.Option(help='File of {"id","gold","completion"} rows.')],
    task: TaskName = "maths",
    seconds: Annotated[float, typer.Option(min=0.01, help="Wall-clock limit per completion.")] = 2.0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Grade completions: one JSON line out for each row in, in order."""
    from headwater.data.validate import grade_file

    for row in grade_file(data, task=task, seconds=seconds, workers=workers):
        print(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(row, ensure_ascii=False)))


@commands.command(
    epilog=examples(
        "headwater validate train.jsonl --task maths", "headwater validate train.jsonl --problem prompt --answer target"
    )
)
def validate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, CSV, Parquet, a `datasets` folder or a hub id.")],
    task: TaskName = "maths",
    problem: ProblemColumn = None,
    answer: AnswerColumn = None,
    json_: Json = False,
) -> None:
    """Grade every label (checked answer) with its own grader and list those that fail. Exit 3 if any does or there is none."""
    if data.endswith((".yaml", ".yml")) or data in builtin_names():
        raise UserError(
            f"validate {data}: reads a file of problems; `headwater doctor {data}` checks a recipe and its data"
        )
    from headwater.config.recipe import Columns, Source
    from headwater.data.validate import validate as validate_source
    from headwater.runs.progress import progress_display
    from headwater.tasks import sandbox

    progress_display(quiet=json_).say(f"grading the labels of {data} …")
    columns = Columns(problem=problem, answer=answer)
    result = validate_source(Source(path=data, columns=columns), task)
    for warning in result.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if task == "python":
        print(f"completions run under {', '.join(sandbox.layers())}", file=sys.stderr)
    if json_:
        print(json.dumps(asdict(result)))
    else:
        for problem_id, gold, reason in result.failed:
            print(f"{problem_id}: gold {gold!r:.80} grades {reason}")
        print(
            f"{data}: {result.total} labels, {len(result.failed)} fail; {result.duplicates} repeated rows, "
            f"{len(result.contradictions)} problems with contradicting answers, {len(result.without_answer)} without an answer"
        )
    if not result.total:
        raise RefusedError(f"{data}: has no label; name the column that holds the answers with --answer, or add them")
    sys.exit(0 if result.ok else 3)
