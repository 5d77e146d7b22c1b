"""Doctor checks of what a run could learn from: answers that a grader finds, teachers that differ from their student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from headwater.config.builtin import find_recipe
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.doctor.signal_checks import answers_found, distillation_first, early_stop, own_start, teacher_is_student
from headwater.runs.inputs import RunInputs
from runs import TINY
from tiny import rollout_of

POCKET = Path(__file__).parents[3] / "src" / "headwater" / "pocket"


def findings(
    check: Callable[[DoctorContext], Any], arms: Sequence[str], *changes: str, out: Path = Path("out")
) -> list[Finding]:
    with RunInputs(find_recipe("pocket", [*TINY, *changes]), need_answers=False) as inputs:
        context = DoctorContext(inputs, tuple(arms), (0,), out)
        try:
            return list(check(context))
        finally:
            context.close()


# The teacher is the student -------------------------------------------------------------------------------------------


def copied_student(folder: Path) -> str:
    """The student's weights in another folder and another file layout: the folders have different fingerprints."""
    shutil.copytree(POCKET / "qwen3-student", folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "copied": "yes"})
    (folder / "notes.txt").write_text("a copy")
    return f"models.teacher={folder}"


@pytest.mark.parametrize("copied", [False, True], ids=["same_folder", "same_weights"])
def test_student_as_its_own_teacher_is_warning_with_kl_and_steps(copied: bool, tmp_path: Path) -> None:
    same = copied_student(tmp_path / "copy") if copied else "models.teacher=pocket:qwen3-student"
    (finding,) = findings(teacher_is_student, ["raw_teacher"], same)
    assert (finding.name, finding.severity) == ("teacher-is-student", "warning")
    assert "KL(student‖teacher) is 0 nats a token" in finding.evidence
    assert "warmup (2 steps) and opd (2 steps) distill it as it is: they would change nothing" in finding.evidence
    assert "direct_grpo" in finding.remedy


def test_student_as_its_own_teacher_before_teacher_rl_is_note() -> None:
    (finding,) = findings(teacher_is_student, ["bridge"], "models.teacher=pocket:qwen3-student")
    assert finding.severity == "note" and "until the teacher is trained on the labels" in finding.evidence


def test_different_teacher_gives_no_finding() -> None:
    assert findings(teacher_is_student, ["raw_teacher", "bridge"]) == []


@pytest.mark.parametrize(
    ("weights", "words", "expected"),
    [
        ("{start: 1}", (), ["start-teaches-nothing"]),
        ("{start: 1, teacher: 1, base_teacher: -1}", (), ["start-teaches-nothing"]),  # the teacher was not trained
        ("{start: 0.5, teacher: 0.5}", (), []),
        ("{start: 1}", ("prompt.teacher={template: 'Solve: {problem}'}",), []),
    ],
)
def test_start_as_only_teacher_in_same_words_is_warning(
    weights: str, words: tuple[str, ...], expected: list[str]
) -> None:
    warnings = findings(own_start, ["raw_teacher"], f"stages.opd.dense.teacher_weights={weights}", *words)
    assert [finding.name for finding in warnings] == expected


# Distilled before it is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "evidence"),
    [
        (
            ["raw_teacher"],
            "warmup (2 steps) and opd (2 steps) distill models.teacher as it is; 16 labels could train it first",
        ),
        (["opd_then_rl"], "opd (2 steps) distill models.teacher as it is; 16 labels could train it first"),
        (["raw_teacher", "bridge"], None),  # the study compares both
        (["bridge"], None),
        (["direct_grpo"], None),
    ],
)
def test_untrained_teacher_with_labels_is_note(arms: list[str], evidence: str | None) -> None:
    given = findings(distillation_first, arms)
    expected = [] if evidence is None else [("teacher-not-trained", "note", evidence)]
    assert [(finding.name, finding.severity, finding.evidence) for finding in given] == expected


# Answers --------------------------------------------------------------------------------------------------------------


