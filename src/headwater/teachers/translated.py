"""A teacher with its own prompt or tokenizer: maps rollouts and scores between the student's token ids and the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.config.dense import Dense
from headwater.losses.alignment import Spans
from headwater.losses.batch import Row
from headwater.losses.distributions import Aligned, Distributions, TokenGroups, select_rows
from headwater.losses.materialized import SpanLogp
from headwater.models.token_bytes import TokenPair
from headwater.models.token_groups import VocabularyGroups
from headwater.sampling.base import OnFinished, Request, SamplerFactory
from headwater.teachers.build import Teacher, sampler_for
from headwater.teachers.scoring import distributions_of, token_logps
from headwater.types import Rollout

Form = Literal["prefix", "shared", "spans", "sorted"]
"""What is compared across tokenizers: distributions over groups of tokens, log-probs of spans, or sorted probabilities."""


def form_of(dense: Dense) -> Form:
    """The form that a recipe's divergence and `dense.tokenizers` name."""
    if dense.divergence == "uld":
        return "sorted"
    if not dense.exact:
        return "spans"
    return "shared" if dense.tokenizers == "shared" else "prefix"


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

    device = property(attrgetter("model.device"))
    ranks = property(attrgetter("model.ranks"))
    shape = property(attrgetter("model.shape"))

    @cached_property
    def _groups(self) -> VocabularyGroups:
        assert self.pair is not None
        return VocabularyGroups(self.pair, "shared" if self.form == "shared" else "prefix")

    @cached_property
    def _student_groups(self) -> Tensor:
        return torch.tensor(self._groups.of_student(self.vocabulary), device=self.device)

    @cached_property
    def _token_groups(self) -> Callable[[bytes], TokenGroups | None]:
        """The teacher's tokens that can follow some bytes of a begun token; None where they are not compared."""

        def made(begun: bytes) -> TokenGroups | None:
            if not begun:
                groups = self._groups.of_teacher(self.model.vocabulary)
                return TokenGroups(torch.arange(len(groups), device=self.device), tensor(groups), whole=True)
            ids, groups = self._groups.continuations(begun) if self.form == "prefix" else ([], [])
            return TokenGroups(tensor(ids), tensor(groups), whole=False) if ids else None

        tensor = partial(torch.tensor, device=self.device, dtype=torch.long)
        return cache(made)

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
        spans = [both for _, both in readings]
        if self.form == "spans" and self.pair is not None:
            logps = token_logps(self.model, own, tokens)
            return [
                SpanLogp.of(both, torch.tensor(rollout.sampler_logp, device=logp.device), logp)
                for rollout, both, logp in zip(rollouts, spans, logps, strict=True)
            ]
        scored = distributions_of(self.model, own, tokens)
        if self.pair is None and self.form != "sorted":
            return scored
        return [self._aligned(*row) for row in zip(rollouts, own, spans, scored, strict=True)]

    def _aligned(self, rollout: Rollout, own: Rollout, spans: Spans, scored: Distributions) -> Aligned:
        """The teacher's distributions at each of the student's tokens: over the teacher's token that this one begins in."""
        tokens, read = len(rollout.completion_ids), spans.first_read
        index_N, state_N = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.long)
        state_N[read:] = -1
        tokens_N: list[TokenGroups | None] = [None] * tokens
        if self.pair is None or self.form == "sorted":
            state_N[:read] = 0
            for student, teacher in spans.pairs():
                index_N[student.start], state_N[student.start] = teacher.start, 1
            group_V, groups = None, 0
        else:
            places = begun_tokens(
                self.pair.student.pieces(rollout.completion_ids)[:read], self.pair.teacher.pieces(own.completion_ids)
            )
            for place, (row, begun) in enumerate(places):
                index_N[place], tokens_N[place] = row, self._token_groups(begun)
                state_N[place] = int(tokens_N[place] is not None)
            group_V, groups = self._student_groups, self._groups.count
        base = select_rows(scored, index_N.to(self.device))
        return Aligned(base, tuple(tokens_N), state_N.to(self.device), group_V, groups)

    def _read(self, rollout: Rollout) -> tuple[Rollout, Spans]:
        """A rollout as the teacher reads it, and the spans of (student, teacher)."""
        if self.pair is None:
            ids = rollout.completion_ids
            ends = tuple(range(1, len(ids) + 1))
            spans = Spans(ends, ends)
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


def begun_tokens(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """For each of the student's tokens: the teacher's token in which it begins, and the bytes of that token before it.

    The bytes of the teacher begin with those of the student.

    Example: student `6`, `2`, `;` and teacher `62`, `;`: (0, nothing), (0, `6`), (1, nothing).
    """
    places, index, offset, start = [], 0, 0, 0
    for piece in student:
        while index < len(teacher) - 1 and start + len(teacher[index]) <= offset:
            start += len(teacher[index])
            index += 1
        places.append((index, teacher[index][: offset - start]))
        offset += len(piece)
    return places


Supervisor = Teacher | TranslatedTeacher
"""A frozen model that supervises, with or without prompts and token ids of its own."""
