"""Arguments that start a vLLM engine, recorded by a stand-in, so that vLLM is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwater.config.builtin import find_recipe
from headwater.config.compute import Compute, Vllm
from headwater.config.recipe import parse_recipe
from headwater.errors import UserError
from headwater.models.policy import Policy
from headwater.sampling import vllm_sampler
from headwater.sampling.vllm_sampler import EnginePool, check_device_count
from tiny import tiny_policy


class Recorded:
    """In the place of `vllm.LLM`: what it was started with, and what its workers were told."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[tuple[str, Any]] = []

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((name, kwargs["weights_iterator"]))

    def reset_prefix_cache(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, 2])
def test_engine_devices_and_weight_transfer_follow_recipe(
    size: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.config.samplers.is_installed", lambda package: True)
    monkeypatch.setattr(vllm_sampler, "_import_vllm", lambda: SimpleNamespace(LLM=Recorded))
    engine = EnginePool(Compute(sampler="vllm", vllm=Vllm(tensor_parallel_size=size)), 64).engine(policy)
    assert engine.llm.settings["tensor_parallel_size"] == size
    engine.load_weights(policy)
    ((name, handed),) = engine.llm.calls
    assert name == "reload_weights"
    assert isinstance(handed, list) == (size > 1)  # workers in processes of their own are sent what a list holds
    state = policy.model.state_dict()
    tensors = dict(handed)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("tied", [True, False])
def test_engine_settings_mark_untied_head(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder's config.json may say otherwise, and the engine would drop the head."""
    monkeypatch.setattr("headwater.config.samplers.is_installed", lambda package: True)
    monkeypatch.setattr(vllm_sampler, "_import_vllm", lambda: SimpleNamespace(LLM=Recorded))
    engine = EnginePool(Compute(sampler="vllm"), 64).engine(tiny_policy(tied=tied))
    assert engine.llm.settings["hf_overrides"] == ({} if tied else {"tie_word_embeddings": False})


def test_engine_refuses_more_devices_than_exist_and_none() -> None:
    with pytest.raises(UserError, match=r"^compute\.vllm\.tensor_parallel_size: 99 devices are requested, and "):
        check_device_count(99, torch.device("cuda"))
    check_device_count(99, torch.device("cpu"))
    raw = find_recipe("pocket", []).model_dump()
    with pytest.raises(UserError, match=r"compute\.vllm\.tensor_parallel_size: .*greater than or equal to 1"):
        parse_recipe({**raw, "compute": {**raw["compute"], "vllm": {"tensor_parallel_size": 0}}}, "recipe x")
