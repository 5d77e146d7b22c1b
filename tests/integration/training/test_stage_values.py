"""Stage settings that change what a stage trains and on which prompts: `lora` and `prompts`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.builtin import find_recipe
from headwater.models.folder import ModelFolder
from headwater.runs.inputs import RunInputs
from runs import call, load_json, node, rows, sets, tiny


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")
def test_adapter_of_one_stage_is_merged_before_next_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = ("stages.warmup.lora={r: 2, alpha: 4}", "stages.warmup.optim.lr=0.01")
    assert tiny("run", out, "--arm", "bridge", changes=changes).code == 0
    folders = {stage: node(out, "bridge", stage) / "model" for stage in ("warmup", "opd")}
    assert not any((folder / "adapter_config.json").exists() for folder in folders.values())
    start = Path(ModelFolder.open("pocket:qwen3-student", "models.student").path)
    weights = {name: load_file(folder / "model.safetensors") for name, folder in {**folders, "start": start}.items()}
    ranks = {}
    for name, before in weights["start"].items():
        warmed, last = (weights[stage][name].double() - before.double() for stage in ("warmup", "opd"))
        if before.ndim == 2:
            ranks[name] = tuple(int(torch.linalg.matrix_rank(change, rtol=1e-4)) for change in (warmed, last))
    adapted = {name for name, (warmed, _) in ranks.items() if warmed}
    assert all(ranks[name][0] == 2 for name in adapted) and any("q_proj" in name for name in adapted)
    assert not any("embed" in name for name in adapted)  # an adapter leaves embeddings and norms alone
    assert all(last > 2 for _, last in ranks.values())  # OPD then trains all weights


def test_every_prompt_is_sampled_and_no_further_label_is_read(tmp_path: Path) -> None:
    out, changes = tmp_path / "out", ("stages.opd.prompts=every", "stages.opd.steps=6")
    assert tiny("run", out, "--arm", "bridge", changes=changes).code == 0
    pool = set(RunInputs(find_recipe("pocket", [*sets(*changes)[1::2]])).pool("all"))
    sampled = {row["problem_id"] for step in (node(out, "bridge", "opd") / "rollouts").iterdir() for row in rows(step)}
    assert len(pool) == 16 and sampled - pool and sampled & pool
    labels = load_json(out / "report.json")["arms"]["bridge"]["labels"]
    assert labels["distinct"] <= 16 and call("report", out, "--audit").code == 0
    spends = rows(node(out, "bridge", "opd") / "ledger.jsonl")
    assert not any(row["labels"] for row in spends if row["purpose"] == "train")
