"""Runs that train adapters: resume after a kill, node names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headwater.models import adapter_files
from runs import WHOLE_ARM, assert_same, call, infos, load_json, node, rows, sets, tiny
from tests.integration.test_resume import Killed, killed_at
from tiny import same_bits, tiny_folder

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")


# Checkpoints and whole runs -------------------------------------------------------------------------------------------


ADAPTED = (
    "models.lora.r=4", "models.lora.alpha=8", "stages.student_rl.sparse.kl_coef=0.01", "stages.teacher_rl.optim.lr=0.01",
    *(f"stages.{stage}.checkpoint_every=1" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
)  # fmt: skip


@pytest.mark.parametrize(("output", "arm"), [("merged", "direct_grpo"), ("adapter", "bridge_rl")])
def test_lora_run_resumes_bit_for_bit_after_kill(tmp_path: Path, output: str, arm: str) -> None:
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
            ours, expected = map(load_file, both)
            assert same_bits(ours, expected) and len(ours) > 20
    stood_on = load_json(node(tmp_path / "out", arm, "student_rl") / "model" / "adapter_config.json")
    assert stood_on["base_model_name_or_path"].endswith("pocket/qwen3-student")
    evaluated = call("eval", node(tmp_path / "out", arm, "opd") / "model", "--data", data(tmp_path), "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["problems"] == 4


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"1{n}+21", "answer": str(31 + n)}) for n in range(4)))
    return path


def test_lora_settings_change_only_nodes_of_their_role(tmp_path: Path) -> None:
    names = []
    for changes in ((), ("models.lora.roles=[student]",), ("models.lora.r=8",)):
        result = call("run", "pocket", *WHOLE_ARM, "--dry-run", "--json", *sets(*changes))
        names.append({row["node"] for row in json.loads(result.out)})
    full, students, both = ({name for name in node_names if name.startswith("teacher_rl")} for node_names in names)
    assert full == students != both
    assert not {name for name in names[0] & names[1] if name.startswith(("warmup", "opd", "student_rl"))}


# Other layers than nn.Linear, adapters from elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_later_stage_on_other_layers_saves_adapter_equal_in_peft_and_merge(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    from peft import PeftModel

    start = tiny_folder(tmp_path / "base", architecture, **config)
    teacher = tiny_folder(tmp_path / "teacher", architecture, seed=1, **config)
    changes = (
        f"models.student={start}",
        f"models.teacher={teacher}",
        "models.lora.output=adapter",
        "stages.opd.optim.lr=0.05",
    )
    result = tiny("run", tmp_path / "out", "--arm", "opd_only", changes=(*ADAPTED, *changes))
    assert result.code == 0, result.err
    folder, ids = node(tmp_path / "out", "opd_only", "opd") / "model", torch.tensor([[1, 6, 15, 7, 2, 9, 8]])
    assert any(tensor.any() for name, tensor in load_file(folder / adapter_files.WEIGHTS).items() if "lora_B" in name)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), folder)
    merged = call("merge", folder, tmp_path / "merged", "--dtype", "float32")
    assert merged.code == 0, merged.err
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, peft_model(input_ids=ids).logits, rtol=0, atol=2e-5)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(start / "model.safetensors").keys()


def test_adapter_on_changed_base_is_refused_by_every_command(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    start, folder = tiny_folder(tmp_path / "base"), tmp_path / "olora"
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="olora")
    get_peft_model(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), settings).save_pretrained(folder)
    results = [
        call("merge", folder, tmp_path / "merged"),
        call("eval", folder, "--data", data(tmp_path)),
        tiny("run", tmp_path / "out", "--arm", "direct_grpo", changes=(f"models.student={folder}",)),
        tiny("run", tmp_path / "out", "--arm", "bridge", changes=(f"models.teacher={folder}",)),
    ]
    for result in results:
        assert result.code == 2 and "init_lora_weights is 'olora'" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "merged").exists()
