"""Tokens that the student chooses for a served teacher: exact against the whole distribution, gradients, unusable answers."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater.config.compute import Server
from headwater.config.dense import Candidates
from headwater.distributed.process_group import SINGLE_PROCESS
from headwater.errors import TrainingStoppedError
from headwater.losses import token_losses
from headwater.losses.batch import Row
from headwater.losses.materialized import Exact, TopK
from headwater.models.policy import Policy
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.build import TaggedTeachers
from headwater.teachers.scoring import distributions_of, top_tokens
from headwater.teachers.served_teacher import ServedTeacher, refuses_candidates, union
from headwater.teachers.server_client import connect
from headwater.training.teacher_contrast import contrast_metrics
from headwater.types import Rollout
from serving import Answering, serving
from tiny import CPU, gradient_of, largest, sampled_rows, stage_of, tiny_policy

K = 4


def served(url: str, student: Policy, candidates: Candidates) -> ServedTeacher:
    model = connect(url, "models.teacher", Server(seconds=5.0, retries=0, concurrency=3))
    return ServedTeacher(model, student.tokenizer, student.vocabulary, (), CPU, K, candidates=candidates)


def chosen_by(student: Policy) -> list[Rollout]:
    return top_tokens(student, [row.rollout for row in sampled_rows(student)], K, 64)


def merged_kl(student_V: Tensor, teacher_V: Tensor, kept: list[int]) -> float:
    """KL(S ‖ T) over the kept tokens and one event for all others, token by token."""
    rest = [token for token in range(len(student_V)) if token not in kept]
    pairs = [(student_V[token].exp().item(), teacher_V[token].exp().item()) for token in kept]
    pairs.append((student_V[rest].exp().sum().item(), teacher_V[rest].exp().sum().item()))
    return sum(s * float(np.log(s / t)) for s, t in pairs)


def test_union_of_kept_and_further_tokens_by_hand() -> None:
    kept = TopK(torch.tensor([[5, 7], [1, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.125]]).log())
    whole = union(kept, torch.tensor([[7, 9], [3, 4]]), torch.tensor([[0.25, 0.125], [0.25, 0.0625]]).log())
    assert whole.count_N is not None and whole.count_N.tolist() == [3, 4]
    assert whole.ids_NK[0, :3].tolist() == [5, 7, 9] and whole.ids_NK[1].tolist() == [1, 2, 3, 4]
    assert whole.logp_NK.exp()[0, :3].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert whole.token_logp(torch.tensor([9, 4])).exp().tolist() == pytest.approx([0.125, 0.0625])


def test_top_tokens_are_those_of_student(policy: Policy) -> None:
    rollouts = chosen_by(policy)
    for rollout, exact in zip(rollouts, distributions_of(policy, rollouts, 4096), strict=True):
        assert rollout.candidates is not None and rollout.candidates.dtype == np.int32
        assert rollout.candidates.tolist() == exact.materialize().top_k(K).ids_NK.tolist()


@pytest.mark.parametrize("candidates", ["student", "both"])
def test_reverse_kl_of_candidates_equals_whole_kl_with_merged_tail(policy: Policy, candidates: Candidates) -> None:
    teacher = tiny_policy(seed=1)
    rollouts = chosen_by(policy)
    with serving(Answering(teacher)) as there:
        assert refuses_candidates(connect(there.url, "models.teacher", Server())) is None
        scored = served(there.url, policy, candidates).distributions(rollouts, 64)
    for rollout, known, own, exact in zip(
        rollouts, scored, distributions_of(policy, rollouts, 64), distributions_of(teacher, rollouts, 64), strict=True
    ):
        student_NV, teacher_NV = (whole.materialize().logp_NV.double() for whole in (own, exact))
        kl_N = token_losses.reverse_kl(*known.materialize().align(student_NV))
        for place in range(len(rollout.completion_ids)):
            kept = set(rollout.candidates[place].tolist())  # type: ignore[index]
            if candidates == "both":
                kept |= set(teacher_NV[place].topk(K).indices.tolist())
            by_hand = merged_kl(student_NV[place], teacher_NV[place], sorted(kept))
            assert kl_N[place].item() == pytest.approx(by_hand, abs=1e-5)
        whole_N, server_N = (
            token_losses.reverse_kl(*form.align(student_NV)) for form in (Exact(teacher_NV), Exact(teacher_NV).top_k(K))
        )
        assert bool((kl_N <= whole_N + 1e-6).all())
        if candidates == "both":
            assert bool((kl_N >= server_N - 1e-6).all()) and kl_N.sum() > server_N.sum()


def test_gradient_of_union_equals_autograd_through_whole_model(policy: Policy) -> None:
    rows, teacher = sampled_rows(policy), tiny_policy(seed=1)
    chosen = top_tokens(policy, [row.rollout for row in rows], K, 4096)
    with serving(Answering(teacher)) as there:
        scored = served(there.url, policy, "both").distributions(chosen, 4096)
    taught = [replace(row, teacher=known) for row, known in zip(rows, scored, strict=True)]
    ours = gradient_of(policy, taught, stage_of("opd", dense={"top_k": K, "candidates": "both"}))
    total, tokens = torch.zeros(()), sum(row.tokens for row in rows)
    for row in taught:
        ids, start = (
            torch.tensor([row.rollout.prompt_ids + row.rollout.completion_ids]),
            len(row.rollout.prompt_ids) - 1,
        )
        logp_NV = torch.log_softmax(policy.model(input_ids=ids).logits[0, start : start + row.tokens], dim=-1)
        total = total + token_losses.reverse_kl(*row.teacher.materialize().align(logp_NV)).sum() / tokens  # type: ignore[union-attr]
    total.backward()
    plain = {name: parameter.grad for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert ours.keys() == plain.keys() and largest(ours) > 1e-3
    assert max((ours[name] - plain[name]).abs().max().item() for name in ours) < 1e-4 * largest(ours)
    policy.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("candidates", ["teacher", "student", "both"])
def test_local_teacher_by_tag_gives_form_of_served_one(policy: Policy, candidates: Candidates) -> None:
    teacher, rollouts = tiny_policy(seed=1), chosen_by(policy)
    tags = {rollout.problem_id: "here" if index < 4 else "there" for index, rollout in enumerate(rollouts)}
    with serving(Answering(teacher)) as there:
        remote = served(there.url, policy, candidates)
        tagged = TaggedTeachers({"here": teacher, "there": remote}, tags, lambda model: model, K, candidates=candidates)  # type: ignore[arg-type,return-value]
        mixed, alone = tagged.distributions(rollouts, 64), remote.distributions(rollouts, 64)
    for ours, single in zip(mixed, alone, strict=True):
        assert isinstance(ours, TopK) and isinstance(single, TopK) and torch.equal(ours.ids_NK, single.ids_NK)
        torch.testing.assert_close(ours.logp_NK, single.logp_NK, atol=1e-5, rtol=0.0)
        assert (ours.count_N is None) == (single.count_N is None)


def test_local_teacher_by_tag_gives_sampled_token_as_served_one(policy: Policy) -> None:
    """A batch, and the metric over a step, take rows of both."""
    teacher, rollouts = tiny_policy(seed=1), chosen_by(policy)
    tags = {rollout.problem_id: "here" if index < 4 else "there" for index, rollout in enumerate(rollouts)}
    with serving(Answering(teacher)) as there:
        remote = replace(served(there.url, policy, "teacher"), top_k=0)
        tagged = TaggedTeachers({"here": teacher, "there": remote}, tags, TorchSampler, 0)
        mixed, alone = tagged.distributions(rollouts, 64), remote.distributions(rollouts, 64)
    for ours, single in zip(mixed, alone, strict=True):
        assert isinstance(ours, TopK) and isinstance(single, TopK) and torch.equal(ours.ids_NK, single.ids_NK)
        torch.testing.assert_close(ours.logp_NK, single.logp_NK, atol=1e-5, rtol=0.0)
    rows = [Row(rollout, teacher=given) for rollout, given in zip(rollouts, mixed, strict=True)]
    assert 0.0 < contrast_metrics(rows, policy.vocabulary, SINGLE_PROCESS)["teacher_contrast"] < 1.0


def test_server_without_endpoint_refuses_in_its_words(policy: Policy) -> None:
    with serving(Answering(policy, scale_out=False)) as there:
        assert "refuses (status 404" in str(refuses_candidates(connect(there.url, "models.teacher", Server())))

    def older(path: str, body: Any) -> Any:
        answer = Answering(policy)(path, body)
        return {**answer, "prompt_token_id_logprobs": None} if path == "/inference/v1/generate" else answer

    with serving(older) as there:
        reason = refuses_candidates(connect(there.url, "models.teacher", Server()))
    assert reason == f"{there.url} gives no prompt_token_id_logprobs"


def encoded(array: Any) -> str:
    data = io.BytesIO()
    np.save(data, array)
    return base64.b64encode(data.getvalue()).decode("ascii")


HUGE = base64.b64encode(
    base64.b64decode(encoded(np.zeros((1, K), np.float32))).replace(b"(1, 4), }  ", b"(999999999, 4), }")[:128]
).decode("ascii")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "gives no prompt_token_id_logprobs"),
        ("not base64", "gives no prompt_token_id_logprobs"),
        (encoded(np.zeros((1, K), np.float32))[:40], "gives no prompt_token_id_logprobs"),
        (HUGE, "gives no prompt_token_id_logprobs"),
        (encoded(np.full((1, K), -9.0, np.float32)), "gives no prompt_token_id_logprobs"),
        (encoded(np.full((2, K), -9.0, np.float64)), "gives no prompt_token_id_logprobs"),
        (encoded(np.full((K, 2), -9.0, np.float32)), "that are not 2 × 4 log-probs"),
        (encoded(np.full((2, K), np.nan, np.float32)), "that are not 2 × 4 log-probs"),
        (encoded(np.full((2, K), 0.5, np.float32)), "that are not 2 × 4 log-probs"),
        (encoded(np.zeros((2, K), np.float32)), "probabilities that sum to 4, over 1"),
    ],
)
def test_unusable_candidate_scores_stop_run(policy: Policy, value: str | None, message: str) -> None:
    rollout = replace(sampled_rows(policy)[0].rollout, completion_ids=(5, 6), sampler_logp=(-1.0, -1.0))
    rollout = replace(rollout, candidates=np.arange(2 * K, dtype=np.int32).reshape(2, K))
    answer = Answering(policy)
    with serving(
        lambda path, body: {"prompt_token_id_logprobs": value} if path.startswith("/inference") else answer(path, body)
    ) as there:
        with pytest.raises(TrainingStoppedError, match=message):
            served(there.url, policy, "student").distributions([rollout], 64)


def test_candidates_without_top_k_or_live_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates both: needs top_k"):
        stage_of("opd", dense={"candidates": "both"})
    with pytest.raises(ValueError, match=r"dense.candidates: objective forward_kl does not compare the policy's own"):
        stage_of("forward_kl", dense={"candidates": "both", "top_k": K})
