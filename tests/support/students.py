"""Trained students in saved folders, trained far enough that their base weights would fail the comparisons."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from headwater.config.stage import Sampling
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import Rollout
from runs import node, temporary, tiny
from tiny import CPU, MODELS, PROMPTS

FAMILIES = ("qwen3", "llama")
TRAINS = {
    "whole": ("stages.student_rl.optim.lr=0.0003",),
    "merged": ("stages.student_rl.optim.lr=0.03", "models.lora.r=8", "models.lora.alpha=16"),
    "adapter": (
        "stages.student_rl.optim.lr=0.03", "models.lora.r=8", "models.lora.alpha=16", "models.lora.output=adapter",
    ),
}  # fmt: skip
"""Settings of a run that trains all weights, adapters that are merged, or adapters that are saved alone."""


def start(family: str) -> str:
    """The pocket models with heads of 32, the smallest that vLLM supports on a CPU."""
    return f"pocket:{family}-teacher"


@cache
def student(family: str, trains: str) -> Path:
    """Model folder of a finished run of direct_grpo."""
    out = temporary() / f"{family}-{trains}"
    result = tiny("run", out, "--arm", "direct_grpo", changes=(f"models.student={start(family)}", *TRAINS[trains]))
    assert result.code == 0, result.err
    return node(out, "direct_grpo", "student_rl") / "model"


def loaded(where: str | Path) -> Policy:
    return load_policy(ModelFolder.open(str(where), "models.student"), LoadOptions(MODELS, CPU, frozen=True))


def texts(policy: Policy) -> list[Rollout]:
    requests = requests_for([(str(place), prompt) for place, prompt in enumerate(PROMPTS)], 4, "texts")
    return TorchSampler(policy).sample(requests, Sampling(max_tokens=24))


def logp(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    """Log-probs of all completion tokens, concatenated."""
    return torch.cat(logp_of(policy, rollouts, 4096))


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference of log-probs; the documentation promises 0.01 between programs."""
    return (a - b).abs().mean().item()
