"""How vLLM engines are started, fed and shared over ranks, recorded by a stand-in, so that vLLM is not needed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.builtin import find_recipe
from headwater.config.compute import Compute, Vllm
from headwater.config.recipe import parse_recipe
from headwater.distributed.process_group import ProcessGroup
from headwater.errors import UserError
from headwater.models.policy import Policy
from headwater.sampling import vllm_sampler
from headwater.sampling.torch_sampler import OomRetrySampler
from headwater.sampling.vllm_sampler import (
    Engine,
    EnginePool,
    VllmSampler,
    check_device_count,
    check_rank_count,
    engine_error,
    engine_share,
    gather_shares,
)
from tiny import tiny_policy


class Recorded:
    """In the place of `vllm.LLM`: what it was started with, and what its workers were told."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[tuple[str, Any]] = []

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((name, kwargs["weights_iterator"]))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache", None))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))


@pytest.mark.parametrize("size", [1, 2])
def test_engine_devices_and_weight_transfer_follow_recipe(
    size: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.config.samplers.is_installed", lambda package: True)
    monkeypatch.setattr(vllm_sampler, "_import_vllm", lambda: SimpleNamespace(LLM=Recorded))
    engine = EnginePool(Compute(sampler="vllm", vllm=Vllm(tensor_parallel_size=size)), 64).engine(policy)
    assert engine.llm.settings["tensor_parallel_size"] == size
    engine.load_weights(policy)
    (name, handed), (last, _) = engine.llm.calls
    assert (name, last) == ("reload_weights", "reset_prefix_cache")
    assert isinstance(handed, list) == (size > 1)  # workers in processes of their own are sent what a list holds
    state = policy.model.state_dict()
    tensors = dict(handed)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in state)


def test_sleeping_engine_wakes_weights_then_cache_and_drops_both(policy: Policy) -> None:
    engine = Engine(Recorded(), sleeps=True)
    policy.model.requires_grad_(False)
    for _ in range(2):  # it has dropped the weights of a frozen policy too
        engine.load_weights(policy)
        engine.sleep()
    names = ["wake_up", "reload_weights", "wake_up", "reset_prefix_cache", "sleep"]
    assert [name for name, _ in engine.llm.calls] == 2 * names
    assert [value for name, value in engine.llm.calls if name in ("wake_up", "sleep")] == 2 * [
        ["weights"],
        ["kv_cache"],
        2,
    ]


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 1), (4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_ranks_of_one_engine_share_requests_and_first_returns_them(ranks: int, size: int, count: int) -> None:
    requests: list[Any] = list(range(count))
    groups = [ProcessGroup(rank, ranks) for rank in range(ranks)]
    shares = [list(engine_share(requests, group, size)) for group in groups]
    assert all(shares[rank] == shares[rank - rank % size] for rank in range(ranks))
    sent = [Recipient(rank, []) for rank in range(ranks)]
    for recipient, share in zip(sent, shares, strict=True):
        gather_shares(share, recipient, size)  # type: ignore[arg-type]
    everyone = Recipient(0, [share for recipient in sent for share in recipient.shares])
    assert gather_shares(shares[0], everyone, size) == requests  # type: ignore[arg-type]


class Recipient:
    """In the place of a process group: keeps what a rank sends, and returns what the others sent before."""

    def __init__(self, rank: int, shares: list[Any]) -> None:
        self.rank, self.shares, self.others = rank, list[Any](), shares

    def all_gather(self, share: Any) -> list[Any]:
        self.shares.append(share)
        return self.others


def test_rank_count_without_whole_engines_is_refused() -> None:
    check_rank_count(2, 8)
    with pytest.raises(UserError, match=r"^compute\.vllm\.tensor_parallel_size: 3 does not divide the 8 processes"):
        check_rank_count(3, 8)


def test_policy_of_one_rank_among_several_gets_embedded_sampler(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preflight runs on the first rank alone, and an engine would wait for the others."""
    recipe = find_recipe("pocket", ["compute.sampler=vllm"])
    assert isinstance(vllm_sampler.make_factory(recipe)(policy), VllmSampler)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    make_sampler = vllm_sampler.make_factory(recipe)
    assert isinstance(make_sampler(policy), OomRetrySampler)
    assert isinstance(make_sampler(replace(policy, ranks=ProcessGroup(0, 2))), VllmSampler)
    with pytest.raises(UserError, match="3 does not divide the 2 processes"):
        vllm_sampler.make_factory(find_recipe("pocket", ["compute.vllm.tensor_parallel_size=3"]))


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711"), 4, "another process of this run was lost"),
        (torch.OutOfMemoryError("CUDA out of memory."), 4, "memory ran out in vLLM's engine of memory"),
        (
            ValueError("Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory"),
            4,
            "memory ran",
        ),
        (ValueError("No available memory for the cache blocks."), 4, "memory ran out in vLLM's engine of memory"),
        (ValueError("Head size 16 is not supported"), 2, "compute.sampler: vllm cannot run memory \\(Head size 16"),
    ],
)
def test_engine_errors_name_lost_ranks_full_devices_and_models(
    error: Exception, code: int, sentence: str, policy: Policy
) -> None:
    result = engine_error(policy, error)
    assert result.exit_code == code
    assert re.match(sentence, str(result)) and "\n" not in str(result)


def test_engine_sampling_ahead_reads_weights_from_shared_file(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: dict[str, torch.Tensor] = {}

    class Reader(Recorded):
        def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
            assert name == "reload_weights"
            (path,) = Path(kwargs["weights_path"]).iterdir()
            self.calls.append((name, path))
            handed.update(load_file(path))

    monkeypatch.setattr("headwater.config.samplers.is_installed", lambda package: True)
    monkeypatch.setattr(vllm_sampler, "_import_vllm", lambda: SimpleNamespace(LLM=Reader))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engine = EnginePool(Compute(sampler="vllm", overlap=1), 64).engine(policy)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1" and engine.own_process and not engine.sleeps
    engine.load_weights(policy)
    state = policy.model.state_dict()
    assert handed.keys() == state.keys() and all(torch.equal(handed[key], state[key]) for key in state)
    assert not engine.llm.calls[0][1].parent.exists()


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
