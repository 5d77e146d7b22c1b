"""The paper's three testable predictions, each as a conjunction of paired contrasts. Needs only report.json's values.

A prediction *holds* if every one of its parts holds; it *does not hold* if any part is reversed, shown by its interval and
p; it is *not measured* if a contrast that it rests on is missing (and none of the others is reversed); else it is *undecided*.
Every part must be shown by itself, so a conjunction that holds needs no correction for having several parts.

A part "a above b" holds if the 95 % interval of a − b lies above zero and p < 0.05, and is reversed if it lies below zero
and p < 0.05. A part "a not above b" (P3's replay) is reversed if a above b holds, and holds otherwise: that no gain was
shown is all that it says, so `why` gives the largest gain that the interval still allows.

Source: 2605.12483. "No OPD" of the paper trains on the teacher's samples with hard targets (`teacher_sft`), which drops
OPD and changes the targets at once; P2 here drops OPD alone (`warmup_only`), and the other stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater.report.contrasts import difference_text, find_contrast, reading, sample_size
from headwater.report.format import count, join_and, percent, points, units


@dataclass(frozen=True)
class Part:
    """`a` is above `b`, or with `above=False` it is not."""

    a: str
    b: str
    above: bool = True

    def says(self, contrast: dict[str, Any]) -> str:
        """Example: a gain of 3 points with an interval of 1 to 5 makes `Part("replay", "bridge_1h", False)` "does not hold"."""
        found = reading(contrast)
        if self.above:
            return found
        return "does not hold" if found == "holds" else "holds"

    def __str__(self) -> str:
        return f"{self.a} {'above' if self.above else 'not above'} {self.b}"


@dataclass(frozen=True)
class Prediction:
    """`beside` are contrasts that are shown with it but not part of it; `more` says what qualifies the reading."""

    name: str
    claim: str
    parts: tuple[Part, ...]
    more: Callable[[dict[str, Any], str], list[str]]
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def rule(self) -> str:
        return f"holds if {join_and([str(part) for part in self.parts])}"


def predictions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each prediction and evaluation, with the contrasts that it rests on.

    Example: `[{"name": "P1", "claim": "raw_teacher < direct_grpo < bridge", "eval": "sums", "reading": "holds", "rule": …,
    "rests_on": [{"a": "direct_grpo", "b": "raw_teacher", "wants": "above", "reading": "holds", "difference": 0.43, …}, …],
    "beside": [], "why": "direct_grpo − raw_teacher +43.8 points, …"}]`.
    """
    return [_row(report, one, eval_name) for one in PREDICTIONS for eval_name in report["evals"]]


def _row(report: dict[str, Any], one: Prediction, eval_name: str) -> dict[str, Any]:
    found = [(part, find_contrast(report, part.a, part.b, eval_name)) for part in one.parts]
    missing = sorted({name for part, c in found if c is None for name in (part.a, part.b) if not _there(report, name)})
    held = [(part, c) for part, c in found if c is not None]
    said = [part.says(c) for part, c in held]
    if "does not hold" in said:
        says = "does not hold"
    elif len(held) < len(found):
        says = "not measured"
    else:
        says = "holds" if set(said) == {"holds"} else "undecided"
    beside = [c for c in (find_contrast(report, a, b, eval_name) for a, b in one.beside) if c is not None]
    why = [_part(part, c) for part, c in held]
    if len(held) < len(found):
        why.append(f"missing: {join_and(missing) or 'pairs on the same seeds'}")
    if held:
        why[0] = f"{sample_size(held[0][1])}: {why[0]}"
        why += one.more(report, eval_name)
    return {
        "name": one.name,
        "claim": one.claim,
        "eval": eval_name,
        "reading": says,
        "rule": one.rule,
        "rests_on": [
            {**_brief(c), "wants": "above" if part.above else "not above", "reading": part.says(c)} for part, c in held
        ],
        "beside": [{**_brief(c), "reading": reading(c)} for c in beside],
        "why": "; ".join(why),
    }


