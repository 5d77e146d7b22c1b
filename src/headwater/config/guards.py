"""Schema of the recipe's section `guards`; `training.guards` defines the metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from headwater.config.schema import Steps, Strict


class Guard(Strict):
    """A training guard: the action when its metric, over the last `window` steps, is beyond `bound`."""

    action: Literal["warn", "stop", "off"]
    """`warn` prints and records the alarm, `stop` ends training with exit code 4, `off` disables the guard."""
    bound: Annotated[float, Field(ge=0.0)]
    """Value of the metric beyond which the guard acts."""
    window: Steps
    """Steps over which the metric is averaged; `teacher_jump` compares the medians of two consecutive windows."""


class ShareGuard(Guard):
    """A guard whose metric is a share."""

    bound: Annotated[float, Field(ge=0.0, le=1.0)]
    """Share beyond which the guard acts."""


class Guards(Strict):
    """Actions when a metric of training goes wrong (docs/checks.md).

    `truncation: stop` changes only the action, `truncation: {action: stop, bound: 0.3}` the named fields."""

    no_signal: Literal["stop", "continue"] = "stop"
    """Action when in the first `patience` steps of a stage all rewards are equal within every group."""
    patience: Steps = 3
    """First steps of a stage that `no_signal` looks at."""
    unchanged_teacher: Literal["warn", "stop", "off"] = "warn"
    """Action at the end of a teacher's stage in which no step had a gradient: the student would distill the teacher as it was."""
    kl_explosion: Guard = Guard(action="warn", bound=1.0, window=10)
    """The KL has risen by more than `bound` nats per token over its lowest."""
    entropy_collapse: ShareGuard = ShareGuard(action="warn", bound=0.03, window=10)
    """The entropy is at most `bound` of its value at the start of the stage."""
    truncation: ShareGuard = ShareGuard(action="warn", bound=0.5, window=10)
    """More than `bound` of the completions reached the token limit."""
    no_variance: ShareGuard = ShareGuard(action="warn", bound=0.01, window=10)
    """At most `bound` of the groups have rewards that differ."""
    sampler_gap: Guard = Guard(action="warn", bound=0.05, window=10)
    """Sampler and trainer differ by more than `bound` nats per token."""
    teacher_uniform: ShareGuard = ShareGuard(action="stop", bound=0.1, window=2)
    """The log-probs of the teacher's tokens differ from −ln V, those of a uniform distribution, by at most `bound` · ln V."""
    teacher_jump: Guard = Guard(action="stop", bound=10.0, window=5)
    """Between two windows the median KL to a served teacher has moved by more than `bound` times its spread over the first of them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {**value, **{name: _guard(value[name], guard) for name, guard in GUARDS.items() if name in value}}


GUARDS: dict[str, Guard] = {
    name: field.default for name, field in Guards.model_fields.items() if isinstance(field.default, Guard)
}
"""Defaults of each guard (docs/checks.md); `training.guards` defines the metrics."""


def _guard(value: Any, default: Guard) -> Any:
    """A guard's value completed by its defaults. YAML reads a bare `off` as false."""
    value = {"action": "off" if value is False else value} if isinstance(value, (str, bool)) else value
    return {**default.model_dump(), **value} if isinstance(value, dict) else value
