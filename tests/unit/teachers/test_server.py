"""A teacher behind a server: what is asked and read, every way in which a server can fail, and a run through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.config.recipe import Server
from headwater.config.stage import Sampling
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.distributions import TopK
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.teachers import server_client
from headwater.teachers.scoring import distributions_of
from headwater.teachers.served_teacher import ServedTeacher
from headwater.teachers.server_client import connect
from headwater.types import Rollout
from runs import held, node, rows, tiny
from serving import Answering, Answers, serving
from tiny import CPU, MODELS, rollout_of, tiny_policy

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
def test_a_servers_scores_are_the_teachers_own_likeliest_tokens(policy: Policy, k: int) -> None:
    with serving(Answering(policy, most=30)) as there:
        found = teacher_at(there.url, k).distributions(ROLLOUTS, 4096)
    exact = [one.materialize().top_k(k) for one in distributions_of(policy, ROLLOUTS, 4096)]
    assert [len(one) for one in found] == [len(one.completion_ids) for one in ROLLOUTS]
    for ours, theirs in zip(exact, found, strict=True):
        assert isinstance(theirs, TopK) and torch.equal(ours.ids_NK, theirs.ids_NK)
        torch.testing.assert_close(ours.logp_NK, theirs.logp_NK, atol=1e-5, rtol=0.0)


def test_sequences_go_out_as_ids_in_parts_of_bounded_size(policy: Policy) -> None:
    with serving(Answering(policy)) as there:
        teacher_at(there.url).distributions(ROLLOUTS, 4096)
    sent = [body["prompt"] for path, body in there.asked if path == "/v1/completions"]
    assert len(sent) > 1 and all(sum(map(len, part)) <= QUICK.batch_tokens for part in sent)
    assert sorted(one for part in sent for one in part) == sorted(
        [*one.prompt_ids, *one.completion_ids] for one in ROLLOUTS
    )


def test_the_sampled_token_alone_is_scored_where_no_divergence_is_asked_for(policy: Policy) -> None:
    with serving(Answering(policy)) as there:
        found = teacher_at(there.url, 0).distributions(ROLLOUTS[:2], 4096)
    for one, rollout, exact in zip(found, ROLLOUTS, distributions_of(policy, ROLLOUTS[:2], 4096), strict=False):
        targets = torch.tensor(rollout.completion_ids)
        torch.testing.assert_close(
            one.token_logp(targets), exact.materialize().token_logp(targets), atol=1e-5, rtol=0.0
        )


def test_samples_are_drawn_by_the_seeds_that_their_requests_name(policy: Policy) -> None:
    requests = requests_for([("a", (1, 6, 15, 7, 2)), ("b", (1, 5, 2))], 3, 0, "draw")
    arrived: list[Rollout] = []
    with serving(Answering(policy)) as there:
        teacher = teacher_at(there.url)
        found = teacher.sample(requests, Sampling(max_tokens=8), arrived.extend)
        again = teacher.sample(requests[::-1], Sampling(max_tokens=8))[::-1]
        seeds = {body["seed"] for path, body in there.asked if path == "/v1/completions"}
    assert len(seeds) == 6 and all(0 <= one < 2**63 for one in seeds)
    assert [one.completion_ids for one in found] == [one.completion_ids for one in again]
    assert [(one.problem_id, one.sample) for one in found] == [(one.problem_id, one.sample) for one in requests]
    assert {one.completion_ids for one in arrived} == {one.completion_ids for one in found}
    assert all(len(one.sampler_logp) == len(one.completion_ids) for one in found)


# Failures -------------------------------------------------------------------------------------------------------------


def failing(good: Answers, times: int, bad: Callable[[], Any]) -> Answers:
    """The first `times` completions fail, later ones are good."""
    left = [times]

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        if path == "/v1/completions" and left[0] > 0:
            left[0] -= 1
            return bad()
        return good(path, body)

    return answer


def late() -> bytes:
    time.sleep(0.6)
    return b"{}"


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "error 500": (lambda: (500, {"error": {"message": "engine died"}}), "status 500: engine died"),
    "too many": (lambda: (429, b"slow down"), "status 429: slow down"),
    "timeout": (late, "no answer within 0.3 s"),
    "no JSON": (lambda: b"<html>oops", "its answer is not JSON"),
    "no object": (lambda: [1], "its answer is not a JSON object but list"),
    "cut": (lambda: b'{"choices": [', "its answer is not JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_fails_twice_is_asked_again_and_one_that_goes_on_failing_stops_the_run(
    kind: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    settings = QUICK.model_copy(update={"seconds": 0.3, "concurrency": 1})
    bad, said = BAD[kind]
    with serving(failing(Answering(policy), 2, bad)) as there:
        teacher = teacher_at(there.url, settings=settings)
        if kind != "timeout":
            monkeypatch.setattr(server_client.time, "sleep", paused.append)
        else:
            monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
        assert len(teacher.distributions(ROLLOUTS[:1], 4096)) == 1
        there.answer = failing(Answering(policy), 99, bad)
        with pytest.raises(TrainingStoppedError) as stopped:
            teacher.distributions(ROLLOUTS[:1], 4096)
    assert paused == ([] if kind == "timeout" else [0.5, 1.0, 0.5, 1.0])
    assert all(one in str(stopped.value) for one in ("models.teacher", there.url, "3 tries", said))


def changed(good: Answers, change: Callable[[dict[str, Any]], Any]) -> Answers:
    """Every choice of a completion, changed."""

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        found = good(path, body)
        if path == "/v1/completions" and isinstance(found, dict):
            return {"choices": [change(one) for one in found["choices"]]}
        return found

    return answer


def without(choice: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in choice.items() if key != name}


def each(choice: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The choice with every position's log-probs changed."""
    return {**choice, "prompt_logprobs": [None if one is None else change(one) for one in choice["prompt_logprobs"]]}


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no prompt_logprobs": (lambda one: without(one, "prompt_logprobs"), "gives no prompt_logprobs"),
    "other ids": (lambda one: {**one, "prompt_token_ids": [1, 2]}, "other token ids than it was sent"),
    "too few": (lambda one: each(one, lambda known: dict(list(known.items())[:1])), "log-prob"),
    "without the token": (lambda one: each(one, lambda known: {"27": {"logprob": -1.0}}), "no log-prob for token"),
    "beyond": (
        lambda one: each(one, lambda known: known | {"151999": {"logprob": -9.0}}),
        "beyond the student's vocab",
    ),
    "another form": (lambda one: each(one, lambda known: {"a": 1}), "in another form than vLLM's"),
    "a list": (lambda one: each(one, lambda known: [1.0]), "in another form than vLLM's"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_answer_that_the_loss_cannot_use_is_refused_in_one_sentence(kind: str, policy: Policy) -> None:
    change, said = UNFIT[kind]
    with serving(changed(Answering(policy), change)) as there, pytest.raises(UserError) as refused:
        teacher_at(there.url).distributions(ROLLOUTS, 4096)
    assert str(refused.value).startswith("models.teacher: http://") and said in str(refused.value)


def test_more_log_probs_than_a_server_gives_are_refused_with_its_own_words(policy: Policy) -> None:
    with serving(Answering(policy, most=20)) as there, pytest.raises(UserError, match="greater than max allowed: 20"):
        teacher_at(there.url, top_k=24).distributions(ROLLOUTS, 4096)
    assert len([1 for path, _ in there.asked if path == "/v1/completions"]) <= QUICK.concurrency  # not asked again


def test_a_server_that_is_not_there_is_named_with_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"models\.teacher: http://127\.0\.0\.1:9/v1 gave no usable answer in 3 tries"):
        connect("http://127.0.0.1:9/v1", "models.teacher", QUICK)


