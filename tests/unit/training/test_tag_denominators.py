"""A loss that is normalized by tag: weights by hand, and the gradient as the mean of the tags' own gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headwater.config.stage import Stage
from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Row
from headwater.models.policy import Policy
from headwater.training.groups import assign_to_ranks, with_tags
from headwater.training.update import token_weights
from tiny import furthest, gradient_of, largest, rollout_of, sampled_rows, stage_of, taught, tiny_policy

ROWS = [
    Row(rollout_of((5,), (7,) * count, sample=count), tag=tag)
    for count, tag in ((6, "long"), (1, "short"), (2, "long"))
]


def by_tag(**fields: object) -> Stage:
    return stage_of("opd", dense={"normalize": "tags"}, **fields)


@pytest.mark.parametrize(
    ("mean", "weights"),
    [
        (
            "token",
            [1 / 16, 1 / 2, 1 / 16],
        ),  # half of the loss over the 8 tokens of `long`, half over the token of `short`
        ("sequence", [1 / 24, 1 / 2, 1 / 8]),  # 1/(2·2·6), 1/(2·1·1), 1/(2·2·2)
        ("constant", [1 / 40, 1 / 20, 1 / 40]),  # 1/(2·2·10), 1/(2·1·10)
    ],
)
def test_token_weights_by_tag_by_hand(mean: str, weights: list[float]) -> None:
    stage = by_tag(loss_mean=mean, sampling={"max_tokens": 10})
    assert token_weights(ROWS, stage) == weights
    one_tag = [replace(row, tag="long") for row in ROWS]
    assert token_weights(one_tag, stage) == token_weights(
        ROWS, stage_of("opd", loss_mean=mean, sampling={"max_tokens": 10})
    )


def test_gradient_normalized_by_tag_is_mean_of_tag_gradients(policy: Policy) -> None:
    rows = taught(sampled_rows(policy), tiny_policy(seed=1))
    tagged = [replace(row, tag="long" if index < 3 else "short") for index, row in enumerate(rows)]
    whole, plain = gradient_of(policy, tagged, by_tag()), gradient_of(policy, tagged, stage_of("opd"))
    parts = [gradient_of(policy, part, stage_of("opd")) for part in (tagged[:3], tagged[3:])]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    assert furthest(whole, mean) < 1e-5 * largest(mean) < furthest(whole, plain)
    assert furthest(whole, gradient_of(policy, tagged, by_tag(), tokens=16)) < 1e-5 * largest(mean)


def test_denominators_by_tag_are_those_of_all_ranks(policy: Policy) -> None:
    rows = sampled_rows(policy)
    tags = {row.rollout.problem_id: tag for row, tag in zip(rows[::4], ("long", "short"), strict=True)}
    shards = [assign_to_ranks(with_tags(rows, tags), by_tag(), 4, ProcessGroup(rank, 2)) for rank in (0, 1)]
    single = token_weights(with_tags(rows, tags), by_tag())
    assert [token_weights(shard, by_tag()) for shard in shards] == [single, single]
    assert sum(weight * row.tokens for weight, row in zip(single, rows, strict=True)) == pytest.approx(1.0)


def test_normalizing_by_tag_without_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense.normalize: objective grpo does not compare with a teacher"):
        stage_of("grpo", dense={"normalize": "tags"})
