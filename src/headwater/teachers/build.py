"""The recipe's base teacher in whichever form it is named: weights here, a server, or several of either by tag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.config.recipe import Recipe
from headwater.config.stage import Sampling, Stage
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, TopK
from headwater.losses.objectives import divergence_of
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.shape import Shape
from headwater.sampling.base import OnFinished, Request, Sampler
from headwater.sampling.build import SamplerFactory
from headwater.sampling.sharded_sampler import ShardedSampler, sampling
from headwater.teachers import server_client
from headwater.teachers.scoring import distributions_of
from headwater.teachers.served_teacher import ServedTeacher
from headwater.types import Problem, Rollout


@dataclass(frozen=True)
class TaggedTeachers:
    """Several teachers, each for the problems of its tag.

    tags   problem id -> tag
    top_k  what each is cut to, so that those that score here and those behind servers come in one form; None where
           all of them are here
    """

    teachers: Mapping[str, Policy | ServedTeacher | OffloadedTeacher]
    tags: Mapping[str, str]
    samplers: SamplerFactory
    top_k: int | None
    ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def first(self) -> Policy | ServedTeacher | OffloadedTeacher:
        return next(iter(self.teachers.values()))

    @property
    def tokenizer(self) -> Any:
        return self.first.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.first.vocabulary

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def shape(self) -> Shape:
        """The costliest one's, so that what is counted is an upper bound."""
        return max((one.shape for one in self.teachers.values()), key=lambda one: one.matrix_parameters)

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return sum(
            one.pass_flops([row for row in rows if self.tags[row.rollout.problem_id] == tag], passes)
            for tag, one in self.teachers.items()
        )

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        return self._each(rollouts, lambda one, some: self._scored(one, some, tokens))

    def _scored(
        self, one: Policy | ServedTeacher | OffloadedTeacher, rollouts: Sequence[Rollout], tokens: int
    ) -> list[Distributions]:
        found = distributions_of(one, rollouts, tokens)
        return found if self.top_k is None else [likeliest(held, self.top_k) for held in found]

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        return self._each(requests, lambda one, some: sampler_for(one, self.samplers).sample(some, sampling, arrived))

    def _each(
        self, asked: Sequence[Any], of: Callable[[Policy | ServedTeacher | OffloadedTeacher, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """What each teacher says of its own, in the order asked."""
        found: dict[int, Any] = {}
        for tag, one in self.teachers.items():
            places = [place for place, it in enumerate(asked) if self.tags[it.problem_id] == tag]
            if places or not self.ranks.alone:  # all ranks pass through it together, also those that ask nothing
                found.update(zip(places, of(one, [asked[place] for place in places]), strict=True))
        return [found[place] for place in range(len(asked))]


@dataclass(frozen=True)
class OffloadedTeacher:
    """A teacher of this process whose weights wait elsewhere while it is not asked, but for its head: distributions are kept as
    hidden states, and the head makes them whole when the loss reads them."""

    policy: Policy
    away: torch.device
    samplers: SamplerFactory
    ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def tokenizer(self) -> Any:
        return self.policy.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.policy.vocabulary

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def shape(self) -> Shape:
        return self.policy.shape

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return self.policy.pass_flops(rows, passes)

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        with self.here():
            return distributions_of(self.policy, rollouts, tokens)

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        with self.here():
            return self.samplers(self.policy).sample(requests, sampling, arrived)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        move(self.policy, self.policy.device)
        try:
            yield
        finally:
            move(self.policy, self.away)


def move(policy: Policy, device: torch.device) -> None:
    """Take all weights but the head's to a device."""
    for one in movable(policy):
        one.data = one.data.to(device)


def movable(policy: Policy) -> list[Tensor]:
    """All weights but the head's; tied embeddings are the head's."""
    head = policy.model.get_output_embeddings()
    kept = set() if head is None else {id(one) for one in head.parameters()}
    return [one for one in (*policy.model.parameters(), *policy.model.buffers()) if id(one) not in kept]


def offloaded(policy: Policy, samplers: SamplerFactory) -> OffloadedTeacher:
    """The policy, at once sent to the machine's memory."""
    away = torch.device("cpu")
    move(policy, away)
    return OffloadedTeacher(policy, away, samplers)


Teacher = Policy | ServedTeacher | OffloadedTeacher | TaggedTeachers


def likeliest(held: Distributions, k: int) -> Distributions:
    """The k likeliest tokens, where more is known."""
    known = held.ready()
    return known if isinstance(known, TopK) else known.likeliest(k)


def sampler_for(who: Teacher, samplers: SamplerFactory) -> Sampler:
    """Who samples for a model: it itself where it is elsewhere, else the recipe's sampler; several ranks share the work out."""
    if who.ranks.alone or isinstance(who, TaggedTeachers):  # of several teachers, each is shared out by itself
        return samplers(who) if isinstance(who, Policy) else who
    if isinstance(who, Policy):
        return ShardedSampler(who.ranks, partial(sampling, who, samplers))
    alone: Sampler = who
    return ShardedSampler(who.ranks, lambda: contextlib.nullcontext(alone))


def load_base_teacher(
    recipe: Recipe,
    stage: Stage | None,
    problems: Sequence[Problem],
    samplers: SamplerFactory,
    device: torch.device,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Teacher:
    """The recipe's teacher, ready to sample and to score for a stage (None: only to sample).

    ranks  who ask it together, each for a share; weights that are here lie on them in parts

    Raises UserError.
    """
    named = recipe.models.named("teacher")
    held = {
        field: replace(_served(recipe, field, name, stage, device), ranks=ranks)
        if server_client.is_served(name)
        else offload_if_configured(
            load_policy(
                ModelFolder.open(name, field, recipe.models.trust_remote_code),
                LoadOptions(recipe.models, device, frozen=True, ranks=ranks),
            ),
            recipe,
            samplers,
        )
        for field, name in named.items()
    }
    if not isinstance(recipe.models.teacher, dict):
        return next(iter(held.values()))
    widths = {field: one.vocabulary for field, one in held.items()}
    if len(set(widths.values())) > 1:
        raise UserError(
            "models.teacher: its models have output layers of different widths ("
            + ", ".join(f"{field.rpartition('.')[2]} {width}" for field, width in widths.items())
            + "), so their distributions cannot stand in one batch"
        )
    k = top_k_of(stage) if any(isinstance(one, ServedTeacher) for one in held.values()) else None
    teachers = {field.removeprefix("models.teacher."): one for field, one in held.items()}
    return TaggedTeachers(teachers, {one.id: one.tag for one in problems}, samplers, k, ranks)


def is_single_local_model(recipe: Recipe) -> bool:
    """Whether the teacher is one model whose weights are here."""
    held = recipe.models.teacher
    return isinstance(held, str) and not server_client.is_served(held)


def offload_if_configured(policy: Policy, recipe: Recipe, samplers: SamplerFactory) -> Policy | OffloadedTeacher:
    """A frozen policy as the recipe wants it to wait; where several ranks hold a part each, it stays."""
    away = recipe.compute.offload_teacher and policy.device.type != "cpu" and policy.ranks.alone
    return offloaded(policy, samplers) if away else policy


def _served(recipe: Recipe, field: str, name: str, stage: Stage | None, device: torch.device) -> ServedTeacher:
    met = server_client.connect(name, field, recipe.compute.server)
    student = ModelFolder.open(recipe.models.student, "models.student", recipe.models.trust_remote_code)
    width = int(student.config.get_text_config().vocab_size)
    return ServedTeacher(met, student.tokenizer, width, student.stop_ids, device, top_k_of(stage) or 0)


def top_k_of(stage: Stage | None) -> int | None:
    """How many tokens a served teacher is asked for: those of the stage's divergence; None for the sampled one alone."""
    if stage is None or divergence_of(stage.dense) is None:
        return None
    return stage.dense.top_k
