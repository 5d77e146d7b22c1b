"""What a probe returns: its measures typed, the advice, and the values of probe.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headwater.doctor.advice import LabelAdvice, WarmupAdvice, arm_to_run, label_advice, warmup_advice
from headwater.doctor.readiness import PairMeasures, Readiness


@dataclass(frozen=True)
class ProbeResult(Mapping[str, Any]):
    """How ready a student and its teacher are: typed, and as the mapping that probe.json holds (`result["advice"]`).

    Example: `result.arm` is the arm to run, `result.student.pass_rate.mean` how often the student is right.
    """

    measures: PairMeasures
    report: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.report[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.report)

    def __len__(self) -> int:
        return len(self.report)

    @property
    def student(self) -> Readiness:
        return self.measures.student

    @property
    def teacher(self) -> Readiness:
        return self.measures.teacher

    @property
    def labels(self) -> LabelAdvice:
        """Where the labels go, and why."""
        return label_advice(self.measures)

    @property
    def warmup(self) -> WarmupAdvice:
        """Whether the student needs a warm-up before on-policy distillation, and why."""
        return warmup_advice(self.measures)

    @property
    def arm(self) -> str | None:
        """The arm to run; None while neither model can use labels."""
        return arm_to_run(self.measures)[0]

    def __repr__(self) -> str:
        rates = f"student={self.student.pass_rate.mean:.3f}, teacher={self.teacher.pass_rate.mean:.3f}"
        return f"ProbeResult(arm={self.arm!r}, {rates})"
