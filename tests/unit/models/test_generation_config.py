"""A generation config that transformers reads and refuses to write does not keep a trained model from being saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.save import save_policy
from tiny import CPU, MODELS, tiny_folder

MENDED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "greedy with sampling settings": (
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        ("do_sample is set to true",),
    ),
    "sampling settings alone": ({"min_p": 0.05}, {"do_sample": True, "min_p": 0.05}, ("do_sample is set to true",)),
    "temperature 0": ({"temperature": 0.0}, {}, ("temperature is left out",)),
    "beam settings without beams": (
        {"length_penalty": 0.8, "early_stopping": True},
        {},
        ("length_penalty is left out", "early_stopping is left out"),
    ),
    "a cache that is off": ({"cache_implementation": "static", "use_cache": False}, {"use_cache": False},
                            ("cache_implementation is left out",)),
    "refused even on reading": ({"max_new_tokens": 0, "top_k": 20, "do_sample": True}, {"top_k": 20, "do_sample": True},
                                ("max_new_tokens is left out",)),
    "an argument of generate": ({"stopping_criteria": None}, {}, ("stopping_criteria is left out",)),
    "a wrong type": ({"max_new_tokens": "many"}, {}, ("max_new_tokens is left out",)),
    "nothing wrong": ({"do_sample": True, "top_p": 0.8, "chat_format": "chatml"},
                      {"do_sample": True, "top_p": 0.8, "chat_format": "chatml"}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_save_resolves_contradictory_generation_config(name: str, tmp_path: Path) -> None:
    entries, wanted, changes = MENDED[name]
    folder = tiny_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({**entries, "eos_token_id": [3, 8]}))
    opened = ModelFolder.open(str(folder), "models.student")
    assert opened.generation_changes == changes
    policy = load_policy(opened, LoadOptions(MODELS, CPU, frozen=False))
    assert policy.stop_ids == (3, 8)
    save_policy(policy, tmp_path / "saved", torch.float32)
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == {**wanted, "eos_token_id": [3, 8]}
    GenerationConfig.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")


def test_generation_settings_move_from_old_config(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 0.7, "do_sample": False, "num_beams": 1}))
    policy = load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=False))
    save_policy(policy, tmp_path / "saved", torch.float32)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "temperature" not in saved and "do_sample" not in saved
    assert (generation["temperature"], generation["do_sample"], generation["eos_token_id"]) == (0.7, True, 3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"eos_token_id": [3, None]}, "eos_token_id must be a token id"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"eos_token_id": 10**30}, "eos_token_id must be a token id"),
        ({"eos_token_id": list(range(100_000))}, "it has over 500 entries or 262,144 characters"),
        ({f"entry{n}": 1 for n in range(1000)}, "it has over 500 entries or 262,144 characters"),
    ],
)
def test_hostile_generation_config_is_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"models.student: the generation config .* cannot be read .{message}"):
        ModelFolder.open(str(folder), "models.student").stop_ids  # noqa: B018
