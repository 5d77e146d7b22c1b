"""Load the recipe's base teacher: weights in this process, a server, or several of either by problem tag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.config.dense import Candidates
from headwater.config.recipe import Recipe
from headwater.config.stage import Sampling, Stage
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, truncate_to_top_k
from headwater.losses.materialized import Exact, TopK
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.shape import Shape
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory
from headwater.sampling.sharded_sampler import ShardedSampler
from headwater.teachers import server_client
from headwater.teachers.scoring import distributions_of
from headwater.teachers.served_teacher import ServedTeacher, refuses_candidates, union
from headwater.types import Problem, Rollout


@dataclass(frozen=True)
class OffloadedTeacher:
    """A teacher of this process whose weights are on another device between calls, except for its output layer.

    The output layer stays because distributions are kept as hidden states and computed from them when the loss reads them.

    away  the device between calls
    """

    policy: Policy
    away: torch.device
    make_sampler: SamplerFactory
    ranks: ProcessGroup = SINGLE_PROCESS

    tokenizer = property(attrgetter("policy.tokenizer"))
    vocabulary = property(attrgetter("policy.vocabulary"))
    device = property(attrgetter("policy.device"))
    shape = property(attrgetter("policy.shape"))

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return self.policy.pass_flops(rows, passes)

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        with self.on_device():
            return distributions_of(self.policy, rollouts, tokens)

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        with self.on_device():
            return self.make_sampler(self.policy).sample(requests, sampling, on_finished)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        move_weights(self.policy, self.policy.device)
        try:
            yield
        finally:
            move_weights(self.policy, self.away)


def move_weights(policy: Policy, device: torch.device) -> None:
    """Move all weights but the output layer's to a device."""
    for tensor in offloadable_weights(policy):
        tensor.data = tensor.data.to(device)


def offloadable_weights(policy: Policy) -> list[Tensor]:
    """All weights but the output layer's, which include tied embeddings."""
    head = policy.model.get_output_embeddings()
    kept = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return [tensor for tensor in (*policy.model.parameters(), *policy.model.buffers()) if id(tensor) not in kept]


def offload_if_configured(policy: Policy, recipe: Recipe, make_sampler: SamplerFactory) -> Policy | OffloadedTeacher:
    """Offload a frozen policy to CPU memory if the recipe says so; one that is sharded over ranks stays."""
    if not recipe.compute.offload_teacher or policy.device.type == "cpu" or not policy.ranks.single_process:
        return policy
    cpu = torch.device("cpu")
    move_weights(policy, cpu)
    return OffloadedTeacher(policy, cpu, make_sampler)


SingleTeacher = Policy | ServedTeacher | OffloadedTeacher


@dataclass(frozen=True)
class TaggedTeachers:
    """Several teachers, each for the problems of its tag.

    tags   problem id -> tag
    top_k  tokens kept of each distribution, so that served and local teachers give one form; 0: the sampled token; None if all are
           local
    candidates  who chooses them, where the rollouts have candidates of the student
    """

    teachers: Mapping[str, SingleTeacher]
    tags: Mapping[str, str]
    make_sampler: SamplerFactory
    top_k: int | None
    ranks: ProcessGroup = SINGLE_PROCESS
    candidates: Candidates = "teacher"

    @property
    def first(self) -> SingleTeacher:
        return next(iter(self.teachers.values()))

    tokenizer = property(attrgetter("first.tokenizer"))
    vocabulary = property(attrgetter("first.vocabulary"))
    device = property(attrgetter("first.device"))

    @property
    def shape(self) -> Shape:
        """The largest teacher's, so that costs derived from it are upper bounds."""
        return max((teacher.shape for teacher in self.teachers.values()), key=lambda shape: shape.matrix_parameters)

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return sum(
            teacher.pass_flops([row for row in rows if self.tags[row.rollout.problem_id] == tag], passes)
            for tag, teacher in self.teachers.items()
        )

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        scored = self._by_tag(rollouts, lambda teacher, own: distributions_of(teacher, own, tokens))
        return [self._kept(*pair) for pair in zip(scored, rollouts, strict=True)]

    def _kept(self, scored: Distributions, rollout: Rollout) -> Distributions:
        """What a server would have given of a local teacher's distributions."""
        if self.top_k is None or isinstance(scored, TopK):
            return scored
        if self.top_k == 0:
            known, ids_N = scored.materialize(), torch.tensor(rollout.completion_ids, device=self.device)
            assert isinstance(known, Exact)
            return TopK(ids_N[:, None], known.token_logp(ids_N)[:, None])
        if self.candidates == "teacher" or rollout.candidates is None:
            return truncate_to_top_k(scored, self.top_k)
        known, ids_NK = scored.materialize(), torch.from_numpy(rollout.candidates).long().to(self.device)
        assert isinstance(known, Exact)
        logp_NK = known.logp_NV.gather(1, ids_NK)
        return (
            TopK(ids_NK, logp_NK) if self.candidates == "student" else union(known.top_k(self.top_k), ids_NK, logp_NK)
        )

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        samplers = partial(sampler_for, make_sampler=self.make_sampler)
        return self._by_tag(requests, lambda teacher, own: samplers(teacher).sample(own, sampling, on_finished))

    def _by_tag(self, items: Sequence[Any], call: Callable[[SingleTeacher, list[Any]], Sequence[Any]]) -> list[Any]:
        """Call each teacher with the requests or rollouts of its tag; results in the order of `items`."""
        results: dict[int, Any] = {}
        for tag, teacher in self.teachers.items():
            own = [index for index, item in enumerate(items) if self.tags[item.problem_id] == tag]
            if own or not self.ranks.single_process:  # calls are collective: ranks without items take part too
                results.update(zip(own, call(teacher, [items[index] for index in own]), strict=True))
        return [results[index] for index in range(len(items))]


