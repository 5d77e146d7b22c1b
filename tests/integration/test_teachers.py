"""Whole runs with a served teacher, with teachers by tag, and with asynchronous scoring."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from forked_ranks import run_ranks
from headwater.config.recipe import Columns, Source
from headwater.data.sources import load as load_source
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from runs import load_json, node, rows, sets, tagged, tiny
from serving import Answering, serving
from tiny import CPU, MODELS, same_bits

# A served teacher -----------------------------------------------------------------------------------------------------

RAW = ("stages.warmup.dense.top_k=20", "stages.opd.dense.top_k=20", "compute.server.retries=0", "conditions.problems=4")


@pytest.fixture(scope="module")
def pocket_teacher(pocket_folder: Path) -> Policy:
    return load_policy(
        ModelFolder.open(str(pocket_folder / "qwen3-teacher"), "models.teacher"), LoadOptions(MODELS, CPU, frozen=True)
    )


def test_served_and_local_teacher_give_equal_distillation_kl(pocket_teacher: Policy, tmp_path: Path) -> None:
    with serving(Answering(pocket_teacher)) as there:
        result = tiny("run", tmp_path / "away", "--arm", "raw_teacher", changes=(*RAW, f"models.teacher={there.url}"))
    assert result.code == 0, result.err
    assert tiny("run", tmp_path / "here", "--arm", "raw_teacher", changes=RAW).code == 0
    away, here = (rows(node(tmp_path / host, "raw_teacher", "opd") / "metrics.jsonl") for host in ("away", "here"))
    # The student of the first step has learnt from the server's samples, which are drawn by other numbers.
    assert away[0]["kl_student_teacher"] == pytest.approx(here[0]["kl_student_teacher"], rel=0.5)
    ledger = rows(tmp_path / "away" / "ledger.jsonl")
    assert sum(row["tokens_teacher_scored"] for row in ledger if row["stage"] == "opd") > 0
    assert all(math.isfinite(row["loss"]) for row in away)
    assert "base_teacher" in load_json(tmp_path / "away" / "report.json")["arms"]


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        ("bridge", (), "is not trained here, and stage teacher_rl of this arm would"),
        ("raw_teacher", ("stages.opd.dense.top_k=null",), "stages.opd.dense.top_k: models.teacher is a server"),
        ("raw_teacher", ("stages.warmup.dense.top_k=null",), "stages.warmup.dense.top_k: models.teacher is a server"),
        ("raw_teacher", ("stages.opd.sampling.temperature=0.7",), "scores at temperature 1 only"),
    ],
)
def test_unservable_recipe_is_refused_before_run(
    arm: str, changes: tuple[str, ...], message: str, pocket_teacher: Policy, tmp_path: Path
) -> None:
    with serving(Answering(pocket_teacher)) as there:
        result = tiny("run", tmp_path / "out", "--arm", arm, changes=(*RAW, *changes, f"models.teacher={there.url}"))
    assert result.code == 2 and message in result.err and len(result.complaints) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "message"),
    [("prompt", "different ids for the same text"), ("messages", "their chat templates give different ids")],
)
def test_server_with_other_tokenizer_or_template_is_refused(
    which: str, message: str, pocket_teacher: Policy, tmp_path: Path
) -> None:
    def other(path: str, body: dict[str, Any] | None) -> Any:
        answer = Answering(pocket_teacher)(path, body)
        wrong = path == "/tokenize" and body is not None and which in body
        return {"tokens": [*answer["tokens"], 4]} if wrong else answer

    with serving(other) as there:
        result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=(*RAW, f"models.teacher={there.url}"))
    assert result.code == 2 and message in result.err, result.err


def test_server_failure_stops_run_and_resume_continues(pocket_teacher: Policy, tmp_path: Path) -> None:
    good, calls = Answering(pocket_teacher), [0]

    def tiring(path: str, body: dict[str, Any] | None) -> Any:
        calls[0] += path == "/v1/completions"
        return (503, b"restarting") if path == "/v1/completions" and calls[0] > 50 else good(path, body)

    with serving(tiring) as there:
        changes = (*RAW, f"models.teacher={there.url}")
        stopped = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
        assert stopped.code == 4 and "returned no valid response in 1 try (status 503: restarting)" in stopped.err
        there.answer = good
        assert tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes).code == 0


def test_guard_stops_run_when_server_turns_uniform(pocket_teacher: Policy, tmp_path: Path) -> None:
    good, steps = Answering(pocket_teacher), "metrics.jsonl"

    def flat(path: str, body: dict[str, Any] | None) -> Any:
        answer = good(path, body)
        if list(tmp_path.glob(f"out/nodes/opd.*/{steps}")) and "prompt_logprobs" in (body or {}):
            entries = [
                entry
                for choice in answer["choices"]
                for place in choice["prompt_logprobs"][1:]
                for entry in place.values()
            ]
            for entry in entries:
                entry["logprob"] = -math.log(pocket_teacher.vocabulary)
        return answer

    with serving(flat) as there:
        changes = (*RAW, "stages.opd.steps=6", f"models.teacher={there.url}")
        result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 4 and "step 3 of 6: guard teacher_uniform: the teacher gives every token" in result.err
    contrasts = [row["teacher_contrast"] for row in rows(node(tmp_path / "out", "raw_teacher", "opd") / steps)]
    assert contrasts[0] > 0.5 and contrasts[1:] == [pytest.approx(0.0, abs=1e-6)] * 2


@pytest.mark.parametrize("scale_out", [True, False])
def test_student_chooses_candidates_or_run_says_why_not(
    scale_out: bool, pocket_teacher: Policy, tmp_path: Path
) -> None:
    with serving(Answering(pocket_teacher, scale_out=scale_out)) as there:
        changes = (*RAW, "stages.opd.dense.top_k=4", f"models.teacher={there.url}", "stages.opd.dense.candidates=both")
        result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
        sent = [body["sampling_params"] for path, body in there.requests if path == "/inference/v1/generate"]
    assert result.code == 0, result.err
    assert result.err.count("the server does not score the student's candidate tokens") == (not scale_out)
    probes = [request for request in sent if request["prompt_logprob_token_ids"] == [[0]]]  # whether it can
    scored = [request["prompt_logprob_token_ids"] for request in sent if request not in probes]
    assert probes and bool(scored) == scale_out
    assert {len(ids) for rows_ in scored for ids in rows_} == ({4} if scale_out else set())


@pytest.mark.many
def test_two_ranks_score_ahead_on_slow_server_bit_for_bit(pocket_teacher: Policy, tmp_path: Path) -> None:
    good = Answering(pocket_teacher)

    def slow(path: str, body: dict[str, Any] | None) -> Any:
        time.sleep(0.02 * ("prompt_logprobs" in (body or {})))
        return good(path, body)

    with serving(slow) as there:
        changes = (*RAW, f"models.teacher={there.url}", "compute.server.batch_tokens=128")
        for name, parts in (("after", 1), ("ahead", 4)):
            argv = ["run", "pocket", "--arm", "raw_teacher", "--out", tmp_path / name]
            ended = run_ranks(2, *argv, *sets(*changes, f"compute.score_ahead={parts}"))
            assert [rank.code for rank in ended] == [0, 0], ended
    after, ahead = (node(tmp_path / name, "raw_teacher", "opd") for name in ("after", "ahead"))
    for name in ("metrics.jsonl", "ledger.jsonl"):
        for first, other in zip(rows(after / name), rows(ahead / name), strict=True):
            timeless = [{key: row[key] for key in row if not key.startswith("seconds")} for row in (first, other)]
            assert timeless[0] == timeless[1]
    weights, others = (load_file(next(folder.glob("model/*.safetensors"))) for folder in (after, ahead))
    assert same_bits(weights, others)


# Teachers by tag ------------------------------------------------------------------------------------------------------


def test_problem_tag_is_read_from_tag_column(tmp_path: Path) -> None:
    tagged(tmp_path, "left", "right")
    path = tmp_path / "labeled.jsonl"
    loaded = load_source(Source(path=str(path), columns=Columns(tag="kind")), "data.labeled", need_answers=True)
    assert [problem.tag for problem in loaded.problems[:3]] == ["left", "right", "left"]
    assert {
        problem.tag for problem in load_source(Source(path=str(path)), "data.labeled", need_answers=True).problems
    } == {""}


def mapped(tmp_path: Path, *tags: str) -> tuple[str, ...]:
    teachers = "models.teacher={left: 'pocket:qwen3-teacher', right: 'pocket:qwen3-teacher-large'}"
    return (teachers, *tagged(tmp_path, *tags), "conditions.problems=1")


def test_cached_rollouts_come_from_teacher_of_their_tag(tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=mapped(tmp_path, "left", "right"))
    assert result.code == 0, result.err
    cached = rows(node(tmp_path / "out", "raw_teacher", "teacher_rollouts") / "cache" / "rollouts.jsonl")
    samplers = {row["sampler"] for row in cached}
    assert len(samplers) == 2  # the fingerprints of two models' weights
    assert "raw_teacher" in load_json(tmp_path / "out" / "report.json")["arms"]


@pytest.mark.parametrize(
    ("arm", "tags", "message"),
    [
        ("bridge", ("left", "right"), "models.teacher: is a mapping to several models, which is not trained here"),
        ("raw_teacher", ("left", "wrong"), "has the tag 'wrong', and the mapping knows left, right"),
    ],
)
def test_invalid_teacher_mapping_is_refused_in_one_sentence(
    arm: str, tags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = tiny("run", tmp_path / "out", "--arm", arm, changes=mapped(tmp_path, *tags))
    assert result.code == 2 and message in result.err and len(result.complaints) == 1


# Asynchronous scoring -------------------------------------------------------------------------------------------------


def test_async_scoring_gives_same_metrics_and_is_deterministic(tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("plain", "ahead", "again")]
    for out, parts in zip(outs, (1, 4, 4), strict=True):
        assert tiny("run", out, "--arm", "raw_teacher", changes=[f"compute.score_ahead={parts}"]).code == 0
    plain, ahead, again = (rows(node(out, "raw_teacher", "opd") / "metrics.jsonl") for out in outs)
    for first, other, third in zip(plain, ahead, again, strict=True):
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-3, abs=1e-6)
        assert other["loss"] == third["loss"] and other["grad_norm"] == third["grad_norm"]
        assert other["tokens_teacher_scored"] == first["tokens_teacher_scored"] > 0
