"""Served teacher: scoring and sampling through a server, and answers that it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from headwater.config.compute import Server
from headwater.config.stage import Sampling
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.materialized import TopK
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.teachers import server_client
from headwater.teachers.scoring import distributions_of
from headwater.teachers.served_teacher import ServedTeacher
from headwater.teachers.server_client import connect
from headwater.types import Rollout
from serving import Answering, Answers, serving
from tiny import CPU, rollout_of, tiny_policy

QUICK = Server(seconds=2.0, retries=2, concurrency=3, batch_tokens=64)


def teacher_at(url: str, top_k: int = 4, settings: Server = QUICK) -> ServedTeacher:
    policy = tiny_policy()
    served_model = connect(url, "models.teacher", settings)
    return ServedTeacher(served_model, policy.tokenizer, policy.vocabulary, policy.stop_ids, CPU, top_k)


ROLLOUTS = [
    replace(rollout_of((1, 6, 15, 7, 2), (8, 9, 3), sample=0)),
    replace(rollout_of((1, 5, 2), (13, 11, 15, 6, 2), sample=1)),
    *(rollout_of((1, 8, 9, 15, 10, 2), (5,) * count, sample=count) for count in range(2, 12)),
]


@pytest.mark.parametrize("k", [1, 4, 20])
def test_served_scores_equal_teacher_top_k(policy: Policy, k: int) -> None:
    with serving(Answering(policy, most=30)) as there:
        distributions = teacher_at(there.url, k).distributions(ROLLOUTS, 4096)
    exact = [distribution.materialize().top_k(k) for distribution in distributions_of(policy, ROLLOUTS, 4096)]
    assert [len(distribution) for distribution in distributions] == [
        len(rollout.completion_ids) for rollout in ROLLOUTS
    ]
    for ours, served in zip(exact, distributions, strict=True):
        assert isinstance(served, TopK) and torch.equal(ours.ids_NK, served.ids_NK)
        torch.testing.assert_close(ours.logp_NK, served.logp_NK, atol=1e-5, rtol=0.0)


def test_sequences_are_sent_as_ids_in_batches_of_bounded_size(policy: Policy) -> None:
    with serving(Answering(policy)) as there:
        teacher_at(there.url).distributions(ROLLOUTS, 4096)
    sent = [body["prompt"] for path, body in there.requests if path == "/v1/completions"]
    assert len(sent) > 1 and all(sum(map(len, part)) <= QUICK.batch_tokens for part in sent)
    assert sorted(request for part in sent for request in part) == sorted(
        [*rollout.prompt_ids, *rollout.completion_ids] for rollout in ROLLOUTS
    )


def test_top_k_zero_scores_only_sampled_token(policy: Policy) -> None:
    with serving(Answering(policy)) as there:
        distributions = teacher_at(there.url, 0).distributions(ROLLOUTS[:2], 4096)
    for distribution, rollout, exact in zip(
        distributions, ROLLOUTS, distributions_of(policy, ROLLOUTS[:2], 4096), strict=False
    ):
        targets = torch.tensor(rollout.completion_ids)
        torch.testing.assert_close(
            distribution.token_logp(targets), exact.materialize().token_logp(targets), atol=1e-5, rtol=0.0
        )


def test_each_sample_has_seed_of_its_request(policy: Policy) -> None:
    requests = requests_for([("a", (1, 6, 15, 7, 2)), ("b", (1, 5, 2))], 3, "draw")
    arrived: list[Rollout] = []
    with serving(Answering(policy)) as there:
        teacher = teacher_at(there.url)
        rollouts = teacher.sample(requests, Sampling(max_tokens=8), arrived.extend)
        again = teacher.sample(requests[::-1], Sampling(max_tokens=8))[::-1]
        seeds = {body["seed"] for path, body in there.requests if path == "/v1/completions"}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert [rollout.completion_ids for rollout in rollouts] == [rollout.completion_ids for rollout in again]
    keys = [(request.problem_id, request.sample) for request in requests]
    assert [(rollout.problem_id, rollout.sample) for rollout in rollouts] == keys
    assert {rollout.completion_ids for rollout in arrived} == {rollout.completion_ids for rollout in rollouts}
    assert all(len(rollout.sampler_logp) == len(rollout.completion_ids) for rollout in rollouts)


# Failures -------------------------------------------------------------------------------------------------------------


def test_failed_call_is_retried_and_persistent_failure_stops_run(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_client.time, "sleep", lambda seconds: None)
    answer, failures = Answering(policy), [2]

    def failing(path: str, body: dict[str, Any] | None) -> Any:
        failures[0] -= path == "/v1/completions"
        return (500, b"engine died") if path == "/v1/completions" and failures[0] >= 0 else answer(path, body)

    with serving(failing) as there:
        teacher = teacher_at(there.url)
        assert len(teacher.distributions(ROLLOUTS[:1], 4096)) == 1
        failures[0] = 99
        with pytest.raises(TrainingStoppedError, match=r"3 tries \(status 500: engine died\)"):
            teacher.distributions(ROLLOUTS[:1], 4096)


def changed(good: Answers, change: Callable[[dict[str, Any]], Any]) -> Answers:
    """Answers with every choice of a completion changed."""

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        reply = good(path, body)
        if path == "/v1/completions" and isinstance(reply, dict):
            return {"choices": [change(choice) for choice in reply["choices"]]}
        return reply

    return answer


def without(choice: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in choice.items() if key != name}


def each(choice: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A choice with the log-probs of every position changed."""
    return {
        **choice,
        "prompt_logprobs": [None if position is None else change(position) for position in choice["prompt_logprobs"]],
    }


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no prompt_logprobs": (lambda answer: without(answer, "prompt_logprobs"), "gives no prompt_logprobs"),
    "other ids": (lambda answer: {**answer, "prompt_token_ids": [1, 2]}, "other token ids than it was sent"),
    "too few": (lambda answer: each(answer, lambda known: dict(list(known.items())[:1])), "log-prob"),
    "without the token": (
        lambda answer: each(answer, lambda known: {"27": {"logprob": -1.0}}),
        "no log-prob for token",
    ),
    "beyond": (
        lambda answer: each(answer, lambda known: known | {"151999": {"logprob": -9.0}}),
        "beyond the student's vocab",
    ),
    "another form": (lambda answer: each(answer, lambda known: {"a": 1}), "in another form than vLLM's"),
    "a list": (lambda answer: each(answer, lambda known: [1.0]), "in another form than vLLM's"),
    "an id twice": (
        lambda answer: each(answer, lambda known: known | {"07": {"logprob": -9.0}}),
        "in another form than vLLM's",
    ),
    "an id of many digits": (
        lambda answer: each(answer, lambda known: known | {"9" * 4000: {"logprob": -9.0}}),
        "names token 99999999999999999999, beyond",
    ),
    "a negative id": (lambda answer: each(answer, lambda known: known | {"-1": {"logprob": -9.0}}), "names token -1"),
    "log-prob of 5": (lambda answer: each(answer, lambda known: scored(known, 5.0)), "gives 5.0 as a log-prob"),
    "log-prob that is no number": (
        lambda answer: each(answer, lambda known: scored(known, float("nan"))),
        "gives nan as a log-prob",
    ),
    "log-prob of many digits": (lambda answer: each(answer, lambda known: scored(known, -(10**400))), "as a log-prob"),
    "log-prob in a string": (
        lambda answer: each(answer, lambda known: scored(known, "-1")),
        "gives '-1' as a log-prob",
    ),
    "mass over 1": (lambda answer: each(answer, lambda known: scored(known, -0.1)), "probabilities that sum to"),
    "index in a string": (lambda answer: {**answer, "index": "0"}, "does not number its"),
    "index twice": (lambda answer: {**answer, "index": 0}, "does not number its"),
    "negative index": (lambda answer: {**answer, "index": -1}, "does not number its"),
    "terminal escape": (
        lambda answer: each(answer, lambda known: scored(known, "\x1b]0;x\x07")),
        "as a log-prob, which must be a number of at most 0",
    ),
}


