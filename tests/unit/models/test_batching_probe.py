from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from headwater.config.stage import Sampling
from headwater.errors import UnsupportedModelError
from headwater.losses.batch import padded_parts
from headwater.models.batching_probe import with_measured_batching
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import problem_id
from tests.support.tiny import CPU, MODELS, PROMPTS, tiny_folder, tiny_policy

MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
INDEXED = {
    **MOE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
    "index_n_heads": 16, "index_head_dim": 16, "index_topk": 4,
}  # fmt: skip


@torch.no_grad()
def alone(policy: Policy, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of a completion by the model itself, on one sequence without mask or cache."""
    ids = torch.tensor([prompt + completion])
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.parametrize(
    ("architecture", "settings", "pads", "decoding"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, True, "left_padded"),
        ("falcon_mamba", {"state_size": 8}, True, "equal_lengths"),
        ("openai-gpt", {}, True, "recompute"),
        ("xlstm", {}, True, "recompute"),
        ("deepseek_v32", INDEXED, False, "equal_lengths"),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, True, "left_padded"),
    ],
)
def test_batched_prompts_equal_single_prompts_in_sampler_and_trainer(
    architecture: str, settings: dict[str, Any], pads: bool, decoding: str
) -> None:
    policy = tiny_policy(architecture, seed=3, **settings)
    assert (policy.supports_padding, policy.decoding) == (pads, decoding)
    policy.model.generation_config = GenerationConfig(
        eos_token_id=list(range(0, 30, 4))
    )  # so that completions end early
    prompts = [(problem_id(str(prompt)), prompt) for prompt in (*PROMPTS, PROMPTS[0][::-1])]
    # Batches of 4: rows leave at other steps than they came, and groups of one prompt are cut.
    rollouts = TorchSampler(policy, batch=4).sample(requests_for(prompts, 2, 0, "test"), Sampling(max_tokens=9))
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 1
    for rollout, trained in zip(rollouts, logp_of(policy, rollouts, 64), strict=True):
        expected = alone(policy, rollout.prompt_ids, rollout.completion_ids)
        torch.testing.assert_close(torch.tensor(rollout.sampler_logp), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(trained, expected, rtol=0, atol=2e-4)


def test_padding_does_not_enter_recurrent_state_in_bfloat16(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "lfm2", layer_types=["conv", "full_attention"])
    models = MODELS.model_copy(update={"dtype": "bfloat16"})
    decoding = [
        load_policy(ModelFolder.open(str(folder), "models.teacher"), LoadOptions(models, CPU, frozen=frozen)).decoding
        for frozen in (True, False)
    ]
    assert decoding == ["equal_lengths", "left_padded"]  # the weights that train are float32


def test_model_random_at_inference_is_refused() -> None:
    policy = tiny_policy("bloom")
    policy.model.transformer.h[0].register_forward_hook(
        lambda _, __, output: (
            (output[0] + torch.rand_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else output + torch.rand_like(output)
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"bloom model"):
        with_measured_batching(policy)


def test_batching_probe_skips_packing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3")
    monkeypatch.setattr(policy.body, "forward", None)
    assert with_measured_batching(policy) is policy
    with pytest.raises(TypeError):
        with_measured_batching(replace(policy, supports_packing=False))


def test_equal_length_parts_by_hand() -> None:
    words = ["dddd", "a", "bb", "cc", "ee", "f"]
    assert list(padded_parts(words, len, 4, pads=False)) == [["a", "f"], ["bb", "cc"], ["ee"], ["dddd"]]
    assert list(padded_parts(words, len, 8, pads=True)) == [["a", "f", "bb", "cc"], ["ee", "dddd"]]


def test_rwkv_weights_load_and_save_unchanged(tmp_path: Path) -> None:
    """transformers halves some of its weights in place at inference, every `rescale_every` layers."""
    folder = tiny_folder(tmp_path / "model", "rwkv", num_hidden_layers=4, rescale_every=2)
    policy = load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=False))
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        ours = policy.model(input_ids=ids).logits
        save_policy(policy, tmp_path / "saved", torch.float32)
        for where in (folder, tmp_path / "saved"):
            plain = AutoModelForCausalLM.from_pretrained(where).eval()
            torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=0, atol=1e-3)


def test_load_policy_refuses_model_unsupported_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", "lfm2", layer_types=["conv", "full_attention"])

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("The size of tensor a (4) must match the size of tensor b (3)")

    monkeypatch.setattr("headwater.models.batching_probe._alone", fail)
    with pytest.raises(
        UnsupportedModelError, match=r"lfm2 model, which transformers cannot run .*\(The size of tensor a"
    ):
        load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=True))
