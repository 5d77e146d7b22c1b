"""The desk recipe as a program: planned without weights, refused, pretrained and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from tiny_desk import TOKENIZER, use_tiny_desk
from tools.pretrain.__main__ import main


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_tiny_desk(tmp_path, monkeypatch)


# The recipe -----------------------------------------------------------------------------------------------------------


FEW = (
    "data.labeled.generate.count=40",
    "data.evals.in_distribution.generate.count=4",
    "data.evals.harder.generate.count=2",
    "labels.budget=16",
    *(
        f"stages.{stage}.{field}"
        for stage in ("teacher_rl", "warmup", "opd", "student_rl")
        for field in ("batch_size=8", "group_size=4", "sampling.max_tokens=16", "steps=2")
    ),
    "evaluate.samples=1",
    "evaluate.sampling.max_tokens=16",
    "guards.no_signal=continue",
    "guards.teacher_uniform=warn",  # three steps of pretraining leave it uniform
    "compute.device=cpu",
    "compute.threads=1",
)
SETS = [part for change in FEW for part in ("--set", change)]


def test_desk_recipe_is_planned_without_weights(elsewhere: Path) -> None:
    result = runs.call("study", "desk", "--dry-run", "--json")
    assert result.code == 0, result.err
    rows = {row["node"].split(".")[0]: row for row in json.loads(result.out)}
    assert rows.keys() >= {
        "base_student",
        "base_teacher",
        "teacher_rl",
        "teacher_rollouts",
        "warmup",
        "opd",
        "student_rl",
    }
    assert rows["opd"]["labels"] == 0 and rows["warmup"]["labels"] == 0
    assert max(row["labels"] for row in json.loads(result.out)) == 1000
    # Evaluations of the student: 1000 problems × 4 samples × 256 tokens at most.
    assert rows["base_student"]["tokens_sampled_at_most"] == 1_024_000
    assert rows["base_student"]["memory_bytes"] >= 2 * 15_335_424
    assert rows["teacher_rl"]["flops_at_most"] > 1e15


@pytest.mark.parametrize(("verb", "code"), [("run", 3), ("study", 3), ("doctor", 3)])
def test_desk_run_without_weights_names_pretraining_command(verb: str, code: int, elsewhere: Path) -> None:
    result = runs.call(verb, "desk", "--out", elsewhere / "out", *SETS)
    assert result.code == code
    assert (
        "models.student: desk:student has no weights yet; `python -m tools.pretrain desk`, in a checkout"
        in result.err + result.out
    )
    assert not (elsewhere / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_desk_recipe_runs_on_tiny_pretrained_models(elsewhere: Path) -> None:
    result = runs.call("desk", "--models", "student,teacher", "--steps", "3", "--device", "cpu", entry=main)
    assert result.code == 0, result.err
    assert "desk/student: solves" in result.out and "desk/teacher: solves" in result.out
    assert AutoTokenizer.from_pretrained("desk/student").get_vocab() == TOKENIZER.get_vocab()
    assert "2 steps of worked ones, then 1 steps" in Path("desk/student/README.md").read_text()
    assert not Path("desk/student/checkpoint").exists()
    ended = runs.call("run", "desk", "--out", "out", *SETS)
    assert ended.code == 0, ended.err
    stages = [name.split(".")[0] for name in runs.node_names(Path("out"), "bridge")]
    assert stages == ["teacher_rl", "teacher_rollouts", "warmup", "opd"]
    report = runs.load_json(Path("out/report.json"))
    assert report["arms"]["bridge"]["accuracy"].keys() == {"in_distribution", "harder"}
    # 2 steps × 8 rollouts of the teacher: every look is one check.
    assert report["arms"]["bridge"]["labels"]["checks"] == 16
    made = AutoModelForCausalLM.from_pretrained(runs.node(Path("out"), "bridge", "opd") / "model")
    assert made.config.hidden_size == 32
