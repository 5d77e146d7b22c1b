"""A teacher behind an OpenAI-compatible vLLM server: scoring and sampling over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headwater import seeds
from headwater.config.stage import Sampling
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, TopK
from headwater.models.shape import Shape
from headwater.sampling.base import OnFinished, Request
from headwater.teachers.server_client import Answer, ServedModel
from headwater.types import Rollout

NO_SHAPE = Shape(0, 0, 0, 0, 0, 0, 0, tied=True)
"""FLOPs and memory of a served model: none are spent on this machine."""
SEEDS = 1 << 63
"""vLLM takes a request's seed as a signed 64-bit number."""


@dataclass(frozen=True)
class ServedTeacher:
    """A served teacher in the place of a frozen `Policy`.

    tokenizer   the student's: the ids are the same
    vocabulary  the student's columns; the server must not name a token beyond them
    stop_ids    end a completion, as do the server's own
    top_k       how many of the likeliest tokens it is asked for; 0 asks for the sampled token alone
    """

    met: ServedModel
    tokenizer: Any
    vocabulary: int
    stop_ids: tuple[int, ...]
    device: torch.device
    top_k: int
    shape: Shape = NO_SHAPE
    ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def fingerprint(self) -> str:
        return self.met.fingerprint

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return 0.0

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        """The k likeliest tokens before every completion token, or the sampled one alone; asked part by part, side by side."""
        parts = cut(rollouts, min(tokens, self.met.server.settings.batch_tokens))
        with ThreadPoolExecutor(self.met.server.settings.concurrency) as threads:
            found = list(threads.map(self._scored, parts))
        return [one for part in found for one in part]

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        sequences = [[*one.prompt_ids, *one.completion_ids] for one in rollouts]
        body = {
            "model": self.met.name,
            "prompt": sequences,
            "max_tokens": 1,  # a server makes at least one token; it is not looked at
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choices = self._choices(body, len(rollouts))
        for choice, sequence in zip(choices, sequences, strict=True):
            if choice.get("prompt_token_ids", sequence) != sequence:
                raise self._unfit("answers for other token ids than it was sent")
        return [self._read(choice, one) for choice, one in zip(choices, rollouts, strict=True)]

    def _choices(self, body: Answer, count: int) -> list[Answer]:
        found = self.met.server.ask("/v1/completions", body).get("choices")
        if not isinstance(found, list) or len(found) != count or not all(isinstance(one, dict) for one in found):
            raise self._unfit(f"gives no {count} choices for {count} prompts")
        return sorted(found, key=lambda one: one.get("index", 0))

    def _read(self, choice: Answer, rollout: Rollout) -> TopK:
        listed = choice.get("prompt_logprobs")
        start, stop = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.completion_ids)
        if not isinstance(listed, list) or len(listed) != stop:
            raise self._unfit("gives no prompt_logprobs, which scoring is made of; serve the model with vLLM")
        width = min(self.top_k, self.vocabulary) or 1
        kept = [
            self._likeliest(known, token, width)
            for known, token in zip(listed[start:stop], rollout.completion_ids, strict=True)
        ]
        ids = torch.tensor([[one[0] for one in row] for row in kept], dtype=torch.long, device=self.device)
        logp = torch.tensor([[one[1] for one in row] for row in kept], dtype=torch.float32, device=self.device)
        return TopK(ids, logp)

    def _likeliest(self, known: Any, token: int, width: int) -> list[tuple[int, float]]:
        """The `width` likeliest (id, log-prob) at a position; the server adds the sampled token where it is none of them."""
        try:
            found = {int(name): float(one["logprob"]) for name, one in known.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._unfit("gives prompt_logprobs in another form than vLLM's") from None
        if max(found, default=0) >= self.vocabulary:
            raise self._unfit(
                f"names token {max(found)}, beyond the student's vocabulary of {self.vocabulary}: it is another's"
            )
        if token not in found:
            raise self._unfit(f"gives no log-prob for token {token}, which stands there")
        if not self.top_k:
            return [(token, found[token])]
        if len(found) > width:
            found.pop(token)
        if len(found) != width:
            raise self._unfit(f"gives {len(found)} log-probs at a position where {width} were asked for")
        return sorted(found.items(), key=lambda one: (-one[1], one[0]))

    def _unfit(self, what: str) -> UserError:
        return UserError(f"{self.met.server.field}: {self.met.server.url} {what}")

    # Sampling -------------------------------------------------------------------------------------------------------

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        """Completions, one call each, so that each has a seed of its own; as `Sampler.sample`."""
        found: dict[int, Rollout] = {}
        with ThreadPoolExecutor(self.met.server.settings.concurrency) as threads:
            waiting = {threads.submit(self._one, one, sampling): index for index, one in enumerate(requests)}
            try:
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    if arrived is not None:
                        arrived([done.result()])
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[index] for index in range(len(requests))]

    def _one(self, request: Request, sampling: Sampling) -> Rollout:
        body = {
            "model": self.met.name,
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,  # a server may have defaults of its own
            "seed": seeds.seed_of(*request.draw) % SEEDS,
            "logprobs": 0,
            "stop_token_ids": list(self.stop_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choice = self._choices(body, 1)[0]
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        drawn = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(ids, list) or not isinstance(drawn, list) or len(ids) != len(drawn) or not ids:
            raise self._unfit("gives no token ids or log-probs for what it samples; serve the model with vLLM")
        if max(ids) >= self.vocabulary:
            raise self._unfit(f"samples token {max(ids)}, beyond the student's vocabulary of {self.vocabulary}")
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=tuple(ids),
            sampler_logp=tuple(float(one) for one in drawn),
            finish="stop" if choice.get("finish_reason") == "stop" else "length",
            sampler=self.fingerprint,
            temperature=sampling.temperature,
        )


def cut(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Consecutive parts of at most so many tokens; a longer rollout stands alone.

    Example: rollouts of 3, 4 and 9 tokens with 8 are cut (3, 4), (9).
    """
    parts: list[list[Rollout]] = []
    room = 0
    for one in rollouts:
        size = len(one.prompt_ids) + len(one.completion_ids)
        if not parts or size > room:
            parts.append([])
            room = tokens
        parts[-1].append(one)
        room -= size
    return parts


def check_scoring(teacher: ServedTeacher, ids: Sequence[int]) -> None:
    """Score a short sequence as a stage would. Raises HeadwaterError that says what the server cannot do."""
    probe = Rollout("probe", 0, tuple(ids[:1]), tuple(ids[1:]), (0.0,) * (len(ids) - 1), "length", "probe")
    teacher.distributions([probe], len(ids))
