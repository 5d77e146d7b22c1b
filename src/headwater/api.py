"""Python API: each command as a function, with typed results (docs/python-api.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.config.arms import DEFAULT_STUDY, arm_of
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Columns, Recipe, parse_recipe
from headwater.config.recipe import Source as DataSource
from headwater.data import validate as validation
from headwater.data.validate import ValidationResult
from headwater.doctor import probe as probes
from headwater.doctor.checks import Examination
from headwater.doctor.checks import diagnose as examine_recipe
from headwater.doctor.probe_result import ProbeResult
from headwater.errors import UserError
from headwater.evaluation import Evaluation, EvaluationSettings, evaluate_models
from headwater.evaluation_files import Comparison, compare
from headwater.plugins import name_of
from headwater.report import build
from headwater.report.result import Result
from headwater.runs.default_arm import choose_arm
from headwater.runs.display import ProgressDisplay
from headwater.runs.progress import progress_display
from headwater.runs.setup import set_up
from headwater.runs.trackers import Callback, Opener, tracked
from headwater.tasks.verifier import Verifier
from headwater.types import Verdict

Source = str | Path | Mapping[str, Any] | Recipe
"""A YAML file, the name of a built-in recipe, a recipe's fields, or a parsed recipe."""
Changes = Mapping[str, Any] | Sequence[str]
"""Fields to change: `{"stages.opd.steps": 5}`, or as for `--set`, `["stages.opd.steps=5"]`. A function stands for its name."""
Grader = Callable[[str, str], bool | tuple[bool, str]]


def run(
    recipe: Source,
    *,
    arm: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    changes: Changes = (),
    track: Sequence[str | Opener] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool | None = None,
) -> Result:
    """Run one arm, or resume it; returns its results, which are also written to `out`.

    arm        None: the arm that `out` holds or its probe advised, else `bridge` (docs/arms.md)
    out        run directory; `runs/NAME` by default
    changes    fields to change, such as `{"stages.opd.steps": 5, "task": my_grader}`
    track      trackers to log to: `tensorboard`, `wandb`, `trackio`, an entry point's name, or a function that opens one
    callbacks  functions called with (node, step, metrics) after each step
    quiet      whether to show no progress; None shows it in a notebook only

    Raises `headwater.errors.HeadwaterError` with the message that the command prints. Guard the call with
    `if __name__ == "__main__":` where nodes run in worker processes (`compute.workers`).
    """
    seeds, parsed = None if seed is None else [seed], read_recipe(recipe, changes)
    if arm is None:
        choice = choose_arm(parsed, _folder(out, parsed))
        _display(quiet).say(choice.sentence)
        arm = choice.arm
    return study(parsed, arms=[arm], seeds=seeds, out=out, track=track, callbacks=callbacks, quiet=quiet)


def study(
    recipe: Source,
    *,
    arms: Sequence[str] = DEFAULT_STUDY,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    changes: Changes = (),
    track: Sequence[str | Opener] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool | None = None,
) -> Result:
    """Run arms × seeds as one plan with shared nodes run once; returns the results. Arguments as for `run`."""
    parsed = read_recipe(recipe, changes)
    for arm in arms:
        arm_of(arm, parsed)
    folder = _folder(out, parsed)
    with tracked(_display(quiet), folder, track, callbacks) as display:
        report = pipeline.run(parsed, list(arms), list(seeds or [parsed.seed]), folder, display)
    return Result(folder, report)


def diagnose(
    recipe: Source, *, arms: Sequence[str] | None = None, out: str | Path | None = None, changes: Changes = ()
) -> Examination:
    """Check everything that could fail or spoil a run, as `headwater doctor` does; writes nothing. Without `arms`, the arm of `run`.

    `result.errors` are the findings for which a run would be refused. Raises HeadwaterError only for an unknown arm or a recipe that
    cannot be read.
    """
    parsed = read_recipe(recipe, changes)
    folder = _folder(out, parsed)
    set_up(parsed.compute)
    return examine_recipe(parsed, list(arms or [choose_arm(parsed, folder).arm]), [parsed.seed], folder)


