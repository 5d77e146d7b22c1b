"""Typed view of a run's report, which the Python API returns. Reads files only."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from headwater.errors import UserError
from headwater.stats import Interval
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan


@dataclass(frozen=True)
class SeedMean(Interval):
    """A fraction's mean over seeds with its 95 % interval over problems and seeds, and the value at each seed."""

    per_seed: Mapping[int, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> SeedMean:
        return cls(row["mean"], row["low"], row["high"], {int(seed): value for seed, value in row["per_seed"].items()})


@dataclass(frozen=True)
class ArmResult:
    """What one arm reached and what it cost; costs are means per seed and leave evaluation out.

    accuracy         evaluation -> accuracy of the arm's student
    pass_at          evaluation -> k -> pass@k
    labels           distinct problems whose answer training used; `checks` counts the uses
    tokens           `sampled`, `trained`, `teacher_scored`
    seconds          wall time of training
    student_folders  seed -> Hugging Face folder of the trained student; empty for the untrained base models
    failed           seed -> why it failed
    """

    name: str
    accuracy: Mapping[str, SeedMean]
    pass_at: Mapping[str, Mapping[int, SeedMean]]
    labels: int
    checks: int
    tokens: Mapping[str, int]
    flops: float
    seconds: float
    student_folders: Mapping[int, Path]
    failed: Mapping[int, str]


@dataclass(frozen=True)
class Result(Mapping[str, Any]):
    """The report of a run directory: typed, and as the mapping that report.json holds (`result["contrasts"]`).

    Example: `result.arms["bridge"].accuracy["held_out"].mean`.
    """

    folder: Path
    report: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.report[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.report)

    def __len__(self) -> int:
        return len(self.report)

    @cached_property
    def arms(self) -> Mapping[str, ArmResult]:
        """Every arm of the run, the base models included."""
        students = self._student_folders
        return {name: _arm(name, row, students.get(name, {})) for name, row in self.report["arms"].items()}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.report["seeds"])

    @property
    def verdict(self) -> str:
        """The sentences that state the result, also when it contradicts the paper."""
        return str(self.report["verdict"])

    @property
    def student_folder(self) -> Path:
        """Folder of the trained student. Raises UserError unless exactly one was trained; `arms[NAME].student_folders` has all."""
        folders = [folder for arm in self.arms.values() for folder in arm.student_folders.values()]
        if len(folders) != 1:
            raise UserError(
                f"{self.folder} holds {len(folders)} trained students: choose one of arms[NAME].student_folders"
            )
        return folders[0]

    @property
    def page(self) -> Path:
        """The HTML report."""
        return RunDir(self.folder).report_html

    def rows(self) -> list[dict[str, Any]]:
        """One row for each arm and evaluation, for `pandas.DataFrame(result.rows())`."""
        return [
            {
                "arm": arm.name, "eval": name, "accuracy": interval.mean, "low": interval.low, "high": interval.high,
                "labels": arm.labels, "checks": arm.checks, **{f"tokens_{kind}": count for kind, count in arm.tokens.items()},
                "flops": arm.flops, "seconds": arm.seconds,
            }
            for arm in self.arms.values()
            for name, interval in arm.accuracy.items()
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        """The report's page, inline in a notebook; the frame keeps its styles and scripts apart from the notebook's."""
        page = self.page.read_text(encoding="utf-8") if self.page.exists() else f"<p>{html.escape(self.verdict)}</p>"
        style = "width:100%;height:720px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page, quote=True)}"></iframe>'

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, arms={list(self.report['arms'])}, seeds={list(self.seeds)})"

    @cached_property
    def _student_folders(self) -> Mapping[str, Mapping[int, Path]]:
        folder = RunDir(self.folder)
        if not folder.plan.exists():
            return {}
        students: dict[str, dict[int, Path]] = {}
        for arm, by_seed in read_plan(folder.plan)["arms"].items():
            last_nodes = {int(seed): folder.node(names[-1]) for seed, names in by_seed.items()}
            finished = {seed: node.model for seed, node in last_nodes.items() if node.done.exists()}
            students[arm] = {seed: model for seed, model in finished.items() if model.is_dir()}
        return students


def _arm(name: str, row: Mapping[str, Any], students: Mapping[int, Path]) -> ArmResult:
    return ArmResult(
        name=name,
        accuracy={key: SeedMean.of(value) for key, value in row["accuracy"].items()},
        pass_at={
            key: {int(k): SeedMean.of(value) for k, value in by_k.items()} for key, by_k in row["pass_at_k"].items()
        },
        labels=row["labels"]["distinct"],
        checks=row["labels"]["checks"],
        tokens=row["tokens"],
        flops=row["flops"],
        seconds=row["seconds"],
        student_folders=students,
        failed={int(seed): failure["sentence"] for seed, failure in row["failed"].items()},
    )
