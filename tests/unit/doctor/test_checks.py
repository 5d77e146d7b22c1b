"""Doctor: a test plants the fault of every finding and checks its name and evidence; a clean recipe has no finding."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headwater.config.arms import ARMS
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe
from headwater.data.labels import Pools
from headwater.doctor import checks, context, data_checks, prompt_checks, resource_checks, weight_checks
from headwater.doctor.checks import CHECKS, Examination, diagnose, examine, preflight
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import UNREADABLE, Finding, error, note, texts, told_once, warning
from headwater.doctor.prompt_checks import thinking_state
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.shape import Shape
from headwater.runs.inputs import RunInputs
from headwater.tasks import python_tests, sandbox
from headwater.tasks.verifier import Verifier
from qwen import END, PAD, PLAIN, qwen_folder
from runs import TINY
from serving import Answering, serving
from tiny import MODELS, tiny_folder
from tools.pretrain.pocket import make_tokenizer

ROOT = Path(__file__).parents[3]
TEACHER = str(ROOT / "src" / "headwater" / "pocket" / "qwen3-teacher")
CLOSES = "{%- if add_generation_prompt and not enable_thinking -%}{{ '<think>;;</think>' }}{%- endif -%}"
HYBRID = PLAIN + CLOSES
OPENS = PLAIN + "{%- if add_generation_prompt -%}{{ '<think>;' }}{%- endif -%}"


def patched(source: Path, folder: Path, file: str, **changes: Any) -> str:
    """A copy of a model folder with some fields of one of its JSON files changed."""
    shutil.copytree(source, folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    return str(folder)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(*changes: str) -> Recipe:
    return find_recipe("pocket", [*TINY, *changes])


def from_file(path: str, field: str = "data.labeled") -> str:
    """An override that replaces a generated source by a file."""
    return f"{field}={{path: {path}}}"


def context_of(tmp_path: Path, *changes: str, arms: Sequence[str] = ("bridge_rl",)) -> DoctorContext:
    inputs = RunInputs(recipe_of(*changes), need_answers=False)
    return DoctorContext(inputs, tuple(arms), (0,), tmp_path / "out")


def examined(tmp_path: Path, *changes: str, arms: Sequence[str] = ("bridge_rl",)) -> Examination:
    return diagnose(recipe_of(*changes), arms, (0,), tmp_path / "out")


def light(tmp_path: Path, *changes: str, arms: Sequence[str] = ("bridge_rl",)) -> Examination:
    """Without the checks that load weights."""
    context = context_of(tmp_path, *changes, arms=arms)
    with context.inputs:
        return examine(context, [check for check in CHECKS if check.stage == "files"])


def checked_by(
    tmp_path: Path, *runs: Callable[[DoctorContext], Iterator[Finding]], arms: Sequence[str] = ("bridge_rl",)
) -> Examination:
    """By these checks of the tiny pocket recipe alone."""
    context = context_of(tmp_path, arms=arms)
    with context.inputs:
        return examine(context, [check for check in CHECKS if check.run in runs])


def find(result: Examination, name: str) -> Finding:
    """The finding of that name, which must be there."""
    named = [finding for finding in result.findings if finding.name == name]
    assert named, f"{name} was not found among {[finding.text() for finding in result.findings]}"
    return named[0]


# Nothing wrong ----------------------------------------------------------------------------------------------------------


def test_every_arm_of_pocket_recipe_passes(tmp_path: Path) -> None:
    result = examined(tmp_path, "evaluate.sampling.max_tokens=48", arms=tuple(ARMS))
    assert not result.errors and result.unchecked == ()


@pytest.mark.parametrize("pair", ["qwen3", "llama"])
def test_pocket_models_pass_every_check(tmp_path: Path, pair: str) -> None:
    result = examined(
        tmp_path, f"models.student=pocket:{pair}-student", f"models.teacher=pocket:{pair}-teacher",
        "evaluate.sampling.max_tokens=48", *(f"stages.{stage}.sampling.max_tokens=48" for stage in
        ("teacher_rl", "warmup", "opd", "student_rl")), arms=("direct_grpo", "bridge_rl"),
    )  # fmt: skip
    assert [finding.text() for finding in result.findings if finding.severity != "warning"] == []
    assert {finding.name for finding in result.findings} <= {"halves-unbalanced"}
    assert result.unchecked == () and len(result.checked) == len(CHECKS)


def test_pocket_preflight_takes_seconds(tmp_path: Path) -> None:
    # Processor time, which a busy sibling core may double: a bound against a check that grows out of hand, not a speed claim.
    recipe = find_recipe("pocket", ["compute.threads=1"])
    diagnose(recipe_of(), ("bridge_rl",), (0,), tmp_path)  # imports and first calls are not the doctor's
    started = time.process_time()
    assert not diagnose(recipe, ("bridge_rl",), (0,), tmp_path).errors
    assert time.process_time() - started < 8.0


# Tokenizers, stop ids, templates ----------------------------------------------------------------------------------------


def test_base_student_with_other_stop_ids_than_teacher_is_refused(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "base", eos="<|endoftext|>")
    teacher = qwen_folder(tmp_path / "instruct", ends=[END, PAD])
    finding = find(light(tmp_path, f"models.student={student}", f"models.teacher={teacher}"), "stop-sets-differ")
    assert finding.severity == "error"
    assert "151643" in finding.evidence and "151645" in finding.evidence and str([PAD, END]) in finding.remedy


def test_student_with_more_stop_ids_than_teacher_is_warned(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "student", ends=[END, PAD])
    teacher = qwen_folder(tmp_path / "teacher")
    finding = find(light(tmp_path, f"models.student={student}", f"models.teacher={teacher}"), "stop-sets-differ")
    assert finding.severity == "warning"


def test_stop_ids_are_compared_for_distillation_only(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "base", eos="<|endoftext|>")
    teacher = qwen_folder(tmp_path / "instruct", ends=[END, PAD])
    result = light(tmp_path, f"models.student={student}", f"models.teacher={teacher}", arms=("direct_grpo",))
    assert "stop-sets-differ" not in {finding.name for finding in result.findings}


def test_eos_missing_from_generation_config_is_named(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "model", eos="<|im_end|>", ends=PAD)
    finding = find(
        light(tmp_path, f"models.student={folder}", f"models.teacher={folder}"), "eos-not-in-generation-config"
    )
    assert "151645" in finding.evidence and "[151643]" in finding.evidence


def test_template_turn_end_missing_from_stop_ids_is_named(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "base", eos="<|endoftext|>")
    finding = find(light(tmp_path, f"models.student={folder}", f"models.teacher={folder}"), "turn-end-does-not-stop")
    assert "151645 (<|im_end|>)" in finding.evidence


def test_model_without_stop_ids_is_refused(tmp_path: Path, pocket_folder: Path) -> None:
    folder = tmp_path / "endless"
    patched(pocket_folder / "qwen3-student", folder, "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert find(light(tmp_path, f"models.student={folder}"), "no-stop-id").severity == "error"


def test_padding_with_eos_is_recognised_and_harmless(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "model", pad="<|im_end|>")
    result = light(tmp_path, f"models.student={folder}", f"models.teacher={folder}")
    finding = find(result, "pad-is-eos")
    assert finding.severity == "note" and "151645" in finding.evidence and not result.errors


def test_equal_width_with_other_ids_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "shuffled")
    config = json.loads((folder / "tokenizer.json").read_text())
    ids = config["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    (folder / "tokenizer.json").write_text(json.dumps(config))
    result = light(tmp_path, f"models.teacher={folder}")
    assert find(result, "token-ids-differ").severity == "error"
    assert "vocabulary-width" not in {finding.name for finding in result.findings}


def test_151936_columns_against_152064_are_refused(tmp_path: Path) -> None:
    student, teacher = qwen_folder(tmp_path / "small"), qwen_folder(tmp_path / "large", width=152064)
    result = light(tmp_path, f"models.student={student}", f"models.teacher={teacher}")
    assert [finding.name for finding in result.errors] == ["vocabulary-width"]
    assert "151936 and 152064" in result.errors[0].evidence
    sampled = light(tmp_path, f"models.student={student}", f"models.teacher={teacher}", arms=("direct_grpo",))
    assert not sampled.errors


def test_tokenizer_with_more_ids_than_model_columns_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "narrow", vocab_size=20)
    finding = find(light(tmp_path, f"models.student={folder}"), "token-beyond-vocabulary")
    assert f"ids up to {len(make_tokenizer()) - 1}" in finding.evidence and "20 columns" in finding.evidence


def test_model_sampling_defaults_are_named_as_ignored(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "model", do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    finding = find(light(tmp_path, f"models.student={folder}", f"models.teacher={folder}"), "sampling-defaults-ignored")
    assert finding.severity == "note" and "temperature 0.6, top_p 0.95, top_k 20" in finding.evidence
    file = Path(folder, "generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": "0.6"}))
    texts = find(light(tmp_path, f"models.student={folder}", f"models.teacher={folder}"), "sampling-defaults-ignored")
    assert "temperature '0.6', top_p 0.95" in texts.evidence


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")
def test_adapter_coverage_and_targets_without_adapter_are_named(tmp_path: Path) -> None:
    moe = tiny_folder(tmp_path / "moe", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    models_ = (f"models.student={moe}", f"models.teacher={moe}")
    finding = find(light(tmp_path, *models_, "models.lora.targets=[q_proj,v_proj]"), "adapters-cover-part")
    # Of each layer: (32 + 16) · 32 of 32 · 96 of attention, 4 · 3 · 32 · 16 of experts and 4 · 32 of the router.
    assert (
        finding.severity == "warning"
        and f"{48 * 32 / (96 * 32 + 12 * 512 + 128):.0%} of the layers'" in finding.evidence
    )
    assert "experts.gate_up_proj" in finding.evidence
    whole = light(tmp_path, *models_, "models.lora.r=2")
    assert not [finding for finding in whole.findings if finding.name.startswith("adapters")]
    dense = find(light(tmp_path, "models.lora.targets=[q_proj]"), "adapters-cover-part")
    assert dense.severity == "note"
    for targets, message in (("[nowhere]", "nowhere"), ("[input_layernorm]", "RMSNorm")):
        refused = find(light(tmp_path, *models_, f"models.lora.targets={targets}"), "adapters-impossible")
        assert refused.severity == "error" and "models.lora.targets" in refused.evidence and message in refused.evidence


def test_thinking_template_with_plain_one_is_refused(tmp_path: Path) -> None:
    student, teacher = qwen_folder(tmp_path / "plain"), qwen_folder(tmp_path / "hybrid", template=HYBRID)
    finding = find(light(tmp_path, f"models.student={student}", f"models.teacher={teacher}"), "thinking-differs")
    assert (
        finding.severity == "error"
        and "the thinking block is none in the first's prompt and closed in the other's" in finding.evidence
    )


def test_teacher_with_optional_thinking_after_same_prompt_is_warned(tmp_path: Path) -> None:
    student, teacher = qwen_folder(tmp_path / "plain"), qwen_folder(tmp_path / "hybrid", template=HYBRID)
    result = light(tmp_path, f"models.student={student}", f"models.teacher={teacher}", "prompt.thinking=true")
    assert find(result, "thinking-known-to-one").severity == "warning" and not result.errors


def test_other_template_differences_are_refused(tmp_path: Path) -> None:
    student = qwen_folder(tmp_path / "one")
    teacher = qwen_folder(tmp_path / "other", template=PLAIN.replace("assistant;", "assistant:"))
    result = light(tmp_path, f"models.student={student}", f"models.teacher={teacher}")
    assert [finding.name for finding in result.errors] == ["prompts-differ"]


def test_unknown_thinking_mode_is_named(tmp_path: Path) -> None:
    finding = find(light(tmp_path, "prompt.thinking=true"), "thinking-without-effect")
    assert "models.student" in finding.evidence


def test_template_with_forced_thinking_is_named(tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "model", template=OPENS)
    result = light(tmp_path, f"models.student={folder}", f"models.teacher={folder}")
    assert find(result, "thinking-always-on").severity == "warning" and not result.errors


def test_dropped_system_prompt_is_named(tmp_path: Path) -> None:
    result = light(tmp_path, "prompt.system=Add up.")
    (finding,) = (finding for finding in result.findings if finding.name == "system-without-effect")
    assert finding.evidence.startswith("models.student and models.teacher: ")


def test_thinking_state_is_read_from_prompt() -> None:
    assert [thinking_state(text) for text in ("<think>\n", "<think>\n\n</think>\n", "a")] == ["open", "closed", "none"]


def test_prompt_over_limit_is_refused_with_its_problem(tmp_path: Path) -> None:
    finding = find(light(tmp_path, "prompt.max_tokens=14"), "prompt-too-long")
    assert finding.severity == "error" and re.search(
        r"\d+ of 69 prompts are over prompt.max_tokens 14", finding.evidence
    )


def test_prompt_and_completion_beyond_positions_are_refused(tmp_path: Path) -> None:
    finding = find(light(tmp_path, "stages.opd.sampling.max_tokens=500"), "context-too-short")
    assert "(stages.opd.sampling.max_tokens 500)" in finding.evidence and "512 positions" in finding.evidence
    finding = find(light(tmp_path, "evaluate.sampling.max_tokens=501"), "context-too-short")
    assert "(evaluate.sampling.max_tokens 501)" in finding.evidence


def test_fine_tuning_without_own_settings_names_fields_of_warmup(tmp_path: Path) -> None:
    context = context_of(tmp_path, "stages.warmup.sampling.max_tokens=500", arms=("teacher_sft",))
    (finding, _) = prompt_checks.context_length(context)
    assert "(stages.warmup.sampling.max_tokens 500)" in finding.evidence
    own = "stages.sft={steps: 2, sampling: {max_tokens: 500}}"
    (finding, _) = prompt_checks.context_length(context_of(tmp_path, own, arms=("teacher_sft",)))
    assert "(stages.sft.sampling.max_tokens 500)" in finding.evidence


LONGROPE = {  # the shortest prompt has 13 tokens, the longest 19
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 51,
    "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "changes", "evidence"),
    [
        (LONGROPE, [], None),
        (LONGROPE, ["evaluate.sampling.max_tokens=33"], "longer than 51 tokens.*completions of up to 33.*at most 32"),
        (LONGROPE, ["stages.opd.sampling.max_tokens=40"], "completions of up to 40.*only prompts of more than 51 tokens"),
        (LONGROPE | {"original_max_position_embeddings": 12}, [], None),
        (LONGROPE, ["compute.sampler=vllm", "prompt.max_tokens=64"], "prompts of 13 to 64 tokens"),
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, ["stages.opd.sampling.max_tokens=500"],
         "dynamic scaling.*longer than 512 tokens"),
    ],
)  # fmt: skip
def test_lengths_across_change_of_positions_are_refused(
    rope: dict[str, Any], changes: list[str], evidence: str | None, tmp_path: Path
) -> None:
    folder = patched(Path(TEACHER), tmp_path / "model", "config.json", rope_parameters=rope)
    context = context_of(tmp_path, f"models.teacher={folder}", *changes)
    findings = list(prompt_checks.length_rules(context))
    if evidence is None:
        assert findings == []
        return
    assert [finding.name for finding in findings] == ["positions-change"]
    assert findings[0].severity == "error" and re.search(rf"^models.teacher: .*{evidence}", findings[0].evidence)
    with pytest.raises(UserError, match=r"^models.teacher: its positions"):
        preflight(context.plan, context.inputs)


def test_problems_in_unknown_characters_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "words.jsonl", *({"problem": f"{n} plus {n}", "answer": str(2 * n)} for n in range(40)))
    assert "40 of 45 problems" in find(light(tmp_path, from_file(path)), "unknown-tokens").evidence


# Data -------------------------------------------------------------------------------------------------------------------


def sums(count: int, first: int = 10) -> list[dict[str, Any]]:
    return [
        {"problem": f"{n}+{n + 1}+11", "answer": str((2 * n + 12) % 100).zfill(2)} for n in range(first, first + count)
    ]


def test_missing_data_file_is_named_and_rest_is_checked(tmp_path: Path) -> None:
    result = light(tmp_path, from_file(str(tmp_path / "none.jsonl")))
    assert [finding.name for finding in result.errors] == ["data-unreadable"]
    assert "vocabulary width" in result.checked


def test_leaked_evaluation_problem_is_named(tmp_path: Path) -> None:
    labeled = jsonl(tmp_path / "labeled.jsonl", *sums(40))
    held_out = jsonl(tmp_path / "eval.jsonl", {"problem": "12 + 13 + 11", "answer": "36"}, *sums(4, first=60))
    finding = find(light(tmp_path, from_file(labeled), from_file(held_out, "data.evals.sums")), "evaluation-leak")
    assert "data.labeled: 1 problems are also in data.evals.sums" in finding.evidence


def test_label_without_answer_is_refused_with_its_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "labeled.jsonl", *sums(20), {"problem": "1+1", "answer": None})
    finding = find(light(tmp_path, from_file(path)), "label-without-answer")
    assert "1 of 21 problems have no answer (rows 21)" in finding.evidence


def test_gold_answer_rejected_by_grader_is_named_with_its_problem(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "labeled.jsonl", *sums(20), {"problem": "1+1", "answer": "=" * 60})
    finding = find(light(tmp_path, from_file(path)), "gold-fails-grader")
    assert finding.severity == "warning" and "1 of 21 labels" in finding.evidence


def test_task_rejecting_most_gold_answers_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "labeled.jsonl", *({"problem": row["problem"], "answer": "=" * 60} for row in sums(20)))
    assert find(light(tmp_path, from_file(path)), "gold-fails-grader").severity == "error"


PROTECTIONS = {
    ("seccomp", "required"): ("sandbox-layers", "note"),
    ("audit hook", "required"): ("sandbox-missing", "error"),
    ("audit hook", "optional"): ("sandbox-incomplete", "warning"),
}


@pytest.mark.parametrize("case", PROTECTIONS, ids="-".join)
def test_protections_of_machine_are_named(
    case: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer, wanted), (name, severity) = case, PROTECTIONS[case]
    monkeypatch.setattr(sandbox, "layers", lambda: (layer, "limits"))
    findings = list(data_checks.sandbox_layers(context_of(tmp_path, "task=python", f"compute.sandbox={wanted}")))
    assert [(finding.name, finding.severity) for finding in findings] == [(name, severity)]
    assert f"{layer}, limits" in findings[0].evidence
    assert list(data_checks.sandbox_layers(context_of(tmp_path))) == []


def test_verifier_refuses_programs_on_machine_without_seccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "layers", lambda: ())
    with Verifier("python", workers=1) as verifier, pytest.raises(UserError, match=r"cannot confine .* none"):
        verifier([python_tests.WARM_UP])


def test_grader_returning_score_is_named_with_type_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoring_graders.py").write_text("def score(gold, completion):\n    return 0.5\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = find(light(tmp_path, "task=scoring_graders:score"), "grader-returns-no-verdict")
    assert finding.severity == "error" and "scoring_graders.py returned float" in finding.evidence


def test_unknown_task_is_named(tmp_path: Path) -> None:
    result = light(tmp_path, "task=no_such_module:grade")
    assert [finding.name for finding in result.errors] == ["task-unusable"]


def test_repeated_and_contradicting_rows_are_named(tmp_path: Path) -> None:
    rows = sums(20)
    path = jsonl(tmp_path / "labeled.jsonl", *rows, rows[0], {**rows[1], "answer": "99"})
    result = light(tmp_path, from_file(path))
    assert "2 rows repeat" in find(result, "duplicates").evidence
    assert "1 problems have several different answers (rows 2 and 22)" in find(result, "contradicting-answers").evidence


def test_unread_column_is_named_with_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "labeled.jsonl", *({**row, "context": "(+)"} for row in sums(20)))
    finding = find(light(tmp_path, from_file(path)), "column-not-read")
    assert finding.severity == "warning" and "data.labeled: column 'context' holds text in 20 of 20" in finding.evidence
    assert 'set data.labeled.columns.problem to "{context}\\n\\n{problem}"' in finding.remedy


def test_overlapping_or_empty_evaluations_are_named(tmp_path: Path) -> None:
    same = jsonl(tmp_path / "same.jsonl", *sums(3, first=60))
    torn = jsonl(tmp_path / "torn.jsonl", {"problem": "7+7", "answer": "14"}, {"problem": "7+7", "answer": "15"})
    sources = (f"{name}: {{path: {path}}}" for name, path in (("a", same), ("b", same), ("c", torn)))
    result = light(tmp_path, f"data.evals={{{', '.join(sources)}}}")
    assert "data.evals.a and data.evals.b share 3 problems" in find(result, "evaluations-overlap").evidence
    assert find(result, "evaluation-empty").severity == "error"


def test_budget_over_pool_is_named(tmp_path: Path) -> None:
    result = light(tmp_path, "labels.budget=65")
    assert [finding.name for finding in result.errors] == ["label-budget-over-pool"]


def test_half_too_small_for_one_step_is_named(tmp_path: Path) -> None:
    finding = find(light(tmp_path, "labels.budget=6"), "pool-too-small")
    assert "gives stage teacher_rl a pool of 3 problems (first_half), fewer than the 4" in finding.evidence


def test_unbalanced_and_overlapping_halves_are_named(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    names = context.inputs.pools.all
    context.inputs.memo[("pools",)] = Pools(names[:12], names[11:16])
    findings = {finding.name: finding for finding in data_checks.halves(context)}
    assert findings["halves-overlap"].severity == "error" and names[11] in findings["halves-overlap"].evidence
    assert "12 and 5" in findings["halves-unbalanced"].evidence


def test_missing_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = light(tmp_path, "compute.device=cuda")
    assert [finding.name for finding in result.errors] == ["device-missing"]


def test_impossible_plan_is_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*parts: object) -> None:
        raise checks.UserError("something of a new kind")

    monkeypatch.setattr("headwater.doctor.context.make_plan", refuse)
    assert "something of a new kind" in find(light(tmp_path), "cannot-run").evidence


def test_training_one_of_several_teachers_is_finding(tmp_path: Path) -> None:
    result = light(tmp_path, f"models.teacher={{a: {TEACHER}, b: {TEACHER}}}")
    assert "is a mapping to several models, which is not trained here" in find(result, "cannot-run").evidence


# Memory and disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "name"), [(0.9, "memory-too-small"), (1.1, "memory-tight"), (2.0, None)])
def test_memory_is_compared_with_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, name: str | None
) -> None:
    # The teacher's GRPO holds most: float32 weights, gradients and two moments.
    needed = 16 * sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(TEACHER).parameters())
    monkeypatch.setattr(resource_checks, "free_memory", lambda device: share * needed)
    names = [finding.name for finding in resource_checks.memory(context_of(tmp_path))]
    assert names == ([] if name is None else [name])


@pytest.mark.parametrize(
    ("free", "top_k", "name"),
    [(10**4, "null", "disk-too-small"), (2 * 10**7, "4000", "disk-tight"), (10**9, "null", None)],
)
def test_disk_is_compared_with_models_checkpoints_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, top_k: str, name: str | None
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    context = context_of(
        tmp_path, f"stages.warmup.dense.top_k={top_k}", "stages.warmup.sampling.max_tokens=4000", arms=("bridge",)
    )
    assert [finding.name for finding in resource_checks.disk(context)] == ([] if name is None else [name])


def test_unusable_exact_cache_is_named_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_checks, "EXACT_CACHE_LIMIT", 1 << 10)
    assert [finding.name for finding in resource_checks.disk(context_of(tmp_path))] == ["cache-over-limit"]
    assert list(resource_checks.disk(context_of(tmp_path, "stages.warmup.dense.top_k=8"))) == []


def advice_at(share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *changes: str) -> str:
    """The remedy where `share` of the needed memory is free."""
    context = context_of(tmp_path, *changes)
    largest = resource_checks.largest_pending(context, context.inputs)
    assert largest is not None
    monkeypatch.setattr(resource_checks, "free_memory", lambda device: share * largest[0])
    (finding,) = resource_checks.memory(context)
    return finding.remedy


def test_memory_advice_names_adapters_with_their_requirements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remedy = advice_at(0.9, monkeypatch, tmp_path)
    # The teacher's GRPO with an adapter: frozen float32 weights, and 16 bytes for each of the adapter's.
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    linears = [
        module for name, module in teacher.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    adapter = 16 * sum(module.in_features + module.out_features for module in linears)
    bytes_ = 4 * sum(parameter.numel() for parameter in teacher.parameters()) + 16 * adapter
    assert f"set models.lora={{r: 16}} (then {resource_checks.size(bytes_)})" in remedy
    # Weights that train stay float32 in bfloat16, with a copy: it would need more.
    assert "bfloat16" not in remedy and "gradient_checkpointing" not in remedy


@pytest.mark.parametrize(
    ("changes", "named", "unnamed"),
    [
        (["models.lora={r: 4}"], ["quantize=nf4", "dtype=bfloat16"], ["models.lora={", "roles"]),
        (["models.lora={r: 4, roles: [student]}"], ["models.lora.roles=[teacher, student]"], ["models.lora={"]),
        (["models.lora={r: 4, quantize: nf4}", "models.dtype=bfloat16", "models.gradient_checkpointing=true"],
         ["smaller models", "microbatch_tokens"], ["models.lora", "quantize", "bfloat16", "gradient_checkpointing"]),
        (["models.gradient_checkpointing=true"], ["models.lora={r: 16}"], ["gradient_checkpointing"]),
        ([], ["models.gradient_checkpointing=true", "models.lora={r: 16}"], []),
    ],
)  # fmt: skip
def test_memory_advice_omits_settings_already_on(
    changes: list[str], named: list[str], unnamed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remedy = advice_at(1.1, monkeypatch, tmp_path, *changes)
    assert all(finding in remedy for finding in named) and not any(finding in remedy for finding in unnamed)


@pytest.mark.parametrize(("sleep", "names"), [(0.0, []), (0.02, ["bfloat16-slower"])])
def test_slower_bfloat16_is_measured(
    sleep: float, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The timed pass runs under torch.autocast: one type of it is made slower."""
    real = torch.autocast

    def autocast(device: str, dtype: torch.dtype, enabled: bool) -> torch.autocast:
        time.sleep(sleep if enabled else 0.02 - sleep)
        return real(device, dtype=dtype, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    threads = torch.get_num_threads()
    findings = list(resource_checks.compute_dtype(context_of(tmp_path, "models.dtype=bfloat16")))
    assert [finding.name for finding in findings] == names and torch.get_num_threads() == threads
    assert all(float(re.search(r"is ([\d.]+) times", finding.evidence)[1]) > 3 for finding in findings)  # type: ignore[index]
    assert list(resource_checks.compute_dtype(context_of(tmp_path))) == []  # narrow models are not timed
    monkeypatch.setattr(resource_checks, "WIDE", 1)
    faster = [finding.name for finding in resource_checks.compute_dtype(context_of(tmp_path))]
    assert faster == ([] if names else ["bfloat16-faster"])


@pytest.mark.parametrize(("used", "names"), [(None, ["experts-per-token-unknown"]), (6, [])])
def test_unknown_number_of_experts_per_token_is_named(used: int | None, names: list[str], tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "deepseek_v2", hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, vocab_size=64,
        num_experts_per_tok=used,
    )  # fmt: skip
    context = context_of(tmp_path)
    context.inputs.memo[("shape", "teacher")] = Shape.from_config(config)
    assert [finding.name for finding in resource_checks.experts(context)] == names


def test_free_memory_is_known() -> None:
    free = resource_checks.free_memory(torch.device("cpu"))
    assert free is not None and 1e7 < free < 1e14


# Weights ----------------------------------------------------------------------------------------------------------------


class Noisy(torch.nn.Module):
    """A body whose hidden states are off by a random amount at every call: what a forgotten dropout does."""

    def __init__(self, body: torch.nn.Module, share: float) -> None:
        super().__init__()
        self.body, self.share = body, share

    def forward(self, **given: Any) -> Any:
        out = self.body(**given)
        noise = torch.randn_like(out.last_hidden_state) * self.share
        out.last_hidden_state = out.last_hidden_state * (1.0 + noise)
        return out


def broken(
    monkeypatch: pytest.MonkeyPatch, role: str, mend: Callable[[Policy], Policy], frozen: bool | None = None
) -> None:
    """Plant a fault into one model of the recipe as it is loaded."""

    def loaded(folder: ModelFolder, options: LoadOptions) -> Policy:
        policy = load_policy(folder, options)
        hit = folder.field == f"models.{role}" and (frozen is None or frozen == options.frozen)
        return mend(policy) if hit else policy

    monkeypatch.setattr(context, "load_policy", loaded)


def noisy(policy: Policy) -> Policy:
    return replace(policy, body=Noisy(policy.body, 0.1))


def test_sampler_disagreeing_with_trainer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "student", noisy)
    finding = find(checked_by(tmp_path, weight_checks.sampler_against_trainer), "sampler-trainer-gap")
    assert finding.severity == "error" and "float32" in finding.evidence


