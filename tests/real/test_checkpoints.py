"""Real pretrained checkpoints: log-probs, gradients, saving, stop ids and doctor against plain transformers (`make real`)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwater.config.lora import Lora
from headwater.config.stage import Sampling
from headwater.losses.batch import Row
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import Rollout
from runs import call
from tiny import CPU, MODELS, gradient_of, stage_of
from tools.real.__main__ import CACHE

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

QUESTIONS = (
    "Mia has 3 boxes with 4 pencils each and gives 5 pencils away. How many pencils are left?",
    "A train drives 60 km in an hour. How far does it drive in 2 hours and a half?",
)


@dataclass(frozen=True)
class Expected:
    """Published facts: ids that end a completion, the start of a rendered prompt, and parameters in millions."""

    stop_ids: tuple[int, ...]
    prompt_start: str
    parameters: float


EXPECTED = {
    "SmolLM2-135M-Instruct": Expected((2,), "<|im_start|>system\nYou are a helpful AI assistant named SmolLM", 134.5),
    "Qwen2.5-Coder-0.5B-Instruct": Expected((151643, 151645), "<|im_start|>system\nYou are Qwen", 494.0),
    "gemma-3-270m": Expected((1, 106), "<bos>Mia has", 268.1),
}


@pytest.fixture(scope="module", params=EXPECTED)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    if not (CACHE / request.param / "config.json").is_file():
        pytest.skip(f"{request.param} is not in {CACHE}: `make real` fetches it; NOT tested")
    yield request.param
    for cached in (policy_of, rollouts_of, plain_model, plain_gradient):
        cached.cache_clear()  # each model is a gigabyte or two


def folder_of(name: str) -> ModelFolder:
    return ModelFolder.open(str(CACHE / name), "models.student")


@cache
def policy_of(name: str) -> Policy:
    return load_policy(folder_of(name), LoadOptions(MODELS, CPU, frozen=False))


@cache
def plain_model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(CACHE / name, dtype=torch.float32).eval()


def prompt_ids(policy: Policy, question: str) -> tuple[int, ...]:
    if policy.tokenizer.chat_template is None:
        return tuple(policy.tokenizer(question)["input_ids"])
    chat = [{"role": "user", "content": question}]
    return tuple(policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


@cache
def rollouts_of(name: str) -> list[Rollout]:
    """Four completions of 16 tokens at most, sampled by the embedded sampler."""
    policy = policy_of(name)
    requests = requests_for([(question, prompt_ids(policy, question)) for question in QUESTIONS], 2, "real")
    return TorchSampler(policy).sample(requests, Sampling(max_tokens=16))


def plain_logp(model: Any, rollout: Rollout) -> Tensor:
    """transformers' log-probs of the completion, one unpadded sequence."""
    logits = model(input_ids=torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
    logp = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


def test_sampler_trainer_and_transformers_log_probs_agree(name: str) -> None:
    rollouts = rollouts_of(name)
    trainer = torch.cat(logp_of(policy_of(name), rollouts, 4096))
    sampler = torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp])
    with torch.no_grad():
        plain = torch.cat([plain_logp(plain_model(name), rollout) for rollout in rollouts])
    print(f"{name}: trainer {(trainer - plain).abs().max():.1e}, sampler {(sampler - plain).abs().max():.1e}")
    assert plain.std() > 0.1  # the tokens are not all certain
    torch.testing.assert_close(trainer, plain, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(sampler, plain, rtol=0.0, atol=1e-4)


STAGE = stage_of("grpo", loss_mean="token", sampling={"max_tokens": 16})
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)


def rows_of(name: str) -> list[Row]:
    return [Row(rollout, advantage=value) for rollout, value in zip(rollouts_of(name), ADVANTAGES, strict=True)]


