"""One stage from the command line, and recipes without labels or teacher: the same work as in a whole recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.tasks import sums
from runs import call, load_json, rows

OPD = "{epochs: 1, steps: 3, batch_size: 8, group_size: 4, sampling: {max_tokens: 24}, optim: {lr: 1.0e-3}}"
PAIR = ("pocket:qwen3-student", "pocket:qwen3-teacher")
SET_OPD = [
    word
    for change in ("steps=3", "batch_size=8", "sampling.max_tokens=24", "optim.lr=1.0e-3")
    for word in ("--set", f"stages.opd.{change}")
] + ["--set", "compute.microbatch_tokens=16384"]


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, problems with answers and a recipe for distillation."""
    monkeypatch.chdir(tmp_path)
    problems = sums.generate(24, "train", 0)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text, _ in problems))
    Path("train.jsonl").write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in problems))
    held_out = sums.generate(4, "eval", 0)
    Path("test.jsonl").write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in held_out))
    models = f"models: {{student: '{PAIR[0]}', teacher: '{PAIR[1]}'}}"
    Path("mine.yaml").write_text(f"{models}\ndata: {{unlabeled: prompts.jsonl}}\nstages:\n  opd: {OPD}\n")
    return tmp_path


def test_distill_is_run_of_equivalent_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_verb = call("distill", *PAIR, "--prompts", "prompts.jsonl", "--out", "a", *SET_OPD)
    by_file = call("run", "mine.yaml", "--out", "b")
    assert (by_verb.code, by_file.code) == (0, 0), by_verb.err + by_file.err
    assert "No accuracy was measured: the recipe has no data.evals. KL(student‖teacher) went from" in by_verb.out
    (node,) = [path.name for path in Path("a/nodes").iterdir()]
    assert [path.name for path in Path("b/nodes").iterdir()] == [node]  # the name holds the fingerprint
    a, b = (rows(Path(out) / "nodes" / node / "metrics.jsonl") for out in ("a", "b"))
    assert [row["loss"] for row in a] == [row["loss"] for row in b] and len(a) == 3
    ledger = rows(Path("a/ledger.jsonl"))
    assert sum(row["checks"] for row in ledger) == 0 and not any(row["labels"] for row in ledger)
    completions = [row for step in (1, 2, 3) for row in rows(Path(f"a/nodes/{node}/rollouts/{step:06d}.jsonl"))]
    assert sum(row["tokens_trained"] for row in ledger) == sum(row["tokens"] for row in completions)
    assert load_json(Path("a/recipe.json"))["name"] == "distill-qwen3-student"
    assert load_json(Path("b/recipe.json"))["name"] == "mine"
    assert call("report", "a", "--audit").code == 0
    finished = (Path("b/nodes") / node / "DONE").stat().st_mtime_ns
    monkeypatch.chdir(folder.parent)  # the recipe's paths are beside it, and its run is the same from here
    again = call("run", f"{folder.name}/mine.yaml", "--out", f"{folder.name}/b")
    assert again.code == 0 and (folder / "b/nodes" / node / "DONE").stat().st_mtime_ns == finished, again.err


def test_distill_resumes_and_dry_run_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["distill", *PAIR, "--prompts", "prompts.jsonl", "--out", "a", *SET_OPD]
    planned = json.loads(call(*command, "--dry-run", "--json").out)
    assert [(row["node"].split(".")[0], row["labels"], row["steps"]) for row in planned] == [("opd", 0, 3)]
    assert not Path("a").exists()
    first = call(*command, "--json")
    fitted = load_json(Path("a/recipe.json"))
    assert fitted["compute"]["microbatch_tokens"] == 16384 and fitted["compute"]["sample_batch"] < 256
    monkeypatch.setattr("headwater.doctor.fit.device_facts", pytest.fail)  # what was fitted stays, whatever is free now
    again = call(*command, "--json")
    assert again.code == 0 and json.loads(again.out) == json.loads(first.out)
    other = call(*command, "--set", "stages.opd.steps=4")
    assert other.code == 2 and "stages.opd.steps" in other.err


def test_grpo_is_direct_grpo_of_whole_recipe(folder: Path) -> None:
    stage = {
        "epochs": 4,
        "batch_size": 8,
        "sampling": {"max_tokens": 24},
        "optim": {"lr": 1e-6},
        "sparse": {"kl_coef": 0.0},
    }
    recipe = {
        "task": "sums",
        "models": dict(zip(("student", "teacher"), PAIR, strict=True)),
        "data": {"labeled": "train.jsonl", "evals": {"held_out": "test.jsonl"}},
        "evaluate": {"samples": 2, "sampling": {"max_tokens": 24}},
        "stages": {"student_rl": stage},
    }
    Path("whole.json").write_text(json.dumps(recipe))  # JSON is YAML
    changes = ["stages.student_rl.batch_size=8", "stages.student_rl.sampling.max_tokens=24", "guards.no_signal=continue",
               "stages.student_rl.optim.lr=1e-6",
               "stages.student_rl.steps=2", "evaluate.samples=2", "evaluate.sampling.max_tokens=24"]  # fmt: skip
    words = [word for change in changes for word in ("--set", change)]
    data = ("--data", "train.jsonl", "--evals", "test.jsonl", "--task", "sums")
    result = call("grpo", PAIR[0], *data, "--out", "a", *words)
    assert result.code == 0, result.err
    planned = json.loads(
        call(
            "run", "whole.json", "--arm", "direct_grpo", "--set", "stages.student_rl.steps=2", "--dry-run", "--json"
        ).out
    )
    expected = {row["node"] for row in planned if not row["node"].startswith("base_teacher")}
    assert {path.name for path in Path("a/nodes").iterdir()} == expected
    report = load_json(Path("a/report.json"))
    assert set(report["arms"]) == {"base_student", "own_stages"}
    graded = rows(next(Path("a/nodes").glob("student_rl*/evals/final/held_out.jsonl")))
    accuracy = report["arms"]["own_stages"]["accuracy"]["held_out"]["mean"]
    assert accuracy == pytest.approx(sum(row["correct"] for row in graded) / len(graded)) and len(graded) == 8


def test_single_stage_verbs_refuse_bad_input_in_one_sentence(folder: Path) -> None:
    for words, named in (
        (["distill", *PAIR, "--prompts", "nothing.jsonl"], "nothing.jsonl"),
        (["distill", PAIR[0], "pocket:nothing", "--prompts", "prompts.jsonl"], "models.teacher"),
        (["grpo", PAIR[0], "--data", "prompts.jsonl"], "data.labeled"),
        (["grpo", PAIR[0], "--data", "train.jsonl", "--task", "math"], "did you mean maths?"),
        (["distill", *PAIR, "--prompts", "prompts.jsonl", "--set", "stages.opd.stesp=1"], "did you mean steps?"),
    ):
        result = call(*words)
        assert result.code == 2 and named in result.err and len(result.complaints) == 1, result.err
    assert not Path("runs").exists()
