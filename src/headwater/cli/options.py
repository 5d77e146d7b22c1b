"""Options that several commands share, as dataclasses whose fields are typer options.

typer names an option after its parameter (`max_tokens` is `--max-tokens`); only other names and flags without a `--no-` are spelt out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast, get_type_hints

import typer

from headwater.config.arms import ARMS, DEFAULT_ARM, STUDIES
from headwater.config.builtin import builtin_names
from headwater.errors import HeadwaterError, UserError, printable
from headwater.printing import PrintableStream
from headwater.runs.hardware import DEVICES

if TYPE_CHECKING:
    from headwater.runs.display import ProgressDisplay

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help=f"A YAML file, or a built-in recipe: {', '.join(builtin_names())}.")
]
Out = Annotated[Path | None, typer.Option(help="Run directory; the same one again resumes the run.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a field: path=value, such as stages.opd.steps=5.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Arms = Annotated[
    str | None, typer.Option(help=f"Arms, separated by commas, or a list: all, improved. {', '.join(ARMS)}.")
]
ArmName = Annotated[
    str | None,
    typer.Option(
        help=f"Which arm; by default the one that --out holds or its probe advised, else {DEFAULT_ARM}, or the recipe's own stages. "
        f"Arms: {', '.join(ARMS)}."
    ),
]
Evals = Annotated[
    str | None, typer.Option(help="File of held-out problems with answers; without it no accuracy is measured.")
]
Seed = Annotated[int | None, typer.Option(help="Training seed.")]
Seeds = Annotated[str | None, typer.Option(help="Training seeds, separated by commas.")]
TaskName = Annotated[str, typer.Option(help="A task's name (docs/tasks.md) or package.module:function.")]
ProblemColumn = Annotated[str | None, typer.Option(help='Column of the problem, or several: "{context} {question}".')]
AnswerColumn = Annotated[str | None, typer.Option(help="Column of the answer.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that run independent nodes; by default cores / compute.threads, or 1."),
]


@dataclass(frozen=True)
class RunOptions:
    """Options of `run`, `study` and `sweep`."""

    out: Out = None
    set_: Set = None
    device: Device = None
    workers: Workers = None
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="Another run directory; its finished nodes are reused where they match."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the nodes and an upper bound on their cost; run nothing.")
    ] = False
    json_: Json = False

    @property
    def changes(self) -> list[str]:
        return recipe_changes(self.set_, self.device, self.workers)


@dataclass(frozen=True)
class ExecutionOptions:
    """Further options of `run` and `study`: who runs the nodes, trackers, and the assumptions of a dry run."""

    executor: Annotated[str, typer.Option(help="Executor: local, or ray for a Ray cluster (RAY_ADDRESS).")] = "local"
    track: Annotated[
        str | None, typer.Option(help="Trackers to log to: tensorboard, wandb, trackio; commas between.")
    ] = None
    on: Annotated[
        str | None, typer.Option(help="With --dry-run: the device to estimate hours for, such as rtx4090 or 16xh200.")
    ] = None
    mean_tokens: Annotated[
        float | None, typer.Option(min=1.0, help="With --dry-run: mean completion length, where you know it.")
    ] = None


@dataclass(frozen=True)
class FitOptions:
    """Options of `init mine`: what the recipe is fitted to."""

    student: Annotated[str | None, typer.Option(help="mine: folder or hub id of the student.")] = None
    teacher: Annotated[str | None, typer.Option(help="mine: folder or hub id of the teacher.")] = None
    data: Annotated[str | None, typer.Option(help="mine: file of problems with answers.")] = None
    evals: Annotated[
        str | None, typer.Option(help="mine: file to evaluate on; without it, a part of --data is held out.")
    ] = None
    task: Annotated[str | None, typer.Option(help="mine: the grader, if the answers do not show it.")] = None
    problem: ProblemColumn = None
    answer: AnswerColumn = None
    tag: Annotated[
        str | None, typer.Option(help="Column that selects a problem's teacher, where there are several.")
    ] = None
    device: Annotated[str, typer.Option(help="mine: auto, cpu, cuda, or a device elsewhere, such as h100.")] = "auto"
    hours: Annotated[
        float | None, typer.Option(min=0.01, help="mine: limit on the default arm's estimated time on that device.")
    ] = None


@dataclass(frozen=True)
class EvalOptions:
    """Options of `eval`: how the model is prompted and sampled, and how completions are graded."""

    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 1
    task: TaskName = "maths"
    problem: ProblemColumn = None
    answer: AnswerColumn = None
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N problems.")] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 512
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 1.0
    top_p: Annotated[float, typer.Option(min=0.001, max=1.0)] = 1.0
    top_k: Annotated[int, typer.Option(min=0)] = 0
    template: Annotated[str, typer.Option(help="The user turn; must contain {problem}.")] = "{problem}"
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Passed to chat templates that have a thinking mode.")
    ] = False
    chat: Annotated[
        bool,
        typer.Option("--chat/--no-chat", help="Apply the model's chat template, or pass the texts unchanged."),
    ] = True
    seed: int = 0
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32"
    device: Device = None
    form: Annotated[
        str | None,
        typer.Option(
            help="Form of the answer that counts in strict reading: boxed or hashes (####); by default the one that the prompt names."
        ),
    ] = None
    sampler: Annotated[str, typer.Option(help="torch or vllm.")] = "torch"
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 256
    out: Annotated[Path | None, typer.Option(help="Write every graded completion here as JSONL.")] = None
    save: Annotated[Path | None, typer.Option(help="Write the results here as JSON, for --compare.")] = None
    json_: Json = False


def examples(*commands: str) -> str:
    """Example command lines for a command's --help, one a line."""
    return "\n\n".join(["Examples:", *(f"  {command}" for command in commands)])


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of a command that is annotated with a dataclass by one option for each of its fields.

    Example: `def run(recipe: RecipeName, options: RunOptions)` becomes a command with the options `--out`, `--set`, …
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        types = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
            )
            for field in fields(group)
        ]

    @functools.wraps(command)
    def run_command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def say_loading(what: str, display: ProgressDisplay) -> None:
    """Show what a command does before it imports torch and transformers, which takes seconds."""
    if "torch" not in sys.modules:
        display.say(f"{what}: loading torch and transformers …")


