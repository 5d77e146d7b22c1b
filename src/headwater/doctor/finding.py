"""What the doctor reports: a named finding with its severity, evidence and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from headwater.runs.read_once import InputError, Part


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, before any time is spent on a run.

    name      kebab-case and stable; docs/doctor.md lists every one
    severity  `error` refuses the run; `warning` is shown; `note` is in the doctor's own list only
    evidence  what was seen, with its numbers
    remedy    what to do about it

    Example: `Finding("pad-is-eos", "note", "models.student: id 3 both pads and ends", "nothing: …")`.
    """

    name: str
    severity: Literal["error", "warning", "note"]
    evidence: str
    remedy: str

    def text(self) -> str:
        return f"{self.severity} {self.name}: {self.evidence}\n    -> {self.remedy}"


UNREADABLE: Mapping[Part, Finding] = {
    "task": Finding(
        "task-unusable",
        "error",
        "",
        "set task to sums, maths, or package.module:function of a module that imports from this folder",
    ),
    "data": Finding("data-unreadable", "error", "", "fix the file or the field that the sentence names"),
    "labels": Finding("label-budget-over-pool", "error", "", "lower labels.budget, or add labelled problems"),
    "device": Finding(
        "device-missing", "error", "", "set compute.device to auto or cpu, or run where a GPU is visible"
    ),
    "model": Finding(
        "model-unreadable",
        "error",
        "",
        "set the field to a folder with config.json, *.safetensors and a tokenizer, or to a hub id",
    ),
    "tokenizer": Finding(
        "model-unreadable",
        "error",
        "",
        "save the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
    ),
    "config": Finding("model-unreadable", "error", "", "fix or replace its config.json"),
    "generation config": Finding("model-unreadable", "error", "", "fix its generation_config.json"),
    "weights": Finding(
        "model-unreadable",
        "error",
        "",
        "the weights are damaged or do not fit config.json: download or save them again",
    ),
    "server": Finding(
        "server-unusable",
        "error",
        "",
        "check that `vllm serve` runs at that address and has finished loading",
    ),
    "engine": Finding("engine-unusable", "error", "", "set compute.sampler=torch, or fix what the sentence names"),
    "plan": Finding("cannot-run", "error", "", "fix what the sentence names"),
}
"""The finding for each input that cannot be read; the evidence is the error's sentence."""


def unreadable(error: InputError) -> Finding:
    return replace(UNREADABLE[error.part], evidence=str(error))
