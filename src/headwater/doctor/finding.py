"""What the doctor reports: a named finding with its severity, evidence and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from headwater.runs.read_once import InputError, Part


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, before any time is spent on a run.

    name      kebab-case and stable; docs/checks.md lists every one
    severity  `error` refuses the run; `warning` is shown; `note` is in the doctor's own list only
    evidence  what was seen, with its numbers
    remedy    what to do about it

    Example: `note("pad-is-eos", "models.student: id 3 both pads and ends", "nothing: …")`.
    """

    name: str
    severity: Literal["error", "warning", "note"]
    evidence: str
    remedy: str

    def text(self) -> str:
        return f"{self.severity} {self.name}: {self.evidence}\n    -> {self.remedy}"


def error(name: str, evidence: str, remedy: str) -> Finding:
    return Finding(name, "error", evidence, remedy)


def warning(name: str, evidence: str, remedy: str) -> Finding:
    return Finding(name, "warning", evidence, remedy)


def note(name: str, evidence: str, remedy: str) -> Finding:
    return Finding(name, "note", evidence, remedy)


def told_once(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Merge the findings that say the same of several models.

    Example: `models.student: id 2 pads` and `models.teacher: id 2 pads` become `models.student and models.teacher: id 2 pads`.
    """
    models: dict[Finding, list[str]] = {}
    for finding in findings:
        model, colon, rest = finding.evidence.partition(": ")
        one_model = bool(colon) and re.fullmatch(r"models\.[\w.-]+", model) is not None
        key = replace(finding, evidence=rest) if one_model else finding
        models.setdefault(key, []).extend([model] if one_model else [])
    return tuple(
        replace(finding, evidence=f"{' and '.join(named)}: {finding.evidence}") if named else finding
        for finding, named in models.items()
    )


def texts(findings: Iterable[Finding]) -> list[str]:
    """The findings in words; a remedy that several of one name share follows the last of them."""
    by_remedy: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_remedy.setdefault((finding.name, finding.remedy), []).append(finding)
    return [
        line
        for *others, last in by_remedy.values()
        for line in (*(other.text().partition("\n")[0] for other in others), last.text())
    ]


UNREADABLE: Mapping[Part, tuple[str, str]] = {
    "task": ("task-unusable", "set task to sums, maths, or package.module:function of a module that imports from here"),
    "data": ("data-unreadable", "fix the file or the field named in the message"),
    "labels": ("label-budget-over-pool", "lower labels.budget, or add labelled problems"),
    "device": ("device-missing", "set compute.device to auto or cpu, or run where a GPU is visible"),
    "hub": (
        "model-unreadable",
        "there: `hf download NAME --local-dir FOLDER` (pip install huggingface_hub); then name the folders in the recipe",
    ),
    "model": ("model-unreadable", "name a folder with config.json, *.safetensors and a tokenizer, or a hub id"),
    "tokenizer": ("model-unreadable", "save tokenizer.json and tokenizer_config.json next to the weights"),
    "config": ("model-unreadable", "fix or replace its config.json"),
    "generation config": ("model-unreadable", "fix its generation_config.json"),
    "weights": ("model-unreadable", "download or save the weights again: they are damaged or do not fit config.json"),
    "architecture": (
        "model-unsupported",
        "name a model of a kind that docs/models.md lists, or follow the message",
    ),
    "server": ("server-unusable", "check that `vllm serve` runs at that address and has finished loading"),
    "engine": ("engine-unusable", "set compute.sampler=torch, or fix the cause named in the message"),
    "plan": ("cannot-run", "fix the cause named in the message"),
}
"""Name and remedy of the finding for each input that cannot be read; the evidence is the error's sentence."""


def unreadable(failure: InputError) -> Finding:
    name, remedy = UNREADABLE[failure.part]
    return error(name, str(failure), remedy)


def try_each(*reads: Callable[[], object]) -> Iterator[Finding]:
    """A finding for each of the reads that fails."""
    for read in reads:
        try:
            read()
        except InputError as failure:
            yield unreadable(failure)
