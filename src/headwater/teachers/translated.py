"""A teacher in the student's words: it takes and gives the student's prompts and token ids, and reads its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.config.dense import Dense
from headwater.distributed.process_group import ProcessGroup
from headwater.losses.alignment import Spans
from headwater.losses.batch import Row
from headwater.losses.distributions import Aligned, Distributions, SharedTokens, select_rows
from headwater.losses.materialized import SpanLogp
from headwater.models.policy import Policy
from headwater.models.shape import Shape
from headwater.models.token_bytes import TokenPair
from headwater.sampling.base import OnFinished, Request, SamplerFactory
from headwater.teachers.build import Teacher, sampler_for
from headwater.teachers.scoring import distributions_of, token_logps
from headwater.types import Rollout

Form = Literal["shared", "spans", "sorted"]
"""What is compared across tokenizers: distributions over shared tokens, log-probs of spans, or sorted probabilities."""


def form_of(dense: Dense) -> Form:
    """The form that a recipe's divergence needs."""
    if dense.divergence == "uld":
        return "sorted"
    return "shared" if dense.exact else "spans"


@dataclass(frozen=True)
class TranslatedTeacher:
    """A teacher that samples and scores behind prompts of its own and, with `pair`, in token ids of its own.

    prompt_ids  problem id -> the teacher's prompt
    pair        both tokenizers; None where the ids are the same
    student     what the distributions are compared with: its tokenizer and width
    """

    model: Teacher
    prompt_ids: Callable[[str], tuple[int, ...]]
    pair: TokenPair | None
    form: Form
    tokenizer: Any
    vocabulary: int
    make_sampler: SamplerFactory

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def ranks(self) -> ProcessGroup:
        return self.model.ranks

    @property
    def shape(self) -> Shape:
        return self.model.shape

    @cached_property
    def _shared(self) -> SharedTokens:
        assert self.pair is not None
        return SharedTokens.of(*self.pair.shared_ids, self.model.vocabulary, self.device)

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return self.model.pass_flops([replace(row, rollout=self._read(row.rollout)[0]) for row in rows], passes)

    def sample(
        self, requests: Sequence[Request], sampling: Any, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """`Sampler.sample`; `on_finished` gets rollouts as the teacher wrote them."""
        own = [replace(request, prompt_ids=self.prompt_ids(request.problem_id)) for request in requests]
        rollouts = sampler_for(self.model, self.make_sampler).sample(own, sampling, on_finished)
        return [
            replace(rollout, prompt_ids=request.prompt_ids)
            if self.pair is None
            else self.pair.to_student(rollout, request.prompt_ids)
            for rollout, request in zip(rollouts, requests, strict=True)
        ]

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        """The teacher's signal at the student's tokens, in the student's ids."""
        readings = [self._read(rollout) for rollout in rollouts]
        own = [reading for reading, _ in readings]
        spans = [found for _, found in readings]
        if self.form == "spans" and self.pair is not None:
            logps = token_logps(self.model, own, tokens)
            return [
                SpanLogp.of(both, torch.tensor(rollout.sampler_logp, device=logp.device), logp)
                for rollout, both, logp in zip(rollouts, spans, logps, strict=True)
            ]
        scored = distributions_of(self.model, own, tokens)
        if self.pair is None and self.form != "sorted":
            return scored
        shared = self._shared if self.form == "shared" else None
        return [
            Aligned(select_rows(base, index_N.to(self.device)), shared, size_N.to(self.device))
            for base, (index_N, size_N) in zip(
                scored, map(_starts, spans, map(len, (rollout.completion_ids for rollout in rollouts))), strict=True
            )
        ]

    def _read(self, rollout: Rollout) -> tuple[Rollout, Spans]:
        """A rollout as the teacher reads it, and the spans of (student, teacher)."""
        if self.pair is None:
            ids = rollout.completion_ids
            spans = Spans(*2 * (tuple(range(1, len(ids) + 1)),))
        else:
            ids, spans = self.pair.to_teacher(rollout)
        # Of the log-probs and the end only the numbers of tokens matter to a model that scores.
        return replace(
            rollout,
            prompt_ids=self.prompt_ids(rollout.problem_id),
            completion_ids=ids,
            sampler_logp=(0.0,) * len(ids),
            teacher_ids=(),
        ), spans


def _starts(spans: Spans, tokens: int) -> tuple[Tensor, Tensor]:
    """(the teacher's row, `Aligned.size_N`) at each of the student's tokens."""
    index_N, size_N = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
    size_N[spans.first_read :] = -1
    pairs = spans.pairs()
    if pairs:
        begins_C = torch.tensor([own.start for own, _ in pairs])
        index_N[begins_C] = torch.tensor([other.start for _, other in pairs])
        size_N[begins_C] = torch.tensor([len(own) for own, _ in pairs])
    return index_N, size_N


Supervisor = Teacher | TranslatedTeacher
"""A model that teaches: read as it is, or in words of its own."""


def untranslated(teacher: Policy | Supervisor) -> Policy | Teacher:
    """The model itself."""
    return teacher.model if isinstance(teacher, TranslatedTeacher) else teacher
