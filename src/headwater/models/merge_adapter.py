"""An adapter and its base as one plain model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from headwater.config.recipe import Models
from headwater.errors import UserError
from headwater.models import lora
from headwater.models import policy as model
from headwater.storage.run_dir import written_aside


def merged(adapter: Path, out: Path, dtype: str) -> None:
    """Raises UserError where `adapter` is none, `out` is there, or the adapter does not fit its base."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"merge --dtype {dtype}: must be float32 or bfloat16")
    if not lora.is_adapter(str(adapter)):
        raise UserError(f"merge {adapter}: holds no adapter (adapter_config.json, and no config.json)")
    if out.exists():
        raise UserError(f"merge {adapter}: {out} is there already")
    # Summed in float32 and rounded once.
    models = Models(student=str(adapter), teacher=str(adapter), dtype="float32")
    policy = model.load(str(adapter), "merge", models, torch.device("cpu"), frozen=True)
    with written_aside(out) as aside:
        model.save(policy, aside, getattr(torch, dtype))
