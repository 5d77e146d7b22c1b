"""The paper's three predictions, each a conjunction of paired contrasts. Uses the values of report.json only.

A prediction *holds* if all of its parts hold. It *does not hold* if any part is reversed. It is *not measured* if a contrast
is missing and no other part is reversed. Otherwise it is *undecided*. Every part must be significant on its own, so a
conjunction that holds needs no correction for multiple comparisons.

The part "a above b" holds if the 95 % interval of a − b lies above zero and p < 0.05; it is reversed if the interval lies
below zero and p < 0.05. The part "a not above b" (replay in P3) is reversed if "a above b" holds, and holds otherwise. It
states only that no gain was shown, so `why` gives the largest gain that the interval allows.

Source: 2605.12483. The paper's "no OPD" arm trains on the teacher's samples with hard targets (`teacher_sft`), which drops
OPD and changes the targets at the same time. P2 here drops OPD alone (`warmup_only`) and shows the paper's arm with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater.report.contrasts import Reading, difference_text, find_contrast, reading, sample_size
from headwater.report.format import count, join_and, percent, points, units


@dataclass(frozen=True)
class Part:
    """The claim that arm `a` is above arm `b`, or that it is not (`above=False`)."""

    a: str
    b: str
    above: bool = True

    def judge(self, contrast: dict[str, Any]) -> Reading:
        """Example: a gain of 3 points with an interval of 1 to 5 makes `Part("replay", "bridge_1h", False)` "does not hold"."""
        above = reading(contrast)
        if self.above:
            return above
        return "does not hold" if above == "holds" else "holds"

    def __str__(self) -> str:
        return f"{self.a} {'above' if self.above else 'not above'} {self.b}"


@dataclass(frozen=True)
class Prediction:
    """A prediction and its parts.

    notes   (report, evaluation) -> sentences that qualify the reading
    related contrasts that are shown with the prediction but do not decide it
    """

    name: str
    claim: str
    parts: tuple[Part, ...]
    notes: Callable[[dict[str, Any], str], list[str]]
    related: tuple[tuple[str, str], ...] = ()

    @property
    def rule(self) -> str:
        return f"holds if {join_and([str(part) for part in self.parts])}"


def predictions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per prediction and evaluation, with the contrasts that decide it.

    Example: `[{"name": "P1", "claim": "raw_teacher < direct_grpo < bridge", "eval": "sums", "reading": "holds", "rule": …,
    "rests_on": [{"a": "direct_grpo", "b": "raw_teacher", "wants": "above", "reading": "holds", "difference": 0.43, …}, …],
    "beside": [], "why": "direct_grpo − raw_teacher +43.8 points, …"}]`.
    """
    return [_row(report, prediction, eval_name) for prediction in PREDICTIONS for eval_name in report["evals"]]


def _row(report: dict[str, Any], prediction: Prediction, eval_name: str) -> dict[str, Any]:
    contrasts = [(part, find_contrast(report, part.a, part.b, eval_name)) for part in prediction.parts]
    measured = [(part, c) for part, c in contrasts if c is not None]
    missing = len(measured) < len(contrasts)
    readings = {part.judge(c) for part, c in measured}
    if "does not hold" in readings:
        result = "does not hold"
    elif missing:
        result = "not measured"
    else:
        result = "holds" if readings == {"holds"} else "undecided"
    why = [f"{difference_text(c)} ({part} {reading_text(part.judge(c))})" for part, c in measured]
    if missing:
        arms = {arm for part, c in contrasts if c is None for arm in (part.a, part.b)}
        arms = {arm for arm in arms if not report["arms"].get(arm, {}).get("accuracy")}
        why.append(f"missing: {join_and(sorted(arms)) or 'pairs on the same seeds'}")
    if measured:
        why[0] = f"{sample_size(measured[0][1])}: {why[0]}"
        why += prediction.notes(report, eval_name)
    related = [c for c in (find_contrast(report, a, b, eval_name) for a, b in prediction.related) if c is not None]
    return {
        "name": prediction.name,
        "claim": prediction.claim,
        "eval": eval_name,
        "reading": result,
        "rule": prediction.rule,
        "rests_on": [
            {**_numbers(c), "wants": "above" if part.above else "not above", "reading": part.judge(c)}
            for part, c in measured
        ],
        "beside": [{**_numbers(c), "reading": reading(c)} for c in related],
        "why": "; ".join(why),
    }


