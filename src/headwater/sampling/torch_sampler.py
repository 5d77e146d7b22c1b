"""The embedded sampler: continuous batching with a KV cache, for any causal LM that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headwater.config.recipe import Recipe
from headwater.config.stage import Sampling
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.rope import refuse_mixed_lengths
from headwater.models.training_mode import at_inference
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory
from headwater.sampling.continuous_batch import ContinuousBatch
from headwater.sampling.decoder import decoder_for
from headwater.sampling.token_draws import draw_tokens
from headwater.types import Rollout, RolloutKey

CHECK_EVERY_CPU, CHECK_EVERY_GPU = 1, 8
"""Steps between checks for finished sequences. Each check synchronizes the device; until then finished rows decode on."""

STOP_EVERY = 16
"""Steps, a multiple of both, between chances for the caller to stop while no sequence finishes."""


def make_factory(recipe: Recipe) -> SamplerFactory:
    """Embedded samplers that decode up to `compute.sample_batch` sequences at once, fewer after running out of memory."""
    return lambda policy: OomRetrySampler(partial(TorchSampler, policy), BatchBudget(recipe.compute.sample_batch))


@dataclass(frozen=True)
class TorchSampler:
    """Batched decoding in this process, at most `batch` sequences at once.

    Finished sequences leave the batch and waiting ones enter; each distinct prompt is prefilled once. A token is the inverse of
    the cumulative distribution at one uniform number that its request names, so neither batch order nor batch size changes
    a draw (the logits may differ in their last bits between batch shapes).
    """

    policy: Policy
    batch: int = 256

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        if not requests:
            return []
        first: dict[tuple[int, ...], int] = {}
        for index, request in enumerate(requests):
            first.setdefault(request.prompt_ids, index)
        # Equal prompts together, similar lengths adjacent; longest first, so that running out of memory shows at once.
        prompts = [request.prompt_ids for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), first[prompts[i]], i))
        with at_inference(self.policy.model):
            rollouts = self._run([requests[i] for i in order], sampling, on_finished)
        by_index = dict(zip(order, rollouts, strict=True))
        return [by_index[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _run(self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None) -> list[Rollout]:
        prompts = [request.prompt_ids for request in requests]
        size, limit = min(self.batch, len(requests)), sampling.max_tokens
        check_every = CHECK_EVERY_CPU if self.policy.device.type == "cpu" else CHECK_EVERY_GPU
        batch = ContinuousBatch(size, limit, check_every, stop_mask(self.policy))
        max_tokens = max(map(len, prompts)) + limit
        refuse_mixed_lengths(self.policy.model.config, self.policy.folder.field, prompts, max_tokens)
        decoder = decoder_for(self.policy)
        min_free = decoder.begin(prompts, size, max_tokens)
        rollouts: dict[int, Rollout] = {}
        admitted = step = 0
        while admitted < len(requests) or len(batch):
            hidden = [decoder.decode_step(batch.token_A)] if len(batch) else []
            new = range(admitted, min(admitted + size - len(batch), len(requests)))
            if new and size - len(batch) >= min_free:
                hidden.append(decoder.prefill(len(new)))
                batch.add(new, [requests[index].rng_key for index in new])
                admitted = new.stop
            hidden_AH = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
            batch.append(*draw_tokens(decoder.logits(hidden_AH), batch.uniforms(), sampling))
            step += 1
            if step % check_every == 0 or batch.age_A.max() >= limit:
                finished_rows = batch.finished_rows()
                if len(finished_rows):
                    finished = {
                        index: requests[index].rollout(ids, logp, stopped, self.policy, sampling)
                        for index, ids, logp, stopped in batch.sequences(finished_rows)
                    }
                    rollouts.update(finished)
                    if on_finished is not None:
                        on_finished(list(finished.values()))
                    decoder.select_rows(batch.remove(finished_rows))
                elif on_finished is not None and step % STOP_EVERY == 0:
                    on_finished([])
        return [rollouts[index] for index in range(len(requests))]


def stop_mask(policy: Policy) -> Tensor:
    """bool (V,): whether a token id ends a completion."""
    stop_V = torch.zeros(policy.vocabulary, dtype=torch.bool, device=policy.device)
    # A tokenizer may have more ids than the model's output layer.
    stop_V[[stop for stop in policy.stop_ids if stop < policy.vocabulary]] = True
    return stop_V


@dataclass(frozen=True)
class OomRetrySampler:
    """Retry sampling with a smaller batch when memory runs out, keeping the rollouts that had finished.

    make_sampler  batch size -> sampler
    """

    make_sampler: Callable[[int], Sampler]
    batch: BatchBudget

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        finished: dict[RolloutKey, Rollout] = {}

        def keep(rollouts: Sequence[Rollout]) -> None:
            finished.update({rollout.key: rollout for rollout in rollouts})
            if on_finished is not None:
                on_finished(rollouts)

        def attempt(batch: int) -> list[Rollout]:
            left = [request for request in requests if request.key not in finished]
            rollouts = self.make_sampler(batch).sample(left, sampling, keep) if left else []
            known = finished | {rollout.key: rollout for rollout in rollouts}
            return [known[request.key] for request in requests]

        remedy = "shorten sampling.max_tokens or prompt.max_tokens, or take a larger device"
        return self.batch.fit(attempt, max(1, len(requests)), 1, "sequence", remedy)
