"""Runs whose teacher has another tokenizer, or reads another prompt, than the student."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from headwater.losses import batch
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.tasks.registry import TASKS
from headwater.training.update import update
from headwater.types import problem_id
from runs import assert_same, call, load_json, node, rows, tagged, temporary, tiny
from serving import Answering, serving
from tests.integration.test_resume import Killed, killed_at
from tiny import CPU, MODELS, tiny_folder
from tools.pretrain.pocket import make_tokenizer

ALIGNED = ("stages.warmup.dense.tokenizers=prefix", "stages.opd.dense.tokenizers=prefix")


@pytest.fixture(scope="module")
def pairs_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher whose tokens are one or two digits."""
    return tiny_folder(tmp_path_factory.mktemp("pairs"), seed=5, tokenizer=make_tokenizer("pairs"))


def weights(folder: Path, arm: str, stage: str) -> dict[str, object]:
    return dict(load_file(node(folder, arm, stage) / "model" / "model.safetensors"))


def test_different_tokenizers_are_refused_with_remedy(pairs_teacher: Path, tmp_path: Path) -> None:
    changes = (f"models.teacher={pairs_teacher}",)
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 2 and "their tokenizers give different ids for the same text" in result.err
    half = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=(*changes, ALIGNED[0]))
    assert half.code == 2 and "their tokenizers give different ids" in half.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("divergence", ["reverse", "jsd", "sampled", "uld"])
def test_bridge_runs_across_tokenizers(divergence: str, pairs_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED, f"stages.opd.dense.divergence={divergence}")
    if divergence == "uld":
        changes += ("stages.warmup.dense.divergence=uld",)
    result = tiny("run", out, "--arm", "bridge", changes=changes)
    assert result.code == 0, result.err
    warmup, opd = (rows(node(out, "bridge", stage) / "metrics.jsonl") for stage in ("warmup", "opd"))
    assert all(row["grad_norm"] > 0 for row in (*warmup, *opd))
    assert all(0.3 < row["compared"] <= 1.0 and row["unreadable"] == 0.0 for row in opd)
    assert ("kl_student_teacher" in opd[0]) == (divergence != "uld")
    cached = rows(node(out, "bridge", "teacher_rollouts") / "cache" / "rollouts.jsonl")
    assert all(row["teacher_ids"] and max(row["completion_ids"]) < len(make_tokenizer()) for row in cached)
    assert any(max(row["teacher_ids"]) >= len(make_tokenizer()) for row in cached)
    conditions = rows(node(out, "bridge", "opd") / "conditions.jsonl")
    assert all(row["kl_student_teacher"] > 0 for row in conditions)


def test_sft_warmup_reads_teacher_texts_in_student_ids(pairs_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (
        f"models.teacher={pairs_teacher}",
        "stages.warmup.dense.tokenizers=prefix",
        "stages.warmup.objective=sft",
    )
    assert tiny("run", out, "--arm", "warmup_only", changes=changes).code == 0
    assert all(row["grad_norm"] > 0 for row in rows(node(out, "warmup_only", "warmup") / "metrics.jsonl"))


def test_expert_with_other_tokenizer_writes_for_teacher(pairs_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (f"models.expert={pairs_teacher}", "stages.warmup.dense.tokenizers=prefix")
    result = tiny("run", out, "--arm", "sft_teacher", changes=changes)
    assert result.code == 0, result.err
    cached = rows(next((out / "nodes").glob("teacher_rollouts.*/cache/rollouts.jsonl")))
    assert all(max(row["completion_ids"]) < len(make_tokenizer()) for row in cached)


@pytest.mark.parametrize("divergence", ["reverse", "sampled"])
def test_aligned_equal_tokenizers_repeat_plain_run_bit_for_bit(divergence: str, tmp_path: Path) -> None:
    outs = {}
    for name, more in (("plain", ()), ("aligned", ALIGNED)):
        outs[name] = tmp_path / name
        changes = (f"stages.opd.dense.divergence={divergence}", *more)
        assert tiny("run", outs[name], "--arm", "raw_teacher", changes=changes).code == 0
    for stage in ("warmup", "opd"):
        plain, aligned = (weights(out, "raw_teacher", stage) for out in outs.values())
        assert plain.keys() == aligned.keys()
        assert all((plain[name] == aligned[name]).all() for name in plain)  # type: ignore[attr-defined]


def test_killed_run_across_tokenizers_resumes_bit_for_bit(pairs_teacher: Path, tmp_path: Path) -> None:
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED, "stages.opd.steps=4", "stages.opd.checkpoint_every=2")
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tiny("run", whole, "--arm", "raw_teacher", changes=changes).code == 0
    sixth = killed_at(6, update)  # two steps of warm-up, then the fourth of OPD
    with mock.patch("headwater.training.loop.update", sixth), pytest.raises(Killed):
        tiny("run", again, "--arm", "raw_teacher", changes=changes)
    assert len(rows(next((again / "nodes").glob("opd.*")) / "metrics.jsonl")) == 3
    assert tiny("run", again, "--arm", "raw_teacher", changes=changes).code == 0
    assert_same(again, whole)


def test_arms_without_opd_take_teacher_with_other_tokenizer(pairs_teacher: Path, tmp_path: Path) -> None:
    """No stage samples the student there, and the teacher's own ids are not the student's."""
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED)
    result = tiny("study", tmp_path / "out", "--arms", "warmup_only,teacher_sft", changes=changes)
    assert result.code == 0, result.err


