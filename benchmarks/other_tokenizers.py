"""Compare bridges across two tokenizers with the bridge of one, at equal steps, over seeds.

    python -m tools.pretrain pocket --models qwen3-teacher-joined --out DIR/models
    python -m benchmarks.other_tokenizers --out DIR --seeds 0,1,2,3,4

Each form of comparison (docs/teachers.md) is a study of the arm `bridge` in DIR/FORM with examples/other_tokenizer.yaml and the joined
teacher, without measurements of condition C2; `same` has the shipped teacher. Forms share the teacher's RL. DIR/table.md has the
forms that finished these seeds; the same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.results import table
from benchmarks.ten_settings import headwater
from headwater import stats
from headwater.report.contrasts import accuracy, seed_matrix
from headwater.report.format import percent, points, units
from headwater.report.study import EvalCounts, costs, read_study
from headwater.storage.files import write_atomic
from headwater.storage.run_dir import RunDir

RECIPE, TEACHER = "examples/other_tokenizer.yaml", "models/qwen3-teacher-joined"
HALVINGS = 12

FORMS: dict[str, tuple[str, ...]] = {
    "same": (
        "models.teacher=pocket:qwen3-teacher",
        "stages.warmup.dense.tokenizers=same",
        "stages.opd.dense.tokenizers=same",
    ),
    "prefix": (),
    "spans": ("stages.opd.dense.divergence=sampled",),
    "shared": ("stages.warmup.dense.tokenizers=shared", "stages.opd.dense.tokenizers=shared"),
    "uld": ("stages.warmup.dense.divergence=uld", "stages.opd.dense.divergence=uld"),
}
"""Changes of the recipe by form."""


@dataclass(frozen=True)
class Trained:
    """The bridge of one form over S seeds and P problems: accuracies before, of the teacher after RL, and after; training FLOPs."""

    before_SP: np.ndarray
    teacher_SP: np.ndarray
    after_SP: np.ndarray
    flops: float


def run(form: str, out: Path, seeds: str, reuse: list[Path]) -> None:
    changes = (f"models.teacher={out / TEACHER}", "conditions.problems=0", *FORMS[form])
    headwater("study", RECIPE, "--arms", "bridge", "--seeds", seeds, out=out / form, changes=changes, reuse=reuse)


def trained(folder: Path, seeds: Sequence[int]) -> Trained | None:
    """The bridge of a form over these seeds; None if some are not finished."""
    study = read_study([folder])
    finished = study.finished("bridge")
    if not set(seeds) <= finished.keys():
        return None
    nodes = {seed: finished[seed] for seed in seeds}
    before = study.results("base_student", study.evals[0])

    def values(evals: Mapping[int, EvalCounts]) -> np.ndarray:
        return seed_matrix([evals[seed] for seed in sorted(evals)], accuracy)[0]

    def of_stage(stage: str) -> dict[int, EvalCounts]:
        return {
            seed: next(node for node in run if node.stage == stage).evals[study.evals[0]] for seed, run in nodes.items()
        }

    return Trained(
        values({seed: before[seed] for seed in seeds}),
        values(of_stage("teacher_rl")),
        values(of_stage("opd")),
        float(np.mean([costs(run)["flops"] for run in nodes.values()])),
    )


def recovered(form: Trained, same: Trained) -> stats.Interval:
    """Share r of the gain of `same` that `form` has, with its 95 % interval.

        r = (form − before) / (same − before)

    The interval holds the r for which form − (1−r) · before − r · same is not shown to differ from 0 (Fieller), by the paired
    interval over seeds and problems of every report.
    """

    def against(share: float) -> stats.Contrast:
        return stats.contrast(form.after_SP, (1.0 - share) * same.before_SP + share * same.after_SP)

    gain = float((same.after_SP - same.before_SP).mean())
    middle = float((form.after_SP - same.before_SP).mean()) / gain
    return stats.Interval(
        middle,
        _root(lambda share: against(share).low, middle - 2),
        _root(lambda share: against(share).high, middle - 2),
    )


def _root(falling: Callable[[float], float], low: float) -> float:
    """Where a falling function crosses 0, within 4 above `low`."""
    high = low + 4.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def markdown(results: Mapping[str, Trained]) -> str:
    """The table of docs/results.md."""
    same, rows = results["same"], []
    for form, result in results.items():
        score, gap, gain = stats.accuracy_interval(result.after_SP), "–", "–"
        if form != "same":
            difference, share = stats.contrast(result.after_SP, same.after_SP), recovered(result, same)
            gap = f"{points(difference.difference)} [{points(difference.low)}, {points(difference.high)}]"
            gain = f"{percent(share.mean)} [{percent(share.low)}, {percent(share.high)}]"
        rows.append(
            [
                f"`{form}`",
                percent(float(result.teacher_SP.mean())),
                f"**{percent(score.mean)}** [{percent(score.low)}, {percent(score.high)}]",
                ", ".join(percent(float(row.mean())) for row in result.after_SP),
                gap,
                gain,
                units(result.flops, "FLOPs"),
            ]
        )
    head = ["form", "teacher after RL, %", "student, % [95 %]", "each seed", "− same, points [95 %]"]
    lines = table([*head, "gain recovered, % [95 %]", "FLOPs"], rows)
    seeds, problems = same.after_SP.shape
    start = percent(float(same.before_SP.mean()))
    return f"{lines}\n\nThe student before: {start} %. {seeds} seeds, {problems} problems.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--forms", default=",".join(FORMS), help="some of them, separated by commas")
    options = parser.parse_args()
    chosen = options.forms.split(",")
    if unknown := [form for form in chosen if form not in FORMS]:
        parser.error(f"--forms {unknown[0]}: the forms are {', '.join(FORMS)}")
    for form in chosen:
        reuse = [options.out / other for other in FORMS if other != form and RunDir(options.out / other).plan.exists()]
        run(form, options.out, options.seeds, reuse)
        print(form, flush=True)
    seeds = sorted(int(seed) for seed in options.seeds.split(","))
    begun = [form for form in FORMS if RunDir(options.out / form).plan.exists()]
    results = {form: result for form in begun if (result := trained(options.out / form, seeds)) is not None}
    write_atomic(options.out / "table.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
