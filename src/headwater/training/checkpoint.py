"""Checkpoints: one atomic folder with weights, optimizer state, step and log offsets.

No random state and no sampler position is saved: every draw is named by (seed, stage, step, problem, sample), and the learning
rate follows from the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file, save_model

from headwater.distributed import checkpoint_io
from headwater.distributed.checkpoint_io import ADAPTER_FILE, MODEL_FILE, OPTIMIZER_FILE
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.storage import fault_points
from headwater.storage.files import ASIDE, Logs, atomic_folder, file_sums, first_damaged, read_json, write_json
from headwater.storage.node_dir import NodeDir

KEPT = 2
"""Checkpoints that stay on disk: the newest may turn out to be damaged."""


class CheckpointPart(Protocol):
    """State of a stage besides weights and optimizer, which writes its own file. Every rank saves and loads, in the same folder."""

    def save(self, folder: Path, ranks: ProcessGroup) -> None: ...
    def load(self, folder: Path, ranks: ProcessGroup) -> None: ...


def save_checkpoint(
    node: NodeDir,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    logs: Logs | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    parts: Sequence[CheckpointPart] = (),
) -> None:
    """Write a checkpoint after `step` finished steps, then delete all but the last two.

    The logs and the files of the steps since the last checkpoint are synced to disk first. With several ranks each writes its
    shard into the first rank's folder.
    """
    if not ranks.is_main:
        shared = Path(ranks.broadcast(""))
        checkpoint_io.save(shared, model, optimizer, ranks)
        for part in parts:
            part.save(shared, ranks)
        ranks.broadcast(None)  # wait until the checkpoint is complete
        return
    before = [int(path.name) for path in node.checkpoints() if int(path.name) < step]
    node.sync_steps(before[0] if before else 0, step)
    fault_points.failpoint("checkpoint.begun")
    with atomic_folder(node.checkpoint(step)) as folder:
        if ranks.single_process:
            write_single_process(folder, model, optimizer)
        else:
            ranks.broadcast(str(folder.resolve()))
            checkpoint_io.save(folder, model, optimizer, ranks)
        for part in parts:
            part.save(folder, ranks)
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
    """Delete all but the last two checkpoints."""
    for old in node.checkpoints()[KEPT:]:
        shutil.rmtree(old)


def remove_checkpoints(node: NodeDir) -> None:
    """Delete all checkpoints of a finished node: first under another name, so that a killed process leaves none that is damaged."""
    folder = node.checkpoint(0).parent
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        fault_points.failpoint("node.cleaning")
        shutil.rmtree(aside)


def write_single_process(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Write weights (of a model with frozen ones, LoRA, those that train) and optimizer state of a single process."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        save_model(model, str(folder / MODEL_FILE))
    else:
        adapter = checkpoint_io.checkpoint_tensors(model)
        save_file({name: tensor.detach().contiguous() for name, tensor in adapter.items()}, folder / ADAPTER_FILE)
    fault_points.failpoint("checkpoint.weights")
    tensors = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    if tensors:
        save_file(tensors, folder / OPTIMIZER_FILE)


def load_checkpoint(
    node: NodeDir,
    model: Any,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None] = lambda line: None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    parts: Sequence[CheckpointPart] = (),
) -> int:
    """Load the newest intact checkpoint into model and optimizer; return its number of finished steps, 0 without one.

    A checkpoint that is damaged, or whose logs are, is reported and the one before it is used. The number of ranks may
    differ from the one that wrote it. Raises UserError naming the damaged file when no checkpoint is intact.
    """
    chosen = ranks.broadcast(newest_intact(node, say) if ranks.is_main else None)
    if chosen is None:
        return 0
    folder = Path(chosen)
    state = read_json(folder / "state.json")
    checkpoint_io.load(folder, state, model, optimizer, ranks)
    for part in parts:
        part.load(folder, ranks)
    return int(state["step"])


def newest_intact(node: NodeDir, say: Callable[[str], None]) -> str | None:
    """Folder of the newest intact checkpoint; None without any checkpoint. Raises UserError when none is intact."""
    damaged: list[str] = []
    for folder in node.checkpoints():
        broken = damage_of(node, folder)
        if broken is None:
            return str(folder.resolve())
        damaged.append(broken)
        say(f"{broken}: is damaged; checkpoint {folder.name} is skipped for the one before it")
    if damaged:
        raise UserError(
            f"{damaged[0]}: is damaged (its checksum differs) and no older checkpoint is intact; "
            f"delete {node.path} to start the stage again"
        )
    return None


def damage_of(node: NodeDir, folder: Path) -> str | None:
    """First damaged file of a checkpoint or of the logs it refers to; None when all are intact."""
    try:
        sums = read_json(folder / "sums.json")
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"sums.json"}
        if not isinstance(sums, dict) or names - sums.keys():
            return str(folder / "sums.json")
        broken = first_damaged(folder, {name: (None, sum_) for name, sum_ in sums.items()}, None)
        if broken is None:
            broken = node.damaged_before(read_json(folder / "state.json").get("logs", {}))
    except UserError:
        return str(folder / "sums.json")
    return None if broken is None else str(broken)
