"""The verbs around a run: evaluate a model, grade and validate data, make the pocket models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwater.cli.options import Device, Json, listed
from headwater.errors import UserError

if TYPE_CHECKING:
    from headwater.runs.node_context import NodeProgress

tools = typer.Typer()


@tools.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, hub id or pocket:NAME.")],
    data: Annotated[str, typer.Option("--data", help="JSONL, Parquet, a `datasets` folder or a hub id.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Completions a problem.")] = 1,
    task: Annotated[
        str, typer.Option("--task", help="A task's name (docs/tasks.md) or package.module:function.")
    ] = "maths",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first so many problems.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest completion.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.001)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.001, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0)] = 0,
    template: Annotated[str, typer.Option("--template", help="The user's turn; must contain {problem}.")] = "{problem}",
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="For chat templates that know it.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every graded text here as JSONL.")] = None,
    json_: Json = False,
) -> None:
    """avg@k, pass@k and maj@k with 95 % intervals."""
    from headwater.cli.evaluate import evaluate_model, settings_of
    from headwater.runs.progress import progress_display

    settings = settings_of(
        {
            "samples": samples,
            "sampling": {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k},
        },
        {"template": template, "thinking": thinking},
        {"student": model, "teacher": model, "dtype": dtype},
    )
    found = evaluate_model(settings, data, task, limit, seed, device or "auto", out, progress_display(quiet=json_))
    print(json.dumps(found) if json_ else found.pop("text"))


@tools.command()
def grade(
    data: Annotated[Path, typer.Option("--data", help='JSONL of {"id","gold","completion"} rows.')],
    task: Annotated[
        str, typer.Option("--task", help="A task's name (docs/tasks.md) or package.module:function.")
    ] = "maths",
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Wall-clock limit of one answer.")] = 2.0,
    workers: Annotated[int, typer.Option("--workers", min=1)] = 2,
) -> None:
    """Grade completions: one JSON line out for each row in, in order."""
    from headwater.data.validate import grade_file

    for row in grade_file(data, task=task, seconds=seconds, workers=workers):
        print(json.dumps(row, ensure_ascii=False))


@tools.command()
def validate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, Parquet, a `datasets` folder or a hub id.")],
    task: Annotated[
        str, typer.Option("--task", help="A task's name (docs/tasks.md) or package.module:function.")
    ] = "maths",
    problem_column: Annotated[str | None, typer.Option("--problem", help="Column of the problem.")] = None,
    answer_column: Annotated[str | None, typer.Option("--answer", help="Column of the answer.")] = None,
    json_: Json = False,
) -> None:
    """Hold every gold answer against its own grader; list those that fail. Exit 3 if any does."""
    from headwater.config.recipe import Columns, Source
    from headwater.data.validate import validate as validated

    columns = Columns(problem=problem_column, answer=answer_column)
    found = validated(Source(path=data, columns=columns), task)
    if json_:
        print(json.dumps(asdict(found)))
    else:
        for name, gold, reason in found.failed:
            print(f"{name}: gold {gold!r:.80} grades {reason}")
        print(
            f"{data}: {found.total} gold answers, {len(found.failed)} fail; {found.duplicates} repeated rows, "
            f"{len(found.contradictions)} problems with contradicting answers, {len(found.without_answer)} without an answer"
        )
    sys.exit(0 if found.ok else 3)


@tools.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, being worked on or not.")],
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once; so it does where the output is no terminal.")
    ] = False,
    json_: Json = False,
) -> None:
    """How far a run is: stage, step, rate, time left, the numbers that matter, warnings by name."""
    import time

    from rich.live import Live

    from headwater.report.format import console
    from headwater.report.watch import read_status, status_table

    found = read_status(folder)
    screen = console()
    if json_:
        print(json.dumps(found.to_json()))
    elif once or not screen.is_terminal:
        screen.print(status_table(found))
    else:
        with Live(status_table(found, screen.height), console=screen, auto_refresh=False) as live:
            while found.running:
                time.sleep(every)
                found = read_status(folder)
                live.update(status_table(found, screen.height), refresh=True)


@tools.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder, such as a node's model/.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the plain model folder goes; must not exist.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32 or bfloat16: of the sum and of the file.")
    ] = "bfloat16",
) -> None:
    """Add an adapter to its base model: a plain model folder that loads anywhere."""
    from headwater.models.save import merge_adapter

    merge_adapter(adapter, out, dtype)
    print(out)


@tools.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory, or the model/ folder of one of its nodes.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="ID", help="Where it goes on the hub: owner/name.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Whose student, where the run has several arms.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a finished model to the hub with a card: recipe, labels spent, results with intervals."""
    from huggingface_hub import HfApi

    from headwater.cli import push as pushes
    from headwater.models.folder import HUB_ID

    if not HUB_ID.match(to):
        raise UserError(f"push --to {to}: must be owner/name")
    print(pushes.push(pushes.find(folder, arm), to, private, HfApi()))