@pytest.mark.parametrize("arm", ["bridge", "warmup_only"])
def test_student_differing_from_its_frozen_copy_is_named(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "student", noisy, frozen=True)
    result = checked_by(tmp_path, weight_checks.sampler_against_trainer, weight_checks.self_distillation, arms=(arm,))
    assert [finding.name for finding in result.errors] == ["self-kl"]


def test_teacher_disagreeing_with_itself_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "teacher", noisy)
    finding = find(checked_by(tmp_path, weight_checks.teacher_agrees_with_itself), "teacher-disagrees-with-itself")
    assert finding.severity == "error" and "models.teacher" in finding.evidence


def test_non_finite_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(policy: Policy) -> Policy:
        with torch.no_grad():
            next(policy.model.parameters())[5] = torch.nan
        return policy

    broken(monkeypatch, "student", spoil)
    result = examined(tmp_path)
    assert [finding.name for finding in result.errors] == ["not-finite"]  # and no comparison of such numbers


def test_truncated_completions_are_named(tmp_path: Path) -> None:
    changes = [f"stages.{stage}.sampling.max_tokens=2" for stage in ("teacher_rl", "warmup", "opd", "student_rl")]
    result = examined(tmp_path, *changes)
    assert "100% of 16 sampled completions run into sampling.max_tokens 2" in find(result, "truncated").evidence
    assert not result.errors


