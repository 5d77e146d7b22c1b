"""The command line. Every expected error prints one line; exit codes: 2 user error, 3 refused, 4 stopped, 130 interrupted."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from headwater.cli import checks, recipes, results, run, single_stage
from headwater.cli.options import examples, exit_codes, launched_by_torchrun
from headwater.config.builtin import builtin_names
from headwater.errors import UserError

app = typer.Typer(
    name="headwater",
    help="Post-train language models when labels are scarce: rewards for the teacher, distillation into the student.",
    epilog=examples("headwater demo", "headwater init pocket > my.yaml", "headwater run my.yaml --dry-run"),
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def print_version(value: bool) -> None:
    if value:
        print(f"headwater {importlib.metadata.version('headwater')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "headwater init gsm8k > my.yaml",
        "headwater init mine --student S --teacher T --data train.jsonl > my.yaml",
        "headwater init --all > all-fields.yaml",
    )
)
def init(
    name: Annotated[
        str | None,
        typer.Argument(
            help=f"A built-in recipe ({', '.join(builtin_names())}), or `mine` for one that is fitted to your models.",
            show_default="pocket",
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Print every field at its default, with its description.")
    ] = False,
    student: Annotated[str | None, typer.Option("--student", help="mine: folder or hub id of the student.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="mine: folder or hub id of the teacher.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="mine: file of problems with answers.")] = None,
    evals: Annotated[
        str | None, typer.Option("--evals", help="mine: file to evaluate on; without it, a part of --data is held out.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="mine: the grader, if the answers do not show it.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="mine: auto, cpu, cuda, or a device that is elsewhere, such as h100.")
    ] = None,
) -> None:
    """Print a commented recipe to start from.

    `headwater init mine --student S --teacher T --data FILE > my.yaml` measures the pair, the data and the device.
    """
    if all_ and name is not None:
        raise UserError(f"init {name} --all: --all prints a recipe of its own; leave one of the two out")
    if name != "mine":
        if any(value is not None for value in (student, teacher, data, evals, task, device)):
            raise UserError(
                "init: the options of models, data and device belong to `headwater init mine`, not to a built-in recipe"
            )
        from headwater.config.builtin import builtin_text
        from headwater.config.full_recipe import full_recipe

        print(full_recipe() if all_ else builtin_text(name or "pocket"), end="")
        return
    if student is None or teacher is None or data is None:
        raise UserError("init mine: needs --student, --teacher and --data")
    from headwater.doctor.fit import FitRequest, fitted_recipe

    print(fitted_recipe(FitRequest(student, teacher, data, evals, task, device or "auto")), end="")


for commands in (run.commands, single_stage.commands, recipes.commands, checks.commands, results.commands):
    app.add_typer(commands)


def main() -> None:
    """Run the command line; `headwater.__main__` calls it."""
    with exit_codes():
        if launched_by_torchrun() and not {"run", "study", "demo", "distill", "grpo"} & set(sys.argv[1:2]):
            raise UserError("torchrun: only run, study, demo, distill and grpo run in several processes")
        app()


if __name__ == "__main__":
    main()
