"""The command line. Every expected error prints one line; exit codes: 2 user error, 3 refused, 4 stopped, 130 interrupted."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Annotated, Any

import typer

from headwater.cli import checks, results, run, single_stage
from headwater.cli.options import FitOptions, examples, exit_codes, launched_by_torchrun, say_loading, with_options
from headwater.config.builtin import builtin_names
from headwater.errors import UserError

app = typer.Typer(
    name="headwater",
    help="Post-train language models when labels are scarce: rewards for the teacher, distillation into the student.",
    epilog=examples("headwater demo", "headwater init pocket > my.yaml", "headwater run my.yaml --dry-run"),
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
        "headwater init mine --student S --teacher T --data F --problem text --answer y",
        "headwater init mine --student S --teacher T --data F --hours 2 > my.yaml",
        "headwater init --all > all-fields.yaml",
    )
)
@with_options
def init(
    options: FitOptions,
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
) -> None:
    """Print a commented recipe to start from.

    `headwater init mine --student S --teacher T --data FILE > my.yaml` measures the pair, the data and the device.
    """
    if all_ and name is not None:
        raise UserError(f"init {name} --all: --all prints a recipe of its own; leave one of the two out")
    if name != "mine":
        if options != FitOptions():
            raise UserError(
                "init: the options of models, data and device belong to `headwater init mine`, not to a built-in recipe"
            )
        from headwater.config.builtin import builtin_text
        from headwater.config.full_recipe import full_recipe

        print(full_recipe() if all_ else builtin_text(name or "pocket"), end="")
        return
    if options.student is None or options.teacher is None or options.data is None:
        raise UserError("init mine: needs --student, --teacher and --data")
    from headwater.config.recipe import Columns
    from headwater.runs.progress import progress_display

    display = progress_display()
    say_loading("fitting a recipe", display)
    from headwater.doctor.fit import FitRequest, fitted_recipe

    request = FitRequest(
        options.student,
        options.teacher,
        options.data,
        options.evals,
        options.task,
        options.device,
        Columns(problem=options.problem, answer=options.answer, tag=options.tag),
        options.hours,
    )
    with display.task("reading models and data, measuring the device"):
        recipe = fitted_recipe(request)
    print(recipe, end="")


for commands in (run.commands, single_stage.commands, checks.commands, results.commands):
    app.add_typer(commands)


USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""A command line that cannot be parsed; typer does not export it by name."""


def usage_sentence(error: Any) -> str:
    """What is wrong with a command line, and what would be right.

    Example: `run: missing argument 'RECIPE': A YAML file, or a built-in recipe: …; for example: headwater run pocket --set …`.
    """
    message, context = error.format_message().rstrip("."), error.ctx
    sentence = f"{message[:1].lower()}{message[1:]}"
    if context is None or context.parent is None:
        return f"{sentence.rstrip('?')}{command_meant(message, context)}; `headwater --help` lists the commands"
    verb, option = context.info_name, getattr(error, "option_name", None)
    example = next((line.strip() for line in (context.command.epilog or "").splitlines() if "headwater " in line), "")
    if option is not None:
        others = context.parent.command.commands.items()
        owners = [name for name, command in others if any(option in param.opts for param in command.params)]
        if owners:
            sentence = f"no such option: {option}, which belongs to {', '.join(owners)}"
        return f"{verb}: {sentence}; `headwater {verb} --help` lists the options of {verb}"
    wanted = str(getattr(getattr(error, "param", None), "help", None) or "").rstrip(".") if "issing" in message else ""
    return f"{verb}: {sentence}{f': {wanted}' if wanted else ''}; for example: {example}"


def command_meant(message: str, context: Any) -> str:
    """The command whose option has the name of an unknown command: `; did you mean `headwater report --audit`` for `audit`."""
    named = re.search(r"'([\w-]+)'", message)
    commands = {} if context is None else getattr(context.command, "commands", {})
    owners = [
        name
        for name, command in commands.items()
        if named and any(f"--{named[1]}" in param.opts for param in command.params)
    ]
    return f"; did you mean `headwater {owners[0]} --{named[1]}`" if named and owners else ""


def main() -> None:
    """Run the command line; `headwater.__main__` calls it."""
    with exit_codes():
        if launched_by_torchrun() and not {"run", "study", "demo", "distill", "grpo"} & set(sys.argv[1:2]):
            raise UserError("torchrun: only run, study, demo, distill and grpo run in several processes")
        try:
            code = app(sys.argv[1:] or ["--help"], prog_name="headwater", standalone_mode=False)
        except USAGE_ERROR as error:
            raise UserError(usage_sentence(error)) from None
        sys.exit(code)


if __name__ == "__main__":
    main()
