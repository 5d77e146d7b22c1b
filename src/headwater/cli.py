"""The verbs. Every expected end is one sentence and an exit code: 2 the user's mistake, 3 refused, 4 stopped, 130 interrupted."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.errors import HeadwaterError, RefusedError, UserError

app = typer.Typer(
    name="headwater",
    help="Post-train language models when labels are scarce: sparse reward upstream, dense supervision downstream.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a built-in recipe.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; run again with the same one and it resumes.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a field: path=value, such as stages.opd.steps=5.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the nodes and what they would cost at most; run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON where a machine reads it.")]


@app.command()
def init(name: Annotated[str, typer.Argument(help="Which recipe to start from.")] = "pocket") -> None:
    """Print a commented recipe to start from."""
    from headwater.recipes import builtin_text

    print(builtin_text(name), end="")


@app.command()
def run(
    recipe: RecipeName,
    arm: Annotated[str, typer.Option("--arm", help="Which arm; the default is the whole recipe.")] = "bridge_rl",
    out: Out = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Training seed.")] = None,
    set_: Set = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Run one arm to its end: teacher RL -> warm-up -> OPD -> student RL by default."""
    _go(recipe, [arm], None if seed is None else [seed], out, set_, device, dry_run, json_)


@app.command()
def study(
    recipe: RecipeName,
    arms: Annotated[str | None, typer.Option("--arms", help="Arms, separated by commas, or `all`.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Training seeds, separated by commas.")] = None,
    out: Out = None,
    set_: Set = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Run many arms × seeds as one plan, shared nodes once, then report."""
    from headwater.recipes import ARMS, DEFAULT_STUDY

    chosen = list(DEFAULT_STUDY) if arms is None else list(ARMS) if arms == "all" else _listed(arms, "--arms")
    try:
        numbers = None if seeds is None else [int(one) for one in _listed(seeds, "--seeds")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: must be whole numbers separated by commas") from None
    _go(recipe, chosen, numbers, out, set_, device, dry_run, json_)


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option("--seed", help="Training seed.")] = 0,
    json_: Json = False,
) -> None:
    """The pocket study: the paper's recipe and its controls, in minutes on two cores."""
    from headwater.recipes import DEFAULT_STUDY

    _go("pocket", list(DEFAULT_STUDY), [seed], out or Path("runs/demo"), None, None, False, json_)


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
    from headwater import pipeline
    from headwater.doctor import diagnose
    from headwater.recipes import ARMS, find_recipe

    found_recipe = find_recipe(recipe, [*(set_ or []), *([] if device is None else [f"compute.device={device}"])])
    chosen = list(ARMS) if arms == "all" else _listed(arms, "--arms")
    pipeline.set_up(found_recipe.compute)
    found = diagnose(found_recipe, chosen, [found_recipe.seed], out or Path("runs") / found_recipe.name)
    print(json.dumps(found.written()) if json_ else found.text())
    if found.errors:
        raise found.refusal(shown=True)


@app.command("eval")
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
    from headwater.console import narrator
    from headwater.evaluation import evaluate_model, settings_of

    settings = settings_of(
        {
            "samples": samples,
            "sampling": {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k},
        },
        {"template": template, "thinking": thinking},
        {"student": model, "teacher": model, "dtype": dtype},
    )
    found = evaluate_model(settings, data, task, limit, seed, device or "auto", out, narrator(quiet=json_))
    print(json.dumps(found) if json_ else found.pop("text"))


@app.command()
def grade(
    data: Annotated[Path, typer.Option("--data", help='JSONL of {"id","gold","completion"} rows.')],
    task: Annotated[
        str, typer.Option("--task", help="A task's name (docs/tasks.md) or package.module:function.")
    ] = "maths",
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Wall-clock limit of one answer.")] = 2.0,
    workers: Annotated[int, typer.Option("--workers", min=1)] = 2,
) -> None:
    """Grade completions: one JSON line out for each row in, in order."""
    from headwater.grading import grade_file

    for row in grade_file(data, task=task, seconds=seconds, workers=workers):
        print(json.dumps(row, ensure_ascii=False))


@app.command()
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
    from headwater.config import Columns, Source
    from headwater.grading import validate as validated

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


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories of one recipe.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; the first DIR by default.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Prove from the files where labels went; exit 3 if not.")
    ] = False,
    json_: Json = False,
) -> None:
    """Rebuild the report from run directories, or audit them."""
    if audit:
        _audit(dirs, json_)
        return
    from headwater import report as reports

    _show(reports.write(out or dirs[0], dirs), out or dirs[0], json_)


