"""Tiny specs of the desk models, and a folder in which they are pretrained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headwater.tasks.word_problems import WordsDials
from tools.pretrain import desk
from tools.pretrain.desk_models import DESK, DeskSpec, shipped_tokenizer

TINY = DeskSpec(
    hidden=32, layers=1, heads=2, kv_heads=1, worked_steps=4, mixture_steps=2, batch=4, width=256, lr=1e-2,
    dials=WordsDials(1, 2, distractors=0),
)  # fmt: skip
TOKENIZER = shipped_tokenizer()


def use_tiny_desk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the specs of the desk models tiny and work in a folder without ./desk; returns the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(desk, "MEASURED_PROBLEMS", 3)
    monkeypatch.setattr(desk, "MEASURED_TOKENS", 8)
    for name in ("student", "teacher"):
        monkeypatch.setitem(DESK, name, replace(TINY, hidden=32 if name == "student" else 48))
    return folder