def test_missing_kv_cache_and_plain_attention_are_named(tmp_path: Path) -> None:
    uncached, eager = tiny_folder(tmp_path / "uncached", "openai-gpt"), tiny_folder(tmp_path / "eager", "bloom")
    result = examined(tmp_path, f"models.student={uncached}", f"models.teacher={eager}")
    assert "models.student" in find(result, "decodes-without-cache").evidence
    assert find(result, "eager-attention") and "does not support bloom models" in result.text()
    assert not result.errors


@pytest.mark.parametrize(("architecture", "reason"), [("bert", "an encoder"), ("t5", "an encoder-decoder")])
def test_encoder_is_refused_by_its_kind(architecture: str, reason: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    AutoConfig.for_model(architecture, vocab_size=32).save_pretrained(folder)
    finding = find(light(tmp_path, f"models.teacher={folder}"), "model-unsupported")
    assert finding.evidence.startswith(f"models.teacher: {folder} is a {architecture} model, {reason}")


def test_bfloat16_is_within_its_wider_bounds(tmp_path: Path) -> None:
    assert not examined(tmp_path, "models.dtype=bfloat16").errors


# Engines and servers ----------------------------------------------------------------------------------------------------


def test_missing_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.config.samplers.is_installed", lambda package: False)
    result = light(tmp_path, "compute.sampler=vllm")
    assert "pip install headwater[vllm]" in find(result, "engine-unusable").evidence


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("server-unusable", {"gone": True}, "returned no valid response in 1 try"),
        ("server-unusable", {"most": 3}, "greater than max allowed: 3"),
        ("server-disagrees", {"shifted": True}, "different ids for the same text"),
        ("server-context-too-short", {"longest": 40}, "takes sequences of 40 tokens"),
        (None, {}, ""),
    ],
)
def test_teacher_server_is_checked_like_model(
    name: str | None, fault: dict[str, Any], message: str, tmp_path: Path
) -> None:
    answering = Answering(
        load_policy(ModelFolder.open(TEACHER, "models.teacher"), LoadOptions(MODELS, torch.device("cpu"), frozen=True)),
        **fault,
    )
    changes = ("stages.warmup.dense.top_k=8", "stages.opd.dense.top_k=8", "compute.server.retries=0")
    with serving(answering) as there:
        url = "http://127.0.0.1:9/v1" if answering.gone else there.url
        result = light(tmp_path, f"models.teacher={url}", *changes, arms=("raw_teacher",))
    if name is None:
        assert not result.errors, result.text()
    else:
        assert message in find(result, name).evidence and "models.teacher" in find(result, name).evidence


