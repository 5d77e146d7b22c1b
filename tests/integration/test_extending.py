"""docs/extending.md: each diff, applied to a copy of the package, is complete and works."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from forked_runs import Place, ProcessResult, warm_runs
from runs import rows, sets

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Edit:
    """One hunk of a diff: the lines that it expects in a file, and those that replace them."""

    path: str
    before: str
    after: str


def edits_of(section: str) -> list[Edit]:
    """The hunks of the diff in a section of docs/extending.md."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    body = page.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    (diff,) = re.findall(r"```diff\n(.*?)```", body, re.DOTALL)
    edits = []
    for file in re.split(r"^--- a?/.*\n", diff, flags=re.MULTILINE)[1:]:
        header, *hunks = re.split(r"^@@.*\n", file, flags=re.MULTILINE)
        path = header.removeprefix("+++ b/").strip()
        for hunk in hunks:
            lines = [(line[:1], line[1:] + "\n") for line in hunk.splitlines()]
            assert {sign for sign, _ in lines} <= {"+", "-", " ", ""}, f"{path}: not a hunk of a diff: {hunk}"
            before = "".join(text for sign, text in lines if sign != "+")
            edits.append(Edit(path, before, "".join(text for sign, text in lines if sign != "-")))
    return edits


def copy_with(edits: list[Edit], folder: Path) -> Path:
    """Copy the package and its tests to a folder, and apply the edits there. An empty `before` creates a file."""
    for name in ("src", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for edit in edits:
        path = folder / edit.path
        if not edit.before:
            path.write_text(edit.after, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count(edit.before) == 1, f"docs/extending.md: the context in {edit.path} is not there just once"
        path.write_text(text.replace(edit.before, edit.after), encoding="utf-8")
    return folder


def run_copy(copy: Path, *argv: str | Path, script: str | None = None) -> ProcessResult:
    """Run the copy's program, or a module with the copy's package, in a process that has the libraries loaded."""
    return warm_runs().run(*argv, whole=True, undrawn=True, place=Place(copy, copy / "src", script))


def test_adding_arm_takes_one_edit(tmp_path: Path) -> None:
    edits = edits_of("Add an arm")
    assert [edit.path for edit in edits] == ["src/headwater/config/arms.py"]
    copy, out = copy_with(edits, tmp_path / "copy"), tmp_path / "run"
    arms = ("--arms", "raw_teacher,raw_warmup_only")
    done = run_copy(copy, "study", "pocket", *arms, "--out", out, "--json", *sets())
    assert done.code == 0, done.out + done.err
    report = json.loads(done.out)
    assert report["arms"]["raw_warmup_only"]["text"] == "warm-up from the teacher before RL, nothing else"
    assert report["arms"]["raw_warmup_only"]["labels"]["distinct"] == 0
    assert ("raw_teacher", "raw_warmup_only") in {(contrast["a"], contrast["b"]) for contrast in report["contrasts"]}
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["arms"]
    assert plan["raw_teacher"]["0"][:-1] == plan["raw_warmup_only"]["0"]  # shared nodes run once


def test_adding_task_takes_two_edits(tmp_path: Path) -> None:
    edits = edits_of("Add a task")
    assert {edit.path for edit in edits} == {"src/headwater/tasks/yes_no.py", "src/headwater/tasks/registry.py"}
    copy, data = copy_with(edits, tmp_path / "copy"), tmp_path / "data.jsonl"
    golds = [{"problem": "Is 7 prime?", "answer": "yes"}, {"problem": "Is 8 prime?", "answer": "No"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in golds), encoding="utf-8")
    validated = run_copy(copy, "validate", data, "--task", "yes_no")
    assert "2 labels, 0 fail" in validated.out, validated.out + validated.err
    completions = ["Not sure. Yes.", "Yes? It is 2*4, so no.", "Perhaps."]
    rows_ = [{"gold": "no", "completion": completion} for completion in completions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_), encoding="utf-8")
    graded = run_copy(copy, "grade", "--data", data, "--task", "yes_no")
    verdicts = [json.loads(line) for line in graded.out.splitlines()]
    assert [(row["correct"], row["reason"]) for row in verdicts] == [
        (False, "different"),
        (True, "equal"),
        (False, "no_answer"),
    ]


def test_adding_objective_takes_three_edits(tmp_path: Path) -> None:
    edits = edits_of("Add an objective")
    assert [edit.path for edit in edits] == [
        "src/headwater/config/objectives.py",
        "src/headwater/losses/objectives.py",
        "tests/unit/losses/test_objectives.py",
    ]
    copy = copy_with(edits, tmp_path / "copy")
    tested = run_copy(
        copy, "-q", "-p", "no:cacheprovider", edits[2].path, "-k", "every_objective_by_hand", script="pytest"
    )
    assert tested.code == 0, tested.out + tested.err
    assert "1 passed" in tested.out

    out = tmp_path / "run"
    change = ("stages.student_rl.objective=raft", "stages.student_rl.steps=1")
    trained = run_copy(copy, "run", "pocket", "--arm", "direct_grpo", "--out", out, *sets(*change))
    assert trained.code == 0, trained.out + trained.err
    (node,) = (path for path in (out / "nodes").iterdir() if path.name.startswith("student_rl."))
    assert json.loads((node / "node.json").read_text(encoding="utf-8"))["settings"]["objective"] == "raft"
    (step,) = rows(node / "metrics.jsonl")
    # Cross-entropy is positive; it is 0 only where no group had both right and wrong samples.
    assert step["loss"] > 0.0 and step["informative"] > 0.0 and step["grad_norm"] > 0.0
    graded = [row["checks"] for row in rows(node / "ledger.jsonl") if row["purpose"] == "train"]
    assert graded == [16]  # it is handed labels, and grades its 16 rollouts


def test_unknown_objective_is_refused_with_table_rows() -> None:
    from headwater.config.objectives import OBJECTIVES, known_objective

    with pytest.raises(ValueError, match=", ".join(f"'{name}'" for name in OBJECTIVES)):
        known_objective("raft")


def test_adding_sampler_takes_two_edits(tmp_path: Path) -> None:
    edits = edits_of("Add a sampler")
    assert [edit.path for edit in edits] == [
        "src/headwater/sampling/uncached_sampler.py",
        "src/headwater/config/samplers.py",
    ]
    copy = copy_with(edits, tmp_path / "copy")
    steps = {}
    for sampler in ("torch", "uncached"):
        out = tmp_path / sampler
        change = (f"compute.sampler={sampler}", "stages.student_rl.steps=2", "conditions.problems=0")
        trained = run_copy(copy, "run", "pocket", "--arm", "direct_grpo", "--out", out, *sets(*change))
        assert trained.code == 0, trained.out + trained.err
        (node,) = (path for path in (out / "nodes").iterdir() if path.name.startswith("student_rl."))
        steps[sampler] = node.name, rows(node / "metrics.jsonl")
    assert steps["torch"][0] != steps["uncached"][0]  # fingerprints
    # Both draw by the same numbers from the same distributions: the same tokens, so the same rewards and the same training.
    for embedded, uncached in zip(steps["torch"][1], steps["uncached"][1], strict=True):
        assert embedded["tokens_sampled"] == uncached["tokens_sampled"] > 0
        assert embedded["reward"] == uncached["reward"]
        assert (
            embedded["grad_norm"] == pytest.approx(uncached["grad_norm"], rel=1e-3) and uncached["sampler_gap"] < 1e-5
        )
    refused = run_copy(copy, "run", "pocket", "--out", tmp_path / "none", "--set", "compute.sampler=cached")
    assert refused.code == 2
    assert (
        "compute.sampler: input should be 'torch', 'uncached', 'vllm', or package.module:function (given: 'cached')"
        in refused.err
    )
