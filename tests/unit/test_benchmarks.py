"""Benchmarks: summaries, output format, and Headwater's side of each workload on tiny models."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import __main__ as program
from benchmarks import child, limits, loss, other_tokenizers, real_pair, runner, sandbox, summary, third_claim
from benchmarks.cases import QWEN25, CannotRunError, Case, all_cases, select_cases
from benchmarks.models import parity
from benchmarks.results import fill
from benchmarks.table import cells
from headwater import stats
from headwater.models.shape import Shape
from headwater.runs.hardware import MODELS
from headwater.tasks import sums
from headwater.types import Problem
from tools.pretrain.pocket import make_tokenizer

STUDENT, TEACHER = "random:1x128:64", "random:2x128:64"
OPD = Case((("b", "opd"),), "opd", STUDENT, TEACHER, batch=4, prompt_tokens=3, new_tokens=5, steps=1)


def tiny(kind: Any, **fields: Any) -> Case:
    return replace(OPD, kind=kind, places=(("t", kind),), **fields)


def test_figures_are_medians_over_runs_and_every_run_is_kept() -> None:
    runs = [{"seconds": s, "peak_bytes": p, "loaded_bytes": 10.0} for s, p in ((3.0, 40.0), (1.0, 70.0), (2.0, 50.0))]
    summary_ = summary.over_runs(runs)
    assert (summary_["seconds"], summary_["peak_bytes"], summary_["growth_bytes"]) == (2.0, 50.0, 40.0)
    assert (summary_["each"], summary_["runs"]) == ([3.0, 1.0, 2.0], 3)


def test_tokens_per_second_are_reported_for_sampling_only_workloads() -> None:
    row = {"seconds": 4.0, "peak_bytes": 1.0, "loaded_bytes": 0.0, "tokens_sampled": 2048.0}
    assert summary.over_runs([row])["tokens_per_second"] == 512.0
    assert "tokens_per_second" not in summary.over_runs([row | {"seconds_sample": 1.0}])


def test_working_bytes_of_loss_stage_exclude_loaded_and_hidden_bytes() -> None:
    row = {"seconds": 1.0, "peak_bytes": 900.0, "loaded_bytes": 300.0, "hidden_bytes": 100.0}
    small = {"headwater": summary.over_runs([row]), "plain": summary.over_runs([row | {"peak_bytes": 2400.0}])}
    assert (small["headwater"]["working_bytes"], small["plain"]["working_bytes"]) == (500.0, 2000.0)
    large = {"headwater": small["headwater"] | {"working_bytes": 520.0}}
    assert summary.growth_of_loss({"loss_2k": small, "loss_16k": large}) == {"headwater": pytest.approx(0.04)}


def test_ratios_are_peer_figures_over_ours() -> None:
    peers = {
        "headwater": {"seconds": 2.0, "peak_bytes": 10.0},
        "trl": {"seconds": 7.0, "peak_bytes": 25.0},
        "vllm": {"skipped": "vllm is not installed"},
    }
    assert summary.ratios(peers) == {"trl": {"seconds": 3.5, "peak_bytes": 2.5}}
    assert summary.ratios({"trl": peers["trl"]}) == {}


def test_share_of_limit_is_least_time_over_measured_time() -> None:
    # 30 at 10 a second and 80 at 20 a second and 40 at 20 a second: 3 + 4 + 2 = 9 seconds at the least.
    gemm = {"decode": {"float32": 10.0}, "train": {"float32": 20.0}}
    work = {
        "sample": {"flops": 30.0, "gemm": "decode"},
        "score": {"flops": 80.0, "gemm": "train"},
        "update": {"flops": 40.0, "gemm": "train"},
    }
    least = summary.least_seconds(work, gemm)
    assert least == {"sample": 3.0, "score": 4.0, "update": 2.0}
    measured = {"seconds": 18.0, "seconds_sample": 6.0, "seconds_score": 2.0, "seconds_update": 10.0}
    got = summary.shares(measured, least)
    assert got == {"share": 0.5, "share_sample": 0.5, "share_training": 0.5, "score_of_step": pytest.approx(1 / 9)}


def test_step_work_is_one_sampling_one_scoring_and_three_forward_passes() -> None:
    parts = limits.parts_of(OPD)
    student, teacher, tokens = limits.shape_of(STUDENT), limits.shape_of(TEACHER), 4 * 8
    assert parts["sample"][3] == student.flops(tokens, 4.0) == parts["update"][3] / 3
    assert parts["score"][3] == teacher.flops(tokens, 4.0)
    # Products of one forward pass cover the shape's matrix parameters, two operations each a token.
    products = sum(times * 2.0 * n * a * b for n, a, b, times in limits.products(student, tokens))
    assert products == 2.0 * tokens * student.matrix_parameters
    assert limits.parts_of(tiny("grpo", teacher=None, group=2))["sample"][3] == student.flops(4 * 5 + 2 * 3, 4.0)


def test_qwen25_spec_has_published_shape() -> None:
    published = Shape.from_fields(MODELS["Qwen/Qwen2.5-0.5B-Instruct"])
    ours = limits.shape_of(QWEN25)
    assert ours.linears == published.linears and ours.vocabulary == published.vocabulary
    assert ours.parameters - published.parameters == 24 * 896  # a bias of the attention's output in each layer
    assert (ours.heads, ours.kv_heads, ours.key_dim) == (published.heads, published.kv_heads, published.key_dim)


@pytest.mark.parametrize("kind", ["opd", "grpo", "sampling"])
def test_step_of_qwen25_shape_runs_on_tiny_model(kind: str, tmp_path: Path) -> None:
    tiny_spec = "qwen2.5:2x128:96"
    case = next(case for case in all_cases() if case.name == f"real.{kind}")
    small = replace(case, student=tiny_spec, teacher=tiny_spec if case.teacher else None, batch=16, new_tokens=5)
    result = child.measure("headwater", small, tmp_path)
    assert result["tokens_sampled"] == 16 * 5 and result["seconds"] > 0


def test_gpu_cases_are_skipped_by_name_without_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for case in select_cases(["gpu"], all_cases()):
        with pytest.raises(CannotRunError, match="no GPU on this machine"):
            child.measure("headwater", case, tmp_path)


def test_limits_give_rate_for_every_shape_in_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.0005)
    monkeypatch.setattr(limits, "bandwidth", lambda: 1e10)
    measured = limits.measure([OPD, tiny("loss"), replace(OPD, places=(("a", "opd"),), endless=False)], tmp_path)
    assert set(measured["work"]) == {"b.opd"}
    assert {part["gemm"] for part in measured["work"]["b.opd"].values()} == set(measured["gemm"])
    assert all(rate > 1e6 for rates in measured["gemm"].values() for rate in rates.values())


def test_workloads_are_chosen_by_letter_or_case_and_unknown_ones_named() -> None:
    every = all_cases()
    assert len({case.name for case in every}) == len(every)
    assert {case.name for case in select_cases(["b"], every)} == {"b.opd", "b.grpo", "b.sampling"}
    assert "b.sampling" in {case.name for case in select_cases(["d"], every)}  # the same measurement stands in both
    assert [case.name for case in select_cases(["c.train"], every)] == ["c.train"]
    with pytest.raises(ValueError, match="no workload 'z'"):
        select_cases(["b", "z"], every)


def fake(peer: str, settings: dict[str, Any]) -> dict[str, Any]:
    if peer == "limits":
        return {"memory_bandwidth": 1e10, "threads": 1, "gemm": {"k": {"float32": 1e9}}, "work": {"b.opd": {
            "update": {"flops": 1e9, "gemm": "k"}}}}  # fmt: skip
    seconds = {"headwater": 2.0, "trl": 7.0}[peer]
    return {"seconds": seconds, "seconds_update": seconds, "peak_bytes": 1e6, "loaded_bytes": 4e5}


def test_peers_alternate_and_missing_ones_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def run(peer: str, settings: dict[str, Any]) -> dict[str, Any]:
        turns.append(peer)
        return fake(peer, settings)

    monkeypatch.setattr(runner, "run_in_process", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    measured = runner.measure(OPD, ["headwater", "trl"], 3, Path(), lambda line: None)
    assert turns == ["headwater", "trl"] * 3
    assert measured["trl"]["seconds"] == 7.0

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    turns.clear()
    measured = runner.measure(OPD, ["headwater", "trl"], 3, Path(), lambda line: None)
    assert turns == ["headwater"] * 3
    assert measured["trl"] == {"skipped": "trl is not installed"}
    assert cells(measured["trl"], {}) == ["trl is not installed"]


def test_failing_peer_is_skipped_after_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    turns: list[str] = []

    def run(peer: str, settings: dict[str, Any]) -> dict[str, Any]:
        turns.append(peer)
        return {"failed": "ValueError: head size 16"} if peer == "trl" else fake(peer, settings)

    monkeypatch.setattr(runner, "run_in_process", run)
    measured = runner.measure(OPD, ["headwater", "trl"], 2, Path(), lambda line: None)
    assert turns == ["headwater", "trl", "headwater"]
    assert measured["trl"] == {"failed": "ValueError: head size 16"}
    assert measured["headwater"]["runs"] == 2


def test_json_has_documented_shape_and_add_keeps_other_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(runner, "run_in_process", fake)
    out = tmp_path / "out.json"
    common = ["--peers", "trl", "--runs", "1", "--json", str(out), "--models", str(tmp_path / "models")]
    program.main(["--workloads", "b.opd", *common])
    read = json.loads(out.read_text(encoding="utf-8"))
    opd = read["workloads"]["b"]["opd"]
    assert opd["headwater"]["seconds"] == 2.0 and opd["headwater"]["peak_bytes"] == 1e6
    assert opd["ratio"]["trl"]["seconds"] == 3.5
    assert opd["headwater"]["share"] == 0.5  # 1 s at the least, 2 s taken
    assert read["limits"]["memory_bandwidth"] == 1e10

    program.main(["--workloads", "b.grpo", "--add", *common])
    read = json.loads(out.read_text(encoding="utf-8"))
    assert set(read["workloads"]["b"]) == {"opd", "grpo"}
    assert read["workloads"]["b"]["opd"] == opd


def test_unknown_peers_and_workloads_are_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--peers", "nobody"], ["--workloads", "z"], ["--runs", "0"]):
        with pytest.raises(SystemExit) as stopped:
            program.parse_options(wrong)
        assert stopped.value.code == 2
    assert "no workload 'z'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["opd", "grpo", "train", "sampling"])
def test_our_side_of_workload_processes_all_its_tokens(kind: Any, tmp_path: Path) -> None:
    more = {"teacher": None, "group": 4} if kind == "grpo" else {}
    case = tiny(kind, peers=("headwater",), **more)
    measured = child.measure("headwater", case, tmp_path)
    if kind != "train":
        assert measured["tokens_sampled"] == 4 * 5
    if kind in ("opd", "train"):
        assert measured["tokens_trained"] == 4 * 5
    parts = sum(measured.get(f"seconds_{part}", 0.0) for part in summary.PARTS)
    assert parts <= measured["seconds"]
    assert measured["peak_bytes"] >= measured["loaded_bytes"] > 1e7


def test_pocket_step_uses_problems_and_grader_of_recipe(tmp_path: Path) -> None:
    [grpo] = select_cases(["a.grpo"], all_cases())
    measured = child.measure("headwater", replace(grpo, batch=16, steps=1), tmp_path)
    assert 16 <= measured["tokens_sampled"] <= 16 * 48


def test_pocket_models_without_eos_sample_to_last_token(tmp_path: Path) -> None:
    [case] = select_cases(["d.pocket_student"], all_cases())
    measured = child.measure("headwater", replace(case, batch=4, new_tokens=40, steps=1), tmp_path)
    assert measured["tokens_sampled"] == 4 * 40


def test_loss_stage_equals_plain_form_in_loss_and_gradients() -> None:
    results = []
    for form in (loss.headwater, loss.plain):
        inputs = loss.inputs_of(tiny("loss", tokens=7), torch.device("cpu"), torch.float32)
        value = form(inputs)
        value.backward()
        results.append((value.detach(), inputs["student_hidden"].grad, inputs["student_head"].weight.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


def test_reward_without_task_is_parity_of_last_token() -> None:
    assert parity("t7 t12") and not parity("t12 t7") and parity("")


def test_sandbox_gradings_have_right_verdicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "STARTS", 2)
    sandbox.main(["--gradings", "13", "--workers", "1"])
    assert "gradings: 12 in " in capsys.readouterr().out
    pairs, reasons = sandbox.gradings(8)
    assert len(set(pairs)) == 8 and reasons.count("different") == 2
    monkeypatch.setattr(sandbox, "gradings", lambda count: (pairs, ["equal"] * 8))
    with pytest.raises(RuntimeError, match="1 of 7 verdicts are not the right ones"):
        sandbox.main(["--workers", "1"])


def trained_form(after: float, seed: int = 0) -> other_tokenizers.Trained:
    """Accuracies of 200 problems with 4 samples each for 3 seeds, around the given mean."""
    draw = np.random.default_rng(seed)
    before, after_SP = (draw.binomial(4, mean, (3, 200)) / 4 for mean in (0.1, after))
    return other_tokenizers.Trained(np.broadcast_to(before[:1], (3, 200)), after_SP, after_SP, 1e12)


def test_gain_recovered_across_tokenizers_is_ratio_with_interval() -> None:
    same, form = trained_form(0.7), trained_form(0.64, seed=1)
    share = other_tokenizers.recovered(form, same)
    before = same.before_SP.mean()
    assert share.mean == pytest.approx((form.after_SP.mean() - before) / (same.after_SP.mean() - before))
    assert share.low < share.mean < share.high and share.high - share.low < 0.3
    # The paired difference to a share within the interval is not shown to be other than 0, to one outside it is.
    mixed = {
        share_: (1 - share_) * same.before_SP + share_ * same.after_SP
        for share_ in (share.high - 0.01, share.high + 0.01)
    }
    inside, outside = (stats.contrast(form.after_SP, values) for values in mixed.values())
    assert inside.high > 0 > outside.high
    itself = other_tokenizers.recovered(same, same)
    assert (itself.mean, itself.low, itself.high) == pytest.approx((1.0, 1.0, 1.0), abs=0.02)


def test_table_of_forms_names_gain_of_each() -> None:
    text = other_tokenizers.markdown({"same": trained_form(0.7), "prefix": trained_form(0.64, seed=1)})
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith("| `same` |") and "| – | – |" in rows[0]
    share = other_tokenizers.recovered(trained_form(0.64, seed=1), trained_form(0.7))
    assert f"| {100 * share.mean:.1f} [" in rows[1] and text.rstrip().endswith("3 seeds, 200 problems.")


def test_steps_of_pair_with_two_tokenizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Headwater's side of workload `gold`, on pocket models: it trains, and both KLs are of the same texts."""
    shipped = Path(str(files("headwater"))) / "pocket"
    shutil.copytree(shipped / "qwen3-teacher", tmp_path / "teacher")
    make_tokenizer("pairs").save_pretrained(tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    rows = len(make_tokenizer("pairs"))
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][torch.arange(rows) % 28].clone()
    save_file(weights, tmp_path / "teacher/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    (tmp_path / "teacher/config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    folders = {"real:s": str(shipped / "qwen3-student"), "real:t": str(tmp_path / "teacher")}
    monkeypatch.setattr(real_pair, "folder_of", folders.__getitem__)
    monkeypatch.setattr(
        real_pair,
        "problems_of",
        lambda count, pool: [Problem.of(text, pool) for text, _ in sums.generate(count, pool, 0)],
    )
    case = Case((("gold", "opd"),), "pair", "real:s", "real:t", batch=4, new_tokens=8, steps=2, endless=False)
    work = real_pair.work_of("headwater", case)
    rows_of_steps = work(case.repetitions)
    assert len(rows_of_steps) == 3 and all(row["tokens_trained"] > 0 for row in rows_of_steps)
    figures = work.held_out()
    assert figures["kl_before"] > 0.1 and figures["kl_after"] != figures["kl_before"]


def test_map_of_third_claim_shows_finished_cells_alone(tmp_path: Path) -> None:
    contrast = {"difference": 0.05, "low": 0.03, "high": 0.07, "p": 0.001, "eval": "skills"}
    report = {
        "evals": ["skills"],
        "contrasts": [{**contrast, "a": a, "b": b, "reading": "above"} for a, b in third_claim.PAIRS],
        "predictions": [{"name": "P3", "reading": "holds"}],
        "arms": {"bridge_1h": {"accuracy": {"skills": {"mean": 0.5}}}},
    }
    for cell, contrasts in ((third_claim.CELLS[0], report["contrasts"]), (third_claim.CELLS[1], [])):
        (tmp_path / cell.folder).mkdir()
        (tmp_path / cell.folder / "report.json").write_text(json.dumps({**report, "contrasts": contrasts}))
    reports = third_claim.finished(tmp_path)
    assert list(reports) == [third_claim.CELLS[0]]
    row = third_claim.markdown(reports).splitlines()[-1]
    assert row.startswith("| 96 | 128 | 49 % | plain | 50.0 | +5.0 [+3.0, +7.0]") and row.endswith("| holds |")


def test_fill_names_block_with_fewer_rows(tmp_path: Path) -> None:
    page, runs = tmp_path / "results.md", tmp_path / "runs"
    (runs / "main").mkdir(parents=True)
    (runs / "main" / "table.md").write_text("| arm |\n|---|\n| a |", encoding="utf-8")
    page.write_text(
        "<!-- main:table -->\n| arm |\n|---|\n| a |\n| b |\n<!-- end -->\n<!-- absent:table -->\n<!-- end -->",
        encoding="utf-8",
    )
    assert fill(page, runs) == (["absent"], ["main:table (4 lines of the table before, 3 now)"])
    assert "| b |" not in page.read_text(encoding="utf-8")
    assert fill(page, runs) == (["absent"], [])