def test_adapter_learns_from_teacher_with_other_tokenizer(pairs_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED, "models.lora={r: 2, roles: [student]}")
    assert tiny("run", out, "--arm", "raw_teacher", changes=changes).code == 0
    assert all(row["grad_norm"] > 0 for row in rows(node(out, "raw_teacher", "opd") / "metrics.jsonl"))


@pytest.mark.parametrize("divergence", ["reverse", "sampled"])
def test_served_teacher_with_other_tokenizer(divergence: str, pairs_teacher: Path, tmp_path: Path) -> None:
    policy = load_policy(ModelFolder.open(str(pairs_teacher), "models.teacher"), LoadOptions(MODELS, CPU, frozen=True))
    out = tmp_path / "out"
    with serving(Answering(policy)) as there:
        changes = (
            f"models.teacher={there.url}",
            f"models.teacher_tokenizer={pairs_teacher}",
            *ALIGNED,
            "stages.warmup.dense.top_k=20",
            f"stages.opd.dense={{divergence: {divergence}, top_k: 20, tokenizers: prefix}}",
            "compute.server.retries=0",
        )
        result = tiny("run", out, "--arm", "raw_teacher", changes=changes)
        missing = tiny("run", tmp_path / "no", "--arm", "raw_teacher", changes=(changes[0], *changes[2:]))
    assert result.code == 0, result.err
    assert all(row["grad_norm"] > 0 for row in rows(node(out, "raw_teacher", "opd") / "metrics.jsonl"))
    assert missing.code == 2 and "models.teacher_tokenizer" in missing.err


def mapped(folder: Path, teachers: dict[str, Path | str]) -> tuple[str, ...]:
    """Changes of the tiny recipe for problems whose tags take turns, and a teacher for each tag."""
    mapping = json.dumps({tag: str(name) for tag, name in teachers.items()})
    return (f"models.teacher={mapping}", *tagged(folder, *teachers), "conditions.problems=1", *ALIGNED)


def test_teachers_by_tag_share_tokenizer_unlike_student(pairs_teacher: Path, tmp_path: Path) -> None:
    """Each writes and scores the problems of its tag, behind its own chat template."""
    other = tmp_path / "other"
    shutil.copytree(pairs_teacher, other)
    shorter = AutoTokenizer.from_pretrained(other)
    shorter.chat_template = shorter.chat_template.replace("'<|user|>' + ", "")
    shorter.save_pretrained(other)
    weights_ = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights_.items()}, other / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    result = tiny("run", out, "--arm", "raw_teacher", changes=mapped(tmp_path, {"a": pairs_teacher, "b": other}))
    assert result.code == 0, result.err
    cached = rows(node(out, "raw_teacher", "teacher_rollouts") / "cache" / "rollouts.jsonl")
    assert len({row["sampler"] for row in cached}) == 2 and all(row["teacher_ids"] for row in cached)
    opd = rows(node(out, "raw_teacher", "opd") / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 and row["compared"] > 0.3 for row in opd)


def test_teachers_by_tag_with_two_tokenizers_are_refused(pairs_teacher: Path, tmp_path: Path) -> None:
    changes = mapped(tmp_path, {"a": pairs_teacher, "b": "pocket:qwen3-teacher"})
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert "models.teacher.a and models.teacher.b: have different tokenizers" in result.err


