"""Checks of teachers: tags of a normalized loss, replicas of a server, tokens that the student chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater.config.builtin import find_recipe
from headwater.doctor import teacher_checks
from headwater.doctor.checks import CHECKS, examine
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.runs.inputs import RunInputs
from runs import TINY
from serving import Answering, serving
from tiny import CPU, MODELS

SERVED = ("stages.warmup.dense.top_k=4", "stages.opd.dense.top_k=4", "compute.server.retries=0")


def findings_of(check: object, out: Path, *changes: str) -> tuple[Finding, ...]:
    """Findings of one check of the tiny pocket recipe's arm `raw_teacher`."""
    inputs = RunInputs(find_recipe("pocket", [*TINY, *changes]), need_answers=False)
    with inputs:
        result = examine(
            DoctorContext(inputs, ("raw_teacher",), (0,), out), [row for row in CHECKS if row.run is check]
        )
    return result.findings


@pytest.mark.parametrize("changes", [(), ("stages.opd.dense.normalize=tags",)])
def test_loss_normalized_by_tag_needs_several_tags(changes: tuple[str, ...], tmp_path: Path) -> None:
    findings = findings_of(teacher_checks.normalized_tags, tmp_path, *changes)
    assert [finding.evidence for finding in findings] == [
        "stages.opd.dense.normalize: is tags, and all problems have the tag 'sums'; leave it out" for _ in changes
    ]


@pytest.fixture(scope="module")
def pocket_teacher(pocket_folder: Path) -> Policy:
    folder = ModelFolder.open(str(pocket_folder / "qwen3-teacher"), "models.teacher")
    return load_policy(folder, LoadOptions(MODELS, CPU, frozen=True))


def entries_of(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for choice in answer["choices"]:
        for position in choice.get("prompt_logprobs", [])[1:]:
            yield from position.values()


@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_replicas_differing_by_more_than_signal_are_refused(
    noise: float, pocket_teacher: Policy, tmp_path: Path
) -> None:
    good, calls = Answering(pocket_teacher), [0]

    def balanced(path: str, body: dict[str, Any] | None) -> Any:
        answer = good(path, body)
        if "prompt_logprobs" in (body or {}):
            calls[0] += 1
            for entry in entries_of(answer):  # every other replica holds another model
                entry["logprob"] -= noise * (calls[0] % 2)
        return answer

    with serving(balanced) as there:
        findings = findings_of(teacher_checks.replicas, tmp_path, *SERVED, f"models.teacher={there.url}")
    assert [finding.name for finding in findings] == ["server-replicas-differ"] * bool(noise)
    assert calls[0] == teacher_checks.REPLICA_CALLS
    for finding in findings:
        assert "4 answers for the same" in finding.evidence and "differ by up to 8 nats a token" in finding.evidence


@pytest.mark.parametrize(("scale_out", "names"), [(True, []), (False, ["server-without-candidates"])])
def test_server_without_candidate_scores_is_noted(
    scale_out: bool, names: list[str], pocket_teacher: Policy, tmp_path: Path
) -> None:
    with serving(Answering(pocket_teacher, scale_out=scale_out)) as there:
        changes = (*SERVED, "stages.opd.dense.candidates=both", f"models.teacher={there.url}")
        findings = findings_of(teacher_checks.candidates, tmp_path, *changes)
    assert [(finding.name, finding.severity) for finding in findings] == [(name, "note") for name in names]


def test_candidates_for_local_teacher_are_refused(tmp_path: Path) -> None:
    findings = findings_of(teacher_checks.candidates, tmp_path, *SERVED, "stages.opd.dense.candidates=both")
    assert [finding.name for finding in findings] == ["cannot-run"] and "is not behind a server" in findings[0].evidence