def _brief(c: dict[str, Any]) -> dict[str, Any]:
    return {key: c[key] for key in ("a", "b", "difference", "low", "high", "p", "seeds")}


def _part(part: Part, c: dict[str, Any]) -> str:
    return f"{difference_text(c)} ({part} {part.says(c).replace('undecided', 'is undecided')})"


def _there(report: dict[str, Any], arm: str) -> bool:
    return bool(report["arms"].get(arm, {}).get("accuracy"))


def _ordering_more(report: dict[str, Any], eval_name: str) -> list[str]:
    """P1 matches labels and not compute: what compute says."""
    c = find_contrast(report, "bridge", "direct_grpo", eval_name)
    if c is None or "compute" in c["equal"]:
        return []
    a, b = units(c["flops"]["a"], "FLOPs"), units(c["flops"]["b"], "FLOPs")
    found = [f"compute is not equal here: bridge {a}, direct_grpo {b}"]
    same = find_contrast(report, "bridge", "direct_grpo_compute", eval_name)
    if same is not None and "compute" in same["equal"]:
        found.append(f"at equal compute {difference_text(same)} (bridge above it: {reading(same)})")
    return found


def _stages_more(report: dict[str, Any], eval_name: str) -> list[str]:
    """P2: a stage that is dropped is also compute that is saved; and the paper's confounded arm beside it."""
    found = []
    for name in ("warmup_only", "opd_only"):
        c = find_contrast(report, "bridge", name, eval_name)
        if c is not None and c["flops"]["a"] and "compute" not in c["equal"]:
            found.append(f"{name} takes {percent(c['flops']['b'] / c['flops']['a'])} % of the bridge's FLOPs")
    c = find_contrast(report, "bridge", "teacher_sft", eval_name)
    if c is not None:
        found.append(f"beside it, the paper's “no OPD”, which makes the targets hard as well: {difference_text(c)}")
    return found


def _fresh_more(report: dict[str, Any], eval_name: str) -> list[str]:
    """P3: bridge_rl − replay is what fresh labels add to the state before them plus what replay takes from it."""
    pairs = (("bridge_rl", "replay"), ("bridge_rl", "bridge_1h"), ("replay", "bridge_1h"))
    both, fresh, again = (find_contrast(report, a, b, eval_name) for a, b in pairs)
    if both is None or fresh is None or again is None:
        return []
    found = [f"replay may still add up to {points(again['high'])} points"] if again["high"] > 0 else []
    whole, gain, loss = both["difference"], fresh["difference"], -again["difference"]
    # On different seeds the three would not add up.
    if abs(whole - gain - loss) < 1e-5 and whole > 0 and loss > 0:
        share = f"{100 * min(loss / whole, 1):.0f} % of it" if gain > 0 else "all of it"
        found.append(
            f"of the {points(whole)} points between bridge_rl and replay, {points(gain)} are fresh labels over bridge_1h "
            f"and {points(loss)} ({share}) replay falling below it"
        )
    labels = {name: report["arms"][name]["labels"]["distinct"] for name in ("bridge_rl", "replay")}
    return [*found, f"labels: {', '.join(f'{name} {count(number)}' for name, number in labels.items())}"]


PREDICTIONS = (
    Prediction(
        "P1",
        "raw_teacher < direct_grpo < bridge",
        (Part("direct_grpo", "raw_teacher"), Part("bridge", "direct_grpo")),
        _ordering_more,
    ),
    Prediction(
        "P2",
        "dropping the warm-up or OPD is worse than the full bridge",
        (Part("bridge", "warmup_only"), Part("bridge", "opd_only")),
        _stages_more,
        beside=(("bridge", "teacher_sft"),),
    ),
    Prediction(
        "P3",
        "fresh labels after the bridge help and matched replay does not",
        (Part("bridge_rl", "bridge_1h"), Part("bridge_rl", "replay"), Part("replay", "bridge_1h", above=False)),
        _fresh_more,
    ),
)