def scored(known: dict[str, Any], value: Any) -> dict[str, Any]:
    return {name: {"logprob": value} for name in known}


@pytest.mark.parametrize("kind", UNFIT)
def test_unusable_server_answer_is_refused_in_one_sentence(kind: str, policy: Policy) -> None:
    change, result = UNFIT[kind]
    with serving(changed(Answering(policy), change)) as there, pytest.raises(TrainingStoppedError) as refused:
        teacher_at(there.url).distributions(ROLLOUTS, 4096)
    assert str(refused.value).startswith("models.teacher: http://") and result in str(refused.value)
    assert str(refused.value).isprintable() and refused.value.exit_code == 4


def test_log_prob_above_zero_by_rounding_counts_as_zero(policy: Policy) -> None:
    certain = changed(Answering(policy), lambda answer: each(answer, lambda known: {"7": {"logprob": 1e-4}}))
    with serving(certain) as there:
        distributions = teacher_at(there.url, 0).distributions([rollout_of((1, 6), (7,))], 64)
    assert isinstance(distributions[0], TopK) and distributions[0].logp_NK.tolist() == [[0.0]]


SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "id in a string": ({"token_ids": ["7"]}, "not all whole numbers"),
    "negative id": ({"token_ids": [-7]}, "not all whole numbers"),
    "bool as id": ({"token_ids": [True]}, "not all whole numbers"),
    "id beyond": ({"token_ids": [151999]}, "beyond the student's vocabulary"),
    "too long": ({"token_ids": [7] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}}, "at most 8 were requested"),
    "log-prob of 5": ({"token_ids": [7], "logprobs": {"token_logprobs": [5.0]}}, "gives 5.0 as a log-prob"),
    "no log-prob": ({"token_ids": [7], "logprobs": {"token_logprobs": [None]}}, "gives None as a log-prob"),
    "aborted": ({"finish_reason": "abort"}, "neither stop nor length"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_malformed_sample_of_server_stops_run(kind: str, policy: Policy) -> None:
    change, sentence = SAMPLES[kind]
    good = {"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}
    with serving(changed(Answering(policy), lambda answer: good | change)) as there:
        teacher = teacher_at(there.url)
        with pytest.raises(TrainingStoppedError) as stopped:
            teacher.sample(requests_for([("a", (1, 6, 15))], 1, "draw"), Sampling(max_tokens=8))
    assert sentence in str(stopped.value)


def test_top_k_above_server_limit_is_refused_with_server_message(policy: Policy) -> None:
    with serving(Answering(policy, most=20)) as there, pytest.raises(UserError, match="greater than max allowed: 20"):
        teacher_at(there.url, top_k=24).distributions(ROLLOUTS, 4096)
    assert len([1 for path, _ in there.requests if path == "/v1/completions"]) <= QUICK.concurrency  # not retried
