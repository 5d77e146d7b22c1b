"""The command line. Every expected error prints one line; exit codes: 2 user error, 3 refused, 4 stopped, 130 interrupted."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from headwater.cli import checks, recipes, results, run, single_stage
from headwater.cli.options import exit_codes, launched_by_torchrun
from headwater.errors import UserError

app = typer.Typer(
    name="headwater",
    help="Post-train language models when labels are scarce: sparse reward upstream, dense supervision downstream.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def init(
    name: Annotated[
        str, typer.Argument(help="A built-in recipe, or `mine` for one that is fitted to your models.")
    ] = "pocket",
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

    `headwater init mine --student S --teacher T --data FILE > mine.yaml` measures the pair, the data and the device.
    """
    if name != "mine":
        if any(value is not None for value in (student, teacher, data, evals, task, device)):
            raise UserError(
                f"init {name}: takes no options; those of models, data and device belong to `headwater init mine`"
            )
        from headwater.config.builtin import builtin_text

        print(builtin_text(name), end="")
        return
    if student is None or teacher is None or data is None:
        raise UserError("init mine: needs --student, --teacher and --data")
    from headwater.doctor.fit import FitRequest, fitted_recipe

    print(fitted_recipe(FitRequest(student, teacher, data, evals, task, device or "auto")), end="")


for commands in (run.commands, single_stage.commands, recipes.commands, checks.commands, results.commands):
    app.add_typer(commands)


def main() -> None:
    """Entry point of `headwater …` and `python -m headwater …`."""
    with exit_codes():
        if launched_by_torchrun() and not {"run", "study", "demo", "distill", "grpo"} & set(sys.argv[1:2]):
            raise UserError("torchrun: only run, study, demo, distill and grpo run in several processes")
        app()


if __name__ == "__main__":
    main()
