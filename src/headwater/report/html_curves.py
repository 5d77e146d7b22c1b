"""Curves over training steps: which metrics have one, their axes, and the page's section about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import shortened
from headwater.report import figures
from headwater.report.contrasts import accuracy
from headwater.report.figures import Series, file_stem
from headwater.report.stages import STAGE_NAMES, stage_name, values_at_common_steps
from headwater.report.study import Node, Study, finite_values
from headwater.report.view import Section


@dataclass(frozen=True, slots=True)
class Metric:
    """A column with a curve.

    least_span  what the vertical axis spans at least, so that it does not magnify noise
    most        the largest possible value
    """

    title: str
    least_span: float = 0.0
    most: float | None = None


def _share(title: str) -> Metric:
    return Metric(title, least_span=0.2, most=1.0)


METRICS = {
    "reward": _share("reward (share correct)"),
    "informative": _share("informative groups, share"),
    "best_of_group": Metric("best of group (pass@G)", least_span=1.0, most=1.0),
    "validation": _share("validation accuracy"),
    "loss": Metric("loss", least_span=0.01),
    "kl_teacher_student": Metric("KL(teacher ‖ student), nats a token", least_span=0.02),
    "kl_student_teacher": Metric("KL(student ‖ teacher), nats a token", least_span=0.02),
    "overlap": _share("overlap of top-k tokens, share"),
    "entropy": Metric("entropy, nats a token", least_span=0.05),
    "completion_tokens": Metric("completion length, tokens", least_span=4.0),
    "truncated": _share("truncated, share"),
    "grad_norm": Metric("gradient norm"),
    "lr": Metric("learning rate"),
    "sampler_gap": Metric("sampler–trainer gap, nats a token", least_span=0.001),
}
"""Metrics with a training curve on the page; a stage's metrics.jsonl has all others."""

HELD_OUT_METRICS = {
    "kl_teacher_student": Metric("KL(teacher ‖ student) on teacher prefixes", least_span=0.02),
    "kl_student_teacher": Metric("KL(student ‖ teacher) on student prefixes", least_span=0.02),
    "overlap_teacher_prefixes": _share("overlap on teacher prefixes"),
    "overlap_student_prefixes": _share("overlap on student prefixes"),
    "entropy_student": Metric("student's entropy, nats a token", least_span=0.05),
}
"""Measures of the conditions on held-out prompts that have a curve."""
TITLES = {
    **{key: metric.title for key, metric in {**METRICS, **HELD_OUT_METRICS}.items()},
    "entropy_teacher": "teacher's entropy, nats a token",
}

LEAST_SHARE = 0.2
"""An axis spans at least this share of the largest value, or the metric's least span where that is more."""
FLAT = 0.05
"""A curve that moves by less than this share of its axis's least span is not drawn."""
MAX_POINTS = 80
"""Points per curve, in the figure and in its CSV."""
ACCURACY = "accuracy on "
"""Prefix of the columns that `with_evaluations` adds."""

Panels = dict[str, Any]
"""A heading, legend entries (swatch and label), plots, and the metrics that are not drawn, with the reason."""
Groups = list[tuple[str, list[list[dict[str, Any]]]]]
"""(label, rows of each seed): the arms that share a stage's nodes."""


def curves(study: Study) -> Section | None:
    """One panel per metric and stage, with a line for each set of arms that shares the stage's nodes."""
    evals = {f"{ACCURACY}{name}": _share(f"{ACCURACY}{name} (held out)") for name in _evals_during_training(study)}
    panels = panels_by_stage(study, {**evals, **METRICS}, with_evaluations)
    plots = tuple(plot for stage in panels for plot in stage["plots"])
    return Section("Training curves", "curves", {"panels": panels}, plots) if panels else None


def with_evaluations(node: Node) -> list[dict[str, Any]]:
    """The node's metrics, and its accuracy on held-out problems at the steps where it was evaluated."""
    by_step = node.evals_by_step
    if by_step and node.metrics:  # the final evaluation ends a curve but is none by itself
        last = node.metrics[-1]["step"]
        by_step = by_step | {last: by_step.get(last, {}) | node.evals}
    rows = [
        {"step": step, f"{ACCURACY}{name}": float(accuracy(counts).mean())}
        for step, evals in by_step.items()
        for name, counts in evals.items()
    ]
    return [*node.metrics, *rows]


