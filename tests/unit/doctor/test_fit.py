"""`headwater init mine`: facts measured from model folders, files and devices, and the recipe that follows."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from headwater.config import yaml
from headwater.config.fitted import SLOW_HOURS, DeviceFacts, duration
from headwater.config.guards import Guards
from headwater.config.learning_rates import suggested_rate
from headwater.config.recipe import Recipe, parse_recipe
from headwater.doctor import fit
from headwater.doctor.context import DoctorContext
from headwater.doctor.fit import FitRequest, fitted_recipe
from headwater.doctor.signal_checks import early_stop
from headwater.doctor.tokenizer_checks import alignment as checked_alignment
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.runs.estimate import estimates
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import make_plan
from headwater.tasks.verifier import Verifier
from headwater.types import problem_id
from qwen import qwen_folder
from runs import call
from tools.pretrain.pocket import make_tokenizer

STUDENT, TEACHER = "pocket:qwen3-student", "pocket:qwen3-teacher"


def sums(path: Path, count: int, first: int = 10, **more: Any) -> str:
    rows = [{"problem": f"{n:02d}+{n + 7:02d}", "answer": str(2 * n + 7), **more} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def teacher_with(folder: Path, tokenizer: Any) -> str:
    shutil.copytree(ModelFolder.open(TEACHER, "").path, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(**changes: Any) -> str:
    return fitted_recipe(FitRequest(**({"student": STUDENT, "teacher": TEACHER, "device": "cpu"} | changes)))


def recipe_of(**changes: Any) -> Recipe:
    return parse_recipe(yaml.read(written(**changes), "text"), "text")


def test_positions_of_model_include_rope_scaling(tmp_path: Path) -> None:
    shipped = ModelFolder.open(STUDENT, "")
    folder = shutil.copytree(shipped.path, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    scaled = fit.model_facts(ModelFolder.open(str(folder), "")).positions
    assert scaled == 4 * config["max_position_embeddings"] == 4 * (fit.model_facts(shipped).positions or 0)


def test_fitted_recipe_holds_out_part_of_file_by_content(tmp_path: Path) -> None:
    """A problem is held out if sha256("part:" + the first six digits of its id) is below the share; no label is among them."""
    data = sums(tmp_path / "sums.jsonl", 80)
    recipe = recipe_of(data=data, task="sums")
    assert recipe.task == "sums" and recipe.data.evals["held_out"].hash_range == (0.0, 0.2)
    texts = [f"{n:02d}+{n + 7:02d}" for n in range(10, 90)]
    held_out = {
        text
        for text in texts
        if int(hashlib.sha256(f"part:{problem_id(text)[:6]}".encode()).hexdigest()[:12], 16) < 0.2 * 16**12
    }
    with RunInputs(recipe) as inputs:
        assert {problem.text for problem in inputs.evals["held_out"][0]} == held_out
        assert {problem.text for problem in inputs.problems.values()} == set(texts) - held_out
        assert recipe.labels.budget == len(inputs.pools.all) == 80 - len(held_out)


def test_fitted_recipe_counts_labels_outside_evaluation_file(tmp_path: Path) -> None:
    data, evals = sums(tmp_path / "train.jsonl", 60), sums(tmp_path / "test.jsonl", 30, first=50)  # 20 in both
    text = written(data=data, evals=evals, task="sums")
    recipe = parse_recipe(yaml.read(text, ""), "")
    assert (
        recipe.labels.budget == 40 and "40 problems with an answer" in text and "30 problems, never trained on" in text
    )
    assert recipe.data.labeled.hash_range is None and recipe.data.evals["held_out"].path == evals


def test_fitted_recipe_measures_lengths_in_student_tokens(tmp_path: Path) -> None:
    """Pocket tokens are characters: the solutions have 30 and 20 characters, the prompt 5 and what the chat template adds."""
    data = sums(tmp_path / "train.jsonl", 40, solution="1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2")
    recipe = recipe_of(data=data, task="sums")
    tokenizer = ModelFolder.open(STUDENT, "").tokenizer
    length = len(tokenizer("1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2 1+1=2", add_special_tokens=False)["input_ids"])
    assert recipe.stages.opd.sampling.max_tokens == -(-2 * length // 64) * 64
    assert f"2 × {length} tokens, the 95th percentile of the worked solutions (mean {length})" in written(
        data=data, task="sums"
    )


def test_fitted_recipe_closes_its_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Verifier] = []
    monkeypatch.setattr(Verifier, "close", lambda verifier: closed.append(verifier))
    written(data=sums(tmp_path / "sums.jsonl", 40), task="sums")
    assert len(closed) == 1


def test_percentile_of_token_lengths() -> None:
    folder = ModelFolder.open(STUDENT, "")
    mean, high = fit.token_lengths(folder, ["1" * n for n in range(1, 101)])
    assert (mean, high) == (50.5, 96.0)


def test_default_task_and_template_follow_answers(tmp_path: Path) -> None:
    recipe = recipe_of(data=sums(tmp_path / "sums.jsonl", 40))
    assert recipe.task == "maths" and "\\boxed{}" in recipe.prompt.template


@pytest.mark.parametrize(
    ("gibibytes", "adapted", "checkpointing", "dtype"),
    [
        (125, (), False, "float32"),  # 100 GiB are 80 % of it
        (124, (), True, "float32"),
        (99, ("teacher",), True, "float32"),
        (62, ("teacher", "student"), True, "float32"),
        (37, ("teacher", "student"), True, "bfloat16"),
    ],
)
def test_form_needing_most_memory_within_limit_is_taken(
    gibibytes: int,
    adapted: tuple[str, ...],
    checkpointing: bool,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = [100, 80, 50, 30, 20]  # of each form in turn
    monkeypatch.setattr(
        fit, "device_facts", lambda name: DeviceFacts("cpu", "here", gibibytes * 2**30, 1e12, "made up")
    )
    monkeypatch.setattr(fit, "peak_bytes", lambda inputs: needs.pop(0) * 2**30)
    models = recipe_of(data=sums(tmp_path / "sums.jsonl", 40), task="sums").models
    assert (() if models.lora is None else models.lora.roles) == adapted
    assert (models.gradient_checkpointing, models.dtype) == (checkpointing, dtype)


def test_pair_too_large_for_device_is_refused_with_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [100, 80, 50, 30, 20]
    monkeypatch.setattr(fit, "device_facts", lambda name: DeviceFacts("cpu", "here", 24 * 2**30, 1e12, "made up"))
    monkeypatch.setattr(fit, "peak_bytes", lambda inputs: needs.pop(0) * 2**30)
    with pytest.raises(
        UserError, match=r"need at least 20.0 GiB, with adapters and .* here has 24.0 GiB free; name smaller models"
    ):
        written(data=sums(tmp_path / "sums.jsonl", 40), task="sums")


def test_peak_bytes_are_those_of_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(written(data=sums(tmp_path / "sums.jsonl", 80), task="sums"))
    nodes = json.loads(call("run", path, "--arm", "bridge_rl", "--dry-run", "--json").out)
    with RunInputs(parse_recipe(yaml.read(path.read_text(), ""), "")) as inputs:
        assert fit.peak_bytes(inputs) == max(node["peak_bytes"] for node in nodes)


def hours_of_dry_run(text: str, path: Path, device: str) -> float:
    path.write_text(text)
    nodes = json.loads(call("run", path, "--dry-run", "--on", device, "--json").out)
    return float(sum(node["hours"] for node in nodes))


def test_time_of_recipe_equals_dry_run(tmp_path: Path) -> None:
    data = sums(tmp_path / "sums.jsonl", 80)
    text = written(data=data, task="sums", device="h100")
    hours = hours_of_dry_run(text, tmp_path / "mine.yaml", "h100")
    assert f"# time     {duration(3600 * hours)} for `headwater run my.yaml`" in text


def test_hours_bound_estimate_of_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, wholes = sums(tmp_path / "sums.jsonl", 80), []
    slow = fit.Device(2e9, 64 * 2**30, 1e9, "made up")
    monkeypatch.setitem(fit.DEVICES, "slow", slow)
    for hours in (2.0, 0.5, 0.1):
        wholes.append(
            hours_of_dry_run(written(data=data, task="sums", device="slow", hours=hours), tmp_path / "m.yaml", "slow")
        )
        assert hours / 3 < wholes[-1] <= hours
    with pytest.raises(
        UserError, match=r"--hours 0.001: the smallest recipe .* takes .* on slow; give --hours 0.\d or more"
    ):
        written(data=data, task="sums", device="slow", hours=0.001)


def test_condition_costs_at_most_tenth_of_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fit.DEVICES, "slow", fit.Device(2e9, 64 * 2**30, 1e9, "made up"))
    for hours in (2.0, 0.1):
        recipe = recipe_of(data=sums(tmp_path / "sums.jsonl", 80), task="sums", device="slow", hours=hours)
        with RunInputs(recipe) as inputs:
            nodes = estimates(make_plan(recipe, ["bridge"], [0], inputs.content()), inputs)
        assert max(node.condition_share for node in nodes) <= 0.1


def test_slow_device_without_hours_is_fitted_to_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fit.DEVICES, "slow", fit.Device(2e8, 64 * 2**30, 1e8, "made up"))
    text = written(data=sums(tmp_path / "sums.jsonl", 80), task="sums", device="slow")
    assert 1.0 < hours_of_dry_run(text, tmp_path / "mine.yaml", "slow") <= SLOW_HOURS


def test_written_recipe_has_no_warning_of_early_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fit.DEVICES, "slow", fit.Device(2e9, 64 * 2**30, 1e9, "made up"))
    recipe = recipe_of(data=sums(tmp_path / "sums.jsonl", 80), task="sums", device="slow", hours=0.1)
    with RunInputs(recipe) as inputs:
        context = DoctorContext(inputs, ("bridge_rl",), (0,), tmp_path / "out")
        assert list(early_stop(context)) == []
        usual = recipe.model_copy(update={"guards": Guards.model_validate({})})
    with RunInputs(usual) as inputs:
        stages = [
            stage for stage in (recipe.stages.teacher_rl, recipe.stages.student_rl) if stage and (stage.steps or 0) >= 3
        ]
        names = {finding.name for finding in early_stop(DoctorContext(inputs, ("bridge_rl",), (0,), tmp_path / "out"))}
        assert names == ({"early-stop-likely"} if stages else set())


def test_named_device_is_used_instead_of_this_machine(tmp_path: Path) -> None:
    text = written(data=sums(tmp_path / "sums.jsonl", 40), task="sums", device="rtx4090")
    recipe = parse_recipe(yaml.read(text, ""), "")
    assert recipe.models.dtype == "bfloat16" and recipe.compute.device == "auto" and recipe.compute.workers is None
    assert "rtx4090, 24.0 GiB of memory free, from its datasheet" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "tpu"}, "--device tpu: must be auto, cpu, cuda or one of b200, h200"),
        ({"teacher": "http://localhost:8000/v1"}, "--teacher http://localhost:8000/v1: the files of the model decide"),
        ({"teacher": "BROKEN"}, "--teacher: the config of"),
        ({"student": "/nowhere"}, "--student: /nowhere is no folder here"),
        ({"data": "/nowhere.jsonl"}, "--data: /nowhere.jsonl: no such file"),
        ({"task": "poetry"}, "task 'poetry' is unknown"),
    ],
)
def test_wrong_option_is_one_sentence(changes: dict[str, str], sentence: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ModelFolder.open(TEACHER, "").path, broken)
    (broken / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "many"}')
    named = {option: str(broken) if value == "BROKEN" else value for option, value in changes.items()}
    with pytest.raises(UserError) as refusal:
        written(**({"data": sums(tmp_path / "sums.jsonl", 40)} | named))
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)
    assert "family" not in str(refusal.value)


def test_missing_gpu_is_refused_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device cuda: no CUDA device is here; .* such as --device h100$"):
        written(data=sums(tmp_path / "sums.jsonl", 40), device="cuda")


def test_pair_with_two_tokenizers_is_aligned(tmp_path: Path) -> None:
    """The figures are those of the doctor, which then has no objection."""
    teacher, data = teacher_with(tmp_path / "pairs", make_tokenizer("pairs")), sums(tmp_path / "sums.jsonl", 40)
    text = written(data=data, task="sums", teacher=teacher)
    recipe = parse_recipe(yaml.read(text, "text"), "text")
    assert recipe.stages.require("warmup").dense.tokenizers == recipe.stages.require("opd").dense.tokenizers == "prefix"
    assert "note     the tokenizers differ" in text and "; a pair is worth it from" not in text
    with RunInputs(recipe) as inputs:
        findings = list(checked_alignment(DoctorContext(inputs, ("bridge",), (0,), tmp_path / "out")))
        assert [finding.name for finding in findings] == ["tokenizers-aligned"]
    unwrapped = " ".join(line.strip().lstrip("# ") for line in text.splitlines())
    (share,) = re.findall(r"[\d.]+% of the student's vocabulary is the teacher's too", findings[0].evidence)
    assert re.search(r"100\.0% of the tokens of \d+ texts are aligned", unwrapped) and share in unwrapped
    assert "tokenizers: prefix" not in written(data=data, task="sums")


def test_limit_of_prompts_holds_for_longer_template_of_teacher(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("pairs")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|>" + 100 * "0+")
    teacher, data = teacher_with(tmp_path / "pairs", tokenizer), sums(tmp_path / "sums.jsonl", 40)
    assert recipe_of(data=data, task="sums", teacher=teacher).prompt.max_tokens >= 200
    assert recipe_of(data=data, task="sums").prompt.max_tokens < 100


def test_pair_without_common_text_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("%")
    teacher = teacher_with(tmp_path / "none", tokenizer)
    with pytest.raises(
        UserError, match=r"^--student and --teacher: their tokenizers give different ids .* name another teacher$"
    ):
        written(data=sums(tmp_path / "sums.jsonl", 40), teacher=teacher)


def test_pair_with_two_vocabulary_widths_is_refused(tmp_path: Path) -> None:
    folders = [qwen_folder(tmp_path / str(width), width=width) for width in (151_936, 152_064)]
    with pytest.raises(
        UserError, match=r"^--student and --teacher: their output layers have 151936 and 152064 columns"
    ):
        written(data=sums(tmp_path / "sums.jsonl", 40), student=folders[0], teacher=folders[1])


def test_row_without_answer_and_short_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": null}\n')
    with pytest.raises(UserError, match=r"--data: .*rows.jsonl, row 2: the problem has no answer in 'answer'"):
        written(data=str(path))
    with pytest.raises(
        UserError, match=r"--data: .*few.jsonl has \d problems to train on, outside the evaluation; at least 8"
    ):
        written(data=sums(tmp_path / "few.jsonl", 8))


def test_sampling_settings_come_from_generation_config(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "model", do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    recipe = recipe_of(data=sums(tmp_path / "sums.jsonl", 40), student=folder, teacher=folder)
    sampling = recipe.evaluate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)


def test_named_columns_are_read_and_written_into_recipe(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [{"aufgabe": f"{n}+7", "loesung": str(n + 7), "fach": "sums", "label": "x"} for n in range(10, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ("--problem", "aufgabe", "--answer", "loesung", "--tag", "fach")
    made = call("init", "mine", "--student", STUDENT, "--teacher", TEACHER, "--data", path, "--device", "cpu", *named)
    assert made.code == 0, made.err
    recipe = parse_recipe(yaml.read(made.out, ""), "")
    for source in (recipe.data.labeled, recipe.data.evals["held_out"]):
        assert source.columns.model_dump() == {"problem": "aufgabe", "answer": "loesung", "tag": "fach"}
    with RunInputs(recipe) as inputs:
        assert set(inputs.labeled.gold.values()) <= {row["loesung"] for row in rows}


def test_unknown_columns_are_refused_with_options_naming_them(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"aufgabe": "1+2", "loesung": "3"}\n' * 20)
    with pytest.raises(
        UserError, match=r"its columns are aufgabe, loesung; name one in columns.problem \(--problem\)$"
    ):
        written(data=str(path))


# One stage from the command line --------------------------------------------------------------------------------------


def stage_reader(path: str, stage: str, *changes: str) -> Any:
    field = "unlabeled" if stage == "opd" else "labeled"
    raw = {
        "task": "sums", "models": {"student": STUDENT, "teacher": TEACHER}, "data": {field: path},
        "stages": {stage: {"epochs": 1, "group_size": 8}},
    }  # fmt: skip
    return lambda values: parse_recipe(raw, "test", [*(f"{k}={json.dumps(v)}" for k, v in values.items()), *changes])


@pytest.mark.parametrize(
    ("gibibytes", "expected"),
    [
        (51, {"models.gradient_checkpointing": False}),  # 40 GiB are within 80 % of it
        (45, {"models.gradient_checkpointing": True}),
        (26, {"models.lora": {"r": 32, "alpha": 64}, "models.gradient_checkpointing": True}),
    ],
)
@pytest.mark.parametrize("stage", ["opd", "student_rl"])
def test_single_stage_is_fitted_like_recipe(
    gibibytes: int,
    expected: dict[str, Any],
    stage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = [40, 30, 20, 10]  # of the forms in which the teacher does not train
    monkeypatch.setattr(
        fit, "device_facts", lambda name: DeviceFacts("cpu", "here", gibibytes * 2**30, 1e12, "made up")
    )
    monkeypatch.setattr(fit, "peak_bytes", lambda inputs, arm: needs.pop(0) * 2**30)
    values, place = fit.fitted_stage(stage_reader(sums(tmp_path / "sums.jsonl", 200), stage), "auto")
    assert {name: values.get(name) for name in expected} == expected and place.startswith("here, ")
    signal, adapters = "teacher" if stage == "opd" else "reward", "models.lora" in values
    parameters = ModelFolder.open(STUDENT, "").shape.parameters
    assert values[f"stages.{stage}.optim.lr"] == suggested_rate(signal, adapters, parameters)
    assert values[f"stages.{stage}.sampling.max_tokens"] > 1 and "evaluate.sampling.max_tokens" not in values


def test_single_stage_keeps_adapters_of_user_at_their_rate(tmp_path: Path) -> None:
    read = stage_reader(sums(tmp_path / "sums.jsonl", 40), "opd", "models.lora.r=4")
    values, _ = fit.fitted_stage(read, "cpu")
    assert "models.lora" not in values and read(values).models.lora.r == 4
    parameters = ModelFolder.open(STUDENT, "").shape.parameters
    assert values["stages.opd.optim.lr"] == suggested_rate("teacher", True, parameters)
