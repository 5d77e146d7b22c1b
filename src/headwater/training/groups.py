"""Groups of rollouts that share a prompt: rewards, advantages, dynamic sampling, and their assignment to ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from headwater.config.stage import Stage
from headwater.distributed.process_group import ProcessGroup
from headwater.losses.advantages import ADVANTAGES
from headwater.losses.batch import Row
from headwater.types import Verdict


def with_rewards(
    rows: Sequence[Row], verdicts: Sequence[Verdict], stage: Stage, skip_zero_advantage: bool
) -> list[Row]:
    """Add verdicts and group advantages to rows (consecutive groups of `group_size`).

    A completion cut at the token limit is graded as it is: the answer may come before the cut.
    """
    rewards_PG = torch.tensor([float(verdict.correct) for verdict in verdicts]).view(-1, stage.group_size)
    advantages = ADVANTAGES[stage.sparse.advantage](rewards_PG).flatten().tolist()
    return [
        replace(row, verdict=verdict, advantage=advantage, zero_gradient=skip_zero_advantage and advantage == 0.0)
        for row, verdict, advantage in zip(rows, verdicts, advantages, strict=True)
    ]


def with_tags(rows: Sequence[Row], tags: Mapping[str, str]) -> list[Row]:
    """Add the tag of each row's problem, by problem id; an empty mapping adds none."""
    return [replace(row, tag=tags[row.rollout.problem_id]) for row in rows] if tags else list(rows)


def groups_of(rows: Sequence[Row], group_size: int) -> list[Sequence[Row]]:
    return [rows[start : start + group_size] for start in range(0, len(rows), group_size)]


def split_minibatches(rows: Sequence[Row], parts: int, group_size: int) -> list[list[Row]]:
    """Split rows into `parts` of nearly equal size without cutting a group of `group_size` rows."""
    groups = groups_of(rows, group_size)
    cuts = [round(index * len(groups) / parts) for index in range(parts + 1)]
    return [[row for group in groups[a:b] for row in group] for a, b in itertools.pairwise(cuts) if b > a]


def is_informative(group: Sequence[Row]) -> bool:
    """Whether the verdicts of a group differ; otherwise its advantages are 0."""
    return len({row.verdict.correct for row in group if row.verdict}) > 1


def count_uninformative(rows: Sequence[Row], group_size: int) -> int:
    return sum(not is_informative(group) for group in groups_of(rows, group_size))


def count_solved(rows: Sequence[Row], group_size: int) -> int:
    """Number of groups with at least one correct completion (pass@G on the step's problems)."""
    return sum(any(row.verdict.correct for row in group if row.verdict) for group in groups_of(rows, group_size))


def truncated_share(rows: Sequence[Row]) -> float:
    """Share of completions that ended at the token limit."""
    return sum(row.rollout.finish == "length" for row in rows) / len(rows)


def replace_uninformative(kept: list[Row], fresh: list[Row], group_size: int) -> list[Row]:
    """Replace uninformative groups by informative fresh ones (dynamic sampling); keep the rest in place."""
    if not kept:
        return fresh
    informative = filter(is_informative, groups_of(fresh, group_size))
    groups = [group if is_informative(group) else next(informative, group) for group in groups_of(kept, group_size)]
    return [row for group in groups for row in group]


def assign_to_ranks(rows: list[Row], stage: Stage, group_size: int, ranks: ProcessGroup) -> list[Row]:
    """Mark the rows that this rank trains on (`owners`)."""
    if ranks.single_process:
        return rows
    owner = owners(rows, stage, group_size, ranks.size)
    return [replace(row, local=owner[index] == ranks.rank) for index, row in enumerate(rows)]


def owners(rows: Sequence[Row], stage: Stage, group_size: int, size: int) -> list[int]:
    """The rank of `size` that trains on each row: about equal tokens per rank in every optimizer step.

    Groups of `group_size` rows, which share a prompt, stay together where there are enough of them. Every rank computes the
    same assignment from the same rows.

    Example: groups of 9, 5 and 4 tokens on two ranks: the first on rank 0, the other two on rank 1.
    """
    assigned: list[int] = []
    for minibatch in split_minibatches(rows, stage.minibatches, group_size):
        groups = groups_of(minibatch, group_size)
        if len(groups) < 2 * size:
            groups = [[row] for row in minibatch]
        cost = [sum(row.rollout.length for row in group if not row.zero_gradient) for group in groups]
        load, owner = [0] * size, [0] * len(groups)
        for index in sorted(range(len(groups)), key=lambda index: (-cost[index], index)):
            owner[index] = load.index(min(load))
            load[owner[index]] += cost[index]
        assigned += [owner[index] for index, group in enumerate(groups) for _ in group]
    return assigned
