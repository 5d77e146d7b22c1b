"""User errors: exit 2 and one sentence that names the field, file or row; nothing is written and nothing lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwater.config.builtin import builtin_text
from runs import CommandResult, call, rows, sets, tiny

GOOD = [{"problem": f"{a:02d}+07+11+90", "answer": f"{(a + 8) % 100:02d}"} for a in range(20)]


def assert_refused(result: CommandResult, *named: str) -> None:
    assert result.code == 2, result
    assert result.out == ""
    (sentence,) = result.complaints
    assert sentence.startswith("headwater: "), result.err
    for text in named:
        assert text in result.err, result.err


def refused(tmp_path: Path, *named: str, changes: tuple[str, ...] = (), arm: str = "bridge_rl") -> None:
    """Running the tiny recipe with these changes is refused, and its folder is not made."""
    out = tmp_path / "out"
    assert_refused(tiny("run", out, "--arm", arm, changes=changes), *named)
    assert not out.exists()


def written(path: Path, rows_: list[object]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows_), encoding="utf-8"
    )
    return path


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("steps: 80", "stpes: 80", ["unknown field stages.warmup.stpes"]),
        ("budget: 256 ", "budget: many ", ["labels.budget", "'many'"]),
        ("budget: 256 ", "budget: 0 ", ["labels.budget", "given: 0"]),
        ("dtype: float32", "dtype: float8", ["models.dtype", "'float8'"]),
        ("objective: opd", "objective: sft", ["stages", "opd.objective is sft", "opd or mixed"]),
        ("task: sums", "# no task", ["task"]),
        ("temperature: 1.0", "temperature: -1", ["evaluate.sampling.temperature"]),
        (
            "batch_size: 128",
            "batch_size: 130",
            ["stages.teacher_rl", "batch_size 130 is not a multiple of group_size 8"],
        ),
        ("sampling: {max_tokens: 48}", "sampling: {top_p: 0.9}", ["stages.teacher_rl", "top_p 1"]),
        ("count: 500", "count: 500, path: x.jsonl", ["data.evals.sums.generate", "path"]),
        ("seed: 0", "seed: zero", ["seed", "'zero'"]),
    ],
)
def test_recipe_with_wrong_value_is_refused_by_field(old: str, new: str, named: list[str], tmp_path: Path) -> None:
    text = builtin_text("pocket")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert_refused(call("run", path, "--out", tmp_path / "out"), str(path), *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"name: [pocket\nseed: 0\n", ["is not YAML", "line 2"]),
        (b"- name: pocket\n", ["must be a mapping of fields, not list"]),
        (b"", ["must be a mapping of fields, not NoneType"]),
        (b"name: \xff\xfe", ["cannot be read"]),
        (b"name: pocket\n\tseed: 0\n", ["is not YAML"]),
    ],
)
def test_file_other_than_recipe_is_refused_by_name(text: bytes, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    assert_refused(call("run", path, "--out", tmp_path / "out"), str(path), *named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stages.opd.steps", "write it as path=value"),
        ("=5", "write it as path=value"),
        ("stages..steps=5", "write it as path=value"),
        ("stages.opd.stepz=5", "unknown field stages.opd.stepz"),
        ("stages.opd.steps=many", "stages.opd.steps"),
        ("stages.opd.steps=[1", "the value is not YAML"),
        ("seed.x=3", "seed holds a value, not fields"),
        ("labels.budget=-1", "labels.budget"),
    ],
)
def test_invalid_set_option_is_refused_by_name(change: str, named: str, tmp_path: Path) -> None:
    result = call("run", "pocket", "--out", tmp_path / "out", "--set", change)
    assert_refused(result, named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run", "pocket", "--arm", "brigde"], ["--arm brigde", "bridge_rl"]),
        (["study", "pocket", "--arms", "bridge,nothing"], ["nothing", "bridge_rl"]),
        (["study", "pocket", "--arms", ","], ["--arms"]),
        (["study", "pocket", "--arms", "bridge,bridge"], ["--arms", "bridge", "twice"]),
        (["study", "pocket", "--seeds", "0,x"], ["--seeds 0,x", "whole numbers"]),
        (["study", "pocket", "--seeds", "0,0"], ["--seeds", "twice"]),
        (["study", "pocket", "--seeds", " "], ["--seeds"]),
        (["run", "poket"], ["poket", "pocket"]),
        (["init", "poket"], ["poket", "pocket"]),
    ],
)
def test_invalid_option_value_is_refused_with_valid_ones(
    argv: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*argv), *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_gpu_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "compute.device", "cuda", changes=("compute.device=cuda",))
    assert_refused(call("eval", "pocket:qwen3-student", "--data", "x.jsonl", "--device", "cuda"), "cuda")


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("summs", "sums, countdown"),
        ("no_such_module_here:grade", "no_such_module_here does not import"),
        ("json:no_such_function", "json has no function no_such_function"),
    ],
)
def test_unresolvable_task_is_refused(task: str, named: str, tmp_path: Path) -> None:
    refused(tmp_path, "task", named, changes=(f"task={task}",))


# Models ---------------------------------------------------------------------------------------------------------------


def copied_model(source: Path, target: Path, but: Callable[[Path], bool] = lambda path: False) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if not but(path):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_missing_model_folder_is_refused_by_field(tmp_path: Path) -> None:
    refused(tmp_path, "models.student", "/no/such/folder", changes=("models.student=/no/such/folder",))
    refused(tmp_path, "models.teacher", "qwen9", "pocket:qwen3-teacher", changes=("models.teacher=pocket:qwen9",))
    refused(tmp_path, "models.expert", changes=("models.expert=null",), arm="sft_teacher")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path, "models.teacher", str(empty), "config.json", changes=(f"models.teacher={empty}",))


def test_folder_with_only_pickled_weights_is_refused_and_never_unpickled(tmp_path: Path, pocket_folder: Path) -> None:
    folder = copied_model(
        pocket_folder / "qwen3-student", tmp_path / "m", but=lambda path: path.suffix == ".safetensors"
    )
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (touched,))

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    refused(tmp_path, "models.student", str(folder), "no *.safetensors", changes=(f"models.student={folder}",))
    assert not touched.exists()


def test_damaged_model_folder_is_refused_by_field(tmp_path: Path, pocket_folder: Path) -> None:
    cut = copied_model(pocket_folder / "qwen3-student", tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = tiny("run", tmp_path / "out", "--arm", "direct_grpo", changes=(f"models.student={cut}",))
    assert_refused(result, "models.student", str(cut), "cannot be loaded")
    no_words = copied_model(pocket_folder / "qwen3-student", tmp_path / "w", but=lambda path: "tokenizer" in path.name)
    result = tiny("run", tmp_path / "new", "--arm", "direct_grpo", changes=(f"models.student={no_words}",))
    assert_refused(result, "models.student", "tokenizer")
    bad = copied_model(pocket_folder / "qwen3-student", tmp_path / "bad")
    (bad / "config.json").write_text("{", encoding="utf-8")
    result = tiny("run", tmp_path / "newer", "--arm", "direct_grpo", changes=(f"models.student={bad}",))
    assert_refused(result, "models.student", str(bad))


def test_teacher_with_other_token_ids_is_refused_with_text(tmp_path: Path, pocket_folder: Path) -> None:
    folder = copied_model(pocket_folder / "qwen3-teacher", tmp_path / "teacher")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["7"], words["8"] = words["8"], words["7"]  # as wide as before, and wrong
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(
        tmp_path, "models.student and models.teacher", "different ids for the same text", "17+45",
        changes=(f"models.teacher={folder}",),
    )  # fmt: skip


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows_", "named"),
    [
        ([*GOOD[:2], '{"problem": "1+1", "answer"', *GOOD[2:]], ["row 3", "is not JSON"]),
        ([*GOOD[:4], '["1+1", "2"]', *GOOD[4:]], ["row 5", "not a JSON object but list"]),
        ([{"text": "1+1", "answer": "2"}], ["no column problem|question|prompt", "text, answer"]),
        ([{"problem": "1+1", "result": "2"}], ["no column answer|", "problem, result"]),
        ([*GOOD[:3], {"problem": "1+1", "answer": None}, *GOOD[3:]], ["row 4", "no answer in 'answer'"]),
        ([*GOOD[:3], {"problem": "1+1"}, *GOOD[3:]], ["row 4", "no answer in 'answer'"]),
        ([*GOOD[:3], {"answer": "2"}, *GOOD[3:]], ["row 4", "has no column 'problem'"]),
        ([*GOOD[:1], {"problem": "  ", "answer": "2"}, *GOOD[1:]], ["row 2", "'problem' is blank"]),
        ([*GOOD[:1], {"problem": 11, "answer": "2"}, *GOOD[1:]], ["row 2", "'problem' is not text but int"]),
        ([], ["is empty"]),
    ],
)
def test_unusable_data_file_is_refused_by_file_and_row(rows_: list[object], named: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "labeled.jsonl", rows_)
    refused(tmp_path, f"data.labeled: {path}", *named, changes=(f"data.labeled={path}",))
    refused(tmp_path, f"data.evals.sums: {path}", *named, changes=(f"data.evals.sums={path}",))


def test_missing_data_file_is_refused_by_field(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.jsonl"
    refused(tmp_path, f"data.labeled: {missing}: no such file", changes=(f"data.labeled={missing}",))
    refused(tmp_path, f"data.unlabeled: {missing}: no such file", changes=(f"data.unlabeled={missing}",))


def test_bridge_prompts_need_no_answer_and_columns_may_have_other_names(tmp_path: Path) -> None:
    bare = written(tmp_path / "bare.jsonl", [{"text": f"{a:02d}+41+11+90"} for a in range(9)])
    changes = ["data.unlabeled.path=" + str(bare), "data.unlabeled.columns.problem=text", "stages.warmup.steps=8"]
    assert tiny("run", tmp_path / "out", "--arm", "raw_teacher", changes=changes).code == 0
    cache = next((tmp_path / "out/nodes").glob("teacher_rollouts*/cache/rollouts.jsonl"))
    assert len({row["problem_id"] for row in rows(cache)}) == 16 + 9


def test_prompt_over_limit_is_refused_by_problem(tmp_path: Path) -> None:
    path = written(tmp_path / "labeled.jsonl", [*GOOD, {"problem": "+".join(["11"] * 30), "answer": "30"}])
    changes = (f"data.labeled={path}", "prompt.max_tokens=40")
    refused(tmp_path, str(path), "11+11+11", "tokens", "over prompt.max_tokens 40", changes=changes)


def test_budget_over_pool_is_refused_with_both_numbers(tmp_path: Path) -> None:
    refused(tmp_path, "labels.budget 65 is more than the 64 labelled problems", changes=("labels.budget=65",))


def test_budget_too_small_for_one_step_is_refused_with_required_labels(tmp_path: Path) -> None:
    refused(
        tmp_path, "labels.budget 6", "stage teacher_rl", "3 problems (first_half)", "fewer than the 4 of one step",
        changes=("labels.budget=6",),
    )  # fmt: skip
    refused(
        tmp_path, "labels.budget 1", "stages.student_rl.batch_size", changes=("labels.budget=1",), arm="direct_grpo"
    )


# Folders --------------------------------------------------------------------------------------------------------------


def test_folder_of_other_recipe_is_refused_by_first_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo").code == 0
    before = contents(out)
    result = tiny("run", out, "--arm", "direct_grpo", changes=("stages.student_rl.optim.lr=0.5",))
    assert_refused(result, f"--out {out}", "another recipe", "stages.student_rl.optim.lr")
    assert contents(out) == before


def test_output_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("precious", encoding="utf-8")
    before = contents(out)
    assert_refused(tiny("run", out), f"--out {out}", "not empty")
    assert contents(out) == before
    assert_refused(tiny("run", out / "chapter1.tex"), "--out", "chapter1.tex", "is a file, not a folder")
    assert contents(out) == before


def test_uncreatable_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert_refused(tiny("run", tmp_path / "file" / "out"), "--out", "file/out")


def test_report_of_folder_without_run_is_refused(tmp_path: Path) -> None:
    assert_refused(call("report", tmp_path), str(tmp_path), "holds no run")
    assert_refused(call("report", tmp_path / "nothing"), "nothing", "holds no run")
    assert not list(tmp_path.iterdir())


def test_broken_file_in_run_directory_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo").code == 0
    (out / "plan.json").write_text("{", encoding="utf-8")
    assert_refused(call("report", out), str(out / "plan.json"), "cannot be read as JSON")
    assert_refused(tiny("run", out, "--arm", "direct_grpo"), str(out / "plan.json"))


# Other verbs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["eval", "/no/such/model", "--data", "DATA"], ["MODEL", "/no/such/model"]),
        (["eval", "pocket:qwen3-student", "--data", "no.jsonl", "--task", "sums"], ["--data: no.jsonl: no such file"]),
        (["eval", "pocket:qwen3-student", "--data", "DATA", "--template", "Solve it"], ["template", "{problem}"]),
        (["eval", "pocket:qwen3-student", "--data", "DATA", "--dtype", "int4"], ["dtype"]),
        (["eval", "pocket:qwen3-student", "--data", "DATA", "--task", "nothing"], ["'nothing'", "sums, countdown"]),
        (["validate", "no.jsonl"], ["no.jsonl", "no such file"]),
    ],
)
def test_other_verbs_refuse_by_name(
    argv: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = written(tmp_path / "data.jsonl", list(GOOD))
    assert_refused(call(*[str(data) if word == "DATA" else word for word in argv]), *named)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_dry_run_refuses_same_input_as_run(tmp_path: Path) -> None:
    changes = sets("labels.budget=65")
    assert_refused(call("run", "pocket", "--dry-run", "--out", tmp_path / "out", *changes), "labels.budget 65")
    assert not (tmp_path / "out").exists()
