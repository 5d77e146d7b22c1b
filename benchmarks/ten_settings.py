"""Test in ten settings whether `headwater probe` names the arm that a later study finds better.

    python -m benchmarks.ten_settings --out DIR                       # the ten: probe with seed 0, study with seeds 0 and 1
    python -m benchmarks.ten_settings --out DIR --calibration         # other settings and other seeds, which chose the rule

For each setting: pretrain its models (once, in DIR/models), probe, run `headwater study pocket --arms direct_grpo,bridge`, and
compare the advice with the outcome. DIR/table.json and DIR/table.md are rewritten after each setting; the same command resumes.

The ten settings were written down before the rule of `headwater.doctor.advice` was chosen; nothing was measured on them until
it was final. The calibration settings differ from all of them in a model or the budget, and also in the training seed, the labels
bought and the evaluation problems.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwater.storage.files import read_json, write_atomic, write_json
from headwater.storage.run_dir import RunDir
from tools.pretrain.pocket import POCKET, PretrainSpec, measure, pretrain

STUDENT, TEACHER = POCKET["qwen3-student"], POCKET["qwen3-teacher"]

MODELS: dict[str, tuple[PretrainSpec, int]] = {
    # Of the ten settings. More steps give more skill; p_cot is how often it shows its work, without which it can only guess.
    "skilled": (replace(STUDENT, worked_steps=1500), 1),
    "seldom": (replace(STUDENT, p_cot=0.06), 2),
    "guesser": (replace(STUDENT, p_cot=0.0), 3),
    "guesser-too": (replace(STUDENT, p_cot=0.0), 4),
    "seldom-teacher": (replace(TEACHER, p_cot=0.05), 5),
    # Of the calibration.
    "able": (replace(STUDENT, worked_steps=1200, p_cot=0.15), 101),
    "rarely": (replace(STUDENT, worked_steps=1200, p_cot=0.02), 102),
}
"""Models besides the shipped ones: pretraining spec and seed."""


@dataclass(frozen=True)
class Setting:
    """A pair of models and a budget. `expected` is the guess before any measurement; no code reads it."""

    name: str
    student: str
    teacher: str
    labels: int
    expected: str


TEN = (
    Setting("few-labels", "qwen3-student", "qwen3-teacher", 64, "bridge"),
    Setting("many-labels", "qwen3-student", "qwen3-teacher", 512, "bridge, by less than with few labels"),
    Setting("other-family", "llama-student", "qwen3-teacher", 128, "bridge"),
    Setting("seldom-works", "seldom", "qwen3-teacher", 256, "bridge"),
    Setting("teacher-seldom-works", "qwen3-student", "seldom-teacher", 128, "open"),
    Setting("skilled-large-teacher", "skilled", "qwen3-teacher-large", 256, "close"),
    Setting("skilled-weak-teacher", "skilled", "qwen3-student", 128, "direct_grpo"),
    Setting("large-student", "qwen3-teacher", "llama-teacher", 128, "direct_grpo or a tie"),
    Setting("teacher-guesses", "llama-student", "guesser", 256, "direct_grpo"),
    Setting("both-guess", "guesser-too", "guesser", 128, "neither arm gains anything"),
)

CALIBRATION = (
    Setting("c-large-teacher", "qwen3-student", "qwen3-teacher-large", 128, "bridge"),
    Setting("c-llama-few", "llama-student", "llama-teacher", 64, "bridge"),
    Setting("c-llama-many", "llama-student", "llama-teacher", 512, "close"),
    Setting("c-self", "qwen3-student", "qwen3-student", 256, "direct_grpo or a tie"),
    Setting("c-equals", "llama-student", "qwen3-student", 128, "direct_grpo or a tie"),
    Setting("c-able", "able", "qwen3-teacher", 128, "close"),
    Setting("c-able-llama", "able", "llama-teacher", 256, "direct_grpo"),
    Setting("c-able-weak-teacher", "able", "llama-student", 128, "direct_grpo"),
    Setting("c-teacher-rarely", "qwen3-student", "rarely", 128, "direct_grpo"),
    Setting("c-rarely", "rarely", "qwen3-teacher", 128, "bridge"),
    Setting("c-both-rarely", "rarely", "rarely", 64, "neither"),
    Setting("c-large-few", "qwen3-student", "qwen3-teacher-large", 64, "open: much from few prompts"),
    Setting("c-llama", "llama-student", "llama-teacher", 128, "open: much from few prompts"),
)

CALIBRATION_SETS = ("labels.seed=101", "data.evals.sums.generate.seed=101")
"""Labels and evaluation problems differ from those of every reported study."""
GAIN = 0.05
"""`neither` is correct if no arm improves the student by more; a study of 500 problems hardly detects less."""


def model_of(name: str, folder: Path) -> str:
    """The model's name in a recipe."""
    return str(folder / name) if name in MODELS else f"pocket:{name}"


