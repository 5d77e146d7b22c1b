"""Sampling completions: a small protocol, and the embedded sampler that works with any causal LM transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headwater import config, seeds
from headwater.data import Rollout
from headwater.decoder import Decoder, decoder_for
from headwater.model import Policy


@dataclass(frozen=True, slots=True)
class Request:
    """One completion wanted. `draw` names its random numbers, so they depend on nothing else in the batch."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    draw: tuple[str | int, ...]


Arrived = Callable[[Sequence[Rollout]], None]


class Sampler(Protocol):
    """Whoever samples: the embedded sampler, or an engine beside the trainer."""

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: Arrived | None = None
    ) -> list[Rollout]:
        """Rollouts in the order of the requests; each records the log-probs that it was drawn with.

        arrived  is told of rollouts as they finish, each once, in any order, so that grading can begin
        """
        ...


def requests_for(
    problems: Sequence[tuple[str, tuple[int, ...]]], samples: int, first: int, *draw: str | int
) -> list[Request]:
    """`samples` requests for every (problem id, prompt ids), numbered from `first`; draws are named (*draw, id, sample)."""
    return [
        Request(name, sample, ids, (*draw, name, sample))
        for name, ids in problems
        for sample in range(first, first + samples)
    ]


@dataclass(frozen=True)
class TorchSampler:
    """Batched decoding with a KV cache, in-process.

    The prompts of a group are prefilled once; finished sequences leave the batch. A token is chosen by inverting the
    cumulative distribution at one uniform number, which its request names, so that neither batch order nor batch size
    changes a draw (the logits themselves may differ in their last bits between batch shapes).
    """

    policy: Policy
    batch: int = 256

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: Arrived | None = None
    ) -> list[Rollout]:
        # Like lengths decode together: less padding in the prefill.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        rollouts: dict[int, Rollout] = {}
        training = self.policy.model.training
        self.policy.model.eval()  # a model that recomputes activations while it trains refuses a cache
        try:
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                found = self._decode([requests[i] for i in chosen], sampling, arrived or (lambda finished: None))
                rollouts.update(zip(chosen, found, strict=True))
        finally:
            self.policy.model.train(training)
        return [rollouts[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request], sampling: config.Sampling, arrived: Arrived) -> list[Rollout]:
        policy, device, limit = self.policy, self.policy.device, sampling.max_tokens
        draws_BT = torch.from_numpy(np.stack([seeds.uniforms(limit, *one.draw) for one in requests])).to(device)
        stops = torch.tensor(policy.stop_ids, device=device)
        ids_BT = torch.zeros((len(requests), limit), dtype=torch.long, device=device)
        logp_BT = torch.zeros((len(requests), limit), device=device)
        length_B = torch.full((len(requests),), limit, dtype=torch.long, device=device)
        stopped_B = torch.zeros(len(requests), dtype=torch.bool, device=device)

        rollouts: dict[int, Rollout] = {}

        def finish(rows_F: Tensor) -> None:
            found = {
                row: Rollout(
                    problem_id=requests[row].problem_id,
                    sample=requests[row].sample,
                    prompt_ids=requests[row].prompt_ids,
                    completion_ids=tuple(ids_BT[row, :length].tolist()),
                    sampler_logp=tuple(logp_BT[row, :length].tolist()),
                    finish="stop" if stopped else "length",
                    sampler=policy.fingerprint,
                    temperature=sampling.temperature,
                )
                for row, length, stopped in zip(
                    rows_F.tolist(), length_B[rows_F].tolist(), stopped_B[rows_F].tolist(), strict=True
                )
            }
            rollouts.update(found)
            arrived(list(found.values()))

        decoder = decoder_for(policy)
        hidden_AH = self._prefill(decoder, requests)
        alive_A = torch.arange(len(requests), device=device)
        done_A = torch.zeros(len(requests), dtype=torch.bool, device=device)
        for step in range(limit):
            token_A, chosen_A = draw_tokens(policy.logits(hidden_AH), draws_BT[alive_A, step], sampling)
            ids_BT[alive_A, step] = token_A
            logp_BT[alive_A, step] = chosen_A
            stop_A = torch.isin(token_A, stops) & ~done_A
            length_B[alive_A[stop_A]] = step + 1
            stopped_B[alive_A[stop_A]] = True
            done_A = done_A | stop_A
            finished = int(done_A.sum())
            if finished == len(done_A) or step + 1 == limit:
                break
            if finished >= max(1, len(done_A) // 8):
                finish(alive_A[done_A])
                keep_A = (~done_A).nonzero().squeeze(1)
                alive_A, done_A, token_A = alive_A[keep_A], done_A[keep_A], token_A[keep_A]
                decoder.keep(keep_A)
            hidden_AH = decoder.step(token_A)
        finish(alive_A)
        return [rollouts[row] for row in range(len(requests))]

    def _prefill(self, decoder: Decoder, requests: Sequence[Request]) -> Tensor:
        """Run each distinct prompt once, padded on the left, and give every request its copy of the cache."""
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        width = max(len(prompt) for prompt in prompts)
        ids_PT = torch.full((len(prompts), width), self.policy.pad_id, dtype=torch.long)
        mask_PT = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_PT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_PT[row, width - len(prompt) :] = 1
        place = {prompt: row for row, prompt in enumerate(prompts)}
        rows_B = torch.tensor([place[request.prompt_ids] for request in requests])
        device = self.policy.device
        return decoder.prefill(ids_PT.to(device), mask_PT.to(device), rows_B.to(device))


def draw_tokens(logits_BV: Tensor, draws_B: Tensor, sampling: config.Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverse cumulative distribution, and its log-prob under the distribution drawn from.

    logits_BV  any float; log-probs are made in float32 at `sampling.temperature`
    draws_B    float64 in [0, 1)

    Example: probabilities (0.25, 0.75) give token 0 for a draw below 0.25, else token 1.
    """
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    logp_BV = torch.log_softmax(logits_BV, dim=-1)
    if sampling.top_p < 1.0:
        sorted_BV, index_BV = logp_BV.exp().sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        cut_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        logp_BV = torch.log_softmax(logp_BV.masked_fill(cut_BV.scatter(1, index_BV, cut_BV), -torch.inf), dim=-1)
    cumulative_BV = logp_BV.exp().double().cumsum(dim=-1)
    target_B1 = draws_B[:, None].double() * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_max(logits_BV.shape[-1] - 1)
    return token_B1.squeeze(1), logp_BV.gather(1, token_B1).squeeze(1)