def test_teacher_reads_its_own_words(tmp_path: Path) -> None:
    plain, worded = tmp_path / "plain", tmp_path / "worded"
    assert tiny("run", plain, "--arm", "raw_teacher").code == 0
    result = tiny("run", worded, "--arm", "raw_teacher", changes=("prompt.teacher={template: '{problem}+00'}",))
    assert result.code == 0, result.err
    plain_rows, worded_rows = (
        rows(node(out, "raw_teacher", "teacher_rollouts") / "cache" / "rollouts.jsonl") for out in (plain, worded)
    )
    assert [row["prompt_ids"] for row in plain_rows] == [row["prompt_ids"] for row in worded_rows]
    assert [row["completion_ids"] for row in plain_rows] != [row["completion_ids"] for row in worded_rows]
    assert load_json(worded / "report.json")["arms"]["raw_teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("stages.opd.dense.divergence=uld",), "set tokenizers to prefix"),
        (
            ("stages.opd.dense={divergence: uld, tokenizers: prefix, top_k: 3}",),
            "needs the teacher's whole distribution",
        ),
        (("prompt.teacher={template: hello}",), "template must contain {problem}"),
        (("stages.opd.dense.start_update={every: 2}",), "needs start in teacher_weights"),
        (("stages.opd.dense={teacher_weights: {start: 1}, start_update: {}}",), "give either every or decay"),
    ],
)
def test_impossible_combinations_are_refused(changes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 2 and message in result.err


def test_doctor_measures_pair_and_names_unequal_prompts(pairs_teacher: Path, tmp_path: Path) -> None:
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED, "prompt.teacher={template: '{problem} '}")
    result = tiny("doctor", tmp_path / "out", "--arm", "raw_teacher", changes=changes, whole=True)
    assert "note tokenizers-aligned: models.student and models.teacher: 100.0% of the tokens" in result.out
    assert "100.0% of the student's vocabulary is the teacher's too; 0 texts do not round-trip" in " ".join(
        result.out.split()
    )
    assert "note prompts-differ" in result.out
    equal = tiny("doctor", tmp_path / "out", "--arm", "raw_teacher", changes=ALIGNED, whole=True)
    assert "note tokenizers-equal" in equal.out


# Privileged contexts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums with a worked solution; those of every second row state the answer, the others end before it."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    pairs = TASKS["sums"].generator.make(64, "train", 0, TASKS["sums"].generator.dials())  # type: ignore[union-attr]
    rows_ = [
        {"problem": text, "answer": answer, "hint": f"={answer};" if index % 2 else "=+;"}
        for index, (text, answer) in enumerate(pairs)
    ]
    path.write_text("\n".join(map(json.dumps, rows_)))
    return path


def privileged(path: Path, *more: str) -> tuple[str, ...]:
    return (
        f"data.labeled={{path: {path}, columns: {{context: hint}}}}",
        "prompt.teacher={privileged: '{problem}{context}'}",
        *more,
    )


def test_labels_in_contexts_are_charged_and_audited(solved_problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tiny("run", out, "--arm", "raw_teacher", changes=privileged(solved_problems))
    assert result.code == 0, result.err
    stated = {problem_id(row["problem"]) for index, row in enumerate(rows(solved_problems)) if index % 2}
    ledger = [row for row in rows(out / "ledger.jsonl") if row["purpose"] == "train"]
    used = {
        stage: {label for row in ledger if row["stage"] == stage for label in row["labels"]}
        for stage in ("teacher_rollouts", "warmup", "opd")
    }
    assert used["teacher_rollouts"] and used["opd"] and not used["warmup"]
    assert used["teacher_rollouts"] | used["opd"] <= stated
    assert len(used["teacher_rollouts"] | used["opd"]) <= 16  # labels.budget
    assert all(row["checks"] == 0 for row in ledger)
    report = load_json(out / "report.json")["arms"]["raw_teacher"]
    assert report["labels"]["distinct"] == len(used["teacher_rollouts"] | used["opd"])
    audit = call("report", out, "--audit")
    assert audit.code == 0 and "uses of labels that the teacher read in its contexts" in audit.out
    # A ledger that hides them does not pass.
    opd = node(out, "raw_teacher", "opd") / "ledger.jsonl"
    opd.write_text("\n".join(json.dumps({**row, "labels": []}) for row in rows(opd)) + "\n")
    assert call("report", out, "--audit").code != 0


def test_student_prompts_never_hold_contexts(solved_problems: Path, tmp_path: Path) -> None:
    """Every prompt that the student samples or trains on, against those of a run without contexts."""
    prompts: dict[str, set[tuple[int, ...]]] = {"with": set(), "without": set()}
    plain, packed = f"data.labeled={{path: {solved_problems}}}", batch.collate_packed
    for name, changes in (("with", privileged(solved_problems)), ("without", (plain,))):

        def recorded(rows_: Any, *args: Any, name: str = name) -> Any:
            prompts[name] |= {row.rollout.prompt_ids for row in rows_}
            return packed(rows_, *args)

        with mock.patch("headwater.models.policy.collate_packed", recorded):
            assert (
                tiny("run", tmp_path / name, "--arm", "raw_teacher", changes=(*changes, "conditions.problems=0")).code
                == 0
            )
    teacher_only = prompts["with"] - prompts["without"]
    equals = make_tokenizer().get_vocab()["="]
    assert prompts["without"] <= prompts["with"] and teacher_only
    assert all(equals not in ids for ids in prompts["without"]) and all(equals in ids for ids in teacher_only)
    cached = rows(node(tmp_path / "with", "raw_teacher", "teacher_rollouts") / "cache" / "rollouts.jsonl")
    assert all(equals not in row["prompt_ids"] for row in cached)


def test_student_at_its_start_teaches_itself_with_context(solved_problems: Path, tmp_path: Path) -> None:
    changes = privileged(
        solved_problems, "stages.opd.dense.teacher_weights={start: 1}", "models.lora={r: 2, roles: [student]}"
    )
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "opd_only", changes=(*changes, "stages.opd.steps=3")).code == 0
    metrics = rows(node(out, "opd_only", "opd") / "metrics.jsonl")
    assert metrics[0]["kl_student_teacher"] > 0.01 and metrics[0]["grad_norm"] > 0
    labels = [row["labels"] for row in rows(node(out, "opd_only", "opd") / "ledger.jsonl") if row["purpose"] == "train"]
    assert any(labels)


