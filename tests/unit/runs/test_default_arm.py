"""Default arm of a run: the folder's own, the probe's advice, the recipe's plateau, else bridge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_runs import ARMS, fake_run
from headwater.config.builtin import find_recipe
from headwater.runs.default_arm import choose_arm
from headwater.storage.files import write_checked

HALF, UNTIL = "labels.split=half", "stages.opd.until={metric: kl_student_teacher}"


def probed(out: Path, arm: str | None, because: str = "the labels go to the student") -> Path:
    out.mkdir()
    (out / "probe.json").write_text(json.dumps({"advice": {"run": {"arm": arm, "because": because}}}))
    return out


@pytest.mark.parametrize(
    ("changes", "arm"), [((), "bridge"), ((HALF,), "bridge"), ((UNTIL,), "bridge"), ((HALF, UNTIL), "bridge_rl")]
)
def test_plateau_and_kept_half_of_labels_together_choose_bridge_rl(
    changes: tuple[str, ...], arm: str, tmp_path: Path
) -> None:
    choice = choose_arm(find_recipe("pocket", list(changes)), tmp_path / "out")
    assert choice.arm == arm
    assert ("stages.opd.until" in choice.because) == (arm == "bridge_rl")


def test_default_sentence_names_arm_stages_and_labels(tmp_path: Path) -> None:
    assert choose_arm(find_recipe("pocket", []), tmp_path).sentence == (
        "arm bridge (GRPO on the teacher → warm-up → OPD): the default, which spends all labels on the teacher; `headwater probe` "
        "checks whether to; choose another with --arm"
    )
    assert "half of the labels" in choose_arm(find_recipe("pocket", [HALF]), tmp_path).sentence


@pytest.mark.parametrize("arm", ["direct_grpo", "bridge_rl", "bridge"])
def test_probe_in_folder_decides_default_arm(arm: str, tmp_path: Path) -> None:
    out = probed(tmp_path / "out", arm)
    choice = choose_arm(find_recipe("pocket", []), out)
    assert choice.arm == arm
    assert choice.because == f"advised by the probe in {out / 'probe.json'}: the labels go to the student"


@pytest.mark.parametrize("text", ['{"advice": {"run": {"arm": null}}}', '{"advice": {}}', "[]", "{", '{"advice": 3}'])
def test_probe_without_arm_to_run_leaves_default_arm(text: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(text)
    assert choose_arm(find_recipe("pocket", []), tmp_path).arm == "bridge"


def test_default_arm_of_folder_with_single_arm_is_its_own(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "bridge_rl")}
    out = fake_run(tmp_path / "run", seeds=(0,), arms=arms, problems=4, steps=2)
    (out / "probe.json").write_text(json.dumps({"advice": {"run": {"arm": "direct_grpo", "because": "x"}}}))
    choice = choose_arm(find_recipe("pocket", []), out)
    assert choice.arm == "bridge_rl" and choice.because == f"{out} holds a run of it"


def test_folder_of_study_has_default_arm(tmp_path: Path) -> None:
    (out := tmp_path / "run").mkdir()
    write_checked(out / "plan.json", {"seeds": [0], "arms": {"replay": {"0": []}, "bridge_rl": {"0": []}}})
    assert choose_arm(find_recipe("pocket", []), out).arm == "bridge"
