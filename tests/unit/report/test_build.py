"""report.json: values equal counts from the run's files."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_runs import ARMS, BASE_S, PROBLEMS, by_problem, fake_run, graded, names, printed
from headwater.errors import UserError
from headwater.report import build as report
from headwater.report import contrasts, html_arms, html_stages
from headwater.report.study import Node
from headwater.storage.files import append_jsonl
from headwater.storage.node_dir import NodeDir


@pytest.mark.parametrize("arm", list(ARMS))
def test_accuracy_pass_at_k_and_maj_at_k_equal_counts_from_files(
    fake_study: Path, fake_report: dict[str, Any], arm: str
) -> None:
    got = fake_report["arms"][arm]
    for seed in (0, 1, 2):
        rows = graded(fake_study, arm, seed)
        right = by_problem(rows, "correct")
        mean = sum(row["correct"] for row in rows) / len(rows)
        assert got["accuracy"]["sums"]["per_seed"][str(seed)] == pytest.approx(mean, abs=1e-6)
        # pass@2 by the share of pairs: 1 - C(wrong, 2)/C(4, 2); pass@4 by "any".
        pairs = [1 - math.comb(4 - sum(c), 2) / 6 for c in right.values()]
        assert got["pass_at_k"]["sums"]["2"]["per_seed"][str(seed)] == pytest.approx(sum(pairs) / PROBLEMS, abs=1e-6)
        best = sum(any(c) for c in right.values()) / PROBLEMS
        assert got["pass_at_k"]["sums"]["4"]["per_seed"][str(seed)] == pytest.approx(best, abs=1e-6)
        votes = []
        for problem, answers in by_problem(rows, "extracted").items():
            top = max(answers.count(a) for a in answers)
            tied = {a for a in answers if answers.count(a) == top}
            assert problem in right
            votes.append((("44" in tied) / len(tied)) if set(answers) != {None} else 0.0)
        assert got["maj_at_k"]["sums"]["per_seed"][str(seed)] == pytest.approx(sum(votes) / PROBLEMS, abs=1e-6)
    means = list(got["accuracy"]["sums"]["per_seed"].values())
    assert got["accuracy"]["sums"]["mean"] == pytest.approx(sum(means) / 3, abs=2e-6)
    assert got["accuracy"]["sums"]["low"] < got["accuracy"]["sums"]["mean"] < got["accuracy"]["sums"]["high"]
    assert list(got["pass_at_k"]["sums"]) == ["1", "2", "4"]


def test_costs_sum_all_nodes_and_keep_evaluation_apart(fake_report: dict[str, Any]) -> None:
    # 12 steps; step s trains 640+s tokens: 12·640 + 78 = 7758 a trained node; 64 checks and 8 labels a sparse step.
    bridge = fake_report["arms"]["bridge"]
    assert bridge["tokens"] == {
        "sampled": 12 * 2000 + 5000 + 12 * 2000,  # teacher RL, teacher rollouts, OPD
        "trained": 3 * 7758,
        "teacher_scored": 2 * 12 * 1900,  # warm-up and OPD
    }
    assert bridge["flops"] == 3 * 12 * 1.5e9 + 2e9
    assert bridge["seconds"] == 3 * 12 * 0.5 + 3.25
    # Steps 1..12 use 8 each of 128, from 8·step on: 96 different ones. Of 64, all 64.
    assert bridge["labels"] == {"distinct": 96, "checks": 768}
    assert fake_report["arms"]["bridge_rl"]["labels"] == {"distinct": 128, "checks": 1536}
    assert fake_report["arms"]["replay"]["labels"] == {"distinct": 64, "checks": 1536}
    assert fake_report["arms"]["raw_teacher"]["labels"] == {"distinct": 0, "checks": 0}
    # Five nodes, each evaluated once on the same 60 problems.
    assert bridge["apart"]["eval"]["labels"] == {"distinct": 60, "checks": 5 * 240}
    # Warm-up and OPD measure the conditions at steps 0, 5, 10 and 12, for 500 tokens and 1e8 FLOPs each.
    measured = bridge["apart"]["measure"]
    assert (measured["labels"], measured["flops"]) == ({"distinct": 0, "checks": 0}, 8e8)
    assert measured["tokens"] == {"sampled": 8 * 500, "teacher_scored": 0}
    assert bridge["apart"]["validation"]["labels"] == {"distinct": 0, "checks": 0}


def test_arms_are_in_table_order_with_their_stages(fake_report: dict[str, Any]) -> None:
    order = [
        "base_student",
        "base_teacher",
        "direct_grpo",
        "raw_teacher",
        "bridge",
        "bridge_rl",
        "replay",
        "warmup_only",
    ]
    assert list(fake_report["arms"]) == order
    stages = fake_report["arms"]["bridge_rl"]["stages"]
    assert [row["stage"] for row in stages] == [
        "base_student",
        "teacher_rl",
        "teacher_rollouts",
        "warmup",
        "opd",
        "student_rl",
    ]
    assert [row["pool"] for row in stages] == [None, "first_half", None, None, None, "second_half"]
    assert stages[2]["accuracy"] == {} and stages[4]["accuracy"]["sums"]["mean"] > 0
    assert stages[1]["labels"] == {"distinct": 64, "checks": 768}


def test_conditions_c1_and_c2_equal_node_measurements(fake_study: Path, fake_report: dict[str, Any]) -> None:
    c1, c2 = fake_report["conditions"]["C1"]["sums"], fake_report["conditions"]["C2"]
    before = by_problem(graded(fake_study, "base_teacher", 0), "correct")
    assert c1["before"]["best_of_k"] == pytest.approx(sum(map(any, before.values())) / PROBLEMS, abs=1e-6)
    assert {row["pool"] for row in c1["after"]} == {"all", "first_half"}
    after = next(row for row in c1["after"] if row["pool"] == "all")
    assert after["arms"] == ["bridge", "warmup_only"]
    assert after["reached"] == pytest.approx(after["accuracy"] / c1["before"]["best_of_k"], abs=1e-5)
    before_rl, after_rl = after["training"]["reward"]["first"], after["training"]["reward"]["last"]
    rows = [_metrics(fake_study, "bridge", seed, 1) for seed in (0, 1, 2)]
    assert before_rl == pytest.approx(sum(row[0]["reward"] for row in rows) / 3, abs=2e-6)
    assert after_rl == pytest.approx(sum(row[-1]["reward"] for row in rows) / 3, abs=2e-6)
    held_out = [
        _rows(fake_study / "nodes" / names(fake_study, "bridge", seed)[-1] / "conditions.jsonl") for seed in (0, 1, 2)
    ]
    opd = c2["bridge"]["opd"]
    assert opd["prompts"] == "held out"
    for key in ("kl_teacher_student", "overlap_student_prefixes"):
        ends = [sum(row[at][key] for row in held_out) / 3 for at in (0, -1)]
        assert (opd[key]["first"], opd[key]["last"]) == pytest.approx(ends, abs=2e-6)
    assert "base_student" not in c2 and "direct_grpo" not in c2


def test_c1_figure_has_teacher_before_and_after_each_stage(fake_report: dict[str, Any]) -> None:
    teachers = fake_report["conditions"]["C1"]["sums"]
    plot = html_stages.c1_figure("sums", teachers)
    header, before, *after = plot.rows
    assert plot.name == "c1-sums" and header == ("teacher", "accuracy", "best_of_k", "k")
    assert before == ("before training", teachers["before"]["accuracy"], teachers["before"]["best_of_k"], 4)
    assert [row[1:] for row in after] == [(row["accuracy"], row["best_of_k"], 4) for row in teachers["after"]]
    assert (
        f"before training {100 * before[1]:.1f} and {100 * before[2]:.1f} (k=4); after Teacher RL" in plot.description
    )


def test_c2_falls_back_to_training_prompts_without_held_out_measurements(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,))
    for file in out.glob("nodes/*/conditions.jsonl"):
        file.unlink()
    opd, rows = report.build([out])["conditions"]["C2"]["bridge"]["opd"], _metrics(out, "bridge", 0, -1)
    assert opd["prompts"] == "training"
    ends = (rows[0]["kl_student_teacher"], rows[-1]["kl_student_teacher"])
    assert (opd["kl_student_teacher"]["first"], opd["kl_student_teacher"]["last"]) == pytest.approx(ends, abs=1e-6)


def test_shared_stages_have_one_row_with_their_arms_and_curves(fake_study: Path, fake_report: dict[str, Any]) -> None:
    shared = [row for row in fake_report["stages"] if row["arms"] == ["bridge_rl", "replay"]]
    assert [(row["stage"], row["pool"]) for row in shared] == [
        ("teacher_rl", "first_half"),
        ("teacher_rollouts", None),
        ("warmup", None),
        ("opd", None),
    ]
    teacher, opd = shared[0], shared[3]
    metrics = [_metrics(fake_study, "replay", seed, 1) for seed in (0, 1, 2)]
    assert teacher["through"]["best_of_group"]["steps"] == list(range(1, 13))
    means = [sum(row[place]["best_of_group"] for row in metrics) / 3 for place in range(12)]
    assert teacher["through"]["best_of_group"]["values"] == pytest.approx(means, abs=2e-6)
    shares = [row["informative"] for seed_rows in metrics for row in seed_rows]
    assert teacher["informative"] == pytest.approx(sum(shares) / 36, abs=2e-6)
    assert opd["conditions_through"]["entropy_student"]["steps"] == [0, 5, 10, 12]
    assert "reward" not in opd["through"] and opd["informative"] is None
    # The same stage within an arm has the same values, without the curves; pass@4 is "any of four", pass@1 the accuracy.
    own = fake_report["arms"]["replay"]["stages"][4]
    assert own == {key: opd[key] for key in own} and "through" not in own
    assert own["pass_at_k"]["sums"]["1"] == pytest.approx(own["accuracy"]["sums"]["mean"], abs=2e-6)


def test_long_curves_are_thinned_and_keep_last_step(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo")}
    values = report.build([fake_run(tmp_path / "out", seeds=(0,), arms=arms, steps=250)])
    steps = next(row for row in values["stages"] if row["stage"] == "student_rl")["through"]["reward"]["steps"]
    assert steps == [*range(1, 251, 3)] and steps[-1] == 250


def test_early_stopped_stage_reports_step_and_reason(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "warmup_only")}
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms=arms)
    ended, node = {"step": 7, "of": 12, "why": "plateau of kl_teacher_student"}, names(out, "warmup_only", 1)[-1]
    (out / "nodes" / node / "DONE").write_text(json.dumps({"fingerprint": node, "ended": ended}))
    values = report.build([out])
    assert values["arms"]["warmup_only"]["stages"][-1]["ended"] == {"1": ended}
    section = html_stages.stages(values)
    assert section is not None
    text = "Warm-up of warmup_only ended on seed 1 after 7 of 12 steps: plateau of kl_teacher_student."
    assert section.view["ended_early"] == [text]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _metrics(out: Path, arm: str, seed: int, place: int) -> list[dict[str, Any]]:
    return _rows(out / "nodes" / names(out, arm, seed)[place] / "metrics.jsonl")


def test_missing_measurements_are_null(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo")}
    values = report.write(fake_run(tmp_path / "out", arms=arms, metrics=False))
    # The evaluations' rows of the teacher are not there, and no stage wrote metrics.
    assert values["conditions"] == {"C1": None, "C2": None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Training curves" not in page and "Conditions" not in page


def test_unfinished_arm_is_listed_and_has_no_accuracy(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out")
    plan = json.loads((out / "plan.json").read_text())["arms"]
    for seed in ("0", "1", "2"):
        (out / "nodes" / plan["replay"][seed][-1] / "DONE").unlink()
    (out / "nodes" / plan["bridge"]["1"][-1] / "DONE").unlink()
    for file in (out / "nodes" / plan["warmup_only"]["2"][-1]).rglob("*"):
        if file.is_file():
            file.unlink()
    values = report.build([out])
    replay, bridge = values["arms"]["replay"], values["arms"]["bridge"]
    assert replay["accuracy"] == {} and set(replay["unfinished"]) == {"0", "1", "2"}
    assert replay["labels"]["checks"] == 1536  # costs so far are kept
    # The warm-up of seed 2 is the last node of `warmup_only` and a stage of the bridge: both wait for it.
    warmup = plan["warmup_only"]["2"][-1]
    assert values["arms"]["warmup_only"]["unfinished"] == {"2": warmup}
    assert bridge["unfinished"] == {"1": plan["bridge"]["1"][-1], "2": warmup}
    assert set(bridge["accuracy"]["sums"]["per_seed"]) == {"0"}
    contrast = contrasts.find_contrast(values, "bridge", "direct_grpo", "sums")
    assert contrast is not None and contrast["seeds"] == 1
    assert contrasts.find_contrast(values, "bridge_rl", "replay", "sums") is None
    assert values["verdict"].endswith("Not finished: bridge, replay, warmup_only.")
    text = printed(values, 110)
    assert f"replay: not finished on seed 0 (waits for {plan['replay']['0'][-1]})" in " ".join(text.split())
    row = next(row for row in html_arms.arms(values).view["table"].rows if row["header"].text == "warmup_only")
    assert row["header"].warnings == ("unfinished on seed 2",)


@pytest.mark.usefixtures("undrawn")
def test_report_is_written_without_finished_arm(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]})
    for done in out.glob("nodes/*/DONE"):
        done.unlink()
    values = report.write(out)
    assert values["verdict"].startswith("Nothing can be said yet: no arm is finished and evaluated. Not finished: ")
    assert values["contrasts"] == [] and values["evals"] == []
    assert "bridge" in printed(values, 100)


def test_first_condition_equals_counts_of_started_seeds(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms={name: ARMS[name] for name in ("base_teacher", "bridge")})
    for folder in out.glob("nodes/*.s1.*"):  # the second seed has not started
        shutil.rmtree(folder)
    trained = next(out.glob("nodes/teacher_rl.s0.*/evals/final/sums.jsonl"))
    untrained = next(out.glob("nodes/base_teacher*/evals/final/sums.jsonl"))

    def measured(file: Path) -> list[float]:
        right = by_problem([json.loads(line) for line in file.read_text().splitlines()], "correct").values()
        return [sum(map(sum, right)) / (4 * PROBLEMS), sum(map(any, right)) / PROBLEMS]

    condition = report.build([out])["conditions"]["C1"]["sums"]
    (after,) = condition["after"]
    for state, file in ((condition["before"], untrained), (after, trained)):
        assert [state["accuracy"], state["best_of_k"]] == pytest.approx(measured(file), abs=1e-6) and state["k"] == 4
    assert after["reached"] == pytest.approx(measured(trained)[0] / measured(untrained)[1], abs=1e-5)


def test_run_directories_with_different_seeds_merge(
    fake_study: Path, fake_report: dict[str, Any], tmp_path: Path
) -> None:
    first, second = fake_run(tmp_path / "a", seeds=(0, 1)), fake_run(tmp_path / "b", seeds=(2,))
    recipe = json.loads((second / "recipe.json").read_text())
    (second / "recipe.json").write_text(json.dumps({**recipe, "compute": {**recipe.get("compute", {}), "workers": 2}}))
    merged = report.build([first, second])  # the number of workers changes no result
    assert merged["seeds"] == [0, 1, 2]
    assert merged == fake_report == report.build([fake_study])
    assert report.build([second, first])["arms"]["bridge"] == fake_report["arms"]["bridge"]


def test_run_directories_of_different_recipes_are_refused(tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a", seeds=(0,)), fake_run(tmp_path / "b", seeds=(1,))
    recipe = json.loads((second / "recipe.json").read_text())
    (second / "recipe.json").write_text(json.dumps({**recipe, "task": "maths"}))
    with pytest.raises(UserError, match=r"another recipe .*differ in task"):
        report.build([first, second])
    with pytest.raises(UserError, match="holds no run"):
        report.build([tmp_path])


def test_report_json_holds_only_numbers_of_json(fake_study: Path, fake_report: dict[str, Any]) -> None:
    text = (fake_study / "report.json").read_bytes()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == fake_report


def test_base_model_evaluated_once_is_paired_with_every_seed(tmp_path: Path, fake_report: dict[str, Any]) -> None:
    out = fake_run(tmp_path / "out")
    plan = json.loads((out / "plan.json").read_text())
    plan["arms"]["base_student"] = {"0": plan["arms"]["base_student"]["0"]}
    (out / "plan.json").write_text(json.dumps(plan))
    contrast = contrasts.find_contrast(report.build([out]), "bridge", "base_student", "sums")
    assert contrast == contrasts.find_contrast(fake_report, "bridge", "base_student", "sums")


def test_base_model_is_paired_with_seeds_it_lacks(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms={name: ARMS[name] for name in ("base_student", "bridge")})
    plan = json.loads((out / "plan.json").read_text())
    del plan["arms"]["base_student"]["1"]
    (out / "plan.json").write_text(json.dumps(plan))
    (out / "nodes" / names(out, "bridge", 0)[-1] / "DONE").unlink()  # the bridge has a result on the other seed alone
    contrast = contrasts.find_contrast(report.build([out]), "bridge", "base_student", "sums")
    assert contrast is not None and (contrast["seeds"], contrast["labels"]) == (1, {"a": 96, "b": 0})


def test_maj_at_k_is_null_if_grader_extracts_no_answers(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]})
    file = next(out.glob("nodes/*/evals/final/sums.jsonl"))
    rows = [{**json.loads(line), "extracted": None} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = report.build([out])["arms"]["base_student"]
    assert values["maj_at_k"] == {"sums": None}
    assert values["accuracy"]["sums"]["mean"] > 0


def test_different_correct_answers_share_vote_only_if_gold_is_answer(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]})
    file = next(out.glob("nodes/*/evals/final/sums.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    size = len(next(iter(groups.values())))
    for (
        group
    ) in groups.values():  # two right answers, written differently, against wrong ones: one more than each alone
        for place, row in enumerate(group):
            row["correct"] = place < 2
            row["extracted"] = (
                ["50+24-46", "24-46+50"][place] if place < 2 else "1+1" if place < 4 else f"wrong {place}"
            )
    assert size >= 4
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = json.loads((out / "recipe.json").read_text())
    values = {}
    for task in ("sums", "countdown"):
        (out / "recipe.json").write_text(json.dumps({**recipe, "task": task}))
        values[task] = report.build([out])["arms"]["base_student"]["maj_at_k"]["sums"]["mean"]
    assert values == {"sums": 0.5, "countdown": 0.0}


def test_accuracy_paths_of_teacher_and_student() -> None:
    from headwater.report.stages import accuracy_paths

    def scored(mean: float) -> dict[str, Any]:
        return {"held_out": {"mean": mean}}

    def stage(name: str, role: str, mean: float | None, teacher_scored: int = 0) -> dict[str, Any]:
        accuracy = {} if mean is None else scored(mean)
        return {"stage": name, "role": role, "accuracy": accuracy, "tokens": {"teacher_scored": teacher_scored}}

    report = {
        "arms": {
            "base_student": {"accuracy": scored(0.089), "stages": []},
            "base_teacher": {"accuracy": scored(0.221), "stages": []},
            "direct_grpo": {"stages": [stage("student_rl", "student", 0.58)]},
            "raw_teacher": {"stages": [stage("opd", "student", 0.142, teacher_scored=9)]},
            "bridge": {
                "stages": [
                    stage("teacher_rl", "teacher", 0.9735),
                    stage("teacher_rollouts", "teacher", None, teacher_scored=9),
                    stage("warmup", "student", 0.569),
                    stage("opd", "student", None, teacher_scored=9),
                ]
            },
        }
    }
    assert accuracy_paths(report, "held_out") == [
        ("direct_grpo", "–", "8.9 → RL 58.0"),
        ("raw_teacher", "22.1", "8.9 → OPD 14.2"),
        ("bridge", "22.1 → RL 97.4", "8.9 → warm-up 56.9 → OPD ?"),
    ]


def test_outcomes_are_shares_of_all_rollouts(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo")}
    out = fake_run(tmp_path / "out", seeds=(0,), arms=arms, steps=3)
    folder = out / "nodes" / names(out, "direct_grpo", 0)[-1] / "rollouts"
    folder.mkdir(exist_ok=True)
    kinds = {
        "right": {"correct": True, "reason": "equal", "finish": "stop"},
        "cut": {"correct": False, "reason": "no_answer", "finish": "length"},
        "wrong": {"correct": False, "reason": "different", "finish": "stop"},
    }
    for step, outcomes in enumerate((["cut"] * 8, ["cut"] * 5 + ["wrong"] * 3, ["cut"] * 7 + ["right"]), 1):
        text = "".join(json.dumps(kinds[name]) + "\n" for name in outcomes)
        (folder / f"{step:06d}.jsonl").write_text(text)
    stage = next(row for row in report.build([out])["stages"] if row["stage"] == "student_rl")
    assert stage["outcomes"] == pytest.approx(
        {"cut": 20 / 24, "wrong": 3 / 24, "right": 1 / 24, "no_answer": 0, "ungraded": 0}
    )
    assert stage["no_signal"] is None  # some of its groups were informative


def test_verdict_says_why_no_group_was_informative(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo")}
    out = fake_run(tmp_path / "out", seeds=(0,), arms=arms, steps=2)
    node = out / "nodes" / names(out, "direct_grpo", 0)[-1]
    rows = [{**row, "informative": 0.0} for row in _rows(node / "metrics.jsonl")]
    (node / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((node / "node.json").read_text())
    info["settings"] = {"sampling": {"max_tokens": 48}}
    (node / "node.json").write_text(json.dumps(info))
    (node / "rollouts").mkdir(exist_ok=True)
    graded = [{"correct": False, "reason": "no_answer", "finish": "length"}] * 24 + [
        {"correct": False, "reason": "different", "finish": "stop"}
    ]
    for step in (1, 2):
        (node / "rollouts" / f"{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    assert (
        "rewards were equal within every group. In student_rl 96 % of the completions were cut at max_tokens = 48, 4 % were wrong: "
        "raise stages.student_rl.sampling.max_tokens"
    ) in report.build([out])["verdict"]


def test_outcomes_of_long_stages_are_read_from_fifty_steps(tmp_path: Path) -> None:
    folder = NodeDir(tmp_path)
    for step in range(1, 148):
        append_jsonl(folder.rollouts(step), [{"step": step}])
    steps = [row["step"] for row in Node("n", folder, True, {}).training_rows()]
    assert (len(steps), steps[0], steps[-1]) == (50, 1, 147)
    assert {after - before for before, after in itertools.pairwise(steps)} == {2, 3}  # 146 / 49 is just below 3
