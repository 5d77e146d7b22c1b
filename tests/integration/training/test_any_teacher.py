"""Runs whose teacher has another tokenizer, or reads another prompt, than the student."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file
from transformers import GenerationConfig

from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.training.update import update
from runs import assert_same, load_json, node, rows, tiny
from serving import Answering, serving
from tiny import CPU, MODELS, tiny_model
from tools.pretrain.pocket import make_tokenizer

ALIGNED = ("stages.warmup.dense.tokenizers=prefix", "stages.opd.dense.tokenizers=prefix")


@pytest.fixture(scope="module")
def pairs_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher whose tokens are one or two digits."""
    folder, tokenizer = tmp_path_factory.mktemp("pairs"), make_tokenizer("pairs")
    model = tiny_model(seed=5, vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


class Killed(BaseException):
    """Ends a run where nothing in the program expects it."""


def test_killed_run_across_tokenizers_resumes_bit_for_bit(pairs_teacher: Path, tmp_path: Path) -> None:
    changes = (f"models.teacher={pairs_teacher}", *ALIGNED, "stages.opd.steps=4", "stages.opd.checkpoint_every=2")
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tiny("run", whole, "--arm", "raw_teacher", changes=changes).code == 0
    calls = itertools.count(1)

    def update_until_killed(*args: Any) -> Any:
        if next(calls) == 6:  # two steps of warm-up, then the fourth of OPD
            raise Killed
        return update(*args)

    with mock.patch("headwater.training.loop.update", update_until_killed), pytest.raises(Killed):
        tiny("run", again, "--arm", "raw_teacher", changes=changes)
    assert len(rows(next((again / "nodes").glob("opd.*")) / "metrics.jsonl")) == 3
    assert tiny("run", again, "--arm", "raw_teacher", changes=changes).code == 0
    assert_same(again, whole)


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
    ],
)
def test_impossible_combinations_are_refused(changes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes)
    assert result.code == 2 and message in result.err
