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
def init(name: Annotated[str, typer.Argument(help="Which recipe to start from.")] = "pocket") -> None:
    """Print a commented recipe to start from."""
    from headwater.config.builtin import builtin_text

    print(builtin_text(name), end="")


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
