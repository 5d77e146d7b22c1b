"""Exchange teacher scores between ranks: each score goes to the rank that trains on its rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headwater.distributed.process_group import ProcessGroup
from headwater.losses import per_token
from headwater.losses.distributions import Distributions, FromHidden
from headwater.losses.materialized import TopK
from headwater.losses.output_head import Head
from headwater.models.policy import Policy
from headwater.teachers.build import TaggedTeachers
from headwater.teachers.composed import ComposedTeacher
from headwater.teachers.served_teacher import ServedTeacher
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.types import Rollout, RolloutKey

Scores = Mapping[RolloutKey, Distributions]


def can_exchange_scores(teacher: Supervisor | ComposedTeacher) -> bool:
    """Whether a teacher's scores are hidden states of an output layer that every rank has, or tokens and log-probs.

    Those of composed teachers and of teachers with another tokenizer refer to more.
    """
    if isinstance(teacher, TranslatedTeacher):
        return teacher.pair is None and teacher.form != "sorted" and can_exchange_scores(teacher.model)
    parts = teacher.teachers.values() if isinstance(teacher, TaggedTeachers) else [teacher]
    return all(isinstance(part, ServedTeacher) or (isinstance(part, Policy) and part.has_whole_head) for part in parts)


def on_group(teacher: Supervisor, ranks: ProcessGroup) -> Supervisor:
    """The same teacher, whose passes communicate over a process group of their own."""
    if isinstance(teacher, TranslatedTeacher):
        model = on_group(teacher.model, ranks)
        assert not isinstance(model, TranslatedTeacher)
        return replace(teacher, model=model)
    if isinstance(teacher, TaggedTeachers):
        parts = {tag: replace(part, ranks=ranks) for tag, part in teacher.teachers.items()}
        return replace(teacher, teachers=parts, ranks=ranks)
    return replace(teacher, ranks=ranks)


def exchanged(
    scores: Scores,
    owner_of: Mapping[RolloutKey, int],
    rollouts: Sequence[Rollout],
    teacher: Supervisor,
    ranks: ProcessGroup,
) -> Scores:
    """Send each score to the rank that trains on its rollout; return this rank's.

    owner_of  (problem id, sample) -> rank, for every row of the step
    rollouts  those that this rank trains on
    """
    parts: list[dict[RolloutKey, Tensor | TopK]] = [{} for _ in range(ranks.size)]
    for key, score in scores.items():
        parts[owner_of[key]][key] = _packed(score, away=owner_of[key] != ranks.rank)
    received = {key: value for part in ranks.exchange(parts) for key, value in part.items()}
    return {rollout.key: _unpacked(received[rollout.key], rollout, teacher) for rollout in rollouts}


def _packed(score: Distributions, away: bool) -> Tensor | TopK:
    assert isinstance(score, (FromHidden, TopK))
    sent = per_token.to_device(score, torch.device("cpu")) if away else score
    return sent.hidden_NH if isinstance(sent, FromHidden) else sent


def _unpacked(value: Tensor | TopK, rollout: Rollout, teacher: Supervisor) -> Distributions:
    if isinstance(value, TopK):
        return per_token.to_device(value, teacher.device)
    return FromHidden(value.to(teacher.device), _head(teacher, rollout), rollout.temperature)


def _head(teacher: Supervisor, rollout: Rollout) -> Head:
    model = teacher.model if isinstance(teacher, TranslatedTeacher) else teacher
    model = model.teachers[model.tags[rollout.problem_id]] if isinstance(model, TaggedTeachers) else model
    assert isinstance(model, Policy)
    return model.logits
