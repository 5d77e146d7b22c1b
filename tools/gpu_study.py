"""Train a built-in recipe on one GPU within a time limit: `python -m tools.gpu_study`. The same command resumes.

It starts `headwater study` in a process of its own and stops it at the limit as Ctrl-C does, with a checkpoint. Weights may come as
parts (`tools.parts`), which are joined when all are there. Nothing is downloaded.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import exit_codes
from headwater.errors import FailedError
from headwater.storage.run_dir import RunDir
from tools.parts import MANIFEST, join_folder

STOP_SECONDS = 120.0
"""Time that a study gets to write its checkpoint after the limit, before it is killed."""
TIME_IS_UP = 3
"""Exit code of a study that the limit stopped: run the same command again."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    student: Annotated[Path, typer.Option(help="Folder of the student, or of its parts.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher, or of its parts.")],
    labeled: Annotated[Path, typer.Option(help="Problems to train on.")],
    evaluation: Annotated[Path, typer.Option(help="Problems to evaluate on.")],
    minutes: Annotated[float, typer.Option(min=0.0, help="Time limit.")],
    out: Annotated[Path, typer.Option(help="Run directory.")],
    recipe: Annotated[str, typer.Option(help="Built-in recipe or file.")] = "gsm8k-qwen2.5",
    arms: Annotated[str, typer.Option(help="Arms, separated by commas.")] = "direct_grpo,bridge",
    change: Annotated[list[str] | None, typer.Option("--set", help="Change a field: path=value.")] = None,
) -> None:
    """Run a study for at most so many minutes and print its accuracies."""
    deadline = time.monotonic() + 60 * minutes
    changes = [
        f"models.student={joined(student)}",
        f"models.teacher={joined(teacher)}",
        f"data.labeled.path={labeled.resolve()}",
        f"data.evals.gsm8k.path={evaluation.resolve()}",
        *(change or []),
    ]
    words = [word for text in changes for word in ("--set", text)]
    code = run_until(deadline, ["study", recipe, "--arms", arms, "--out", str(out), *words])
    if code is None:
        print(f"time is up after {minutes:g} minutes; the same command resumes {out}")
        raise typer.Exit(TIME_IS_UP)
    if code != 0:
        raise FailedError(f"headwater study ended with exit code {code}", code)
    for line in accuracies(json.loads(RunDir(out).report_json.read_text(encoding="utf-8"))):
        print(line)


def joined(folder: Path) -> Path:
    """The model's folder; parts are joined into `joined` inside their folder, once. Raises UserError for missing parts."""
    if not (folder / MANIFEST).is_file():
        return folder.resolve()
    whole = folder / "joined"
    if not (whole / "complete").is_file():
        join_folder(folder, whole)
        (whole / "complete").touch()
    return whole.resolve()


def run_until(deadline: float, words: list[str]) -> int | None:
    """Run `headwater` and stop it at the deadline (of `time.monotonic`); its exit code, None if it was stopped."""
    with subprocess.Popen([sys.executable, "-m", "headwater", *words]) as process:
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return None


def accuracies(report: dict[str, Any]) -> list[str]:
    """One line for each arm and evaluation. Example: "bridge gsm8k 41.0 % [38.2, 43.9]"."""
    return [
        f"{arm} {name} {100 * score['mean']:.1f} % [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        for arm, result in report["arms"].items()
        for name, score in result["accuracy"].items()
    ]


def main() -> None:
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
