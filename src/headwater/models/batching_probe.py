"""Measure how a loaded model's sequences may share a forward pass, by comparing batches with each sequence alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headwater.errors import UnsupportedModelError
from headwater.models.architecture import WANTED
from headwater.models.cached_forward import CachedBatch, last_hidden
from headwater.models.policy import Decoding, Policy
from headwater.models.training_mode import at_inference
from headwater.models.untrusted_files import as_user_error

TOLERANCE = {torch.float32: 1e-4}
COARSE_TOLERANCE = 3e-2
"""Mean absolute difference of hidden states that rounding may cause, relative to their mean size: float32, other types."""
LONG, SHORT, PREFIX, BRANCH = 14, 12, 3, 8
"""Tokens of the two sequences, of the short prompt, and of the long prompt, after which the causality check differs."""


@torch.no_grad()
def with_measured_batching(policy: Policy) -> Policy:
    """Policy with `supports_padding` and `decoding` set from measurements of its model.

    A model that packs has plain attention (`packed_attention.PACKABLE`) and needs no measurement.

    Raises UnsupportedModelError for a model that sees later tokens, or is random at inference.
    """
    if policy.supports_packing:
        return policy
    with at_inference(policy.model):
        return _measure(policy)


def _measure(policy: Policy) -> Policy:
    kind, folder = policy.model.config.model_type, policy.folder
    model = f"{folder.field}: {folder.name} is a {kind} model"
    ids = [(3 + 7 * index + index * index) % policy.vocabulary for index in range(LONG + SHORT)]
    long, short = tuple(ids[:LONG]), tuple(ids[LONG:])
    alone = [_alone(policy, sequence) for sequence in (long, short)]
    if not all(hidden.isfinite().all() for hidden in alone):
        return policy  # nothing can be compared: sampling and the doctor name a NaN or an infinity as what it is
    other_end = _alone(policy, (*long[:BRANCH], *short[: LONG - BRANCH]))
    if not _equal(other_end[:BRANCH], alone[0][:BRANCH]):
        raise UnsupportedModelError(
            f"{model}, which is not causal, so it cannot generate text from left to right; {WANTED}"
        )
    pads = not _selects_tokens(policy) and _padding_is_exact(policy, (long, short), alone)
    adapted = (
        "" if policy.adapter is None else " with adapters on its layers; name linear layers in models.lora.targets"
    )
    with as_user_error(f"{model}, which keeps state from one pass to the next{adapted}", UnsupportedModelError):
        again = _alone(policy, long)  # after a batch of another size
    if not _equal(again, alone[0]):
        raise UnsupportedModelError(
            f"{model}, which gives two equal passes different results, so its log-probs mean nothing; take a model without "
            "randomness at inference"
        )
    modes: tuple[Decoding, ...] = ("left_padded", "equal_lengths") if pads else ("equal_lengths",)
    exact = (mode for mode in modes if _cache_is_exact(policy, mode, (long, short), alone))
    return replace(policy, supports_padding=pads, decoding=next(exact, "recompute"))


def _selects_tokens(policy: Policy) -> bool:
    """Whether attention reads only the tokens that score best: padding takes their places once there are enough tokens."""
    return bool(getattr(policy.model.config.get_text_config(), "index_topk", None))


def _alone(policy: Policy, sequence: tuple[int, ...]) -> Tensor:
    """Hidden states (T, H) of one sequence without mask or cache."""
    return last_hidden(policy.body(input_ids=torch.tensor([sequence], device=policy.device), use_cache=False))[0]


def _padding_is_exact(policy: Policy, sequences: tuple[tuple[int, ...], ...], alone: list[Tensor]) -> bool:
    ids = [(*sequence, *(policy.pad_id,) * (LONG - len(sequence))) for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (LONG - len(sequence)) for sequence in sequences]
    device = policy.device
    out = policy.body(
        input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), use_cache=False
    )
    hidden = last_hidden(out)
    return all(_equal(hidden[row, : len(expected)], expected) for row, expected in enumerate(alone))


def _cache_is_exact(
    policy: Policy, mode: Decoding, sequences: tuple[tuple[int, ...], ...], alone: list[Tensor]
) -> bool:
    """Whether prefill, selection of rows and single steps give each sequence what it gets alone."""
    ends = (BRANCH, PREFIX if mode == "left_padded" else BRANCH)
    prompts = [ids[:end] for ids, end in zip(sequences, ends, strict=True)]
    batch = CachedBatch(policy.body, pads=mode == "left_padded")
    try:
        hidden = batch.prefill(prompts, policy.pad_id, policy.device)
        if mode == "left_padded" and not batch.is_plain and hidden.dtype != torch.float32:
            return False  # what padding adds to a recurrent state can be smaller than a coarse type's rounding
        exact = all(_equal(hidden[which], alone[which][end - 1]) for which, end in enumerate(ends))
        rows = [0, 1]  # the sequence in each row
        for step, chosen in enumerate(([1, 0, 1], [2, 1], [1, 0])):
            batch.select_rows(chosen)
            rows = [rows[row] for row in chosen]
            tokens = [sequences[which][ends[which] + step] for which in rows]
            hidden = batch.append(torch.tensor(tokens, device=policy.device))
            exact = exact and all(
                _equal(hidden[row], alone[which][ends[which] + step]) for row, which in enumerate(rows)
            )
        return exact
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # no cache, or one whose rows cannot be selected


def _equal(actual: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE.get(expected.dtype, COARSE_TOLERANCE)
    actual, expected = actual.float(), expected.float()
    return bool((actual - expected).abs().mean() <= tolerance * expected.abs().mean())
