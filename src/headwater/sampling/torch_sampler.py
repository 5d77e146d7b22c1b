"""Sampling completions: a small protocol, and the embedded sampler that works with any causal LM transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.config import recipe as config
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request
from headwater.sampling.decoder import decoder_for
from headwater.sampling.sequence_slots import Line, Slots
from headwater.sampling.token_draws import draw_tokens
from headwater.types import Rollout

LOOK_CPU, LOOK_ELSEWHERE = 1, 8
"""Steps from one look at who has ended to the next: a look waits for the device; without one, ended rows run on."""


@dataclass(frozen=True)
class TorchSampler:
    """Batched decoding with a KV cache, in-process, at most `batch` sequences at once.

    Finished sequences leave and waiting ones enter; each distinct prompt is run once. A token is chosen by inverting the
    cumulative distribution at one uniform number, which its request names, so that neither batch order nor batch size changes
    a draw (the logits themselves may differ in their last bits between batch shapes).
    """

    policy: Policy
    batch: int = 256

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        if not requests:
            return []
        first: dict[tuple[int, ...], int] = {}
        for index, one in enumerate(requests):
            first.setdefault(one.prompt_ids, index)
        # Equal prompts together and like lengths beside one another; the longest first: what does not fit shows at once.
        prompts = [one.prompt_ids for one in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), first[prompts[i]], i))
        training = self.policy.model.training
        self.policy.model.eval()  # a model that recomputes activations while it trains refuses a cache
        try:
            found = self._run([requests[i] for i in order], sampling, arrived or (lambda finished: None))
        finally:
            self.policy.model.train(training)
        placed = dict(zip(order, found, strict=True))
        return [placed[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _run(self, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished) -> list[Rollout]:
        prompts = [one.prompt_ids for one in requests]
        size, limit = min(self.batch, len(requests)), sampling.max_tokens
        look = LOOK_CPU if self.policy.device.type == "cpu" else LOOK_ELSEWHERE
        slots = Slots(size, limit, look, stops_of(self.policy))
        decoder = decoder_for(self.policy)
        group = decoder.begin(prompts, size, len(max(prompts, key=len)) + limit)
        rollouts: dict[int, Rollout] = {}
        entered = step = 0
        while entered < len(requests) or len(slots):
            hidden = [decoder.step(slots.token_A)] if len(slots) else []
            entering = range(entered, min(entered + size - len(slots), len(requests)))
            if entering and size - len(slots) >= group:
                hidden.append(decoder.enter(len(entering)))
                slots.enter(entering, [requests[index].draw for index in entering])
                entered = entering.stop
            hidden_AH = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
            slots.append(*draw_tokens(decoder.logits(hidden_AH), slots.uniforms(), sampling))
            step += 1
            if step % look == 0 or slots.age_A.max() >= limit:
                ended = slots.ended()
                if len(ended):
                    found = {
                        line.request: self._rollout(requests[line.request], line, sampling)
                        for line in slots.lines(ended)
                    }
                    rollouts.update(found)
                    arrived(list(found.values()))
                    decoder.keep(slots.leave(ended))
        return [rollouts[index] for index in range(len(requests))]

    def _rollout(self, request: Request, line: Line, sampling: config.Sampling) -> Rollout:
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=line.ids,
            sampler_logp=line.logp,
            finish="stop" if line.stopped else "length",
            sampler=self.policy.fingerprint,
            temperature=sampling.temperature,
        )


def stops_of(policy: Policy) -> Tensor:
    """bool (V,): whether an id ends a completion."""
    stops_V = torch.zeros(policy.vocabulary, dtype=torch.bool, device=policy.device)
    for stop in policy.stop_ids:
        if stop < policy.vocabulary:  # a tokenizer may know more ids than the model can say
            stops_V[stop] = True
    return stops_V