def test_findings_and_docs_list_same_codes() -> None:
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8").partition("\n## Guards")[0]
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(finding_names())


def test_every_finding_is_planted_by_test() -> None:
    files = (ROOT / "tests").glob("*/doctor/test_*checks.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in sorted(finding_names()) if f'"{name}"' not in text] == []


def finding_names() -> set[str]:
    """The names that findings are made with: first arguments of Finding, error, warning and note."""
    names = {name for name, _ in UNREADABLE.values()}
    for file in (ROOT / "src" / "headwater" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "error", "warning", "note"):
                names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def test_doctor_tells_errors_last_and_same_finding_of_two_models_once() -> None:
    pads = [note("pad-is-eos", f"models.{role}: id 2 both pads and ends", "nothing") for role in ("student", "teacher")]
    others = [error("bad", "data.labeled: row 3", "mend it"), warning("odd", "models.teacher: id 9", "look"), *pads]
    result = Examination(told_once(others), ("data files", "memory"), ("lengths of completions",))
    assert result.text().splitlines() == [
        "note pad-is-eos: models.student and models.teacher: id 2 both pads and ends",
        "    -> nothing",
        "warning odd: models.teacher: id 9",
        "    -> look",
        "2 checks done (--verbose lists them)",
        "1 check not done, because of the errors below",
        "error bad: data.labeled: row 3",
        "    -> mend it",
    ]
    assert "2 checks done: data files, memory\n" in result.text(verbose=True)


def test_remedy_of_two_findings_of_one_name_is_printed_once() -> None:
    long = [
        note("lengths-not-judged", f"models.{role}: {count} of 4", "run it") for role, count in (("a", 4), ("b", 3))
    ]
    assert texts([long[0], note("other", "x", "y"), long[1]]) == [
        "note lengths-not-judged: models.a: 4 of 4",
        "note lengths-not-judged: models.b: 3 of 4\n    -> run it",
        "note other: x\n    -> y",
    ]
