"""Probe: its measures against independent counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headwater.config.builtin import find_recipe
from headwater.data.labels import Labels
from headwater.doctor import probe
from headwater.doctor.probe_samples import as_student_reads, first_part
from headwater.doctor.readiness import informative_share
from headwater.models.token_bytes import TokenBytes, TokenPair
from headwater.runs.inputs import RunInputs
from headwater.runs.progress import progress_display
from headwater.runs.setup import prepared
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.ledger import Spend
from headwater.teachers.translated import TranslatedTeacher
from headwater.types import Verdict
from runs import TINY
from tiny import policy_of, rollout_of, tiny_model
from tools.pretrain.pocket import make_tokenizer


def test_informative_share_counts_sample_groups() -> None:
    # Of four samples one is right: of the six pairs three hold it. Two right: four pairs of six. None or all: no pair.
    assert informative_share([1, 2, 0, 4], 4, 2) == pytest.approx([1 / 2, 2 / 3, 0.0, 0.0])
    # Where the samples are one whole group, it is informative or not.
    assert informative_share([0, 1, 3, 4], 4, 4) == pytest.approx([0.0, 1.0, 1.0, 0.0])


def test_warmup_epochs_follow_from_recipe() -> None:
    # 2 steps of 16 rollouts on a cache of 16 prompts × 4 rollouts: half of it is read once.
    with prepared(find_recipe("pocket", list(TINY)), ["bridge"], [0]) as (_, inputs):
        assert probe.cache_passes(inputs) == 0.5
    half = find_recipe("pocket", [*TINY, "labels.split=half"])
    with prepared(half, ["bridge"], [0]) as (_, inputs):
        assert probe.cache_passes(inputs) == 1.0
        assert set(probe.sampled_problems(inputs, None, 0)) == set(inputs.pools.first_half)


def test_continuations_start_in_first_quarter_of_correct_teacher_answer() -> None:
    seen: list[str] = []

    def grade(pairs: Any) -> list[Verdict]:
        seen.extend(text for _, text in pairs)
        return [Verdict(len(text) % 2 == 0, "by hand") for _, text in pairs]

    recipe, prompt = find_recipe("pocket", list(TINY)), (1, 6, 15, 7, 2)
    wrong, right, later = (rollout_of(prompt, (first, *[9] * 7), sample) for sample, first in enumerate((7, 8, 6)))
    policies = [policy_of(tiny_model(seed=seed)) for seed in (0, 1)]
    stage = recipe.stages.teacher_rl
    no, yes = Verdict(False, "different"), Verdict(True, "equal")
    student = probe.ModelSamples(policies[0], stage, "stages.student_rl", (wrong,), (no,), 1)
    teacher = probe.ModelSamples(policies[1], stage, "stages.teacher_rl", (wrong, right, later), (no, yes, yes), 3)
    spends: list[Spend] = []
    labels = Labels({right.problem_id: "4"}, grade, 1)
    task = probe.ProbeTask(
        RunInputs(recipe), [right.problem_id], 1, 0, labels, progress_display(quiet=True), spends.append
    )
    continuations = probe.continue_right_answers((student, teacher), policies[1], teacher.rollouts, task)
    beginning = policies[0].tokenizer.decode([8, 9])
    assert continuations is not None and continuations.problems == 1
    assert len(seen) == 2 * probe.CONTINUATIONS and all(text.startswith(beginning) for text in seen)
    for interval, part in (
        (continuations.student, seen[: probe.CONTINUATIONS]),
        (continuations.teacher, seen[probe.CONTINUATIONS :]),
    ):
        assert interval.mean == pytest.approx(sum(len(text) % 2 == 0 for text in part) / probe.CONTINUATIONS)
    assert [spend.checks for spend in spends] == [probe.CONTINUATIONS] * 2
    assert continuations.kl > 0.1  # two models of random weights on two right answers


def test_first_part_of_answer_ends_with_token_of_both_models() -> None:
    """Characters against pairs: `=` is the teacher's first token, and its next two are `12` and `34`."""
    pairs = make_tokenizer("pairs")
    pair = TokenPair(*(TokenBytes.of(tokenizer, (tokenizer.eos_token_id,)) for tokenizer in (make_tokenizer(), pairs)))
    teacher = TranslatedTeacher(
        policy_of(tiny_model()), lambda name: (1, 2), pair, "prefix", pair.student.tokenizer, 28, TorchSampler
    )
    ids = tuple(pairs("=1234;56", add_special_tokens=False)["input_ids"])
    own = replace(rollout_of((1, 40, 2), ids, 0), finish="length")
    (read,) = as_student_reads([own], teacher, lambda name: (1, 6, 2))
    assert read.prompt_ids == (1, 6, 2) and read.teacher_ids == ids and len(read.completion_ids) == 8
    for share, length, text in ((0.25, 1, "="), (0.5, 2, "=12"), (0.75, 4, "=1234;")):
        parts = first_part(own, read, teacher, share)
        assert parts["teacher"] == ids[:length]
        assert {
            tokens.tokenizer.decode(parts[role])
            for role, tokens in (("student", pair.student), ("teacher", pair.teacher))
        } == {text}
    lost = pair.to_student(replace(own, completion_ids=(pairs.unk_token_id,)), (1, 6, 2))
    assert set(first_part(own, replace(lost, teacher_ids=()), teacher, 0.5).values()) != {()}


def test_readiness_counts_outcomes_of_its_samples() -> None:
    recipe, prompt = find_recipe("pocket", list(TINY)), (1, 6, 15, 7, 2)
    cut = [rollout_of(prompt, (7, 8), sample) for sample in range(4)]  # rollout_of makes rollouts that were cut
    ended = [replace(rollout, finish="stop") for rollout in cut]
    verdicts = [
        *(
            Verdict(correct, reason)
            for correct, reason in ((True, "equal"), (False, "no_answer"), (False, "different"))
        ),
        *(Verdict(False, reason) for reason in ("no_answer", "no_answer", "different", "timeout", "truncated")),
    ]
    samples = probe.ModelSamples(
        policy_of(tiny_model()), recipe.stages.teacher_rl, "stages.teacher_rl", [*cut[:3], *ended, cut[3]], verdicts, 4
    )
    measured = probe.readiness(samples, 0.5)
    assert measured.outcomes.counts == {"right": 1, "cut": 3, "no_answer": 2, "wrong": 1, "ungraded": 1}
    assert (measured.stage, measured.max_tokens) == ("stages.teacher_rl", 32)
    assert measured.pass_rate.mean == 1 / 8 and samples.correct().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
