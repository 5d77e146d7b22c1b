"""`doctor` and preflight as commands: findings, refusals, exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwater.config.builtin import find_recipe
from headwater.doctor import checks
from headwater.doctor.checks import CHECKS, Check, Examination
from headwater.doctor.context import DoctorContext
from headwater.doctor.resource_checks import stage_files
from headwater.report.html import Page
from headwater.runs.node import base_of
from headwater.runs.setup import prepared
from qwen import END, PAD, PLAIN, qwen_folder
from runs import TINY, call, tiny

# Nothing wrong ----------------------------------------------------------------------------------------------------------


def test_doctor_command_lists_its_checks_and_exits_0(tmp_path: Path) -> None:
    result = call("doctor", "pocket", "--out", tmp_path / "out", "--set", "compute.threads=1", "--verbose")
    assert result.code == 0, result.err
    for check in CHECKS:
        assert check.title in result.out
    assert not (tmp_path / "out").exists()


# Tokenizers, stop ids, templates ----------------------------------------------------------------------------------------


def test_missing_model_folder_is_doctor_finding_and_run_exit_2(tmp_path: Path) -> None:
    missing = ("--set", f"models.teacher={tmp_path / 'nowhere'}")
    result = call("doctor", "pocket", "--json", *missing)
    answer = json.loads(result.out)
    assert result.code == 3 and not answer["ok"]
    assert [finding["name"] for finding in answer["findings"]] == ["model-unreadable"]  # once, and no consequence of it
    assert "data files" in answer["checked"] and "student taught by itself" in answer["unchecked"]
    ran = tiny("run", tmp_path / "out", *missing, whole=True)
    assert ran.code == 2 and "is no folder here" in ran.err


def test_unreachable_hub_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = json.loads(call("doctor", "pocket", "--json", "--set", "models.teacher=Qwen/Nowhere-8B").out)
    (finding,) = answer["findings"]
    assert finding["name"] == "model-unreadable"
    assert "Qwen/Nowhere-8B is no folder here, and the hub cannot be reached (HF_HUB_OFFLINE is set)" in str(finding)


# run, and the table -----------------------------------------------------------------------------------------------------


def test_run_refuses_before_writing_and_names_remedy(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "base", eos="<|endoftext|>")
    teacher = qwen_folder(tmp_path / "instruct", ends=[END, PAD])
    result = tiny(
        "run", tmp_path / "out", "--set", f"models.student={student}", "--set", f"models.teacher={teacher}", whole=True
    )
    assert result.code == 3 and "error stop-sets-differ" in result.err and "generation_config.json" in result.err
    assert not (tmp_path / "out").exists()


def test_run_refuses_recipe_mistake_in_one_sentence_and_exits_2(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "one")
    teacher = qwen_folder(tmp_path / "other", template=PLAIN.replace("assistant;", "assistant:"))
    result = tiny("run", tmp_path / "out", "--set", f"models.student={student}", "--set", f"models.teacher={teacher}")
    assert result.code == 2 and len(result.complaints) == 1
    assert (
        "models.student and models.teacher: their chat templates give different ids for the same problem" in result.err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_run_prints_doctor_warnings_and_continues(tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--arm", "direct_grpo", "--set", "prompt.system=Add up.", whole=True)
    assert result.code == 0, result.err
    assert "warning system-without-effect: models.student" in result.err and "pad-is-eos" not in result.err


@pytest.mark.usefixtures("undrawn")
def test_finished_run_skips_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny("run", tmp_path / "out", "--arm", "direct_grpo", whole=True).code == 0
    monkeypatch.setattr(checks, "examine", lambda *given: pytest.fail("the doctor was asked again"))
    assert tiny("run", tmp_path / "out", "--arm", "direct_grpo", whole=True).code == 0


def test_resumed_run_repeats_only_machine_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[int] = []

    def examine(context: DoctorContext, checks: Sequence[Check], *tell: object) -> Examination:
        examined.append(len(checks))
        return Examination((), (), ())

    monkeypatch.setattr(checks, "examine", examine)
    monkeypatch.setattr("headwater.report.html.page", lambda *given: Page(""))
    out, options = tmp_path / "out", ("--arm", "direct_grpo")
    ended = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("headwater.pipeline.reuse_nodes", interrupt)
            ended.append(tiny("run", out, *options, whole=True))
    changed = tiny("run", out, *options, changes=["guards.patience=9"], whole=True)
    assert [result.code for result in (*ended, changed)] == [130, 130, 0]
    assert examined[1] < 4 < examined[0] == examined[2]
    line = "recipe, models and data passed preflight when this run began"
    assert [line in result.err for result in (*ended, changed)] == [False, True, False]


def interrupt(*given: object) -> None:
    raise KeyboardInterrupt


# Disk and memory against runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "lora"),
    [("direct_grpo", "null"), ("direct_grpo", "{r: 4}"), ("bridge_rl", "{r: 4, output: adapter, roles: [student]}")],
)
def test_disk_estimate_equals_usage_of_run(arm: str, lora: str, tmp_path: Path) -> None:
    """Weights and checkpoints of every stage within a fifth; the small files beside them are not estimated."""
    changes = [f"models.lora={lora}", "stages.student_rl.checkpoint_every=1"]
    with prepared(find_recipe("pocket", [*TINY, *changes]), [arm], [0]) as (plan, inputs):
        shapes = {role: inputs.shape(role) for role in ("teacher", "student")}
        estimated = {
            plan.names[node]: stage_files(node, inputs, shapes[base_of(node.start)])
            for node in plan.order()
            if node.kind == "train"
        }
    assert tiny("run", tmp_path / "out", "--arm", arm, changes=changes).code == 0
    for name, (model, checkpoint, kept) in estimated.items():
        folder = tmp_path / "out" / "nodes" / name
        weights, checkpoints = (
            sum(path.stat().st_size for path in (folder / part).rglob("*.safetensors"))
            for part in ("model", "checkpoint")
        )
        assert len(list((folder / "checkpoint").iterdir())) == kept == (2 if "student_rl" in name else 1)
        assert weights == pytest.approx(model, rel=0.2), name
        assert checkpoints == pytest.approx(kept * checkpoint, rel=0.2), name
    assert len(estimated) == (1 if arm == "direct_grpo" else 4)
