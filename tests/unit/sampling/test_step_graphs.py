"""Graphs of decoding steps: a replay on fixed memory equals the step, and where no graph can be captured the step itself runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from headwater.config.stage import Sampling
from headwater.sampling import fast_decoder as fast_decoder_module
from headwater.sampling import fast_weights, token_draws
from headwater.sampling.base import requests_for
from headwater.sampling.continuous_batch import ContinuousBatch
from headwater.sampling.decoder import decoder_for
from headwater.sampling.step_graphs import StepGraphs
from headwater.sampling.torch_sampler import TorchSampler, stop_mask
from headwater.types import Rollout
from recorded_steps import Recorder, capture_by_recording
from tiny import PROMPTS, tiny_policy

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def sampled(
    kind: str, settings: dict[str, Any], capture: Capture | None, monkeypatch: pytest.MonkeyPatch, batch: int = 5
) -> tuple[list[Rollout], list[StepGraphs]]:
    """Rollouts of a tiny model, some longer than others, in a batch that rows leave and enter, with or without graphs."""
    monkeypatch.setattr(fast_weights, "kernels", lambda: None)  # graphs are of torch's operations
    monkeypatch.setattr(fast_decoder_module, "INITIAL_COLUMNS", 4)  # the cache grows, which moves its memory
    policy, made = tiny_policy(kind, seed=4, **settings), list[StepGraphs]()
    prompts = [(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    begin = fast_decoder_module.FastDecoder.begin

    def begin_with_graphs(decoder: Any, *arguments: Any) -> int:
        free = begin(decoder, *arguments)
        if capture is not None:
            decoder.graphs = StepGraphs(decoder._step, batch, policy.device, capture)
            made.append(decoder.graphs)
        return free

    monkeypatch.setattr(fast_decoder_module.FastDecoder, "begin", begin_with_graphs)
    rollouts = TorchSampler(policy, batch).sample(requests_for(prompts, 4, "graphs"), Sampling(max_tokens=40))
    monkeypatch.undo()
    return rollouts, made


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {}),
        ("llama", {}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        ),
    ],
)
@pytest.mark.parametrize("batch", [5, 16])
def test_replayed_steps_sample_tokens_of_plain_steps(
    kind: str, settings: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def counted(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        captured.append(step)
        return capture_by_recording(step)

    expected, _ = sampled(kind, settings, None, monkeypatch, batch)
    replayed, _ = sampled(kind, settings, counted, monkeypatch, batch)
    assert [rollout.completion_ids for rollout in replayed] == [rollout.completion_ids for rollout in expected]
    for ours, plain in zip(replayed, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(ours.sampler_logp), torch.tensor(plain.sampler_logp), atol=1e-4, rtol=0.0
        )
    lengths = {len(rollout.completion_ids) for rollout in expected}
    assert len(lengths) > 3  # rows left the batch at different times
    assert 1 < len(captured) < max(lengths)


def test_failed_capture_leaves_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        calls.append(step())
        raise RuntimeError("operation not permitted when stream is capturing")

    expected, _ = sampled("qwen3", {}, None, monkeypatch)
    rollouts, (graphs,) = sampled("qwen3", {}, fails, monkeypatch)
    assert [rollout.completion_ids for rollout in rollouts] == [rollout.completion_ids for rollout in expected]
    assert len(calls) == 1 and not graphs.works and not graphs.graphs


def test_rows_and_columns_of_graphs_are_rounded_up() -> None:
    sizes: list[tuple[int, int]] = []

    def step(token_R: Tensor, columns: int) -> Tensor:
        sizes.append((len(token_R), columns))
        return token_R[:, None].float()

    graphs = StepGraphs(step, 64, torch.device("cpu"), capture_by_recording)
    for rows, columns in ((3, 5), (8, 128), (9, 128), (9, 129), (64, 500)):
        out = graphs.run(torch.arange(rows), columns, 300)
        assert out[:, 0].tolist() == list(range(rows))
    assert sizes == [(8, 128), (16, 128), (16, 256), (64, 300)]


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
"""Operations whose result the CPU needs, so that it waits for the device."""


def test_decoding_step_waits_for_device_only_at_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sampler does for a token: the step, the head, the draw, keeping it. `finished_rows` alone reads a tensor."""
    for module in (fast_weights, token_draws):
        monkeypatch.setattr(module, "kernels", lambda: None)
    policy = tiny_policy("qwen3", seed=4)
    decoder, batch = decoder_for(policy), ContinuousBatch(4, 8, 8, stop_mask(policy))
    with torch.inference_mode():
        decoder.begin(list(PROMPTS), 4, 32)
        hidden = decoder.prefill(4)
        batch.add(range(4), [("key", row) for row in range(4)])
        draw = partial(token_draws.draw_tokens, sampling=Sampling(max_tokens=8))
        batch.append(*draw(decoder.logits(hidden), batch.uniforms()))
        with Recorder() as recorder:
            batch.append(*draw(decoder.logits(decoder.decode_step(batch.token_A)), batch.uniforms()))
    names = {func.__name__.split(".")[0] for func, *_ in recorder.calls}
    assert "index_copy_" in names and not names & set(WAITING)