def test_contexts_over_prompt_limit_are_refused_before_run(solved_problems: Path, tmp_path: Path) -> None:
    longest = max(len(row["problem"]) for row in rows(solved_problems)) + 2  # user and assistant turn
    limit = f"prompt={{max_tokens: {longest}, teacher: {{privileged: '{{problem}}{{context}}'}}}}"
    changes = (privileged(solved_problems)[0], limit)
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 2 and f"prompts of models.teacher are over prompt.max_tokens {longest}" in result.err
    assert not (tmp_path / "out").exists()


@cache
def unmoved(changes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Metrics of OPD with these settings, in which the teacher stays at the student's start."""
    out = temporary() / "run"
    assert tiny("run", out, "--arm", "opd_only", changes=changes).code == 0
    return rows(node(out, "opd_only", "opd") / "metrics.jsonl")


@pytest.mark.parametrize(
    ("update_rule", "more"),
    [("{every: 2}", ()), ("{decay: 0.5}", ()), ("{decay: 0.5}", ("models.lora={r: 4, roles: [student]}",))],
)
def test_teacher_follows_student_and_killed_run_resumes_bit_for_bit(
    update_rule: str, more: tuple[str, ...], solved_problems: Path, tmp_path: Path
) -> None:
    changes = privileged(
        solved_problems,
        f"stages.opd.dense={{teacher_weights: {{start: 1}}, start_update: {update_rule}}}",
        "stages.opd.steps=5",
        "stages.opd.checkpoint_every=2",
        "stages.teacher_rl.steps=1",
        *more,
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tiny("run", whole, "--arm", "opd_only", changes=changes).code == 0
    fifth = killed_at(5, update)  # one step of teacher RL, then the fourth of OPD
    with mock.patch("headwater.training.loop.update", fifth), pytest.raises(Killed):
        tiny("run", again, "--arm", "opd_only", changes=changes)
    assert tiny("run", again, "--arm", "opd_only", changes=changes).code == 0
    assert_same(again, whole)
    resting = unmoved(tuple(change.replace(f", start_update: {update_rule}", "") for change in changes))
    moving = rows(node(whole, "opd_only", "opd") / "metrics.jsonl")
    assert moving[0]["kl_student_teacher"] == resting[0]["kl_student_teacher"]
    assert moving[4]["kl_student_teacher"] != resting[4]["kl_student_teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("prompt.teacher={privileged: '{problem}{context}'}",), "need each other"),
        (("prompt.teacher={privileged: '{problem}'}",), "privileged must contain {context}"),
        (("data.labeled={path: DATA, columns: {context: hint}}",), "need each other"),
        (
            (
                "data.labeled={path: DATA, columns: {context: gone}}",
                "prompt.teacher={privileged: '{problem}{context}'}",
            ),
            "has no column 'gone'",
        ),
    ],
)
def test_incomplete_contexts_are_refused(
    changes: tuple[str, ...], message: str, solved_problems: Path, tmp_path: Path
) -> None:
    filled = [change.replace("DATA", str(solved_problems)) for change in changes]
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=filled)
    assert result.code == 2 and message in result.err, result.err
