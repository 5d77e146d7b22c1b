"""Trained students in vLLM and transformers: both load the saved folder and give each token the log-prob that we give."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.types import Rollout
from students import FAMILIES, loaded, logp, mean_difference, start, student, texts
from tiny import PROMPTS, rollout_of

HERE = importlib.util.find_spec("vllm") is not None
ADAPTERS = importlib.util.find_spec("peft") is not None
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not HERE, reason="vLLM is not installed here: `make test-engines` runs these"),
]
if HERE:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
NEAR = 1e-4
"""Mean absolute difference allowed here; the documentation promises 0.01."""


def engine(where: str, **more: Any) -> Any:
    """vLLM engine of a model folder, with default loading."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    return vllm.LLM(where, dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=1 << 27, **more)


def vllm_logp(where: Path, rollouts: list[Rollout]) -> torch.Tensor:
    """vLLM's log-prob of every completion token."""
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": list(rollout.prompt_ids + rollout.completion_ids)} for rollout in rollouts]
    outputs = engine(str(where)).generate(requests, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return torch.tensor(
        [
            known[token].logprob
            for rollout, output in zip(rollouts, outputs, strict=True)
            for token, known in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[
                len(rollout.prompt_ids) :
            ]
        ]
    )


def transformers_logp(where: Path, rollouts: list[Rollout]) -> torch.Tensor:
    plain, logps = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32), []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            all_logp = plain(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        logps.append(all_logp.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0])
    return torch.cat(logps)


def need(trains: str) -> None:
    if trains != "whole" and not ADAPTERS:
        pytest.skip("peft is not installed here: `make test-engines` brings it")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["whole", "merged"])
def test_trained_student_has_equal_log_probs_in_transformers_and_vllm(family: str, trains: str) -> None:
    need(trains)
    folder = student(family, trains)
    policy = loaded(folder)
    rollouts = texts(policy)
    ours, expected, engines = logp(policy, rollouts), transformers_logp(folder, rollouts), vllm_logp(folder, rollouts)
    moved = mean_difference(ours, logp(loaded(start(family)), rollouts))
    gaps = mean_difference(ours, expected), mean_difference(ours, engines)
    print(f"{family}, {trains}: transformers {gaps[0]:.1e}, vLLM {gaps[1]:.1e}, base {moved:.1e}")
    assert all(gap < NEAR for gap in gaps)
    assert moved > 20 * NEAR  # the training changed the log-probs, so base weights would fail
    chat = [{"role": "user", "content": "17+45"}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_has_equal_log_probs_in_transformers_and_vllm(family: str) -> None:
    """Of tokens that vLLM draws: what it says of prompts it cannot say with an adapter on a CPU (0.32.0: a mismatch of shapes)."""
    need("adapter")
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = student(family, "adapter")
    policy, base = loaded(folder), loaded(start(family))
    outputs = engine(base.folder.path, enable_lora=True, max_lora_rank=8).generate(
        [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS * 4],
        SamplingParams(max_tokens=24, logprobs=0, seed=1),
        use_tqdm=False,
        lora_request=LoRARequest("student", 1, str(folder)),
    )
    rollouts = [rollout_of(tuple(output.prompt_token_ids), tuple(output.outputs[0].token_ids)) for output in outputs]
    result = [
        at[token].logprob
        for output in outputs
        for token, at in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    ]
    ours, expected = logp(policy, rollouts), transformers_logp(folder, rollouts)
    engines, moved = mean_difference(ours, torch.tensor(result)), mean_difference(ours, logp(base, rollouts))
    print(
        f"{family}, adapter: transformers {mean_difference(ours, expected):.1e}, vLLM {engines:.1e}, base {moved:.1e}"
    )
    assert mean_difference(ours, expected) < NEAR and engines < NEAR < 20 * NEAR < moved
