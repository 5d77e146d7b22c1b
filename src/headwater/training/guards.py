"""Is training going wrong? Named figures over the last steps of a stage, each held against the recipe's bound.

A guard reads nothing but the rows of metrics.jsonl, in order, so a resumed stage comes to the same decisions. docs/guards.md
says why each is there and what to do about it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headwater.config.recipe import GUARDS, Guard, Guards
from headwater.storage.run_dir import NodeDir, append_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a guard reads training.

    metrics  the columns of metrics.jsonl; of several the worst counts
    figure   (mean over the window, mean over the stage's first window, lowest mean so far) -> what is held against the bound
    below    whether it is too low rather than too high
    said     the figure in words; {figure} stands for its number
    remedy   what to do about it, in a few words
    unless   a column whose presence means that the guard has nothing to say
    """

    metrics: tuple[str, ...]
    figure: Callable[[float, float, float], float]
    below: bool
    said: str
    remedy: str
    unless: str | None = None


def _mean(mean: float, first: float, lowest: float) -> float:
    return mean


MEASURES: dict[str, Measure] = {
    "kl_explosion": Measure(
        ("kl_reference", "kl_student_teacher", "kl_teacher_student"),
        lambda mean, first, lowest: mean - lowest,
        below=False,
        said="the KL has risen by {figure} nats a token over its lowest",
        remedy="lower optim.lr, or raise sparse.kl_coef",
    ),
    "entropy_collapse": Measure(
        ("entropy",),
        lambda mean, first, lowest: mean / first if first > 0.0 else 1.0,
        below=True,
        said="the entropy is {figure} of what it was at the stage's beginning",
        remedy="lower optim.lr, raise sparse.clip_high or sparse.kl_coef, or end the stage earlier",
        unless="kl_student_teacher",  # a student that nears a sure teacher becomes as sure
    ),
    "truncation": Measure(
        ("truncated",),
        _mean,
        below=False,
        said="{figure} of the completions ran into the token limit",
        remedy="raise sampling.max_tokens",
    ),
    "no_variance": Measure(
        ("informative",),
        _mean,
        below=True,
        said="{figure} of the groups have rewards that differ",
        remedy="end the stage earlier, take harder or easier problems, or raise group_size",
    ),
    "sampler_gap": Measure(
        ("sampler_gap",),
        _mean,
        below=False,
        said="sampler and trainer differ by {figure} nats a token",
        remedy="run `headwater doctor`, or set models.dtype to float32",
    ),
}
assert MEASURES.keys() == GUARDS.keys()


@dataclass(frozen=True)
class Alarm:
    """A guard whose figure is beyond its bound.

    Example: `Alarm("truncation", 40, 0.62, 0.5, 10, "warn").sentence` is `truncation: 0.62 of the completions ran into the token
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
        said = measure.said.format(figure=f"{self.figure:.3g}")
        return f"{self.guard}: {said} (mean of the last {self.window} steps; bound {self.bound:g}): {measure.remedy}"

    def written(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


class _Window:
    """The running mean of one metric over whole windows, the first and the lowest of these."""

    def __init__(self, size: int) -> None:
        self.held: deque[float] = deque(maxlen=size)
        self.first = self.lowest = float("nan")

    def take(self, value: float) -> float | None:
        """The mean over the window that ends with `value`; None while it is not full."""
        self.held.append(value)
        if len(self.held) < (self.held.maxlen or 1):
            return None
        mean = sum(self.held) / len(self.held)
        if self.first != self.first:
            self.first = self.lowest = mean
        self.lowest = min(self.lowest, mean)
        return mean


class _Gauge:
    """One guard and what it has seen of a stage."""

    def __init__(self, name: str, guard: Guard) -> None:
        self.name, self.guard, self.measure = name, guard, MEASURES[name]
        self.windows = {metric: _Window(guard.window) for metric in self.measure.metrics}
        self.sounding = False

    def take(self, row: Row) -> tuple[Alarm, bool] | None:
        """The alarm that sounds at this step and whether it has just begun. A row without the metric changes nothing."""
        if self.measure.unless in row:
            return None
        figures = []
        for metric, window in self.windows.items():
            mean = window.take(float(row[metric])) if metric in row else None
            if mean is not None:
                figures.append(self.measure.figure(mean, window.first, window.lowest))
        if not figures:
            return None
        figure = min(figures) if self.measure.below else max(figures)
        began = not self.sounding
        self.sounding = figure <= self.guard.bound if self.measure.below else figure > self.guard.bound
        if not self.sounding:
            return None
        alarm = Alarm(self.name, int(row["step"]), figure, self.guard.bound, self.guard.window, self.guard.action)
        return alarm, began


class GuardMonitor:
    """The guards of one stage: shown every row of its metrics once, in order.

    node  where an alarm is written down when it begins (warnings.jsonl)
    say   who is told its sentence
    """

    def __init__(self, guards: Guards, node: NodeDir, say: Callable[[str], None]) -> None:
        chosen = {name: getattr(guards, name) for name in GUARDS}
        self._gauges = [_Gauge(name, guard) for name, guard in chosen.items() if guard.action != "off"]
        self._node, self._say = node, say

    def catch_up(self, rows: Iterable[Row]) -> str | None:
        """Take in the rows of the steps already done; why the stage stops there, as it did when they were new."""
        why: str | None = None
        for row in rows:
            found = self._take(row)
            why = _why(found)
        return why

    def look(self, row: Row) -> str | None:
        """Take in the row of a new step; why the stage stops after it, None where it goes on."""
        found = self._take(row)
        for alarm, began in found:
            if began:
                append_jsonl(self._node.warnings, [alarm.written()])
                self._say(alarm.sentence)
        return _why(found)

    def _take(self, row: Row) -> list[tuple[Alarm, bool]]:
        return [found for gauge in self._gauges if (found := gauge.take(row)) is not None]


def _why(found: Iterable[tuple[Alarm, bool]]) -> str | None:
    """The sentence of the first alarm that stops a stage; nothing else about a stage may decide it."""
    for alarm, _ in found:
        if alarm.action == "stop":
            return (
                f"guard {alarm.sentence} (or set guards.{alarm.guard}=warn to go on from the checkpoint all the same)"
            )
    return None
