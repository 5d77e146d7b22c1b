"""Untrusted model folders given to `run` and `doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwater.models import prompts
from runs import call, sets, tiny
from tiny import tiny_folder
from untrusted import HOSTILE_TEMPLATES, TouchOnUnpickle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "weights.pt", "old.PTH", "optimizer.ckpt", "x.pkl", "training_args.bin"]
)
def test_pickle_next_to_safetensors_is_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": TouchOnUnpickle(tmp_path / "touched")}, folder / name)
    result = tiny("run", tmp_path / "out", changes=(f"models.student={folder}",))
    assert result.code == 2 and len(result.complaints) == 1
    assert all(text in result.err for text in ("models.student", str(folder), name, "a pickle", "*.safetensors"))
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["attribute", "its own error", "loops"])
def test_doctor_bounds_hostile_chat_template(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 1.0)
    (folder / "chat_template.jinja").write_text(HOSTILE_TEMPLATES[name], encoding="utf-8")
    result = call("doctor", "pocket", "--out", tmp_path / "out", *sets(f"models.student={folder}"))
    assert result.code in (2, 3) and "chat template" in result.out + result.err and "Traceback" not in result.err
