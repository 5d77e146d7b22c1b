"""One atomic folder that holds all a stage needs to go on: weights, optimizer, step, and how far its logs were.

There is no random state and no sampler's position to keep: every draw is named by (seed, stage, step, problem, sample), and
the learning rate by the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from headwater.distributed import checkpoint_io
from headwater.distributed.checkpoint_io import ADAPTER_FILE, MODEL_FILE
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.storage import fault_points
from headwater.storage.files import Logs, file_sums, first_changed
from headwater.storage.run_dir import NodeDir, read_json, write_json, written_aside

KEPT = 2


def trained_part(model: Any) -> dict[str, torch.nn.Parameter] | None:
    """The weights that train, where others are frozen and need not be kept; None where all of them train."""
    named = dict(model.named_parameters())
    trained = {name: one for name, one in named.items() if one.requires_grad}
    return None if len(trained) == len(named) else trained


def save_checkpoint(
    node: NodeDir,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    logs: Logs | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Write step `step` (the number of finished steps) whole, then drop all but the last two.

    What it rests on comes first: the logs and the files of the steps since the last one are flushed to disk before it.
    Where several ranks hold the weights, each writes its part into the first one's folder.
    """
    if not ranks.is_main:
        checkpoint_io.save(Path(ranks.broadcast("")), model, optimizer, ranks)
        ranks.broadcast(None)  # the checkpoint stands
        return
    before = [int(path.name) for path in node.checkpoints()]
    node.sync_steps(before[0] if before else 0, step)
    fault_points.failpoint("checkpoint.begun")
    with written_aside(node.checkpoint(step)) as folder:
        if ranks.single_process:
            write_whole(folder, model, optimizer)
        else:
            ranks.broadcast(str(folder.resolve()))
            checkpoint_io.save(folder, model, optimizer, ranks)
        fault_points.failpoint("checkpoint.optimizer")
        marks, groups = (logs or Logs(node.logs)).marks(), optimizer.state_dict()["param_groups"]
        write_json(folder / "state.json", {"step": step, "param_groups": groups, "logs": marks})
        write_json(folder / "sums.json", file_sums(folder))
        fault_points.failpoint("checkpoint.sums")
    fault_points.failpoint("checkpoint.saved")
    prune(node)
    ranks.broadcast(None)
    fault_points.failpoint("checkpoint.pruned")


def prune(node: NodeDir) -> None:
    """Drop all but the last two."""
    for old in node.checkpoints()[KEPT:]:
        shutil.rmtree(old)


def write_whole(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer of one process alone."""
    adapter = trained_part(model)
    if adapter is None:
        save_model(model, str(folder / MODEL_FILE))
    else:
        save_file({name: one.detach().contiguous() for name, one in adapter.items()}, folder / ADAPTER_FILE)
    fault_points.failpoint("checkpoint.weights")
    tensors = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    if tensors:
        save_file(tensors, folder / "optimizer.safetensors")


def load_checkpoint(
    node: NodeDir,
    model: Any,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None] = lambda line: None,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> int:
    """Load the newest whole checkpoint into model and optimizer; the number of finished steps, 0 when there is none.

    A damaged checkpoint, or one that rests on a damaged log, is named and the one before is used. It does not matter how many
    ranks wrote it. Raises UserError naming the damaged file when none is whole.
    """
    chosen = ranks.broadcast(newest_whole(node, say) if ranks.is_main else None)
    if chosen is None:
        return 0
    folder = Path(chosen)
    state = read_json(folder / "state.json")
    if ranks.single_process and ((folder / MODEL_FILE).exists() or (folder / ADAPTER_FILE).exists()):
        read_whole(folder, state, model, optimizer)
    else:
        checkpoint_io.load(folder, state, model, optimizer, ranks)
    return int(state["step"])


def newest_whole(node: NodeDir, say: Callable[[str], None]) -> str | None:
    """The folder of the newest checkpoint that is what was written; None when there is none. Raises UserError when none is whole."""
    damaged: list[str] = []
    for folder in node.checkpoints():
        broken = damage_of(node, folder)
        if broken is not None:
            damaged.append(broken)
            say(f"{broken}: is damaged, so checkpoint {folder.name} is passed over for the one before")
            continue
        return str(folder.resolve())
    if damaged:
        raise UserError(
            f"{damaged[0]}: is damaged (its checksum differs) and no older checkpoint is whole; "
            f"delete {node.path} to run it again from its start"
        )
    return None


def read_whole(folder: Path, state: Any, model: Any, optimizer: torch.optim.Optimizer) -> None:
    adapter = trained_part(model)
    if adapter is None:
        load_model(model, str(folder / MODEL_FILE), device=str(next(model.parameters()).device))
    else:
        with torch.no_grad():
            for name, tensor in load_file(folder / ADAPTER_FILE).items():
                adapter[name].copy_(tensor)
    tensors = load_file(folder / "optimizer.safetensors") if (folder / "optimizer.safetensors").exists() else {}
    per_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        per_parameter.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})


def damage_of(node: NodeDir, folder: Path) -> str | None:
    """The first damaged file of a checkpoint, or of the logs that it rests on; None when it is whole."""
    try:
        sums = read_json(folder / "sums.json")
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"sums.json"}
        if not isinstance(sums, dict) or names - sums.keys():
            return str(folder / "sums.json")
        broken = first_changed(folder, {name: (None, sum_) for name, sum_ in sums.items()}, None)
        if broken is None:
            broken = node.damaged_before(read_json(folder / "state.json").get("logs", {}))
    except UserError:
        return str(folder / "sums.json")
    return None if broken is None else str(broken)
