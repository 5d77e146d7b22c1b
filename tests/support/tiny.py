"""Tiny models, tokenizers, rollouts and stages for the tests: deterministic, float32, on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

from headwater.config.recipe import Models
from headwater.config.stage import Sampling, Stage
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models.batching_probe import with_measured_batching
from headwater.models.folder import ModelFolder
from headwater.models.packed_attention import enable_packing
from headwater.models.policy import Policy, split_head
from headwater.sampling.base import SamplerFactory, requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import distributions_of
from headwater.training.update import update
from headwater.types import Rollout, problem_id
from tools.pretrain.pocket import make_tokenizer

CPU = torch.device("cpu")
MODELS = Models(student="unused", teacher="unused")


def tiny_model(architecture: str = "qwen3", seed: int = 0, std: float = 0.3, tied: bool = True, **more: Any) -> Any:
    """A random model whose distributions are far from uniform. `more` goes to its config."""
    settings: dict[str, Any] = {
        "vocab_size": len(make_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": std,
        "bos_token_id": None,
        "eos_token_id": make_tokenizer().eos_token_id,
        "pad_token_id": make_tokenizer().pad_token_id,
    } | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **settings)
        return AutoModelForCausalLM.from_config(config).float().eval()


def tiny_policy(
    architecture: str = "qwen3", seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **more: Any
) -> Policy:
    return policy_of(tiny_model(architecture, seed, **more), tokenizer, f"{architecture}-{seed}")


MEMORY = ModelFolder("memory", "test", "memory")
"""Folder of models that exist in memory only."""


def policy_of(
    model: Any,
    tokenizer: PreTrainedTokenizerFast | None = None,
    fingerprint: str = "tiny",
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    model.to(device)
    body, head = split_head(model, device)
    packs = enable_packing(model, body, device)
    return with_measured_batching(
        Policy(model, tokenizer or make_tokenizer(), MEMORY, fingerprint, device, dtype, body, head, packs)
    )


def copied(policy: Policy) -> Policy:
    """A copy of the policy that shares no memory with it."""
    model = copy.deepcopy(policy.model)
    return replace(policy, model=model, body=split_head(model, CPU)[0], head=split_head(model, CPU)[1])


def tiny_folder(
    folder: Path,
    architecture: str = "qwen3",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **more: Any,
) -> Path:
    """A plain Hugging Face folder: config, safetensors, generation config, tokenizer with a chat template."""
    tokenizer = tokenizer or make_tokenizer()
    model = tiny_model(architecture, seed, **{"vocab_size": len(tokenizer), **more})
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stage_of(objective: str = "grpo", **fields: Any) -> Stage:
    """A stage with small default settings; `fields` overrides them."""
    plain: dict[str, Any] = {
        "objective": objective,
        "steps": 1,
        "batch_size": 8,
        "group_size": 4,
        "optim": {"lr": 1e-3, "grad_clip": 1e6},
        "sampling": {"max_tokens": 8},
        "sparse": {"kl_coef": 0.0},
    }
    return Stage.model_validate(plain | fields)


def rollout_of(
    prompt: tuple[int, ...], completion: tuple[int, ...], sample: int = 0, temperature: float = 1.0, logp: float = -1.0
) -> Rollout:
    name = problem_id(str(prompt))
    return Rollout(name, sample, prompt, completion, (logp,) * len(completion), "length", "by-hand", temperature)


PROMPTS = ((1, 6, 15, 7, 2), (1, 8, 9, 15, 10, 2), (1, 14, 2), (1, 5, 5, 15, 13, 11, 15, 6, 2))
"""Token ids in the style of the pocket models: user turn, digits and pluses, assistant turn; lengths 5, 6, 3, 9."""


def sampled_rows(
    policy: Policy,
    groups: int = 2,
    group_size: int = 4,
    max_tokens: int = 8,
    temperature: float = 1.0,
    draw: int = 0,
    make_sampler: SamplerFactory = TorchSampler,
) -> list[Row]:
    """Rollouts of a policy on the first PROMPTS, with ±1 advantages that differ within each group."""
    wanted = requests_for([(problem_id(str(prompt)), prompt) for prompt in PROMPTS[:groups]], group_size, draw, "test")
    rollouts = make_sampler(policy).sample(wanted, Sampling(max_tokens=max_tokens, temperature=temperature))
    return [Row(rollout, advantage=1.0 if index % 2 else -1.0) for index, rollout in enumerate(rollouts)]


def taught(rows: list[Row], teacher: Policy, tokens: int = 4096) -> list[Row]:
    """Rows annotated with the distributions of a live teacher."""
    distributions = distributions_of(teacher, [row.rollout for row in rows], tokens)
    return [replace(row, teacher=distribution) for row, distribution in zip(rows, distributions, strict=True)]


def gradient_of(policy: Policy, rows: list[Row], stage: Stage, tokens: int = 4096) -> dict[str, torch.Tensor]:
    """Gradient that `update` computes for one optimizer step; the learning rate is 0, so the policy does not change."""
    policy.model.zero_grad(set_to_none=True)
    update(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0), rows, objective_of(stage), tokens)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in policy.model.named_parameters()
        if parameter.grad is not None
    }
    policy.model.zero_grad(set_to_none=True)
    return gradients


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of tensors of the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def largest(a: dict[str, torch.Tensor]) -> float:
    return max(gradient.abs().max().item() for gradient in a.values())


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