def probe(
    recipe: Source,
    *,
    problems: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    changes: Changes = (),
    quiet: bool | None = None,
) -> ProbeResult:
    """Measure how ready student and teacher are, and advise where to spend the labels, as `headwater probe` does.

    Example: `probe("my.yaml").arm` is the arm to run.

    problems  labelled problems to sample; 128 by default
    samples   completions per problem; 8 or the group size by default
    out       directory of the later run, which then stores the result and the label checks
    """
    parsed = read_recipe(recipe, changes)
    chosen = parsed.seed if seed is None else seed
    return probes.probe(parsed, problems, samples, chosen, None if out is None else Path(out), _display(quiet))


def evaluate(
    model: str | Path,
    data: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    quiet: bool | None = None,
) -> Evaluation:
    """Evaluate a model folder, hub id or `pocket:NAME` on a data file: avg@k, pass@k and maj@k, as `headwater eval` does.

    Example: `evaluate(student, "held-out.jsonl", EvaluationSettings(samples=8)).measures["avg@8"].mean`.
    """
    return evaluate_each([model], [data], settings, quiet=quiet)[0]


def evaluate_each(
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    settings: EvaluationSettings | None = None,
    *,
    quiet: bool | None = None,
) -> list[Evaluation]:
    """Evaluate every model on every data file, models outermost, each loaded once."""
    names, files = list(map(str, models)), list(map(str, data))
    return evaluate_models(names, files, settings or EvaluationSettings(), _display(quiet))


def compare_evaluations(first: str | Path, second: str | Path) -> list[Comparison]:
    """Compare two result files of `headwater eval --save`, paired by problem: second minus first."""
    return compare(Path(first), Path(second))


def validate(
    data: str | Path, *, task: str | Grader = "maths", problem: str | None = None, answer: str | None = None
) -> ValidationResult:
    """Grade every gold answer of a data file with its own grader; `result.failed` lists those that fail.

    problem, answer  columns; recognised by their names by default
    """
    source = DataSource(path=str(data), columns=Columns(problem=problem, answer=answer))
    return validation.validate(source, _task_name(task))


def grade(pairs: Sequence[tuple[str, str]], *, task: str | Grader = "maths", seconds: float = 2.0) -> list[Verdict]:
    """Grade (gold, completion) pairs in order, each within a limit of seconds, in worker processes.

    Example: `grade([("1/2", "so \\\\boxed{0.5}")])[0].correct` is True.
    """
    with Verifier(_task_name(task), seconds=seconds) as verifier:
        verdicts = verifier(list(pairs))
        verifier.refuse_no_verdict(verdicts)
        return verdicts


def rebuild_report(*folders: str | Path, out: str | Path | None = None) -> Result:
    """Rebuild report.json and report.html from the files of run directories of one recipe, as `headwater report` does.

    out  where to write; the first folder by default
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UserError("rebuild_report: name at least one run directory")
    target = paths[0] if out is None else Path(out)
    return Result(target, build.write(target, paths))


def read_recipe(recipe: Source, changes: Changes = ()) -> Recipe:
    """Parse a recipe, and change fields of it. Raises UserError with the message that the command would print.

    Example: `read_recipe("my.yaml", {"labels.budget": 64}).labels.budget` is 64.
    """
    overrides = _overrides(changes)
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        return parse_recipe(_plain(recipe, "recipe"), "recipe", overrides)
    return find_recipe(str(recipe), overrides)


def _display(quiet: bool | None) -> ProgressDisplay:
    """The progress display of a call; None shows progress in a notebook only."""
    return progress_display(quiet=not in_notebook() if quiet is None else quiet)


def in_notebook() -> bool:
    """Whether the caller is a Jupyter notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def _overrides(changes: Changes) -> list[str]:
    """Changes as `path=value`; JSON is YAML."""
    if not isinstance(changes, Mapping):
        return list(changes)
    return [f"{path}={json.dumps(_plain(value, path))}" for path, value in changes.items()]


def _plain(value: Any, field: str) -> Any:
    """The value with functions replaced by their names and paths by text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, field) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return name_of(value, field) if callable(value) else value


def _task_name(task: str | Grader) -> str:
    return task if isinstance(task, str) else name_of(task, "task")


def _folder(out: str | Path | None, recipe: Recipe) -> Path:
    return Path("runs") / recipe.name if out is None else Path(out)
