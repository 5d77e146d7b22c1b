"""Doctor check of the adapters that a recipe trains; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error
from headwater.errors import UserError
from headwater.models.adapter_coverage import Coverage, coverage
from headwater.runs.plan import base_of

MIN_SHARE = 0.9
"""Share of the layers' weights below which `all-linear` does not mean what it says."""
SHOWN = 3


def adapters(context: DoctorContext) -> Iterator[Finding]:
    """Whether adapters can be attached, saved and loaded again, and what share of the layers' weights they cover."""
    adapters = dict.fromkeys((base_of(node.start), node.lora(context.recipe)) for node in context.nodes)
    trained = [(role, lora) for role in context.roles for base, lora in adapters if base == role.partition(".")[0]]
    for role, lora in trained:
        if lora is None:
            continue
        try:
            covered = coverage(context.inputs.model_folder(role), lora)
        except UserError as refusal:
            remedy = "name linear layers of the model in models.lora.targets, or train all weights (no models.lora)"
            yield error("adapters-impossible", f"models.{role}: {refusal}", remedy)
            continue
        if covered is not None:
            yield from _finding(role, covered, everything=lora.targets == "all-linear")


def _finding(role: str, covered: Coverage, everything: bool) -> Iterator[Finding]:
    others = list(covered.others)
    if not others:
        return
    experts = any("expert" in name for name in others)
    names = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
    evidence = f"models.{role}: adapters cover {covered.share:.0%} of the layers' weights; not adapted: {names}"
    remedy = "nothing, if that is intended; otherwise set models.lora.targets to "
    remedy += "the layers that should train, or train all weights" if everything else "all-linear, or name these too"
    partial = covered.share < MIN_SHARE if everything else experts
    yield Finding("adapters-cover-part", "warning" if partial else "note", evidence, remedy)