@cache
def plain_gradient(name: str) -> dict[str, Tensor]:
    """Gradient of −Σ advantage · log-prob / tokens by autograd on the plain model."""
    model, rollouts = plain_model(name), rollouts_of(name)
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    model.zero_grad(set_to_none=True)
    for rollout, advantage in zip(rollouts, ADVANTAGES, strict=True):
        (-advantage * plain_logp(model, rollout).sum() / tokens).backward()
    gradient = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradient


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_grpo_step_gradient_equals_plain_autograd(name: str) -> None:
    ours, plain = gradient_of(policy_of(name), rows_of(name), STAGE), plain_gradient(name)
    assert ours.keys() == plain.keys()
    worst = max(relative_difference(ours[key], plain[key]) for key in ours)
    print(f"{name}: largest relative difference of a gradient {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: adapters NOT tested")
def test_lora_grpo_step_gradient_follows_from_full_gradient(name: str) -> None:
    """With B = 0: dL/dB = scaling · dL/dW Aᵀ and dL/dA = 0."""
    spec = AdapterSpec(Lora(r=4, alpha=8), ("real",))
    policy = load_policy(folder_of(name), LoadOptions(MODELS, CPU, frozen=False, adapter=spec))
    gradient, full = gradient_of(policy, rows_of(name), STAGE), plain_gradient(name)
    assert policy.adapter is not None
    assert len(policy.adapter.layers) == 7 * policy.model.config.num_hidden_layers
    for path, layer in policy.adapter.layers.items():
        down = layer.lora_A["default"].weight.detach()
        expected = 2.0 * full[f"{path}.weight"] @ down.T
        assert relative_difference(gradient[f"{path}.lora_B.default.weight"], expected) < 1e-3, path
        assert not gradient[f"{path}.lora_A.default.weight"].any()


def test_saved_student_keeps_trained_log_probs_in_transformers(name: str, tmp_path: Path) -> None:
    policy, rollouts = policy_of(name), rollouts_of(name)
    weight = policy.model.get_input_embeddings().weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.01)  # a student that differs from its start
        save_policy(policy, tmp_path, torch.float32)
        ours = torch.cat(logp_of(policy, rollouts, 4096))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([plain_logp(saved, rollout) for rollout in rollouts])
        start = torch.cat([plain_logp(plain_model(name), rollout) for rollout in rollouts])
    assert (ours - start).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)


def test_stop_ids_prompt_and_size_equal_published_ones(name: str) -> None:
    policy, expected = policy_of(name), EXPECTED[name]
    assert sorted(policy.stop_ids) == sorted(expected.stop_ids)
    assert policy.tokenizer.decode(prompt_ids(policy, QUESTIONS[0])).startswith(expected.prompt_start)
    assert policy.shape.parameters / 1e6 == pytest.approx(expected.parameters, abs=0.1)


STAGE_FIELDS = "steps: 2, batch_size: 2, sampling: {max_tokens: 64}, optim: {lr: 1.0e-6}"
RECIPE = f"""
name: real
task: maths
models: {{student: MODEL, teacher: MODEL}}
data: {{labeled: train.jsonl, evals: {{held_out: test.jsonl}}}}
labels: {{budget: 4}}
stages:
  teacher_rl: {{objective: grpo, group_size: 2, {STAGE_FIELDS}}}
  warmup: {{objective: forward_kl, group_size: 1, {STAGE_FIELDS}}}
  opd: {{objective: opd, group_size: 1, {STAGE_FIELDS}}}
  student_rl: {{objective: grpo, group_size: 2, {STAGE_FIELDS}}}
evaluate: {{samples: 2, sampling: {{max_tokens: 64}}}}
conditions: {{problems: 2, top_k: 64}}
"""


def test_doctor_reports_no_error_for_recipe_with_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, start in (("train.jsonl", 20), ("test.jsonl", 60)):
        rows = [{"problem": f"What is {n} plus {n + 3}?", "answer": str(2 * n + 3)} for n in range(start, start + 8)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "real.yaml").write_text(RECIPE.replace("MODEL", str((CACHE / name).resolve())))
    monkeypatch.chdir(tmp_path)
    result = call("doctor", "real.yaml", "--json")
    findings = json.loads(result.out)
    assert result.code == 0, findings