def _evals_during_training(study: Study) -> list[str]:
    by_step = [evals for node in study.nodes.values() for evals in node.evals_by_step.values()]
    return list(dict.fromkeys(name for evals in by_step for name in evals))


def panels_by_stage(
    study: Study, metrics: dict[str, Metric], rows: Callable[[Node], list[dict[str, Any]]], held_out: bool = False
) -> list[Panels]:
    """The curves of `rows` for each stage, role and objective, in the order of STAGE_NAMES."""
    stages: dict[tuple[str, str, str], Groups] = {}
    for arms, by_seed in study.stage_groups():
        seeds = [rows(node) for node in by_seed.values()]
        if any(seeds):
            first = next(iter(by_seed.values()))
            stages.setdefault((first.stage, first.role, first.objective), []).append((shortened(arms), seeds))
    order = {stage: index for index, stage in enumerate(STAGE_NAMES)}
    panels = []
    for stage, role, objective in sorted(stages, key=lambda key: order.get(key[0], len(order))):
        groups, plots, flat = stages[stage, role, objective], [], []
        for key, metric in metrics.items():
            series = mean_curves(groups, key)
            if not series:
                continue
            limits = axis_limits(series, metric)
            if key == "loss" and (same := _equal_metric(series, groups)):
                flat.append(f"loss, which equals {metrics[same].title.split(',')[0]}")
            elif limits is None:
                flat.append(f"{metric.title}, nearly constant at {_middle(series):.3g}")
            else:
                name = file_stem("held_out" if held_out else "curve", stage, role, objective, key)
                plots.append(figures.curves(name, metric.title, series, limits))
        if plots:
            heading = stage_name(stage, objective, role) + (", on held-out prompts" if held_out else "")
            legend = [(figures.swatch(style), label) for style, (label, _) in enumerate(groups)]
            panels.append({"heading": heading, "legend": legend, "plots": plots, "flat": "; ".join(flat)})
    return panels


def mean_curves(groups: Groups, key: str) -> list[Series]:
    """A series for each group with values of the metric `key`. Groups without a value are left out but keep their style."""
    series = []
    for style, (label, seeds) in enumerate(groups):
        number = sum(bool(finite_values(rows, key)) for rows in seeds)
        if number:
            steps, values = values_at_common_steps(seeds, key, MAX_POINTS)
            means = [sum(at_step) / number for at_step in values]
            series.append(Series(label, style, steps, means, [*map(min, values)], [*map(max, values)], number))
    return series


def axis_limits(series: Sequence[Series], metric: Metric) -> tuple[float, float] | None:
    """Limits of the vertical axis with a small margin; None for curves that are flat or have no point.

    The axis spans at least what the metric says, and neither passes zero nor `metric.most` unless a value does.

    Example: rewards from 0.5 to 0.55 give the limits 0.425 and 0.625, and rewards from 0.5 to 0.505 None.
    """
    values = [value for line in series for value in (*line.y, *line.low, *line.high)]
    if not values:
        return None
    low, high = min(values), max(values)
    least = max(metric.least_span, LEAST_SHARE * max(abs(low), abs(high)))
    if high - low <= FLAT * least:
        return None
    room = max(0.05 * (high - low), (least - (high - low)) / 2)
    bottom, top = low - room, high + room
    if low >= 0.0 > bottom:
        bottom, top = 0.0, max(top, least)
    if metric.most is not None and high <= metric.most < top:
        bottom = min(bottom, max(0.0, metric.most - least))
        top = metric.most + 0.02 * (metric.most - bottom)  # a line at the limit stays visible
    return bottom, top


def _equal_metric(loss: Sequence[Series], groups: Groups) -> str | None:
    """The divergence whose values the loss of a distillation stage repeats, up to rounding; None if there is none."""
    for key in ("kl_teacher_student", "kl_student_teacher"):
        series = mean_curves(groups, key)
        if len(series) == len(loss) and all(
            len(a.y) == len(b.y) and np.allclose(a.y, b.y, rtol=1e-4, atol=1e-8)
            for a, b in zip(loss, series, strict=True)
        ):
            return key
    return None


def _middle(series: Sequence[Series]) -> float:
    values = [value for line in series for value in line.y]
    return (min(values) + max(values)) / 2 if values else 0.0
