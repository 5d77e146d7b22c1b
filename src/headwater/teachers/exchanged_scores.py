"""Exchange teacher scores between ranks: each score goes to the rank that trains on its rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.distributions import Distributions, FromHidden
from headwater.losses.materialized import TopK
from headwater.losses.output_head import Head
from headwater.models.policy import Policy
from headwater.teachers.build import TaggedTeachers
from headwater.teachers.composed import ComposedTeacher
from headwater.teachers.served_teacher import ServedTeacher
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.types import Rollout

Key = tuple[str, int]
Scores = Mapping[Key, Distributions]


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
    scores: Scores, owner_of: Mapping[Key, int], rollouts: Sequence[Rollout], teacher: Supervisor, ranks: ProcessGroup
) -> Scores:
    """Send each score to the rank that trains on its rollout; return this rank's.

    owner_of  (problem id, sample) -> rank, for every row of the step
    rollouts  those that this rank trains on
    """
    parts: list[dict[Key, Tensor | TopK]] = [{} for _ in range(ranks.size)]
    for key, score in scores.items():
        parts[owner_of[key]][key] = _packed(score, away=owner_of[key] != ranks.rank)
    received = {key: value for part in ranks.exchange(parts) for key, value in part.items()}
    return {
        (rollout.problem_id, rollout.sample): _unpacked(received[rollout.problem_id, rollout.sample], rollout, teacher)
        for rollout in rollouts
    }


def _packed(score: Distributions, away: bool) -> Tensor | TopK:
    if isinstance(score, FromHidden):
        return score.hidden_NH.cpu() if away else score.hidden_NH
    assert isinstance(score, TopK)
    if not away:
        return score
    count_N = None if score.count_N is None else score.count_N.cpu()
    return TopK(score.ids_NK.cpu(), score.logp_NK.cpu(), count_N)


def _unpacked(value: Tensor | TopK, rollout: Rollout, teacher: Supervisor) -> Distributions:
    if isinstance(value, TopK):
        count_N = None if value.count_N is None else value.count_N.to(teacher.device)
        return TopK(value.ids_NK.to(teacher.device), value.logp_NK.to(teacher.device), count_N)
    return FromHidden(value.to(teacher.device), _head(teacher, rollout), rollout.temperature)


def _head(teacher: Supervisor, rollout: Rollout) -> Head:
    model = teacher.model if isinstance(teacher, TranslatedTeacher) else teacher
    model = model.teachers[model.tags[rollout.problem_id]] if isinstance(model, TaggedTeachers) else model
    assert isinstance(model, Policy)
    return model.logits