@app.command()
def pretrain(
    what: Annotated[str, typer.Argument(help="What to make: `pocket`, the models that ship with the package.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the models.")] = Path("pocket"),
    models: Annotated[str | None, typer.Option("--models", help="Some of them, separated by commas.")] = None,
) -> None:
    """Make the pocket models again, from scratch."""
    import torch

    from headwater.console import narrator
    from headwater.pretrain import POCKET, pretrain_pocket

    if what != "pocket":
        raise UserError(f"pretrain {what}: only `pocket` is known")
    names = list(POCKET) if models is None else _listed(models, "--models")
    unknown = [name for name in names if name not in POCKET]
    if unknown:
        raise UserError(f"--models {unknown[0]}: no such pocket model; there are {', '.join(POCKET)}")
    torch.set_num_threads(1)  # the shipped models were made with one; sums over several threads round differently
    told = narrator()
    for number, name in enumerate(names, 1):
        with told.node(name, number, len(names)) as watch:
            watch.start(0, POCKET[name].steps, "steps")
            made = pretrain_pocket(out, [name], progress=lambda step, steps, loss: watch.advance(1, {"loss": loss}))
        print(
            f"{out / name}: pass rate {made[name].pass_rate:.1%}, {made[name].worked_share:.0%} of samples show their work"
        )


def _go(
    name: str,
    arms: list[str],
    seeds: list[int] | None,
    out: Path | None,
    overrides: list[str] | None,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from headwater.recipes import arm_of, find_recipe

    changes = [*(overrides or []), *([] if device is None else [f"compute.device={device}"])]
    recipe = find_recipe(name, changes)
    for arm in arms:
        arm_of(arm, recipe)
    chosen = seeds or [recipe.seed]
    if len(set(chosen)) != len(chosen):
        raise UserError("--seeds: a seed stands there twice")
    if len(set(arms)) != len(arms):
        raise UserError(f"--arms {','.join(arms)}: an arm stands there twice")
    from headwater import pipeline
    from headwater.console import narrator

    if dry_run:
        with pipeline.prepared(recipe, arms, chosen) as (plan, materials):
            _show_estimates(plan, materials, as_json)
        return
    folder = out or Path("runs") / recipe.name
    try:
        found = pipeline.run(recipe, arms, chosen, folder, narrator(quiet=as_json))
    except KeyboardInterrupt:
        print(f"headwater: interrupted; the same command with --out {folder} goes on from here", file=sys.stderr)
        sys.exit(130)
    _show(found, folder, as_json)


def _audit(dirs: list[Path], as_json: bool) -> None:
    from headwater import audit as audits

    failed: list[str] = []
    for folder in dirs:
        found = audits.audit(folder)
        print(audits.written(found) if as_json else f"{folder}\n{audits.text(found)}")
        failed += [f"{folder}: {one.name} ({one.faults[0]})" for one in found if not one.holds]
    if failed:
        raise RefusedError(f"audit: {'; '.join(failed)}")


def _show(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    from headwater.report_words import console, terminal_table

    if as_json:
        print(json.dumps(found))
        return
    console().print(terminal_table(found))
    print(f"report: {folder / 'report.html'}")


def _show_estimates(plan: Any, materials: Any, as_json: bool) -> None:
    from rich.table import Table

    from headwater.estimate import estimates
    from headwater.report_words import console, units

    rows = estimates(plan, materials)
    if as_json:
        print(json.dumps([row.row() for row in rows]))
        return
    table = Table(
        "node", "labels", "steps", "tokens ≤", "teacher tokens ≤", "FLOPs ≤", "memory", title="what would run"
    )
    for row in rows:
        table.add_row(
            row.name, str(row.labels), str(row.steps), units(row.tokens_sampled), units(row.tokens_teacher_scored),
            units(row.flops), units(row.bytes, "B"),
        )  # fmt: skip
    console().print(table)
    print("labels: distinct problems a node may look at; memory: weights, gradients and optimizer, without activations")


def _listed(text: str, option: str) -> list[str]:
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise UserError(f"{option}: names nothing")
    return found


def main() -> None:
    """The program: `headwater …` and `python -m headwater …`."""
    try:
        app()
    except HeadwaterError as error:
        print(f"headwater: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