@tools.command()
def pretrain(
    what: Annotated[
        str, typer.Argument(help="`pocket`, the models that ship with the package, or `desk`, larger ones for a GPU.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the models; ./pocket or ./desk by default.")
    ] = None,
    models: Annotated[str | None, typer.Option("--models", help="Some of them, separated by commas.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="desk: train so many steps, not the usual.")
    ] = None,
    device: Device = None,
) -> None:
    """Make the pocket or the desk models from scratch."""
    if what == "desk":
        _pretrain_desk(out or Path("desk"), models, steps, device or "auto")
    elif what != "pocket":
        raise UserError(f"pretrain {what}: only `pocket` and `desk` are known")
    elif steps is not None or device is not None:
        raise UserError("pretrain pocket: --steps and --device belong to `pretrain desk`")
    else:
        _pretrain_pocket(out or Path("pocket"), models)


def _chosen(models: str | None, known: Collection[str], what: str) -> list[str]:
    names = list(known) if models is None else listed(models, "--models")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--models {unknown[0]}: no such {what} model; there are {', '.join(known)}")
    return names


def _pretrain_pocket(out: Path, models: str | None) -> None:
    import torch

    from headwater.runs.progress import progress_display
    from tools.pretrain.pocket import POCKET, pretrain_pocket

    names = _chosen(models, POCKET, "pocket")
    torch.set_num_threads(1)  # the shipped models were made with one; sums over several threads round differently
    told = progress_display()
    for number, name in enumerate(names, 1):
        with told.node(name, number, len(names)) as watch:
            watch.start(0, POCKET[name].steps, "steps")
            made = pretrain_pocket(out, [name], progress=lambda step, steps, loss: watch.advance(1, {"loss": loss}))
        print(
            f"{out / name}: pass rate {made[name].pass_rate:.1%}, {made[name].worked_share:.0%} of samples show their work"
        )


def _pretrain_desk(out: Path, models: str | None, steps: int | None, device_name: str) -> None:
    import os

    from headwater.runs.inputs import device_of
    from headwater.runs.progress import progress_display
    from tools.pretrain.desk import pretrain_desk
    from tools.pretrain.desk_models import DESK, shortened

    names, device = _chosen(models, DESK, "desk"), device_of(device_name)
    workers = min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0
    told = progress_display()
    for number, name in enumerate(names, 1):
        spec = DESK[name] if steps is None else shortened(DESK[name], steps)
        with told.node(name, number, len(names)) as watch:
            watch.start(0, spec.steps, "steps")
            made = pretrain_desk(name, out, spec, device, progress=_shown_by(watch), workers=workers)
        rates = ", ".join(f"{found.pass_rate:.1%} of {where}" for where, found in made.items())
        print(f"{out / name}: solves {rates}")


def _shown_by(watch: NodeProgress) -> Callable[[int, int, float], None]:
    """Steps done are told from 1 on, or from where an interrupted training goes on."""
    seen = 0

    def show(step: int, steps: int, loss: float) -> None:
        nonlocal seen
        watch.advance(step - seen, {"loss": loss})
        seen = step

    return show
