"""Positions whose rule depends on the length of the sequence: exact on one side of it, refused across it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from headwater.config.stage import Sampling
from headwater.errors import UserError
from headwater.models.policy import Policy
from headwater.models.rope import LengthRule, length_rule, mixed_lengths, positions
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import Rollout
from tiny import policy_of, tiny_model

LIMIT = 24
LONGROPE = {"rope_theta": 10_000.0, "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [4.0, 5.0, 6.0, 8.0]}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {
        "original_max_position_embeddings": LIMIT, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "longrope", **LONGROPE},
    },
    "phimoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "original_max_position_embeddings": LIMIT,
        "rope_parameters": {
            "rope_type": "longrope", "original_max_position_embeddings": LIMIT, "short_mscale": 1.2, "long_mscale": 1.6, **LONGROPE
        },
    },
    "qwen2": {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": LIMIT, "factor": 4.0, **LONGROPE}},
    "llama": {
        "max_position_embeddings": LIMIT, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    },
    "qwen3": {
        "max_position_embeddings": LIMIT, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    },
}  # fmt: skip
"""Architecture -> fields of a model whose rule changes after LIMIT tokens."""


def policy_with(architecture: str) -> Policy:
    return policy_of(tiny_model(architecture, **MODELS[architecture]))


def prompts(*lengths: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"p{row}", tuple(3 + (7 * row + at) % 20 for at in range(count))) for row, count in enumerate(lengths)]


def sample(policy: Policy, lengths: tuple[int, ...], tokens: int) -> list[Rollout]:
    return TorchSampler(policy).sample(requests_for(prompts(*lengths), 4, 0, "rope"), Sampling(max_tokens=tokens))


@torch.no_grad()
def alone(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """Log-probs of a completion whose sequence is the only one that transformers ever sees."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logits = policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


def furthest_from_alone(policy: Policy, rollouts: list[Rollout]) -> float:
    """The largest difference of the sampler's and of the trainer's log-probs from those of each sequence alone."""
    expected = [alone(policy, rollout) for rollout in rollouts]
    sampled = [torch.tensor(rollout.sampler_logp) for rollout in rollouts]
    differences = [
        (row - right).abs().max().item()
        for actual in (sampled, logp_of(policy, rollouts, 4096))
        for row, right in zip(actual, expected, strict=True)
    ]
    return max(differences)


@pytest.mark.parametrize("architecture", MODELS)
def test_rope_below_limit_sampler_trainer_and_single_agree(architecture: str) -> None:
    policy = policy_with(architecture)
    assert policy.supports_packing == (architecture != "phimoe")  # packed rows begin at position 0 each
    rollouts = sample(policy, (5, 9, 16), LIMIT - 16)
    assert max(len(rollout.prompt_ids + rollout.completion_ids) for rollout in rollouts) == LIMIT
    assert furthest_from_alone(policy, rollouts) < 2e-4


@pytest.mark.parametrize("architecture", ["phi3", "phimoe", "qwen2"])
def test_rope_above_limit_sampler_trainer_and_single_agree(architecture: str) -> None:
    policy = policy_with(architecture)
    rollouts = sample(policy, (LIMIT + 1, LIMIT + 9), 8)
    assert furthest_from_alone(policy, rollouts) < 2e-4
    assert mixed_lengths(policy.model.config, LIMIT, LIMIT + 9, 8) is not None


@pytest.mark.parametrize("architecture", MODELS)
def test_rope_rows_across_limit_are_refused(architecture: str) -> None:
    policy = policy_with(architecture)
    with pytest.raises(
        UserError, match=rf"^test: its positions .* longer than {LIMIT} tokens.*max_tokens to at most {LIMIT - 16}"
    ):
        sample(policy, (5, 16), LIMIT - 15)
    # What is refused: one row of the batch is short, one is long, and the trainer's log-probs of the short one change.
    short = Rollout("p0", 0, prompts(5)[0][1], (7, 8, 9, 4), (0.0,) * 4, "length", "by-hand", 1.0)
    long = Rollout("p1", 0, prompts(5, LIMIT)[1][1], (7, 8, 9, 4), (0.0,) * 4, "length", "by-hand", 1.0)
    expected = alone(policy, short)
    assert (logp_of(policy, [short, long], 4096)[0] - expected).abs().max() > 1e-3


def test_rope_prompts_over_limit_are_refused_if_rule_depends_on_length() -> None:
    with pytest.raises(UserError, match="use prompts well below 24 tokens, or take a model without this scaling"):
        sample(policy_with("llama"), (LIMIT + 1, LIMIT + 2), 4)


@pytest.mark.parametrize(
    ("architecture", "fields", "rule", "known"),
    [
        ("llama", {}, None, 2048),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, None, 2048),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                   "original_max_position_embeddings": 1024}}, None, 4096 * 8),
        ("gemma3_text", {}, None, 131_072),
        ("xlnet", {}, None, None),
        # As files of older versions write it: another name of the field and of the rule.
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
                  "max_position_embeddings": 131_072}, LengthRule("longrope", 4096, True), 131_072),
        ("phi3", {"rope_scaling": {"type": "su", "original_max_position_embeddings": 512, "short_factor": [1.0] * 48,
                  "long_factor": [2.0] * 48}}, LengthRule("longrope", 512, True), 4096),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, LengthRule("dynamic", 2048, False), 8192),
    ],
)  # fmt: skip
def test_rope_limit_is_read_from_config(
    architecture: str, fields: dict[str, Any], rule: LengthRule | None, known: int | None
) -> None:
    config = AutoConfig.for_model(architecture, **fields)
    assert length_rule(config) == rule
    assert positions(config) == known


def test_rope_limit_is_lowest_of_all_layer_types() -> None:
    config = AutoConfig.for_model("gemma3_text")
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
    }
    assert length_rule(config) == LengthRule("longrope", 64, False)
    assert mixed_lengths(config, 5, 60, 4) is None
    assert mixed_lengths(config, 65, 70, 4) is not None