def _numbers(c: dict[str, Any]) -> dict[str, Any]:
    return {key: c[key] for key in ("a", "b", "difference", "low", "high", "p", "seeds")}


def reading_text(result: str) -> str:
    """A reading as a predicate. Example: `reading_text("undecided")` is `is undecided`, `reading_text("holds")` is `holds`."""
    return result.replace("undecided", "is undecided")


def _compute_notes(report: dict[str, Any], eval_name: str) -> list[str]:
    """P1 compares at equal labels; these notes add the comparison at equal compute."""
    c = find_contrast(report, "bridge", "direct_grpo", eval_name)
    if c is None or "compute" in c["equal"]:
        return []
    a, b = units(c["flops"]["a"], "FLOPs"), units(c["flops"]["b"], "FLOPs")
    notes = [f"compute is not equal here: bridge {a}, direct_grpo {b}"]
    same = find_contrast(report, "bridge", "direct_grpo_compute", eval_name)
    if same is not None and "compute" in same["equal"]:
        notes.append(f"at equal compute {difference_text(same)} (bridge above it: {reading(same)})")
    return notes


def _ablation_notes(report: dict[str, Any], eval_name: str) -> list[str]:
    """P2: a dropped stage also saves compute; and the paper's confounded arm."""
    notes = []
    for name in ("warmup_only", "opd_only"):
        c = find_contrast(report, "bridge", name, eval_name)
        if c is not None and c["flops"]["a"] and "compute" not in c["equal"]:
            notes.append(f"{name} takes {percent(c['flops']['b'] / c['flops']['a'])} % of the bridge's FLOPs")
    c = find_contrast(report, "bridge", "teacher_sft", eval_name)
    if c is not None:
        notes.append(f"next to it, the paper's “no OPD”, which makes the targets hard as well: {difference_text(c)}")
    return notes


def _fresh_label_notes(report: dict[str, Any], eval_name: str) -> list[str]:
    """P3: split bridge_rl − replay into the gain of unused labels and the loss from replay, both relative to bridge_1h."""
    pairs = (("bridge_rl", "replay"), ("bridge_rl", "bridge_1h"), ("replay", "bridge_1h"))
    gap, fresh, replay = (find_contrast(report, a, b, eval_name) for a, b in pairs)
    if gap is None or fresh is None or replay is None:
        return []
    notes = [f"replay may still add up to {points(replay['high'])} points"] if replay["high"] > 0 else []
    total, gain, loss = gap["difference"], fresh["difference"], -replay["difference"]
    # The three differences add up only if they were measured on the same seeds.
    if abs(total - gain - loss) < 1e-5 and total > 0 and loss > 0:
        share = f"{100 * min(loss / total, 1):.0f} % of it" if gain > 0 else "all of it"
        notes.append(
            f"of the {points(total)} points between bridge_rl and replay, {points(gain)} are unused labels over bridge_1h "
            f"and {points(loss)} ({share}) replay falling below it"
        )
    labels = {name: report["arms"][name]["labels"]["distinct"] for name in ("bridge_rl", "replay")}
    return [*notes, f"labels: {', '.join(f'{name} {count(number)}' for name, number in labels.items())}"]


PREDICTIONS = (
    Prediction(
        "P1",
        "raw_teacher < direct_grpo < bridge",
        (Part("direct_grpo", "raw_teacher"), Part("bridge", "direct_grpo")),
        _compute_notes,
    ),
    Prediction(
        "P2",
        "dropping the warm-up or OPD is worse than the full bridge",
        (Part("bridge", "warmup_only"), Part("bridge", "opd_only")),
        _ablation_notes,
        related=(("bridge", "teacher_sft"),),
    ),
    Prediction(
        "P3",
        "unused labels after the bridge help and matched replay does not",
        (Part("bridge_rl", "bridge_1h"), Part("bridge_rl", "replay"), Part("replay", "bridge_1h", above=False)),
        _fresh_label_notes,
    ),
)