def answers(texts: Sequence[str], arms: Sequence[str], **fields: Any) -> list[Finding]:
    """Findings for a model whose completions, in place of sampled ones, are these texts of task `sums`."""
    rollouts = [replace(rollout_of((1, 2), (5,), sample), finish="stop") for sample in range(len(texts))]
    rollouts = [replace(rollout, **fields) for rollout in rollouts]

    def completion(ids: Any) -> str:
        return next(remaining)

    remaining = iter(texts)
    sample: Any = SimpleNamespace(rollouts=rollouts)
    with (
        mock.patch.object(DoctorContext, "sample", return_value=sample),
        mock.patch.object(DoctorContext, "prompter", return_value=SimpleNamespace(completion=completion)),
    ):
        return findings(answers_found, arms)


def test_completions_without_answers_are_warning_with_their_number() -> None:
    (finding,) = answers(["17+45", "47", "hm", "=47"], ["direct_grpo"])
    assert (finding.name, finding.severity) == ("no-answers", "warning")
    assert (
        "models.student: the grader of task sums finds no answer in 3 of 4 sampled completions that ended by themselves, and "
        "stage student_rl rewards"
    ) in finding.evidence


@pytest.mark.parametrize(
    ("texts", "arms", "fields"),
    [
        (["47", "47", "=1", "=2"], ["direct_grpo"], {}),  # half of them have an answer, right or wrong
        (["47"] * 3, ["direct_grpo"], {}),  # too few to judge
        (["47"] * 8, ["direct_grpo"], {"finish": "length"}),  # cut: the answer may have been to come
    ],
)
def test_completions_with_answers_or_too_few_give_no_finding(texts: Any, arms: Any, fields: dict[str, Any]) -> None:
    assert answers(texts, arms, **fields) == []


def test_student_distilled_before_its_rl_is_not_judged() -> None:
    names = [finding.evidence.split(":")[0] for finding in answers(["47"] * 16, ["bridge_rl"])]
    assert names == ["models.teacher"]


# Stopped by chance ----------------------------------------------------------------------------------------------------

FEW_GROUPS = (
    "guards.no_signal=stop",
    "guards.patience=2",
    "stages.teacher_rl.batch_size=8",
    "stages.teacher_rl.group_size=4",
)


def test_stage_with_few_groups_in_window_of_guard_is_warned_of() -> None:
    """2 steps of 2 problems: all 4 groups are silent in 0.85^4 = 52 % of runs; with 16 problems a step in 0.85^32 = 0.6 %."""
    (finding,) = findings(early_stop, ["bridge"], *FEW_GROUPS)
    assert (finding.name, finding.severity) == ("early-stop-likely", "warning")
    assert (
        "none of its first 4 groups (2 steps of 2 problems)" in finding.evidence and "52% of runs" in finding.evidence
    )
    assert not findings(early_stop, ["bridge"], *FEW_GROUPS, "stages.teacher_rl.batch_size=64")


def test_early_stop_is_not_judged_where_guard_cannot_stop() -> None:
    assert not findings(early_stop, ["bridge"], *FEW_GROUPS, "guards.no_signal=continue")
    assert not findings(early_stop, ["bridge"], *FEW_GROUPS, "guards.patience=99")  # the stage is shorter
    assert not findings(early_stop, ["raw_teacher"], *FEW_GROUPS)  # no stage with rewards


def test_early_stop_is_estimated_from_probe_in_folder(tmp_path: Path) -> None:
    share = {"teacher": 0.5, "student": 0.02}
    models = {role: {"informative": {"mean": mean}} for role, mean in share.items()}
    (tmp_path / "probe.json").write_text(json.dumps({"models": models}))
    assert not findings(early_stop, ["bridge"], *FEW_GROUPS, out=tmp_path)  # 0.5^4 = 6 %
    student = [change.replace("teacher_rl", "student_rl") for change in FEW_GROUPS]
    (finding,) = findings(early_stop, ["direct_grpo"], *student, out=tmp_path)
    assert "2% of models.student's groups, as `headwater probe` measured" in finding.evidence
    assert "92% of runs" in finding.evidence  # 0.98^4