def make(name: str, folder: Path) -> None:
    """Pretrain one of MODELS unless it exists; about a minute for a student and three for a teacher, on one thread."""
    card = folder / f"{name}.json"
    if name not in MODELS or card.exists():
        return
    spec, seed = MODELS[name]
    pretrain(spec, folder / name, seed)
    write_json(card, {"spec": asdict(spec), "seed": seed, "measured": asdict(measure(folder / name))})


def changes_of(setting: Setting, models: Path, more: tuple[str, ...]) -> tuple[str, ...]:
    """The setting's changes of the recipe. A teacher that never learns is a result here, not a reason to stop."""
    return (
        f"models.student={model_of(setting.student, models)}",
        f"models.teacher={model_of(setting.teacher, models)}",
        f"labels.budget={setting.labels}",
        "guards.no_signal=continue",
        *more,
    )


def headwater(*words: str, out: Path, changes: Iterable[str], reuse: Iterable[Path] = ()) -> str:
    """Run a command with `--json` on a changed recipe and return its stdout. Raises CalledProcessError; the reason is on stderr."""
    options = [word for change in changes for word in ("--set", change)]
    options += [word for folder in reuse for word in ("--reuse", str(folder))]
    process = subprocess.run(
        [sys.executable, "-m", "headwater", *words, "--out", str(out), "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return process.stdout


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """Outcome of a study: accuracies, bridge − direct_grpo with its interval, and the better arm.

    `better` is `neither` if neither arm improves the student by more than GAIN; otherwise the sign of the
    difference decides, and `clear` says whether the interval excludes zero.
    """
    (name,) = report["arms"]["base_student"]["accuracy"]
    accuracies = {
        arm: report["arms"][arm]["accuracy"][name]["mean"] for arm in ("base_student", "direct_grpo", "bridge")
    }
    (contrast,) = (c for c in report["contrasts"] if (c["a"], c["b"], c["eval"]) == ("bridge", "direct_grpo", name))
    gained = max(accuracies["direct_grpo"], accuracies["bridge"]) - accuracies["base_student"]
    better = "neither" if gained <= GAIN else "bridge" if contrast["difference"] > 0 else "direct_grpo"
    return {
        **accuracies,
        **{key: contrast[key] for key in ("difference", "low", "high", "p")},
        "better": better,
        "clear": contrast["low"] > 0 or contrast["high"] < 0,
    }


def measured(setting: Setting, out: Path, seeds: str, more: tuple[str, ...]) -> dict[str, Any]:
    """Probe and study one setting in out/NAME; returns its row of the table."""
    models = out / "models"
    for name in (setting.student, setting.teacher):
        make(name, models)
    changes, folder = changes_of(setting, models, more), RunDir(out / setting.name)
    # Before the study: the prediction is on disk before the outcome exists.
    if not folder.probe.exists():
        headwater("probe", "pocket", "--seed", seeds.split(",")[0], out=folder.path, changes=changes)
    answer = read_json(folder.probe)
    arms = ("--arms", "direct_grpo,bridge", "--seeds", seeds)
    result = outcome(json.loads(headwater("study", "pocket", *arms, out=folder.path, changes=changes)))
    advised = answer["advice"]["labels"]["arm"] or "neither"
    return {
        **asdict(setting),
        "measures": summary(answer),
        "advice": answer["advice"]["labels"],
        "outcome": result,
        "agrees": advised == result["better"],
    }


def summary(answer: dict[str, Any]) -> dict[str, Any]:
    """The numbers behind the advice."""
    student, teacher = answer["models"]["student"], answer["models"]["teacher"]
    finish = answer["finish"]
    return {
        "pass_student": student["pass_rate"]["mean"],
        "pass_teacher": teacher["pass_rate"]["mean"],
        "informative_student": student["informative"]["mean"],
        "informative_teacher": teacher["informative"]["mean"],
        "finish_student": None if finish is None else finish["student"]["mean"],
        "finish_teacher": None if finish is None else finish["teacher"]["mean"],
        "kl_right": None if finish is None else finish["kl"],
        "cache_passes": answer["cache_passes"],
        "kl_student_prefixes": answer["conditions"]["C2"]["kl_student_teacher"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md: measures, advice and outcome, including misses."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f}"

    lines = [
        "| setting | student ← teacher, labels | pass rate, % | informative, % | ends right, % | nats × passes | advice | "
        "student before → direct_grpo, bridge, % | bridge − direct_grpo, points [95 %] | better | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        m, o, advised = row["measures"], row["outcome"], row["advice"]
        toll = "–" if m["kl_right"] is None else f"{m['kl_right']:.2f} × {m['cache_passes']:.1f}"
        lines.append(
            f"| {row['name']} | {row['student']} ← {row['teacher']}, {row['labels']} "
            f"| {share(m['pass_student'])} / {share(m['pass_teacher'])} "
            f"| {share(m['informative_student'])} / {share(m['informative_teacher'])} "
            f"| {share(m['finish_student'])} / {share(m['finish_teacher'])} | {toll} "
            f"| {advised['where']}{' (close)' if advised['close'] else ''} "
            f"| {100 * o['base_student']:.1f} → {100 * o['direct_grpo']:.1f}, {100 * o['bridge']:.1f} "
            f"| {100 * o['difference']:+.1f} [{100 * o['low']:+.1f}, {100 * o['high']:+.1f}] "
            f"| {o['better']}{'' if o['clear'] or o['better'] == 'neither' else ' (within noise)'} "
            f"| {'agrees' if row['agrees'] else '**misses**'} |"
        )
    agreed = sum(row["agrees"] for row in rows)
    note = "Pairs of numbers: student / teacher. The better arm goes by the sign of the difference, also within noise."
    return "\n".join([*lines, "", f"{agreed} of {len(rows)} agree. {note}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", help="training seeds of the studies; the probe uses the first")
    parser.add_argument("--only", help="settings, separated by commas")
    parser.add_argument(
        "--calibration", action="store_true", help="run the settings that chose the rule instead of the ten"
    )
    options = parser.parse_args()
    settings = CALIBRATION if options.calibration else TEN
    only = [setting.name for setting in settings] if options.only is None else options.only.split(",")
    unknown = [name for name in only if name not in {setting.name for setting in settings}]
    if unknown:
        parser.error(f"--only {unknown[0]}: the settings are {', '.join(setting.name for setting in settings)}")
    seeds = options.seeds or ("101" if options.calibration else "0,1")
    torch.set_num_threads(1)  # more threads change the rounding of pretraining
    rows: list[dict[str, Any]] = []
    for setting in settings:
        if setting.name in only:
            rows.append(measured(setting, options.out, seeds, CALIBRATION_SETS if options.calibration else ()))
            write_json(options.out / "table.json", rows)
            write_atomic(options.out / "table.md", markdown(rows))
            print(f"{setting.name}: {'agrees' if rows[-1]['agrees'] else 'misses'}", flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
