"""One atomic folder that holds all a stage needs to go on: weights, optimizer, step.

There is no random state to keep: every draw is named by (seed, stage, step, problem, sample).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from headwater.errors import UserError
from headwater.rundir import NodeDir, file_sums, read_json, write_json, written_aside

KEPT = 2


def save_checkpoint(node: NodeDir, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Write step `step` (the number of finished steps) whole, then drop all but the last two."""
    with written_aside(node.checkpoint(step)) as folder:
        save_model(model, str(folder / "model.safetensors"))
        held = optimizer.state_dict()
        tensors = {
            f"{index}.{key}": value.contiguous()
            for index, state in held["state"].items()
            for key, value in state.items()
        }
        if tensors:
            save_file(tensors, folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": step, "param_groups": held["param_groups"]})
        write_json(folder / "sums.json", file_sums(folder))
    for old in node.checkpoints()[KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(node: NodeDir, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint into model and optimizer; the number of finished steps, 0 when there is none.

    A damaged checkpoint is left out and the one before is used. Raises UserError naming it when none is whole.
    """
    damaged: list[str] = []
    for folder in node.checkpoints():
        if not is_whole(folder):
            damaged.append(str(folder))
            continue
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        load_model(model, str(folder / "model.safetensors"), device=str(next(model.parameters()).device))
        tensors = load_file(folder / "optimizer.safetensors") if (folder / "optimizer.safetensors").exists() else {}
        per_parameter: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            per_parameter.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})
        return int(state["step"])
    if damaged:
        raise UserError(
            f"{damaged[0]}: the checkpoint is damaged (its checksums differ) and no older one is whole; delete it"
        )
    return 0


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are those that were written, by their checksums (which may be damaged themselves)."""
    try:
        sums = read_json(folder / "sums.json")
    except UserError:
        return False
    return bool({name: value for name, value in file_sums(folder).items() if name != "sums.json"} == sums)
