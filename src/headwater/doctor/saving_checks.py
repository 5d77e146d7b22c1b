"""Doctor check of what a stage needs at its end: its model is saved and read back before the first step."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, warning
from headwater.doctor.weight_checks import AGREEMENT, dtype_name, mean_gap
from headwater.errors import HeadwaterError, error_text
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy, save_without_weights
from headwater.models.tokenizer import read_tokenizer, reads_alike
from headwater.storage.files import disk_errno
from headwater.teachers.scoring import logp_of
from headwater.types import Rollout

ROUND_TRIP_PARAMETERS = 16_000_000
"""Models up to this size are written whole; of larger ones everything but the weights."""
SCORED_PROBLEMS, SCORED_TOKENS = 4, 48
"""Prompts whose log-probs are compared before and after, and their tokens at most."""
NOISE = 0.05
"""Standard deviation of the values that stand for the trained ones in a fresh adapter, whose second matrices are 0."""


def saving(context: DoctorContext) -> Iterator[Finding]:
    """Save each model that a stage trains into a temporary folder, load it again, and compare log-probs."""
    for role, adapted in context.trained_roles.items():
        small = context.inputs.shape(role).parameters <= ROUND_TRIP_PARAMETERS
        # Other checks load the student as it trains, and frozen teachers.
        policy = context.policy(role, frozen=role != "student" and not (adapted and small))
        try:
            with tempfile.TemporaryDirectory(prefix="headwater-", ignore_cleanup_errors=True) as folder:
                out = Path(folder, "model")
                yield from _round_trip(context, role, policy, out) if small else _without_weights(role, policy, out)
        except Exception as failure:
            if disk_errno(failure) is not None:
                evidence = f"models.{role}: saving it was not tried, because {tempfile.gettempdir()} cannot be written ({failure})"
                yield warning("saving-not-tried", evidence, "free space there, or set TMPDIR to another folder")
                continue
            detail = str(failure) if isinstance(failure, HeadwaterError) else f"{type(failure).__name__}: {failure}"
            yield error(
                "cannot-be-saved",
                f"models.{role}: after training it could not be saved and loaded again ({error_text(detail, 300)})",
                "fix the file named in the message, or use another model",
            )


def _round_trip(context: DoctorContext, role: str, policy: Policy, folder: Path) -> Iterator[Finding]:
    rollouts, tokens = _prompts(context, role), context.recipe.compute.microbatch_tokens
    with _as_if_trained(policy):
        save_policy(policy, folder, policy.compute_dtype)
        source = context.inputs.model_folder(role)
        saved = type(source).open(str(folder), f"models.{role}", source.trust_remote_code)
        again = load_policy(saved, LoadOptions(context.recipe.models, context.inputs.device, frozen=True))
        gap = mean_gap(logp_of(policy, rollouts, tokens), logp_of(again, rollouts, tokens))
    bound = AGREEMENT[policy.compute_dtype]
    if not gap <= bound:
        yield error(
            "saved-model-differs",
            f"models.{role}: saved and loaded again, it gives the same tokens log-probs that differ by {gap:.2g} nats on average (at "
            f"most {bound:g} in {dtype_name(policy)})",
            "use another model, or train all weights instead of an adapter; report a bug",
        )
    if not reads_alike(policy.tokenizer, again.tokenizer):
        yield _other_tokenizer(role)


def _without_weights(role: str, policy: Policy, folder: Path) -> Iterator[Finding]:
    """The same for a large model: its other files are written and read, and the parameters that would be written counted."""
    shapes = save_without_weights(policy, folder, policy.compute_dtype)
    AutoConfig.from_pretrained(folder, trust_remote_code=policy.folder.trust_remote_code)
    named = policy.model.named_parameters(remove_duplicate=False)
    parameters = sum(parameter.numel() for name, parameter in named if ".lora_" not in name)
    written = sum(math.prod(shape) for shape in shapes.values())
    if written < parameters:
        yield error(
            "cannot-be-saved",
            f"models.{role}: after training {written:,} of its {parameters:,} parameters would be saved",
            "train all weights instead of an adapter, or use another model; report a bug",
        )
    if not reads_alike(policy.tokenizer, read_tokenizer(str(folder), policy.folder.trust_remote_code)):
        yield _other_tokenizer(role)


def _other_tokenizer(role: str) -> Finding:
    return error(
        "saved-tokenizer-differs",
        f"models.{role}: its tokenizer, saved and loaded again, gives other ids, special tokens or prompts",
        "save the tokenizer with the installed version of transformers and compare the two, or use another model",
    )


def _prompts(context: DoctorContext, role: str) -> list[Rollout]:
    """The tokens of a few prompts after the first one, as completions to score."""
    prompter, rollouts = context.prompter(role), []
    for problem in context.compared_problems[:SCORED_PROBLEMS]:
        first, *ids = prompter.ids(problem)[: SCORED_TOKENS + 1]
        logp = (0.0,) * len(ids)
        if ids:
            rollouts.append(Rollout(problem.id, 0, (first,), tuple(ids), logp, "length", "doctor", 1.0))
    return rollouts


@contextlib.contextmanager
def _as_if_trained(policy: Policy) -> Iterator[None]:
    """Give a fresh adapter an effect, so that an error in merging it shows; its matrices are 0 again at the end."""
    fresh = [
        parameter
        for parameter in policy.model.parameters()
        if policy.adapter and parameter.requires_grad and not parameter.any()
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in fresh:
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * NOISE)
        try:
            yield
        finally:
            for matrix in fresh:
                matrix.zero_()