def test_one_of_several_models_is_named_after_the_address() -> None:
    listed = {"data": [{"id": "a"}, {"id": "b", "max_model_len": 9}]}
    with serving(lambda path, body: listed) as there:
        assert connect(f"{there.url}#b", "models.teacher", QUICK).max_tokens == 9
        for name in (there.url, f"{there.url}#c"):
            with pytest.raises(UserError, match="has the models a, b; name one"):
                connect(name, "models.teacher", QUICK)


def test_the_key_comes_from_the_environment_and_is_sent_with_every_call(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK.model_copy(update={"key_env": "SERVER_KEY"})
    with serving(Answering(policy)) as there:
        with pytest.raises(UserError, match=r"compute\.server\.key_env: the environment has no variable SERVER_KEY"):
            connect(there.url, "models.teacher", settings)
        monkeypatch.setenv("SERVER_KEY", "secret")
        model = connect(there.url, "models.teacher", settings)
    assert model.client.headers["Authorization"] == "Bearer secret" and "secret" not in repr(model)


# Whole runs -----------------------------------------------------------------------------------------------------------

RAW = ("stages.warmup.dense.top_k=20", "stages.opd.dense.top_k=20", "compute.server.retries=0", "conditions.problems=4")


@pytest.fixture(scope="module")
def pocket_teacher(pocket_folder: Path) -> Policy:
    return load_policy(
        ModelFolder.open(str(pocket_folder / "qwen3-teacher"), "models.teacher"), LoadOptions(MODELS, CPU, frozen=True)
    )


def test_a_bridge_from_a_served_teacher_comes_to_what_the_same_teacher_here_does(
    pocket_teacher: Policy, tmp_path: Path
) -> None:
    with serving(Answering(pocket_teacher)) as there:
        said = tiny("run", tmp_path / "away", "--arm", "raw_teacher", changes=(*RAW, f"models.teacher={there.url}"))
    assert said.code == 0, said.err
    assert tiny("run", tmp_path / "here", "--arm", "raw_teacher", changes=RAW).code == 0
    away, here = (rows(node(tmp_path / one, "raw_teacher", "opd") / "metrics.jsonl") for one in ("away", "here"))
    # The student of the first step has learnt from the server's samples, which are drawn by other numbers.
    assert away[0]["kl_student_teacher"] == pytest.approx(here[0]["kl_student_teacher"], rel=0.5)
    ledger = rows(tmp_path / "away" / "ledger.jsonl")
    assert sum(row["tokens_teacher_scored"] for row in ledger if row["stage"] == "opd") > 0
    assert all(math.isfinite(row["loss"]) for row in away)
    assert "base_teacher" in held(tmp_path / "away" / "report.json")["arms"]


@pytest.mark.parametrize(
    ("arm", "changes", "said"),
    [
        ("bridge", (), "is not trained here, and stage teacher_rl of this arm would"),
        ("raw_teacher", ("stages.opd.dense.top_k=null",), "stages.opd.dense.top_k: models.teacher is a server"),
        ("raw_teacher", ("stages.warmup.dense.top_k=null",), "stages.warmup.dense.top_k: models.teacher is a server"),
        ("raw_teacher", ("stages.opd.sampling.temperature=0.7",), "scores at temperature 1 only"),
    ],
)
def test_what_a_server_cannot_give_is_refused_before_the_run(
    arm: str, changes: tuple[str, ...], said: str, pocket_teacher: Policy, tmp_path: Path
) -> None:
    with serving(Answering(pocket_teacher)) as there:
        found = tiny("run", tmp_path / "out", "--arm", arm, changes=(*RAW, *changes, f"models.teacher={there.url}"))
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "said"),
    [("prompt", "different ids for the same text"), ("messages", "their chat templates give different ids")],
)
def test_a_server_with_another_tokenizer_or_template_is_refused(
    which: str, said: str, pocket_teacher: Policy, tmp_path: Path
) -> None:
    def other(path: str, body: dict[str, Any] | None) -> Any:
        found = Answering(pocket_teacher)(path, body)
        wrong = path == "/tokenize" and body is not None and which in body
        return {"tokens": [*found["tokens"], 4]} if wrong else found

    with serving(other) as there:
        found = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=(*RAW, f"models.teacher={there.url}"))
    assert found.code == 2 and said in found.err, found.err


def test_a_server_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(
    pocket_teacher: Policy, tmp_path: Path
) -> None:
    good, calls = Answering(pocket_teacher), [0]

    def tiring(path: str, body: dict[str, Any] | None) -> Any:
        calls[0] += path == "/v1/completions"
        return (503, b"restarting") if path == "/v1/completions" and calls[0] > 70 else good(path, body)

    with serving(tiring) as there:
        changes = (*RAW, f"models.teacher={there.url}")
        stopped = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
        assert stopped.code == 4 and "gave no usable answer in 1 tries (status 503: restarting)" in stopped.err
        there.answer = good
        assert tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes).code == 0
