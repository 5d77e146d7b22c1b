"""Whole studies: files of a run directory, ledger, labels, report, shared nodes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.config.arms import PAPER_ARMS as ARMS
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Models
from headwater.config.stage import Sampling
from headwater.data.sources import load
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.pipeline import environment
from headwater.runs.inputs import RunInputs
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import problem_id
from runs import all_arms, infos, load_json, node, node_names, nodes, rows, tiny


def objective(info: dict) -> str:  # type: ignore[type-arg]
    return str(info["settings"]["objective"])


def steps_of(path: Path) -> list[tuple[dict, list[dict]]]:  # type: ignore[type-arg]
    """(ledger row, rollouts) of every training step of a node."""
    spends = [row for row in rows(path / "ledger.jsonl") if row["purpose"] == "train"]
    return [(row, rows(path / "rollouts" / f"{row['step']:06d}.jsonl")) for row in spends]


# What a run directory holds -------------------------------------------------------------------------------------------


def test_run_directory_has_documented_files() -> None:
    out = all_arms()
    assert {path.name for path in out.iterdir()} >= {
        "recipe.json", "env.json", "plan.json", "ledger.jsonl", "nodes", "report.json", "report.html",
    }  # fmt: skip
    wanted = {
        "evaluate": {"node.json", "ledger.jsonl", "evals", "DONE"},
        "rollouts": {"node.json", "ledger.jsonl", "cache", "DONE"},
        "train": {
            "node.json", "metrics.jsonl", "ledger.jsonl", "sums.jsonl", "rollouts", "evals", "checkpoint", "model", "DONE",
        },
    }  # fmt: skip
    for path, info in infos(out):
        taught = info["kind"] == "train" and info["role"] == "student" and objective(info) not in ("grpo", "constant")
        beside = {"conditions.jsonl"} if taught else set()  # how far the student stands from its teacher
        assert {file.name for file in path.iterdir()} == wanted[info["kind"]] | beside, path.name
        assert load_json(path / "DONE")["fingerprint"] == info["fingerprint"]


def test_recipe_json_is_resolved_recipe() -> None:
    recipe = load_json(all_arms() / "recipe.json")
    assert recipe["stages"]["opd"]["steps"] == 2 and recipe["labels"]["budget"] == 16
    assert recipe["stages"]["opd"]["optim"]["beta2"] == 0.999  # a default that nobody wrote
    assert find_recipe("pocket", []).model_dump(mode="json").keys() == recipe.keys()


def test_env_json_has_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    written = json.dumps(environment(torch.device("cpu")))
    assert torch.__version__ in written and "hf_secret" not in written


def test_metrics_rows_have_documented_keys_and_steps_from_one() -> None:
    wanted = {
        "step", "loss", "grad_norm", "seconds", "seconds_sample", "seconds_score", "seconds_update",
        "tokens_sampled", "tokens_trained", "tokens_teacher_scored",
    }  # fmt: skip
    longer = [node(all_arms(), arm, "student_rl") for arm in ("direct_grpo_compute", "opd_then_rl_compute")]
    for path, info in infos(all_arms()):
        if info["kind"] != "train":
            continue
        metrics = rows(path / "metrics.jsonl")
        assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
        assert len(metrics) == 2 or path in longer
        for row in metrics:
            assert wanted <= row.keys(), path.name
            parts = row["seconds_sample"] + row["seconds_score"] + row["seconds_update"]
            assert 0 < parts <= row["seconds"] * 1.01


def test_metrics_depend_on_objective() -> None:
    out = all_arms()
    measured = {
        "teacher_rl": {"reward", "informative", "entropy", "truncated", "sampler_gap"},
        "warmup": {"kl_teacher_student", "kl_student_teacher", "entropy", "truncated"},
        "opd": {"kl_teacher_student", "kl_student_teacher", "entropy", "truncated", "sampler_gap"},
    }
    for stage, wanted in measured.items():
        for row in rows(node(out, "bridge", stage) / "metrics.jsonl"):
            assert wanted <= row.keys()
    for row in rows(node(out, "bridge", "opd") / "metrics.jsonl"):
        assert row["sampler_gap"] < 1e-4  # what samples and what trains are the same model
        assert row["loss"] == pytest.approx(row["kl_student_teacher"], rel=1e-4)  # OPD's loss is that divergence


def test_report_json_has_documented_shape() -> None:
    report = load_json(all_arms() / "report.json")
    assert {"recipe", "seeds", "arms", "contrasts", "conditions"} <= report.keys()
    assert (report["recipe"], report["seeds"]) == ("pocket", [0])
    assert set(report["arms"]) == {"base_student", "base_teacher", *ARMS}
    for arm in report["arms"].values():
        assert arm["accuracy"]["sums"].keys() == {"mean", "low", "high", "per_seed"}
        assert 0 <= arm["accuracy"]["sums"]["low"] <= arm["accuracy"]["sums"]["mean"] <= arm["accuracy"]["sums"]["high"]
        assert arm["labels"].keys() == {"distinct", "checks"}
        assert arm["tokens"].keys() == {"sampled", "trained", "teacher_scored"}
        assert isinstance(arm["flops"], (int, float)) and isinstance(arm["seconds"], (int, float))
    for contrast in report["contrasts"]:
        assert {"a", "b", "eval", "difference", "low", "high", "p"} <= contrast.keys()
    assert report["conditions"].keys() == {"C1", "C2"}


# Arms and what they share ---------------------------------------------------------------------------------------------


def test_study_of_all_arms_runs_every_shared_node_once() -> None:
    out = all_arms()
    stages = Counter(info["stage"] for _, info in infos(out))
    # Teachers: RL on all, on 1H, then on 2H; caches: raw, RL'd on all, on 1H, on 1H+2H, fine-tuned, and the expert's.
    # OPD: after each of the five warm-ups, without one from the RL'd and from the raw teacher; constant advantage with and
    # without a warm-up, forward KL, the mixture. Student RL: cold, on 2H, on 1H again, after OPD; two at equal compute.
    assert stages == {
        "base_student": 1, "base_teacher": 1, "teacher_rl": 3, "teacher_rollouts": 6, "sft": 2, "warmup": 5, "opd": 11,
        "student_rl": 6,
    }  # fmt: skip
    teacher = node(out, "bridge", "teacher_rl")
    assert all(node(out, arm, "teacher_rl") == teacher for arm in ("opd_only", "warmup_only", "teacher_sft"))
    half = node(out, "bridge_rl", "teacher_rl")
    assert node(out, "replay", "teacher_rl") == half == nodes(out, "teacher_2h")[0] != teacher
    assert sum(row["purpose"] == "train" for row in rows(teacher / "ledger.jsonl")) == 2  # its two steps, once


def test_teacher_fine_tuning_reads_expert_rollouts() -> None:
    cache = nodes(all_arms(), "sft_teacher")[0]
    expert = ModelFolder.open("pocket:qwen3-teacher-large", "models.expert").fingerprint
    assert {row["sampler"] for row in rows(cache / "cache" / "rollouts.jsonl")} == {expert}


def test_raw_teacher_arm_uses_no_label() -> None:
    report = load_json(all_arms() / "report.json")
    assert report["arms"]["raw_teacher"]["labels"] == {"distinct": 0, "checks": 0}
    spends = [row for path in nodes(all_arms(), "raw_teacher") for row in rows(path / "ledger.jsonl")]
    assert all(row["purpose"] == "eval" for row in spends if row["labels"] or row["checks"])


def test_stage_three_uses_fresh_labels_and_replay_teacher_labels() -> None:
    out = all_arms()

    def looked_at(path: Path) -> set[str]:
        return {label for row, _ in steps_of(path) for label in row["labels"]}

    teacher = looked_at(node(out, "bridge_rl", "teacher_rl"))
    assert len(teacher) == 8  # the whole first half
    assert looked_at(node(out, "replay", "student_rl")) == teacher
    fresh = looked_at(node(out, "bridge_rl", "student_rl"))
    assert len(fresh) == 8 and not fresh & teacher
    assert looked_at(nodes(out, "teacher_2h")[1]) == fresh
    # Both controls take as many steps, rollouts and checks.
    for arm in ("bridge_rl", "replay"):
        spent = [(row["step"], row["checks"]) for row, _ in steps_of(node(out, arm, "student_rl"))]
        assert spent == [(1, 16), (2, 16)]


def test_no_arm_uses_more_labels_than_budget() -> None:
    out = all_arms()
    for arm in ARMS:
        spends = [row for path in nodes(out, arm) for row in rows(path / "ledger.jsonl") if row["purpose"] == "train"]
        looked_at = {label for row in spends for label in row["labels"]}
        assert len(looked_at) <= 16
        assert load_json(out / "report.json")["arms"][arm]["labels"]["distinct"] == len(looked_at)


def test_half_split_is_disjoint_by_content_in_any_file_order(tmp_path: Path) -> None:
    texts = [f"{a:02d}+{b:02d}" for a in range(6) for b in range(6)]
    lines = [{"problem": text, "answer": "1"} for text in texts]
    lines += [{"problem": f" {texts[3]} ", "answer": "1"}, {"problem": texts[7], "answer": "1"}]  # seen twice

    def halves(rows_: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        path = tmp_path / "labeled.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_), encoding="utf-8")
        recipe = find_recipe("pocket", [f"data.labeled={path}", "labels.budget=24"])
        pools = RunInputs(recipe).pools
        assert len(pools.all) == 24 == len(set(pools.all))
        return set(pools.first_half), set(pools.second_half)

    first, second = halves(lines)
    assert len(first) == len(second) == 12 and not first & second
    assert first | second <= {problem_id(text) for text in texts}
    assert halves(lines[::-1]) == (first, second)


def test_leaked_training_problem_is_excluded_with_warning(tmp_path: Path) -> None:
    test = find_recipe("pocket", ["data.evals.sums.generate.count=5"])
    leaked = load(test.data.evals["sums"], "x", need_answers=True).problems[0].text
    path = tmp_path / "labeled.jsonl"
    pairs = [(leaked, "00"), *((f"{a:02d}+07+11+90", "00") for a in range(24))]
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs), encoding="utf-8")
    result = tiny("run", tmp_path / "out", "--arm", "direct_grpo", changes=[f"data.labeled={path}", "labels.budget=24"])
    assert result.code == 0
    (warning,) = [line for line in result.err.splitlines() if "data.labeled: " in line]
    assert warning[9:].startswith("warning evaluation-leak: data.labeled: 1 problems are also in data.evals.sums")
    assert "left out" in warning
    seen = {row["problem_id"] for row in rows(next((tmp_path / "out/nodes").glob("student_rl*/rollouts/000001.jsonl")))}
    assert problem_id(leaked) not in seen


# The ledger against independent counts --------------------------------------------------------------------------------


def test_ledger_of_every_step_agrees_with_its_rollouts() -> None:
    counted: Counter[str] = Counter()
    for path, info in infos(all_arms()):
        if info["kind"] != "train":
            continue
        for spend, texts in steps_of(path):
            tokens = sum(row["tokens"] for row in texts)
            assert spend["tokens_sampled"] == (0 if objective(info) in ("forward_kl", "sft") else tokens)
            assert spend["tokens_teacher_scored"] == (tokens if objective(info) in ("opd", "mixed") else 0)
            if objective(info) in ("grpo", "mixed"):
                assert set(spend["labels"]) == {row["problem_id"] for row in texts}
                assert spend["checks"] == len(texts) == info["settings"]["batch_size"]
                if objective(info) == "grpo":  # a rollout without advantage is not run: it has no gradient
                    tokens = sum(row["tokens"] for row in texts if row["advantage"] != 0.0)
            else:
                assert spend["labels"] == [] and spend["checks"] == 0
                assert all("correct" not in row for row in texts)
            assert spend["tokens_trained"] == tokens
        counted[objective(info)] += 1
    # Teacher and student RL; fine-tunings; warm-ups; OPD but for its two constant and its one mixed form.
    assert counted == {"grpo": 3 + 6, "sft": 2, "forward_kl": 5, "opd": 11 - 3, "constant": 2, "mixed": 1}


def test_ledger_and_metrics_of_every_step_agree() -> None:
    for path, info in infos(all_arms()):
        if info["kind"] == "train":
            for (spend, _), metrics in zip(steps_of(path), rows(path / "metrics.jsonl"), strict=True):
                for key in ("step", "tokens_sampled", "tokens_trained", "tokens_teacher_scored", "seconds"):
                    assert spend[key] == metrics[key]


def test_cache_node_is_charged_once_for_its_tokens_and_no_label() -> None:
    out = all_arms()
    for path, info in infos(out):
        if info["kind"] == "rollouts":
            (spend,) = rows(path / "ledger.jsonl")
            tokens = sum(len(row["completion_ids"]) for row in rows(path / "cache" / "rollouts.jsonl"))
            assert spend["tokens_sampled"] == spend["tokens_teacher_scored"] == tokens
            assert (spend["labels"], spend["checks"], spend["tokens_trained"]) == ([], 0, 0)


def test_evaluation_labels_are_counted_apart_from_training_labels() -> None:
    out = all_arms()
    evaluated = {problem["problem_id"] for problem in rows(node(out, "bridge", "opd") / "evals/final/sums.jsonl")}
    for path, info in infos(out):
        if info["kind"] == "rollouts":
            continue
        (spend,) = [row for row in rows(path / "ledger.jsonl") if row["purpose"] == "eval"]
        texts = rows(path / "evals" / "final" / "sums.jsonl")
        assert spend["checks"] == len(texts) == 10
        assert set(spend["labels"]) == evaluated and len(evaluated) == 5
        assert spend["tokens_sampled"] == sum(row["tokens"] for row in texts)
        trained = {label for row in rows(path / "ledger.jsonl") if row["purpose"] == "train" for label in row["labels"]}
        assert not trained & evaluated
    report = load_json(out / "report.json")["arms"]
    assert report["base_student"]["labels"] == {"distinct": 0, "checks": 0}


def test_report_totals_sum_over_nodes_with_each_label_once() -> None:
    out = all_arms()
    report = load_json(out / "report.json")["arms"]
    for arm in ARMS:
        spends = [row for path in nodes(out, arm) for row in rows(path / "ledger.jsonl") if row["purpose"] == "train"]
        assert report[arm]["tokens"]["sampled"] == sum(row["tokens_sampled"] for row in spends)
        assert report[arm]["tokens"]["trained"] == sum(row["tokens_trained"] for row in spends)
        assert report[arm]["tokens"]["teacher_scored"] == sum(row["tokens_teacher_scored"] for row in spends)
        assert report[arm]["labels"]["checks"] == sum(row["checks"] for row in spends)
        assert report[arm]["labels"]["distinct"] == len({label for row in spends for label in row["labels"]})
        assert report[arm]["flops"] == pytest.approx(sum(row["flops"] for row in spends), rel=1e-6)
    # Replay looks at the same 8 labels twice: 8 distinct, 64 checks.
    assert report["replay"]["labels"] == {"distinct": 8, "checks": 64}
    assert report["bridge_rl"]["labels"] == {"distinct": 16, "checks": 64}


def test_run_ledger_joins_node_ledgers() -> None:
    out = all_arms()
    parts = [row for path, _ in infos(out) for row in rows(path / "ledger.jsonl")]
    assert rows(out / "ledger.jsonl") == parts
    assert {row["node"] for row in parts} == {path.name for path, _ in infos(out)}


# Models ---------------------------------------------------------------------------------------------------------------


def test_trained_model_folder_has_weights_of_last_checkpoint() -> None:
    for path in nodes(all_arms(), "bridge_rl"):
        if not (path / "model").exists():
            continue
        names = {file.name for file in (path / "model").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
        saved = load_file(path / "model/model.safetensors")
        last = load_file(path / "checkpoint/000002/model.safetensors")
        assert saved.keys() ^ last.keys() <= {"model.embed_tokens.weight", "lm_head.weight"}  # tied: one of the names
        assert len(saved.keys() & last.keys()) > 10
        assert all(torch.equal(saved[name], last[name]) for name in saved.keys() & last.keys())


def test_transformers_gives_log_probs_of_trained_model() -> None:
    folder = node(all_arms(), "bridge", "opd") / "model"
    ours = load_policy(
        ModelFolder.open(str(folder), "x"),
        LoadOptions(Models(student="s", teacher="t"), torch.device("cpu"), frozen=True),
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "17+45+82+03"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    wanted = requests_for([("p", prompt)], 3, "draw")
    for rollout in TorchSampler(ours).sample(wanted, Sampling(max_tokens=24)):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logp = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert torch.allclose(logp, logp_of(ours, [rollout], 4096)[0], atol=1e-5)
        assert torch.allclose(logp, torch.tensor(rollout.sampler_logp), atol=1e-4)


def test_model_card_names_base_model_and_labels_used() -> None:
    out = all_arms()
    card = (node(out, "bridge", "opd") / "model/README.md").read_text(encoding="utf-8")
    assert node(out, "bridge", "warmup").name in card and "objective `opd`" in card and "may use: 0" in card
    card = (node(out, "bridge_rl", "student_rl") / "model/README.md").read_text(encoding="utf-8")
    assert "may use: 8" in card


# A folder that grows --------------------------------------------------------------------------------------------------


def test_added_arms_and_seeds_reuse_finished_nodes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "warmup_only").code == 0
    first = {path.name: (path / "DONE").stat().st_mtime_ns for path, _ in infos(out)}
    assert tiny("study", out, "--arms", "warmup_only,bridge", "--seeds", "0,1").code == 0
    assert {name: (out / "nodes" / name / "DONE").stat().st_mtime_ns for name in first} == first
    report = load_json(out / "report.json")
    assert set(report["arms"]) == {"base_student", "base_teacher", "warmup_only", "bridge"}
    assert report["seeds"] == [0, 1]
    assert node_names(out, "bridge")[:3] == node_names(out, "warmup_only")
    # An arm asked for later on its own leaves those of before in the plan and in the report.
    assert tiny("run", out, "--arm", "opd_only", "--seed", "1").code == 0
    report = load_json(out / "report.json")
    assert set(report["arms"]) == {"base_student", "base_teacher", "warmup_only", "bridge", "opd_only"}
    assert report["arms"]["opd_only"]["accuracy"]["sums"]["per_seed"].keys() == {"1"}
    assert report["arms"]["bridge"]["accuracy"]["sums"]["per_seed"].keys() == {"0", "1"}


def test_corrected_answer_reruns_nodes_using_it(tmp_path: Path) -> None:
    path, out = tmp_path / "labeled.jsonl", tmp_path / "out"
    pairs = [(f"{a:02d}+07+11+90", f"{(a + 8) % 100:02d}") for a in range(16)]
    changes = [f"data.labeled={path}"]

    def run() -> set[str]:
        path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs), encoding="utf-8")
        assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
        return set(node_names(out, "direct_grpo"))

    before = run()
    assert run() == before
    pairs[3] = (pairs[3][0], "99")
    assert not run() & before


def test_compute_and_guards_may_change_on_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo", changes=["guards.patience=1"]).code == 0
    done = {path.name: (path / "DONE").stat().st_mtime_ns for path, _ in infos(out)}
    assert tiny("run", out, "--arm", "direct_grpo", changes=["guards.patience=2", "compute.sample_batch=7"]).code == 0
    assert {path.name: (path / "DONE").stat().st_mtime_ns for path, _ in infos(out)} == done
    assert load_json(out / "recipe.json")["compute"]["sample_batch"] == 7