def recipe_changes(set_: list[str] | None, device: str | None, workers: int | None = None) -> list[str]:
    """Options that change a field of the recipe, as `path=value`."""
    named = {"compute.device": device, "compute.workers": workers}
    return [*(set_ or []), *(f"{path}={value}" for path, value in named.items() if value is not None)]


@dataclass(frozen=True)
class DryRunOptions:
    """Assumptions of a dry run: the device (None for no hours), how many of them, and the mean completion length."""

    device: str | None
    count: int
    mean_tokens: float | None


def dry_run_options(dry_run: bool, on: str | None, mean_tokens: float | None) -> DryRunOptions | None:
    """None without --dry-run. Raises UserError for --on or --mean-tokens without it, and for an unknown device."""
    if not dry_run:
        if on is not None or mean_tokens is not None:
            raise UserError(f"{'--on' if on is not None else '--mean-tokens'}: needs --dry-run")
        return None
    if on is None:
        return DryRunOptions(None, 1, mean_tokens)
    count, times, name = on.lower().partition("x") if on[:1].isdigit() else ("1", "", on.lower())
    if name not in DEVICES or not count.isdigit() or not 1 <= int(count) <= 100_000 or (on[:1].isdigit() and not times):
        raise UserError(f"--on {on}: unknown device; there are {', '.join(DEVICES)}, and 8xh100 means eight of one")
    return DryRunOptions(name, int(count), mean_tokens)


def parse_list(text: str, option: str) -> list[str]:
    """Comma-separated values of an option. Raises UserError where there are none."""
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise UserError(f"{option}: names nothing")
    return values


def parse_arms(text: str) -> list[str]:
    """The arms that `--arms` names; `all` and `improved` name lists of arms."""
    return list(STUDIES[text]) if text in STUDIES else parse_list(text, "--arms")


def parse_seeds(text: str | None) -> list[int] | None:
    """The seeds that `--seeds` names; None without the option. Raises UserError."""
    try:
        return None if text is None else [int(value) for value in parse_list(text, "--seeds")]
    except ValueError:
        raise UserError(f"--seeds {text}: must be whole numbers separated by commas") from None


def launched_by_torchrun() -> bool:
    """Whether torchrun or a similar launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn expected errors into one line on stderr and an exit code; Ctrl-C exits with 130."""
    try:
        with contextlib.redirect_stdout(cast(TextIO, PrintableStream(sys.stdout))):
            yield
    except HeadwaterError as error:
        print(f"headwater: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """On SIGINT or SIGTERM print how to resume and exit with 130."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = None
    with contextlib.suppress(ValueError):  # signal handlers can be set on the main thread only
        previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"headwater: interrupted; the same command with --out {printable(str(folder))} resumes", file=sys.stderr)
        sys.exit(130)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
