"""Guards: named metrics over the last steps of a stage, each compared with the recipe's bound.

Guards decide by the rows of metrics.jsonl alone, in order, so a resumed stage makes the same decisions; their sentences also
read the ledger and the rollouts. docs/checks.md says why each exists and what to do about it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headwater.config.dense import Dense
from headwater.config.guards import GUARDS, Guard, Guards
from headwater.storage.files import append_jsonl, read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.tasks.outcomes import Outcomes

Row = Mapping[str, Any]

JUMP_FLOOR = 0.05
"""Nats per token that a KL may move by from one window to the next in a run whose steps are alike."""


@dataclass(frozen=True)
class StageOutcomes:
    """How the completions of a stage ended, read from its rollout files when a guard needs to say why.

    field       the stage's field in the recipe, such as `stages.teacher_rl`
    max_tokens  its `sampling.max_tokens`
    """

    folder: NodeDir
    field: str
    max_tokens: int

    def over(self, steps: Iterable[int]) -> Outcomes:
        """The outcomes of the completions of these steps that were graded."""
        paths = [path for path in map(self.folder.rollouts, steps) if path.exists()]
        return Outcomes.of(row for path in paths for row in read_jsonl(path))


class Windows:
    """One metric over the steps so far, in windows of `length` steps.

    values  of the last two windows
    mean    over the last window, once it is full
    first   mean over the stage's first window
    lowest  lowest mean so far
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.values: deque[float] = deque(maxlen=2 * length)
        self.mean = self.first = self.lowest = float("nan")

    def add(self, value: float) -> bool:
        """Add the value of a step; whether a window is full."""
        self.values.append(value)
        if len(self.values) < self.length:
            return False
        self.mean = sum(list(self.values)[-self.length :]) / self.length
        if math.isnan(self.first):
            self.first = self.lowest = self.mean
        self.lowest = min(self.lowest, self.mean)
        return True


def jump(windows: Windows) -> float | None:
    """|median of the last window − median of the window before| / (median absolute deviation of the window before + JUMP_FLOOR).

    None until two windows are full. Medians, because a single odd completion moves the mean of a step.

    Example: windows of three steps 0.1, 0.2, 0.3 and 1.2, 1.2, 9: 1.0 / (0.1 + 0.05) = 6.7.
    """
    values, length = list(windows.values), windows.length
    if len(values) < 2 * length:
        return None
    before, now = values[:length], values[length:]
    center = statistics.median(before)
    spread = statistics.median(abs(earlier - center) for earlier in before)
    return abs(statistics.median(now) - center) / (spread + JUMP_FLOOR)