Teacher = SingleTeacher | TaggedTeachers


def sampler_for(model: Teacher, make_sampler: SamplerFactory) -> Sampler:
    """A model's sampler: the recipe's for a policy, else the model itself; requests are sharded over the model's ranks."""
    if isinstance(model, Policy):
        return make_sampler(model)
    if model.ranks.single_process or isinstance(model, TaggedTeachers):  # tagged teachers are sharded one by one
        return model
    local: Sampler = model
    return ShardedSampler(model.ranks, lambda: contextlib.nullcontext(local))


def load_base_teacher(
    recipe: Recipe,
    stage: Stage | None,
    problems: Sequence[Problem],
    make_sampler: SamplerFactory,
    device: torch.device,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Teacher:
    """The recipe's teacher, ready to sample and to score for a stage (None: only to sample).

    ranks  they call it together, each with a shard of the work; local weights are sharded over them

    Raises UserError.
    """
    loaded: dict[str, SingleTeacher] = {}
    for role, name in recipe.models.by_role("teacher").items():
        field = f"models.{role}"
        if server_client.is_served(name):
            loaded[role] = replace(_served_teacher(recipe, field, name, stage, device), ranks=ranks)
        else:
            folder = ModelFolder.open(name, field, recipe.models.trust_remote_code)
            policy = load_policy(folder, LoadOptions(recipe.models, device, frozen=True, ranks=ranks))
            loaded[role] = offload_if_configured(policy, recipe, make_sampler)
    if not isinstance(recipe.models.teacher, dict):
        return next(iter(loaded.values()))
    widths = {role: teacher.vocabulary for role, teacher in loaded.items()}
    if len(set(widths.values())) > 1:
        raise UserError(
            "models.teacher: its models have output layers of different widths ("
            + ", ".join(f"{role.rpartition('.')[2]} {width}" for role, width in widths.items())
            + "), so one batch cannot hold their distributions"
        )
    served = [teacher for teacher in loaded.values() if isinstance(teacher, ServedTeacher)]
    candidates = served[0].candidates if served and all(map(uses_candidates, served)) else "teacher"
    teachers = {
        role.removeprefix("teacher."): replace(teacher, candidates=candidates)
        if isinstance(teacher, ServedTeacher)
        else teacher
        for role, teacher in loaded.items()
    }
    tags = {problem.id: problem.tag for problem in problems}
    return TaggedTeachers(teachers, tags, make_sampler, top_k_of(stage) if served else None, ranks, candidates)


def uses_candidates(teacher: object) -> bool:
    """Whether a teacher scores candidates of the student."""
    return isinstance(teacher, (ServedTeacher, TaggedTeachers)) and teacher.candidates != "teacher"


def is_single_local_model(recipe: Recipe) -> bool:
    """Whether the recipe's teacher is one model loaded in this process."""
    teacher = recipe.models.teacher
    return isinstance(teacher, str) and not server_client.is_served(teacher)


def _served_teacher(recipe: Recipe, field: str, name: str, stage: Stage | None, device: torch.device) -> ServedTeacher:
    served_model = server_client.connect(name, field, recipe.compute.server)
    models, field_of_ids = recipe.models, "student" if recipe.models.teacher_tokenizer is None else "teacher_tokenizer"
    folder = ModelFolder.open(getattr(models, field_of_ids), f"models.{field_of_ids}", models.trust_remote_code)
    width, top_k = int(folder.config.get_text_config().vocab_size), top_k_of(stage)
    teacher = ServedTeacher(served_model, folder.tokenizer, width, folder.stop_ids, device, top_k)
    candidates = "teacher" if stage is None else stage.dense.candidates
    if candidates == "teacher" or refuses_candidates(served_model) is not None:
        return teacher
    return replace(teacher, candidates=candidates)


def top_k_of(stage: Stage | None) -> int:
    """Tokens per position that a served teacher is asked for: the divergence's top-k; 0 for the sampled token only."""
    return stage.dense.top_k or 0 if stage is not None and stage.dense.exact else 0
