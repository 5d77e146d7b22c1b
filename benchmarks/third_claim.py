"""Map where the paper's third claim holds: unused labels after the bridge help, and matched replay does not.

    python -m benchmarks.third_claim --out DIR --seeds 0,1,2

A cell is a study of bridge_1h, bridge_rl and replay on the task `skills`, with a number of skills, a number of labels, and a setting
of student RL or of the bridge. The teacher takes 80 steps in every cell. DIR/table.md has the finished cells; the same command resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import interval, read_report, table
from benchmarks.ten_settings import headwater
from headwater.report.contrasts import reading
from headwater.report.format import count, points
from headwater.storage.files import write_atomic
from headwater.storage.run_dir import RunDir

SETTINGS = {
    "plain": "",
    "KL to its start, 0.05": "stages.student_rl.sparse.kl_coef=0.05",
    "3 × the learning rate": "stages.student_rl.optim.lr=3.0e-4",
    "entropy-aware bridge": "stages.opd.dense.divergence=entropy_aware",
}
"""Changes of the recipe by setting."""


PAIRS = (("bridge_rl", "bridge_1h"), ("replay", "bridge_1h"), ("bridge_rl", "replay"))
"""Differences that a row shows."""


@dataclass(frozen=True)
class Cell:
    skills: int
    labels: int
    setting: str = "plain"

    @property
    def folder(self) -> str:
        number = list(SETTINGS).index(self.setting)
        return f"{self.skills}-{self.labels}" + (f"-{number}" if number else "")

    @property
    def covered(self) -> float:
        """Expected share of problems whose skill occurs in the first half of the labels: 1 − (1 − 1/K)^n.

        Example: K = 96 skills and n = 64 labels: 49 %.
        """
        return 1.0 - (1.0 - 1.0 / self.skills) ** (self.labels // 2)

    @property
    def changes(self) -> list[str]:
        dials = [f"data.{source}.generate.dials.skills={self.skills}" for source in ("labeled", "evals.skills")]
        teacher = ["stages.teacher_rl.epochs=null", "stages.teacher_rl.steps=80", "guards.no_signal=continue"]
        setting = [SETTINGS[self.setting]] if SETTINGS[self.setting] else []
        return [*teacher, f"labels.budget={self.labels}", *dials, "conditions.problems=0", *setting]


CELLS = [
    *(Cell(skills, labels) for skills in (96, 48, 8) for labels in (128, 256, 512)),
    *(Cell(skills, 128, setting) for skills in (96, 48) for setting in list(SETTINGS)[1:]),
]


def run(cell: Cell, out: Path, seeds: str) -> None:
    plain = out / Cell(cell.skills, cell.labels).folder
    reuse = [plain] if cell.setting != "plain" and RunDir(plain).plan.exists() else []
    words = ("study", "pocket-skills", "--arms", "bridge_1h,bridge_rl,replay", "--seeds", seeds)
    headwater(*words, out=out / cell.folder, changes=cell.changes, reuse=reuse)


def compared(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The contrasts of `PAIRS`; fewer where an arm is not finished."""
    pairs = {(contrast["a"], contrast["b"]): contrast for contrast in report["contrasts"]}
    return [pairs[pair] for pair in PAIRS if pair in pairs]


def row(cell: Cell, report: dict[str, Any]) -> list[str]:
    chosen = compared(report)
    third = next(prediction for prediction in report["predictions"] if prediction["name"] == "P3")
    bridge = report["arms"]["bridge_1h"]["accuracy"][report["evals"][0]]
    return [
        str(cell.skills), count(cell.labels), f"{100 * cell.covered:.0f} %", cell.setting, f"{100 * bridge['mean']:.1f}",
        *(f"{points(contrast['difference'])} {interval(contrast, points)} {reading(contrast)}" for contrast in chosen),
        third["reading"],
    ]  # fmt: skip


def finished(out: Path) -> dict[Cell, dict[str, Any]]:
    """Reports of the cells in which every arm has finished."""
    paths = {cell: out / cell.folder / "report.json" for cell in CELLS}
    reports = {cell: read_report(path) for cell, path in paths.items() if path.exists()}
    return {cell: report for cell, report in reports.items() if len(compared(report)) == len(PAIRS)}


def markdown(reports: dict[Cell, dict[str, Any]]) -> str:
    """The table of docs/results.md."""
    head = ["skills", "labels", "1H covers", "student RL", "`bridge_1h`, %"]
    head += ["`bridge_rl` − `bridge_1h`", "`replay` − `bridge_1h`", "`bridge_rl` − `replay`", "P3 as written"]
    return table(head, [row(cell, report) for cell, report in reports.items()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    for cell in CELLS:
        run(cell, options.out, options.seeds)
        print(cell.folder, flush=True)
        write_atomic(options.out / "table.md", markdown(finished(options.out)))
    print(markdown(finished(options.out)))


if __name__ == "__main__":
    main()
