"""Runs that train adapters: resume after a kill, node names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from headwater.models import adapter_files
from runs import assert_same, call, infos, load_json, node, rows, sets, tiny
from tests.integration.test_resume import Killed, killed_at
from tiny import same_bits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")


# Checkpoints and whole runs -------------------------------------------------------------------------------------------


ADAPTED = (
    "models.lora.r=4", "models.lora.alpha=8", "stages.student_rl.sparse.kl_coef=0.01", "stages.teacher_rl.optim.lr=0.01",
    *(f"stages.{stage}.checkpoint_every=1" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
)  # fmt: skip


@pytest.mark.parametrize(("output", "arm"), [("merged", "direct_grpo"), ("adapter", "bridge_rl")])
def test_lora_run_resumes_bit_for_bit_after_a_kill(tmp_path: Path, output: str, arm: str) -> None:
    changes, synced = (*ADAPTED, f"models.lora.output={output}"), []
    with mock.patch("os.fsync", synced.append):
        result = tiny("run", tmp_path / "whole", "--arm", arm, changes=changes)
    assert result.code == 0, result.err
    with mock.patch("os.fsync", killed_at(int(0.6 * len(synced)), lambda descriptor: None)), pytest.raises(Killed):
        tiny("run", tmp_path / "out", "--arm", arm, changes=changes)
    assert tiny("run", tmp_path / "out", "--arm", arm, changes=changes).code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    # The reference of student RL is where it began: not apart at its first step, apart at its second.
    metrics = rows(node(tmp_path / "out", arm, "student_rl") / "metrics.jsonl")
    assert [row["kl_reference"] > 1e-9 for row in metrics] == [False, True]
    if output == "merged":
        return
    for folder, info in infos(tmp_path / "whole"):
        if info["kind"] == "train":
            both = (
                tmp_path / run / "nodes" / folder.name / "model" / adapter_files.WEIGHTS for run in ("out", "whole")
            )
            ours, theirs = map(load_file, both)
            assert same_bits(ours, theirs) and len(ours) > 20
    stood_on = load_json(node(tmp_path / "out", arm, "student_rl") / "model" / "adapter_config.json")
    assert stood_on["base_model_name_or_path"].endswith("pocket/qwen3-student")
    evaluated = call("eval", node(tmp_path / "out", arm, "opd") / "model", "--data", data(tmp_path), "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["problems"] == 4


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"1{n}+21", "answer": str(31 + n)}) for n in range(4)))
    return path


def test_lora_settings_change_only_the_nodes_of_their_role(tmp_path: Path) -> None:
    names = []
    for changes in ((), ("models.lora.roles=[student]",), ("models.lora.r=8",)):
        result = call("run", "pocket", "--dry-run", "--json", *sets(*changes))
        names.append({row["node"] for row in json.loads(result.out)})
    full, students, both = ({name for name in one if name.startswith("teacher_rl")} for one in names)
    assert full == students != both
    assert not {name for name in names[0] & names[1] if name.startswith(("warmup", "opd", "student_rl"))}