@dataclass(frozen=True)
class Measure:
    """What a guard computes and how it reports it.

    metrics      columns of metrics.jsonl; the worst of several counts
    figure       what is compared with the bound; None where it is not known yet
    below        whether a value at or below the bound sounds the alarm, rather than one above it
    description  the alarm in words; {figure} is replaced by the value, {percent} by it in percent
    remedy       what to do about it, in a few words; {stage} is replaced by the stage's field
    windows      number of full windows that it compares; a stage must be long enough for them
    unless       a column whose presence disables the guard
    requires     a column without which a row is skipped
    explained    whether the outcomes of the completions say why it fires, and give the remedy
    """

    metrics: tuple[str, ...]
    figure: Callable[[Windows], float | None]
    below: bool
    description: str
    remedy: str
    windows: int = 1
    unless: str | None = None
    requires: str | None = None
    explained: bool = False

    def window(self, window: int, steps: int) -> int:
        """The window of a recipe, or a shorter one that a stage of `steps` steps has room for.

        A comparison of single steps would be noise, so windows that are compared are not shortened to fewer than two.
        """
        return min(window, max(self.windows, steps // self.windows))


MEASURES: dict[str, Measure] = {
    "kl_explosion": Measure(
        ("kl_reference", "kl_student_teacher", "kl_teacher_student"),
        lambda windows: windows.mean - windows.lowest,
        below=False,
        description="the KL has risen by {figure:.3g} nats per token over its lowest",
        remedy="lower {stage}.optim.lr, or in a stage with rewards raise sparse.kl_coef",
        windows=2,
    ),
    "entropy_collapse": Measure(
        ("entropy",),
        lambda windows: windows.mean / windows.first if windows.first > 0.0 else 1.0,
        below=True,
        description="the entropy is {figure:.3g} of its value at the start of the stage",
        remedy="lower {stage}.optim.lr, raise sparse.clip_high or sparse.kl_coef, or end the stage earlier",
        windows=2,
        unless="kl_student_teacher",  # a student that approaches a low-entropy teacher loses entropy too
    ),
    "truncation": Measure(
        ("truncated",),
        lambda windows: windows.mean,
        below=False,
        description="{percent:.0f} % of the completions reached the token limit",
        remedy="raise {stage}.sampling.max_tokens",
    ),
    "no_variance": Measure(
        ("informative",),
        lambda windows: windows.mean,
        below=True,
        description="{percent:.0f} % of the groups have rewards that differ",
        remedy="end the stage earlier, use harder or easier problems, or raise {stage}.group_size",
        explained=True,
    ),
    "sampler_gap": Measure(
        ("sampler_gap",),
        lambda windows: windows.mean,
        below=False,
        description="sampler and trainer differ by {figure:.3g} nats per token",
        remedy="run `headwater doctor`, or set models.dtype to float32; with compute.overlap, lower {stage}.optim.lr",
    ),
    "teacher_uniform": Measure(
        ("teacher_contrast",),
        lambda windows: windows.mean,
        below=True,
        description="the teacher gives every token about the probability 1/V: its log-probs differ by {figure:.1%} from −ln V",
        remedy="check the weights that teacher or server loaded",
    ),
    "teacher_jump": Measure(
        ("kl_student_teacher",),
        jump,
        below=False,
        description="the KL to the teacher moved by {figure:.3g} times its spread over the steps before",
        remedy="check that teacher or server still has the weights that it began with",
        windows=2,
        requires="sampler_gap",  # cached rollouts are scored once, before the stage
    ),
}
assert MEASURES.keys() == GUARDS.keys()


@dataclass(frozen=True)
class Alarm:
    """A guard whose value is beyond its bound: a row of warnings.jsonl."""

    guard: str
    step: int
    figure: float
    bound: float
    window: int
    action: str

    def sentence(self, stage: StageOutcomes) -> str:
        """The alarm in words, with its remedy.

        Example: `truncation: 62 % of the completions reached the token limit (window of 10 steps; bound 0.5): raise
        stages.opd.sampling.max_tokens`.
        """
        measure = MEASURES[self.guard]
        description = measure.description.format(figure=self.figure, percent=100 * self.figure)
        cause, remedy = "", measure.remedy.format(stage=stage.field)
        if measure.explained:
            outcomes = stage.over(range(self.step - self.window + 1, self.step + 1))
            if outcomes.total:
                cause, remedy = f"; {outcomes.because(stage.max_tokens)}", outcomes.remedy(stage.field)
        window = "the last step" if self.window == 1 else f"window of {self.window} steps"
        return f"{self.guard}: {description} ({window}; bound {self.bound:g}){cause}: {remedy}"


class _GuardState:
    """One guard and its windows over a stage of `steps` steps so far."""

    def __init__(self, name: str, guard: Guard, steps: int) -> None:
        self.name, self.guard, self.measure = name, guard, MEASURES[name]
        self.window = self.measure.window(guard.window, steps)
        self.metrics = {metric: Windows(self.window) for metric in self.measure.metrics}
        self.active = False

    def add(self, row: Row) -> tuple[Alarm, bool] | None:
        """The alarm of this step, with whether it has just started. A row without the metric changes nothing."""
        if self.measure.unless in row or (self.measure.requires is not None and self.measure.requires not in row):
            return None
        measured = [windows for metric, windows in self.metrics.items() if metric in row and windows.add(row[metric])]
        figures = [figure for figure in map(self.measure.figure, measured) if figure is not None]
        if not figures:
            return None
        figure = min(figures) if self.measure.below else max(figures)
        started = not self.active
        self.active = figure <= self.guard.bound if self.measure.below else figure > self.guard.bound
        if not self.active:
            return None
        alarm = Alarm(self.name, int(row["step"]), figure, self.guard.bound, self.window, self.guard.action)
        return alarm, started


class GuardMonitor:
    """All guards of one stage. Give it every row of the stage's metrics once, in order.

    stage  the stage, whose warnings.jsonl records each alarm when it starts
    steps  length of the stage: windows are at most as long
    warn   receives the alarm's sentence
    """

    def __init__(self, guards: Guards, stage: StageOutcomes, steps: int, warn: Callable[[str], None]) -> None:
        chosen = {name: getattr(guards, name) for name in GUARDS}
        self._states = [_GuardState(name, guard, steps) for name, guard in chosen.items() if guard.action != "off"]
        self._stage, self._warn = stage, warn

    def catch_up(self, rows: Iterable[Row]) -> str | None:
        """Replay the rows of finished steps silently; return why the stage had stopped at the last of them, if it had."""
        alarms: list[tuple[Alarm, bool]] = []
        for row in rows:
            alarms = self._alarms(row)
        return self._stop_reason(alarms)

    def check(self, row: Row) -> str | None:
        """Check the row of a new step; return why the stage must stop after it, or None."""
        alarms = self._alarms(row)
        for alarm, started in alarms:
            if started:
                sentence = alarm.sentence(self._stage)
                append_jsonl(self._stage.folder.warnings, [{**asdict(alarm), "sentence": sentence}])
                self._warn(sentence)
        return self._stop_reason(alarms)

    def _alarms(self, row: Row) -> list[tuple[Alarm, bool]]:
        return [alarm for state in self._states if (alarm := state.add(row)) is not None]

    def _stop_reason(self, alarms: Iterable[tuple[Alarm, bool]]) -> str | None:
        """The sentence of the first alarm whose action is `stop`."""
        for alarm, _ in alarms:
            if alarm.action == "stop":
                return f"guard {alarm.sentence(self._stage)} (or set guards.{alarm.guard}=warn to continue from the checkpoint)"
        return None


UNCHANGED = "unchanged_teacher"


def unchanged_teacher(guards: Guards, stage: StageOutcomes, warn: Callable[[str], None]) -> str | None:
    """Warn at the end of a teacher's stage in which no step had a gradient; returns why the stage must stop instead, or None.

    What the student distills afterwards is then the teacher as it was before the labels.
    """
    rows = [row for row in read_jsonl(stage.folder.metrics) if "informative" in row]
    if guards.unchanged_teacher == "off" or not rows or any(row["informative"] or row.get("grad_norm") for row in rows):
        return None
    outcomes = stage.over(int(row["step"]) for row in rows)
    sentence = (
        f"{UNCHANGED}: no step of {stage.field} had a gradient, so a student distills the teacher as it was before the labels: "
        f"{outcomes.remedy(stage.field)}"
    )
    if guards.unchanged_teacher == "stop":
        return f"guard {sentence} (or set guards.{UNCHANGED}=warn to distill it anyway)"
    warn(sentence)
    if not any(row["guard"] == UNCHANGED for row in read_jsonl(stage.folder.warnings)):  # of an interrupted end
        alarm = Alarm(UNCHANGED, int(rows[-1]["step"]), 0.0, 0.0, len(rows), "warn")
        append_jsonl(stage.folder.warnings, [{**asdict(alarm), "sentence": sentence}])
    return None


def no_signal(
    guards: Guards, stage: StageOutcomes, rows: Sequence[Row], steps: int, pool: int, dense: Dense
) -> str | None:
    """Why a stage must stop because its labels buy nothing: in its first steps every group's rewards are equal. Else None.

    Call it after the last step's ledger row and rollouts are written: the sentence counts labels and outcomes from them.

    rows   of metrics.jsonl, one for each step so far
    steps  length of the stage; one shorter than `guards.patience`, as in a first try, is not stopped: `no_variance` warns of it
    pool   number of labels that the stage may use
    dense  the stage's settings of the teacher's signal; where it trains groups that are all wrong, their labels buy that
    """
    if guards.no_signal != "stop" or steps < guards.patience or dense.trains_wrong_groups:
        return None
    if not rows or "informative" not in rows[-1] or rows[-1]["step"] < guards.patience:
        return None
    if any(row.get("informative", 0.0) > 0.0 for row in rows):
        return None
    step = int(rows[-1]["step"])
    spent = [spend for spend in read_jsonl(stage.folder.ledger) if spend["purpose"] == "train"]
    labels = len({label for spend in spent for label in spend["labels"]})
    outcomes = stage.over(range(1, step + 1))
    left = pool - labels if step < steps else 0
    rest = f", and the other {left} of this stage's {pool} would be wasted too" if left > 0 else ""
    return (
        f"no informative group in {step} step{'s' if step > 1 else ''}, so reward gives no gradient: "
        f"{outcomes.because(stage.max_tokens)}; {labels} labels were used{rest}; "
        f"{outcomes.remedy(stage.field)} (or set guards.no_signal=continue to train on anyway)"
    )
