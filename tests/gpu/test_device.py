"""One device against float64 on the CPU: losses, packing, sampler, memory, checkpoints (`make gpu` on a machine with a GPU).

Every test runs on the CPU too, which checks its logic; without a GPU its other half is skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwater.config.stage import Sampling
from headwater.errors import TrainingStoppedError
from headwater.losses import token_losses
from headwater.losses.distributions import FromHidden
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.objectives import objective_of
from headwater.losses.output_head import LinearHead
from headwater.losses.token_stats import TokenInputs, TokenStats
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.sampling import fast_decoder, step_graphs
from headwater.sampling.base import requests_for
from headwater.sampling.continuous_batch import ContinuousBatch
from headwater.sampling.decoder import CacheDecoder, decoder_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.token_draws import draw_tokens
from headwater.sampling.torch_sampler import TorchSampler, stop_mask
from headwater.storage.node_dir import NodeDir
from headwater.teachers.scoring import logp_of
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.training.update import make_optimizer, update
from headwater.types import Rollout
from simulated_oom import Room
from tiny import (
    CPU,
    PROMPTS,
    gradient_of,
    largest,
    policy_of,
    same_bits,
    sampled_rows,
    stage_of,
    taught,
    tiny_model,
    weights_of,
)

CUDA = torch.device("cuda")
without_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA device: NOT tested on one"
)
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=without_gpu)]
)
DIVERGENCES = {
    "reverse": token_losses.REVERSE,
    "forward": token_losses.FORWARD,
    "jsd": token_losses.jensen_shannon(0.5),
    "skewed": token_losses.skewed(0.9),
}
TOKENS, WIDTH, VOCABULARY = 96, 64, 4001


def policy_on(
    device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32, kind: str = "qwen3", **more: Any
) -> Policy:
    return policy_of(tiny_model(kind, seed, **more), fingerprint=f"{kind}-{seed}", device=device, dtype=dtype)


# Losses ---------------------------------------------------------------------------------------------------------------


def loss_stage(device: torch.device, dtype: torch.dtype, divergence: str, inputs: list[Tensor]) -> list[Tensor]:
    """The loss, and its gradients to hidden states and head, on inputs that are rounded to bfloat16 for every dtype."""
    hidden, head, teacher_hidden, teacher_head = (part.bfloat16().to(device, dtype) for part in inputs)
    hidden.requires_grad_(), head.requires_grad_()
    targets = (torch.arange(TOKENS) * 37 % VOCABULARY).to(device)
    teacher = FromHidden(teacher_hidden, LinearHead(teacher_head, None, dtype), 0.8)

    def mean(stats: TokenStats, rows: slice) -> Tensor:
        assert stats.divergence_N is not None
        return (stats.divergence_N + 0.3 * stats.logp_N) / TOKENS

    token_inputs = TokenInputs(targets, 0.8, teacher, DIVERGENCES[divergence])
    loss, _ = loss_and_stats(hidden, LinearHead(head, None, dtype), token_inputs, mean, chunk_elements=40 * VOCABULARY)
    loss.backward()
    return [
        loss.detach().cpu().double(),
        *(part.grad.cpu().double() for part in (hidden, head) if part.grad is not None),
    ]


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@on_each_device
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_loss_stage_is_close_to_float64(
    device: torch.device, divergence: str, dtype: torch.dtype, bound: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (TOKENS, 2 * WIDTH), (VOCABULARY, 2 * WIDTH))
    inputs = [
        torch.randn(*shape, generator=generator) * scale for shape, scale in zip(shapes, (1.0, 0.2) * 2, strict=True)
    ]
    expected = loss_stage(CPU, torch.float64, divergence, inputs)
    differences = [
        relative(*pair) for pair in zip(loss_stage(device, dtype, divergence, inputs), expected, strict=True)
    ]
    assert len(differences) == 3 and max(differences) < bound, differences


# Training -------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("objective", ["grpo", "opd"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_packed_gradient_equals_padded_one_of_cpu(
    device: torch.device, objective: str, dtype: torch.dtype, bound: float
) -> None:
    stage = stage_of(objective)
    plain, teacher = policy_on(CPU), policy_on(CPU, seed=1)
    rows = sampled_rows(plain)
    policy = policy_on(device, dtype=dtype)
    assert policy.supports_packing
    expected = gradient_of(replace(plain, supports_packing=False), taught(rows, teacher), stage)
    ours = gradient_of(policy, taught(rows, policy_on(device, seed=1, dtype=dtype)), stage)
    assert ours.keys() == expected.keys() and largest(expected) > 1e-3
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    gap = torch.cat([(ours[name].cpu() - expected[name]).flatten() for name in expected]).norm()
    assert gap / norm < bound


@on_each_device
def test_update_out_of_memory_halves_microbatch_and_gives_same_weights(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = stage_of("grpo"), sampled_rows(policy_on(CPU))
    whole, halved = policy_on(device), policy_on(device)
    update(whole, torch.optim.SGD(whole.model.parameters(), lr=0.1), rows, objective_of(stage), 4096)
    room = Room(most=20)
    room.patch(monkeypatch)
    optimizer = torch.optim.SGD(halved.model.parameters(), lr=0.1)
    fitted = update(halved, optimizer, rows, objective_of(stage), 4096)["microbatch_tokens"]
    assert fitted < 40 and max(room.sizes) > 20 and room.sizes[-1] <= 20
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(halved)[name], weight, rtol=1e-4, atol=1e-6)


@without_gpu
def test_real_out_of_memory_on_gpu_is_recognised_and_halved() -> None:
    total = torch.cuda.get_device_properties(CUDA).total_memory
    tried: list[int] = []

    def attempt(size: int) -> int:
        tried.append(size)
        return torch.empty(size * total // 5, dtype=torch.uint8, device=CUDA).numel()

    budget = BatchBudget(16)
    assert budget.fit(attempt, 16, 1, "piece", "take a larger device") < total
    assert tried == [16, 8, 4] and budget.size == 4
    with pytest.raises(TrainingStoppedError, match="memory ran out"):
        BatchBudget(8).fit(lambda size: torch.empty(2 * total, dtype=torch.uint8, device=CUDA), 8, 8, "pieces", "stop")


@on_each_device
def test_checkpoint_of_device_continues_bitwise_and_loads_on_cpu(device: torch.device, tmp_path: Path) -> None:
    stage, node = stage_of("grpo"), NodeDir(tmp_path / "nodes" / "opd")
    policy, rows = policy_on(device), sampled_rows(policy_on(CPU))
    optimizer = make_optimizer(policy, stage.optim)
    update(policy, optimizer, rows, objective_of(stage), 4096)
    save_checkpoint(node, 1, policy.model, optimizer)
    other, on_cpu = policy_on(device, seed=9), policy_on(CPU, seed=9)
    restored = make_optimizer(other, stage.optim)
    assert load_checkpoint(node, other.model, restored) == 1
    assert load_checkpoint(node, on_cpu.model, make_optimizer(on_cpu, stage.optim)) == 1
    assert same_bits(weights_of(other), weights_of(policy))
    assert same_bits(weights_of(on_cpu), {name: weight.cpu() for name, weight in weights_of(policy).items()})
    update(policy, optimizer, rows, objective_of(stage), 4096)
    update(other, restored, rows, objective_of(stage), 4096)
    for name, weight in weights_of(policy).items():  # atomic additions on a GPU have no fixed order
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=1e-5, atol=1e-7)


# Sampling -------------------------------------------------------------------------------------------------------------


def sampled(
    policy: Policy, batch: int, order: Callable[[list[Any]], list[Any]] = list
) -> dict[tuple[str, int], Rollout]:
    requests = requests_for([(str(index), prompt) for index, prompt in enumerate(PROMPTS)], 4, "device")
    rollouts = TorchSampler(policy, batch).sample(order(requests), Sampling(max_tokens=24))
    return {(rollout.problem_id, rollout.sample): rollout for rollout in rollouts}


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [5, 16])
def test_sampler_repeats_its_tokens_for_one_batch_shape(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    policy = policy_on(device, dtype=dtype)
    first, second = sampled(policy, batch), sampled(policy, batch)
    assert {key: rollout.completion_ids for key, rollout in first.items()} == {
        key: rollout.completion_ids for key, rollout in second.items()
    }
    assert len({rollout.completion_ids for rollout in first.values()}) > 8


@on_each_device
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_sampler_log_probs_equal_trainer_ones(
    device: torch.device, kind: str, dtype: torch.dtype, bound: float
) -> None:
    policy = policy_on(device, dtype=dtype, kind=kind)
    rollouts = list(sampled(policy, 6).values())
    trainer = torch.cat(logp_of(policy, rollouts, 4096)).cpu()
    sampler = torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp])
    assert trainer.std() > 0.1 and (trainer - sampler).abs().mean() < bound


@on_each_device
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_fast_decoder_in_bfloat16_equals_general_one(device: torch.device, kind: str) -> None:
    """Two query heads share keys here; sharing them wrongly would change every hidden state."""
    policy = policy_on(device, dtype=torch.bfloat16, kind=kind)
    states = []
    for decoder in (decoder_for(policy), CacheDecoder(policy)):
        with torch.inference_mode():
            decoder.begin(list(PROMPTS), len(PROMPTS), 32)
            hidden = [decoder.prefill(len(PROMPTS))]
            for token in (7, 9, 12, 5):
                hidden.append(decoder.decode_step(torch.full((len(PROMPTS),), token, device=device)).clone())
        states.append(torch.cat(hidden).float())
    assert isinstance(decoder_for(policy), FastDecoder)
    assert relative(*states) < 0.04


@on_each_device
def test_draws_of_device_equal_draws_of_cpu_in_float32(device: torch.device) -> None:
    """Named random numbers are made on the CPU, so that only rounding could choose another token."""
    ours, plain = sampled(policy_on(device), 8), sampled(policy_on(CPU), 8)
    same = [key for key in plain if ours[key].completion_ids == plain[key].completion_ids]
    assert len(same) >= len(plain) - 1


@without_gpu
def test_cuda_graphs_of_steps_sample_tokens_of_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, made, capture = [], [], step_graphs.cuda_capture

    def counted(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        captured.append(step)
        return capture(step)

    class Kept(step_graphs.StepGraphs):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, capture=counted)
            made.append(self)

    class Plain(step_graphs.StepGraphs):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.works = False

    policy = policy_on(CUDA)
    monkeypatch.setattr(fast_decoder, "StepGraphs", Plain)
    expected = sampled(policy, 8)
    monkeypatch.setattr(fast_decoder, "StepGraphs", Kept)
    replayed = sampled(policy, 8)
    assert captured and all(graphs.works for graphs in made)
    same = [key for key in expected if replayed[key].completion_ids == expected[key].completion_ids]
    assert len(same) >= len(expected) - 1


@without_gpu
def test_decoding_step_on_gpu_does_not_wait_for_it() -> None:
    policy, sampling = policy_on(CUDA), Sampling(max_tokens=8)
    decoder, batch = decoder_for(policy), ContinuousBatch(4, 8, 8, stop_mask(policy))
    with torch.inference_mode():
        decoder.begin(list(PROMPTS), 4, 32)
        hidden = decoder.prefill(4)
        batch.add(range(4), [("key", row) for row in range(4)])
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps capture
            try:
                batch.append(*draw_tokens(decoder.logits(hidden), batch.uniforms(), sampling))
                hidden = decoder.decode_step(batch.token_A)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(batch) == 4
