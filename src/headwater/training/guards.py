"""Guards: named metrics over the last steps of a stage, each compared with the recipe's bound.

Guards read the rows of metrics.jsonl and the ledger only, in order, so a resumed stage makes the same decisions. docs/guards.md
says why each exists and what to do about it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwater.config.guards import GUARDS, Guard, Guards
from headwater.config.stage import Stage
from headwater.storage.run_dir import NodeDir, append_jsonl, read_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """What a guard computes and how it reports it.

    metrics      columns of metrics.jsonl; the worst of several counts
    figure       (mean over the window, mean over the stage's first window, lowest mean so far) -> value compared with the bound
    below        whether a value at or below the bound sounds the alarm, rather than one above it
    description  the alarm in words; {figure} is replaced by the value
    remedy       what to do about it, in a few words
    unless       a column whose presence disables the guard
    """

    metrics: tuple[str, ...]
    figure: Callable[[float, float, float], float]
    below: bool
    description: str
    remedy: str
    unless: str | None = None


def _mean(mean: float, first: float, lowest: float) -> float:
    return mean


MEASURES: dict[str, Measure] = {
    "kl_explosion": Measure(
        ("kl_reference", "kl_student_teacher", "kl_teacher_student"),
        lambda mean, first, lowest: mean - lowest,
        below=False,
        description="the KL has risen by {figure} nats per token over its lowest",
        remedy="lower optim.lr, or raise sparse.kl_coef",
    ),
    "entropy_collapse": Measure(
        ("entropy",),
        lambda mean, first, lowest: mean / first if first > 0.0 else 1.0,
        below=True,
        description="the entropy is {figure} of its value at the start of the stage",
        remedy="lower optim.lr, raise sparse.clip_high or sparse.kl_coef, or end the stage earlier",
        unless="kl_student_teacher",  # a student that approaches a low-entropy teacher loses entropy too
    ),
    "truncation": Measure(
        ("truncated",),
        _mean,
        below=False,
        description="{figure} of the completions reached the token limit",
        remedy="raise sampling.max_tokens",
    ),
    "no_variance": Measure(
        ("informative",),
        _mean,
        below=True,
        description="{figure} of the groups have rewards that differ",
        remedy="end the stage earlier, use harder or easier problems, or raise group_size",
    ),
    "sampler_gap": Measure(
        ("sampler_gap",),
        _mean,
        below=False,
        description="sampler and trainer differ by {figure} nats per token",
        remedy="run `headwater doctor`, or set models.dtype to float32",
    ),
}
assert MEASURES.keys() == GUARDS.keys()


@dataclass(frozen=True)
class Alarm:
    """A guard whose value is beyond its bound.

    Example: `Alarm("truncation", 40, 0.62, 0.5, 10, "warn").sentence` is `truncation: 0.62 of the completions reached the token
    limit (mean of the last 10 steps; bound 0.5): raise sampling.max_tokens`.
    """

    guard: str
    step: int
    figure: float
    bound: float
    window: int
    action: str

    @property
    def sentence(self) -> str:
        measure = MEASURES[self.guard]
        description = measure.description.format(figure=f"{self.figure:.3g}")
        return f"{self.guard}: {description} (mean of the last {self.window} steps; bound {self.bound:g}): {measure.remedy}"

    def written(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


class _Window:
    """Running mean of one metric over full windows, with the first and the lowest mean."""

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self.first = self.lowest = float("nan")

    def add(self, value: float) -> float | None:
        """Mean of the window that ends with `value`; None until the window is full."""
        self.values.append(value)
        if len(self.values) < (self.values.maxlen or 1):
            return None
        mean = sum(self.values) / len(self.values)
        if self.first != self.first:
            self.first = self.lowest = mean
        self.lowest = min(self.lowest, mean)
        return mean


class _GuardState:
    """One guard and its windows over the stage so far."""

    def __init__(self, name: str, guard: Guard) -> None:
        self.name, self.guard, self.measure = name, guard, MEASURES[name]
        self.windows = {metric: _Window(guard.window) for metric in self.measure.metrics}
        self.active = False

    def add(self, row: Row) -> tuple[Alarm, bool] | None:
        """The alarm of this step, with whether it has just started. A row without the metric changes nothing."""
        if self.measure.unless in row:
            return None
        figures = []
        for metric, window in self.windows.items():
            mean = window.add(float(row[metric])) if metric in row else None
            if mean is not None:
                figures.append(self.measure.figure(mean, window.first, window.lowest))
        if not figures:
            return None
        figure = min(figures) if self.measure.below else max(figures)
        started = not self.active
        self.active = figure <= self.guard.bound if self.measure.below else figure > self.guard.bound
        if not self.active:
            return None
        alarm = Alarm(self.name, int(row["step"]), figure, self.guard.bound, self.guard.window, self.guard.action)
        return alarm, started


class GuardMonitor:
    """All guards of one stage. Give it every row of the stage's metrics once, in order.

    node  folder whose warnings.jsonl records each alarm when it starts
    warn  receives the alarm's sentence
    """

    def __init__(self, guards: Guards, node: NodeDir, warn: Callable[[str], None]) -> None:
        chosen = {name: getattr(guards, name) for name in GUARDS}
        self._states = [_GuardState(name, guard) for name, guard in chosen.items() if guard.action != "off"]
        self._node, self._warn = node, warn

    def catch_up(self, rows: Iterable[Row]) -> str | None:
        """Replay the rows of finished steps silently; return why the stage had stopped at the last of them, if it had."""
        why: str | None = None
        for row in rows:
            why = _stop_reason(self._alarms(row))
        return why

    def check(self, row: Row) -> str | None:
        """Check the row of a new step; return why the stage must stop after it, or None."""
        alarms = self._alarms(row)
        for alarm, started in alarms:
            if started:
                append_jsonl(self._node.warnings, [alarm.written()])
                self._warn(alarm.sentence)
        return _stop_reason(alarms)

    def _alarms(self, row: Row) -> list[tuple[Alarm, bool]]:
        return [alarm for state in self._states if (alarm := state.add(row)) is not None]


def _stop_reason(alarms: Iterable[tuple[Alarm, bool]]) -> str | None:
    """The sentence of the first alarm whose action is `stop`."""
    for alarm, _ in alarms:
        if alarm.action == "stop":
            return f"guard {alarm.sentence} (or set guards.{alarm.guard}=warn to continue from the checkpoint)"
    return None


class NoSignalGuard:
    """Stops a stage whose labels buy nothing: in its first steps every group's rewards are equal.

    Call `check` after the step's ledger row is written: the sentence counts labels and completions from the ledger.

    pool  number of labels that the stage may look at
    """

    def __init__(self, guards: Guards, stage: Stage, steps: int, pool: int, ledger: Path) -> None:
        self._step = min(guards.patience, steps) if guards.no_signal == "stop" else None
        self._group_size, self._pool, self._ledger = stage.group_size, pool, ledger
        self._informative = False

    def catch_up(self, rows: Iterable[Row]) -> str | None:
        """Replay the rows of finished steps; return why the stage had stopped at the last of them, if it had."""
        why: str | None = None
        for row in rows:
            why = self.check(row)
        return why

    def check(self, row: Row) -> str | None:
        """Why the stage must stop after this step; None where it goes on."""
        if "informative" not in row:
            return None
        self._informative |= row["informative"] > 0.0
        if self._step is None or self._informative or row["step"] < self._step:
            return None
        spent = [spend for spend in read_jsonl(self._ledger) if spend["purpose"] == "train"]
        labels = len({label for spend in spent for label in spend["labels"]})
        groups = sum(spend["checks"] for spend in spent) // self._group_size
        verdict = "wrong" if row["reward"] == 0.0 else "right" if row["reward"] == 1.0 else "graded alike"
        return (
            f"no group is informative: in each of the {groups} groups so far all completions were {verdict}, so sparse "
            f"reward gives no gradient; {labels} labels were looked at and bought nothing, and the other "
            f"{self._pool - labels} of this stage's {self._pool} labels would be wasted too (set "
            "guards.no_signal=continue to train on all the same)"
        )
