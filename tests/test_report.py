from __future__ import annotations

import hashlib
import html.parser
import io
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from headwater import report, report_words, stats
from headwater.errors import UserError

PROBLEMS, SAMPLES = 60, 4
LABELED = [f"label-{i:03d}" for i in range(128)]
POOLS = {"all": LABELED, "first_half": LABELED[:64], "second_half": LABELED[64:]}

# Nodes of each arm: (stage, role, kind, pool). Equal prefixes are shared nodes.
TEACHER, TEACHER_1H = ("teacher_rl", "teacher", "train", "all"), ("teacher_rl", "teacher", "train", "first_half")
ROLL = ("teacher_rollouts", "teacher", "rollouts", None)
WARM, OPD = ("warmup", "student", "train", None), ("opd", "student", "train", None)
BASE_T, BASE_S = ("base_teacher", "teacher", "evaluate", None), ("base_student", "student", "evaluate", None)


def _rl(pool: str) -> tuple[str, str, str, str]:
    return ("student_rl", "student", "train", pool)


ARMS: dict[str, list[tuple[str, str, str, str | None]]] = {
    "base_student": [BASE_S],
    "base_teacher": [BASE_T],
    "direct_grpo": [BASE_S, _rl("all")],
    "raw_teacher": [BASE_S, BASE_T, ROLL, WARM, OPD],
    "bridge": [BASE_S, TEACHER, ROLL, WARM, OPD],
    "bridge_rl": [BASE_S, TEACHER_1H, ROLL, WARM, OPD, _rl("second_half")],
    "replay": [BASE_S, TEACHER_1H, ROLL, WARM, OPD, _rl("first_half")],
    "warmup_only": [BASE_S, TEACHER, ROLL, WARM],
}
MORE_ARMS = {
    "opd_only": [BASE_S, TEACHER, OPD],
    "teacher_sft": [BASE_S, TEACHER, ROLL, ("sft", "student", "train", None)],
    "teacher_2h": [BASE_S, TEACHER_1H, ("teacher_rl", "teacher", "train", "second_half"), ROLL, WARM, OPD],
    "zz_own": [BASE_S, TEACHER, OPD, _rl("all")],
}
LEVELS = {
    "base_student": 0.12,
    "base_teacher": 0.35,
    "direct_grpo": 0.25,
    "raw_teacher": 0.18,
    "bridge": 0.42,
    "bridge_rl": 0.52,
    "replay": 0.44,
    "warmup_only": 0.33,
    "opd_only": 0.36,
    "teacher_sft": 0.3,
    "teacher_2h": 0.5,
}


def _draw(*names: object) -> float:
    """A number in [0, 1) that its names decide."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, names)).encode()).digest()[:6]) / 2**48


def fake_run(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: dict[str, Any] | None = None,
    evals: tuple[str, ...] = ("sums",),
    problems: int = PROBLEMS,
    steps: int = 12,
    correct: Callable[[str, int, int, int], bool] | None = None,
    text: str = "17+45=62; 62+82=44 #### 44",
    metrics: bool = True,
) -> Path:
    """A run directory as the pipeline would leave it, with made-up numbers that `_draw` decides."""
    arms = ARMS if arms is None else arms
    plan: dict[str, Any] = {"recipe": "pocket", "seeds": list(seeds), "arms": {}}
    for arm, nodes in arms.items():
        for seed in seeds:
            parents: list[str] = []
            for place, (stage, role, kind, pool) in enumerate(nodes):
                key = hashlib.sha256(f"{nodes[: place + 1]}".encode()).hexdigest()[:8]
                name = f"{stage}.{key}" if kind == "evaluate" else f"{stage}.s{seed}.{key}"
                folder = out / "nodes" / name
                last = place == len(nodes) - 1
                if not folder.exists():
                    _fake_node(folder, stage, role, kind, pool, seed, parents, steps if metrics else 0)
                if role == "student" or kind != "rollouts":
                    level = LEVELS.get(arm, 0.4) if last else LEVELS.get(stage, 0.3)
                    for eval_name in evals:
                        file = folder / "evals" / "final" / f"{eval_name}.jsonl"
                        if last or not file.exists():
                            _fake_eval(file, name, level, problems, correct, text)
                parents = [name]
                plan["arms"].setdefault(arm, {}).setdefault(str(seed), []).append(name)
    (out / "plan.json").write_text(json.dumps(plan))
    recipe = {"name": "pocket", "seed": seeds[0], "task": "sums", "data": {"evals": {name: {} for name in evals}}}
    (out / "recipe.json").write_text(json.dumps(recipe))
    (out / "env.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0", "threads": 2}))
    return out


def _fake_node(
    folder: Path, stage: str, role: str, kind: str, pool: str | None, seed: int, parents: list[str], steps: int
) -> None:
    folder.mkdir(parents=True)
    labels = {"pool": pool, "distinct_allowed": len(POOLS[pool])} if pool else None
    info = {"name": folder.name, "kind": kind, "stage": stage, "role": role, "seed": seed, "parents": parents}
    (folder / "node.json").write_text(json.dumps({**info, "fingerprint": folder.name, "labels": labels}))
    (folder / "DONE").write_text(json.dumps({"fingerprint": folder.name}))
    zero = {"tokens_sampled": 0, "tokens_trained": 0, "tokens_teacher_scored": 0, "flops": 0.0, "seconds": 0.0}
    common = {"node": folder.name, "stage": stage, "seed": seed, "labels": [], "checks": 0, **zero}
    rows, measured = [], []
    for step in range(1, steps + 1) if kind == "train" else []:
        row = {**common, "step": step, "purpose": "train", "tokens_trained": 640 + step, "flops": 1.5e9, "seconds": 0.5}
        noise, share = _draw(folder.name, step), step / steps
        measure = {
            "loss": 1 / step + 0.1 * noise,
            "grad_norm": 0.5 + noise,
            "seconds": 0.5,
            "tokens_trained": 640 + step,
        }
        measure |= {"lr": 1e-3, "seconds_sample": 0.2, "seconds_score": 0.1, "seconds_update": 0.2}
        if pool:
            start = step * 8 % len(POOLS[pool])
            row |= {"labels": POOLS[pool][start : start + 8], "checks": 64, "tokens_sampled": 2000}
            measure |= {"reward": 0.2 + 0.4 * share + 0.1 * noise, "informative": 0.7 - 0.2 * share + 0.1 * noise}
            measure |= {"entropy": 0.6 - 0.3 * share, "truncated": 0.05 * noise, "sampler_gap": 1e-5 * noise}
        else:
            row |= {"tokens_sampled": 2000 if stage == "opd" else 0, "tokens_teacher_scored": 1900}
            measure |= {
                "kl_teacher_student": 0.9 / step + 0.02 * noise,
                "kl_student_teacher": 0.8 / step + 0.02 * noise,
            }
        rows.append(row)
        measured.append({"step": step, **measure, "note": "text is not plotted", "gap": float("nan")})
    if kind == "rollouts":
        rows.append({**common, "step": 0, "purpose": "train", "tokens_sampled": 5000, "flops": 2e9, "seconds": 3.25})
    looked = [f"sums-{i:04d}" for i in range(PROBLEMS)]
    rows.append({**common, "step": steps, "purpose": "eval", "labels": looked, "checks": 240, "tokens_sampled": 7777})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if measured:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))


def _fake_eval(file: Path, node: str, level: float, problems: int, correct: Any, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    seed_effect = 0.03 * (_draw("seed", node) - 0.5)
    rows = []
    for problem in range(problems):
        rate = min(max(level + seed_effect + 0.6 * (_draw("hard", problem) - 0.5), 0.0), 1.0)
        for sample in range(SAMPLES):
            right = (
                correct(node, problem, sample, SAMPLES)
                if correct is not None
                else _draw(file.stem, node, problem, sample) < rate
            )
            wrong = f"{int(3 * _draw('wrong', node, problem, sample))}"
            none = not right and _draw("none", node, problem, sample) < 0.2
            row = {"problem_id": f"{file.stem}-{problem:04d}", "sample": sample, "correct": right, "text": text}
            row |= {"reason": "equal" if right else "no_answer" if none else "different", "tokens": 20 + sample}
            rows.append({**row, "extracted": "44" if right else None if none else wrong, "finish": "stop"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("fake") / "out")


@pytest.fixture(scope="module")
def built(run: Path) -> dict[str, Any]:
    return report.write(run)


def _rows(run: Path, arm: str, seed: int, eval_name: str = "sums") -> list[dict[str, Any]]:
    name = json.loads((run / "plan.json").read_text())["arms"][arm][str(seed)][-1]
    file = run / "nodes" / name / "evals" / "final" / f"{eval_name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def _by_problem(rows: list[dict[str, Any]], key: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["problem_id"], []).append(row[key])
    return found


@pytest.mark.parametrize("arm", list(ARMS))
def test_accuracy_pass_and_majority_are_those_counted_from_the_files(
    run: Path, built: dict[str, Any], arm: str
) -> None:
    got = built["arms"][arm]
    for seed in (0, 1, 2):
        rows = _rows(run, arm, seed)
        right = _by_problem(rows, "correct")
        mean = sum(row["correct"] for row in rows) / len(rows)
        assert got["accuracy"]["sums"]["per_seed"][str(seed)] == pytest.approx(mean, abs=1e-6)
        # pass@2 by the share of pairs: 1 - C(wrong, 2)/C(4, 2); pass@4 by "any".
        pairs = [1 - math.comb(4 - sum(c), 2) / 6 for c in right.values()]
        assert got["pass_at_k"]["sums"]["2"]["per_seed"][str(seed)] == pytest.approx(sum(pairs) / PROBLEMS, abs=1e-6)
        best = sum(any(c) for c in right.values()) / PROBLEMS
        assert got["pass_at_k"]["sums"]["4"]["per_seed"][str(seed)] == pytest.approx(best, abs=1e-6)
        votes = []
        for problem, answers in _by_problem(rows, "extracted").items():
            top = max(answers.count(a) for a in answers)
            tied = {a for a in answers if answers.count(a) == top}
            assert problem in right
            votes.append((("44" in tied) / len(tied)) if set(answers) != {None} else 0.0)
        assert got["maj_at_k"]["sums"]["per_seed"][str(seed)] == pytest.approx(sum(votes) / PROBLEMS, abs=1e-6)
    means = list(got["accuracy"]["sums"]["per_seed"].values())
    assert got["accuracy"]["sums"]["mean"] == pytest.approx(sum(means) / 3, abs=2e-6)
    assert got["accuracy"]["sums"]["low"] < got["accuracy"]["sums"]["mean"] < got["accuracy"]["sums"]["high"]
    assert list(got["pass_at_k"]["sums"]) == ["1", "2", "4"]


def test_costs_are_those_of_every_node_and_evaluation_looks_stand_apart(built: dict[str, Any]) -> None:
    # 12 steps; step s trains 640+s tokens: 12·640 + 78 = 7758 a trained node; 64 checks and 8 labels a sparse step.
    bridge = built["arms"]["bridge"]
    assert bridge["tokens"] == {
        "sampled": 12 * 2000 + 5000 + 12 * 2000,  # teacher RL, teacher rollouts, OPD
        "trained": 3 * 7758,
        "teacher_scored": 2 * 12 * 1900,  # warm-up and OPD
    }
    assert bridge["flops"] == 3 * 12 * 1.5e9 + 2e9
    assert bridge["seconds"] == 3 * 12 * 0.5 + 3.25
    # Steps 1..12 look at 8 each of 128, from 8·step on: 96 different ones. Of 64, all 64.
    assert bridge["labels"] == {"distinct": 96, "checks": 768}
    assert built["arms"]["bridge_rl"]["labels"] == {"distinct": 128, "checks": 1536}
    assert built["arms"]["replay"]["labels"] == {"distinct": 64, "checks": 1536}
    assert built["arms"]["raw_teacher"]["labels"] == {"distinct": 0, "checks": 0}
    # Five nodes, each evaluated once on the same 60 problems.
    assert (bridge["eval_labels"], bridge["eval_checks"]) == (60, 5 * 240)


def test_contrasts_are_the_paired_differences_of_the_files(run: Path, built: dict[str, Any]) -> None:
    found = report_words.find_contrast(built, "bridge", "direct_grpo", "sums")
    assert found is not None

    def table(arm: str) -> np.ndarray:
        seeds = [_by_problem(_rows(run, arm, seed), "correct") for seed in (0, 1, 2)]
        return np.array([[np.mean(by_problem[name]) for name in sorted(by_problem)] for by_problem in seeds])

    values = table("bridge") - table("direct_grpo")
    assert found["difference"] == pytest.approx(values.mean(), abs=1e-6)
    assert (found["seeds"], found["problems"], found["labels"]) == (3, 60, {"a": 96, "b": 96})
    # A bootstrap of its own, over problems alone, is no wider than the one over seeds too.
    draws = np.random.default_rng(0).integers(0, 60, (4000, 60))
    low, high = np.quantile(values.mean(axis=0)[draws].mean(axis=1), [0.025, 0.975])
    assert found["low"] < low + 0.01 and found["high"] > high - 0.01
    assert found["p"] == pytest.approx(stats.sign_flip_p(values.mean(axis=0)), abs=1e-6)
    pairs = {(c["a"], c["b"]) for c in built["contrasts"]}
    wanted = set(report_words.NAMED_PAIRS) | {(arm, "base_student") for arm in ARMS if arm != "base_student"}
    assert pairs == {pair for pair in wanted if set(pair) <= set(ARMS)}


def test_arms_stand_in_their_order_with_the_stages_they_rest_on(built: dict[str, Any]) -> None:
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
    assert list(built["arms"]) == order
    stages = built["arms"]["bridge_rl"]["stages"]
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


def test_the_conditions_are_what_the_nodes_measured(run: Path, built: dict[str, Any]) -> None:
    c1, c2 = built["conditions"]["C1"]["sums"], built["conditions"]["C2"]
    before = _by_problem(_rows(run, "base_teacher", 0), "correct")
    assert c1["before"]["best_of_k"] == pytest.approx(sum(map(any, before.values())) / PROBLEMS, abs=1e-6)
    assert {row["pool"] for row in c1["after"]} == {"all", "first_half"}
    after = next(row for row in c1["after"] if row["pool"] == "all")
    assert after["arms"] == ["bridge", "warmup_only"]
    assert after["reached"] == pytest.approx(after["accuracy"] / c1["before"]["best_of_k"], abs=1e-5)
    names = [json.loads((run / "plan.json").read_text())["arms"]["bridge"][str(seed)][-1] for seed in (0, 1, 2)]
    metrics = [(run / "nodes" / name / "metrics.jsonl").read_text().splitlines() for name in names]
    ends = [[json.loads(lines[at])["kl_student_teacher"] for lines in metrics] for at in (0, -1)]
    opd = c2["bridge"]["opd"]["kl_student_teacher"]
    assert (opd["first"], opd["last"]) == pytest.approx([sum(values) / 3 for values in ends], abs=2e-6)
    assert "base_student" not in c2 and "direct_grpo" not in c2


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo")}
    found = report.write(fake_run(tmp_path / "out", arms=arms, metrics=False))
    # The evaluations' rows of the teacher are not there, and no stage wrote metrics.
    assert found["conditions"] == {"C1": None, "C2": None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Training curves" not in page and "Conditions" not in page


def test_an_unfinished_arm_is_named_and_has_no_accuracy(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out")
    plan = json.loads((out / "plan.json").read_text())["arms"]
    for seed in ("0", "1", "2"):
        (out / "nodes" / plan["replay"][seed][-1] / "DONE").unlink()
    (out / "nodes" / plan["bridge"]["1"][-1] / "DONE").unlink()
    for file in (out / "nodes" / plan["warmup_only"]["2"][-1]).rglob("*"):
        if file.is_file():
            file.unlink()
    found = report.write(out)
    replay, bridge = found["arms"]["replay"], found["arms"]["bridge"]
    assert replay["accuracy"] == {} and set(replay["unfinished"]) == {"0", "1", "2"}
    assert replay["labels"]["checks"] == 1536  # what was spent so far stays in the accounts
    # The warm-up of seed 2 is `warmup_only`'s result and a step of the bridge: both wait for it.
    warmup = plan["warmup_only"]["2"][-1]
    assert found["arms"]["warmup_only"]["unfinished"] == {"2": warmup}
    assert bridge["unfinished"] == {"1": plan["bridge"]["1"][-1], "2": warmup}
    assert set(bridge["accuracy"]["sums"]["per_seed"]) == {"0"}
    contrast = report_words.find_contrast(found, "bridge", "direct_grpo", "sums")
    assert contrast is not None and contrast["seeds"] == 1
    assert report_words.find_contrast(found, "bridge_rl", "replay", "sums") is None
    assert found["verdict"].endswith("Not finished: bridge, replay, warmup_only.")
    text = _printed(found, 100)
    assert f"replay: not finished on seed 0 (waits for {plan['replay']['0'][-1]})" in " ".join(text.split())
    assert "unfinished" in (out / "report.html").read_text()


def test_a_run_without_any_finished_arm_still_has_a_report(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,))
    for done in out.glob("nodes/*/DONE"):
        done.unlink()
    found = report.write(out)
    assert found["verdict"] == "Nothing can be said yet: no arm is finished and evaluated."
    assert found["contrasts"] == [] and found["evals"] == []
    assert "bridge" in _printed(found, 100)


def test_two_directories_of_different_seeds_make_one_report(run: Path, built: dict[str, Any], tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a", seeds=(0, 1)), fake_run(tmp_path / "b", seeds=(2,))
    merged = report.build([first, second])
    assert merged["seeds"] == [0, 1, 2]
    assert merged == built == report.build([run])
    assert report.build([second, first])["arms"]["bridge"] == built["arms"]["bridge"]


def test_directories_of_different_recipes_are_refused(tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a", seeds=(0,)), fake_run(tmp_path / "b", seeds=(1,))
    recipe = json.loads((second / "recipe.json").read_text())
    (second / "recipe.json").write_text(json.dumps({**recipe, "task": "maths"}))
    with pytest.raises(UserError, match=r"another recipe .*differ in task"):
        report.build([first, second])
    with pytest.raises(UserError, match="holds no run"):
        report.build([tmp_path])


def test_the_same_files_give_the_same_bytes(run: Path, built: dict[str, Any]) -> None:
    first = (run / "report.json").read_bytes(), (run / "report.html").read_bytes()
    report.write(run)
    assert ((run / "report.json").read_bytes(), (run / "report.html").read_bytes()) == first
    # A number that JSON does not know would have been written as NaN or Infinity.
    assert json.loads(first[0], parse_constant=lambda name: pytest.fail(name)) == built


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_has_intervals_and_no_verdict_beyond_them(tmp_path: Path, right: bool) -> None:
    found = report.build([fake_run(tmp_path / "out", correct=lambda *_: right)])
    accuracy = found["arms"]["bridge"]["accuracy"]["sums"]
    assert accuracy["mean"] == float(right)
    assert accuracy["high"] - accuracy["low"] == pytest.approx(1.959964**2 / (60 + 1.959964**2), abs=1e-5)
    assert all(c["difference"] == 0 and c["p"] == 1 and c["low"] < 0 < c["high"] for c in found["contrasts"])
    assert "is undecided" in found["verdict"] and "Whether fresh labels" in found["verdict"]


def test_the_verdict_names_the_numbers_and_the_labels(built: dict[str, Any]) -> None:
    said = built["verdict"]
    upper = report_words.find_contrast(built, "bridge", "direct_grpo", "sums")
    assert upper is not None
    assert said.startswith("On sums (3 seeds × 60 problems) the paper's ordering raw_teacher < direct_grpo < bridge ")
    assert f"bridge {100 * built['arms']['bridge']['accuracy']['sums']['mean']:.1f} %" in said
    assert f"bridge − direct_grpo +{100 * upper['difference']:.1f} points" in said
    assert "equal labels, 96 each, none on raw_teacher" in said
    assert "labels not equal: bridge_rl 128, replay 64" in said


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"raw_teacher": 0.1, "direct_grpo": 0.4, "bridge": 0.8}, "bridge holds:"),
        ({"raw_teacher": 0.1, "direct_grpo": 0.8, "bridge": 0.4}, "bridge does not hold:"),
        ({"raw_teacher": 0.4, "direct_grpo": 0.4, "bridge": 0.8}, "bridge is undecided:"),
    ],
)
def test_the_verdict_follows_the_numbers_also_against_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: dict[str, float], expected: str
) -> None:
    for name, level in {**levels, "bridge_rl": 0.3, "replay": 0.6}.items():
        monkeypatch.setitem(LEVELS, name, level)
    said = report.build([fake_run(tmp_path / "out")])["verdict"]
    assert expected in said
    assert "do worse than replaying the used ones, against the paper" in said


def test_one_arm_alone_is_compared_with_the_student_before(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "bridge")}
    found = report.build([fake_run(tmp_path / "out", seeds=(0,), arms=arms)])
    assert found["verdict"].startswith("On sums (1 seed × 60 problems) bridge is better than base_student: bridge ")
    lone = report.build([fake_run(tmp_path / "lone", seeds=(0,), arms={"bridge": ARMS["bridge"]})])
    assert "no two arms to compare" in lone["verdict"]


def test_a_base_model_listed_for_one_seed_stands_beside_every_seed(tmp_path: Path, built: dict[str, Any]) -> None:
    out = fake_run(tmp_path / "out")
    plan = json.loads((out / "plan.json").read_text())
    plan["arms"]["base_student"] = {"0": plan["arms"]["base_student"]["0"]}
    (out / "plan.json").write_text(json.dumps(plan))
    contrast = report_words.find_contrast(report.build([out]), "bridge", "base_student", "sums")
    assert contrast == report_words.find_contrast(built, "bridge", "base_student", "sums")


def _printed(found: dict[str, Any], width: int) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(report.terminal_table(found))
    return buffer.getvalue()


@pytest.mark.parametrize("evals", [("sums",), ("math500", "aime24", "aime25")])
def test_the_terminal_table_fits_in_a_hundred_columns(tmp_path: Path, evals: tuple[str, ...]) -> None:
    found = report.build([fake_run(tmp_path / "out", arms={**ARMS, **MORE_ARMS}, evals=evals)])
    text = _printed(found, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    accuracy = found["arms"]["bridge_rl"]["accuracy"][evals[-1]]
    line = f"{100 * accuracy['mean']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    assert line in text
    assert list(found["arms"])[-1] == "zz_own"


def test_output_to_a_file_is_110_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert report.console(io.StringIO()).width == 110


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999, "999"),
        (1000, "1.00k"),
        (1234567, "1.23M"),
        (99_960, "100k"),
        (999_900, "1.00M"),
        (2.5e12, "2.50T"),
        (0, "0"),
    ],
)
def test_units_keep_three_digits(value: float, text: str) -> None:
    assert report_words.units(value) == text


class _Page(html.parser.HTMLParser):
    """Collects ids, references and headings, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_needs_nothing_from_outside(run: Path, built: dict[str, Any]) -> None:
    text = (run / "report.html").read_text()
    page = _parsed(text)
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in references} <= set(page.ids)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "image"}
    outside = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
    assert outside == []
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {"http://www.w3.org/2000/svg"}
    levels = [int(level) for level in re.findall(r"<h([1-6])>", text)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert len(text.encode()) < 3_000_000
    accuracy = built["arms"]["bridge"]["accuracy"]["sums"]
    assert f">{100 * accuracy['mean']:.1f}<" in text
    for title in ("reward (share correct)", "KL(teacher ‖ student), nats a token", "entropy, nats a token"):
        assert f">{title}<" in text.replace("&#8214;", "‖")


def test_what_comes_from_files_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\x00\ud800\x1b[31m '\""
    out = fake_run(tmp_path / "out", seeds=(0,), text=hostile)
    name = "<b>pocket</b>$x^2$"
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({**recipe, "name": name, "task": "<script>alert(2)</script>"}))
    (out / "env.json").write_text(json.dumps({"<i>os</i>": "<u>x</u>"}))
    plan = json.loads((out / "plan.json").read_text())
    plan["arms"]['"><script>alert(3)</script>$_'] = plan["arms"]["bridge"]
    (out / "plan.json").write_text(json.dumps(plan))
    metrics = next(out.glob("nodes/opd*/metrics.jsonl"))
    metrics.write_text(metrics.read_text().replace('"lr"', '"<script>$\\\\frac$</script> id=\\"x\\""'))
    report.write(out)
    text = (out / "report.html").read_text()
    page = _parsed(text)
    assert not page.tags.keys() & {"script", "img", "b", "i", "u"}
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "\x00" not in text and "\x1b" not in text
    assert len(page.ids) == len(set(page.ids))


def test_a_very_long_completion_is_cut(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]}, text="x" * 100_000)
    report.write(out)
    text = (out / "report.html").read_text()
    assert len(text) < 150_000 and "97,500 more characters" in text


def test_graders_that_extract_nothing_have_no_majority(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]})
    file = next(out.glob("nodes/*/evals/final/sums.jsonl"))
    rows = [{**json.loads(line), "extracted": None} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report.write(out)["arms"]["base_student"]
    assert found["maj_at_k"] == {"sums": None}
    assert found["accuracy"]["sums"]["mean"] > 0


def test_five_seeds_of_twelve_arms_are_reported_in_seconds(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0, 1, 2, 3, 4), arms={**ARMS, **MORE_ARMS}, problems=200, steps=60)
    start = time.perf_counter()
    report.write(out)
    seconds = time.perf_counter() - start
    size = (out / "report.html").stat().st_size
    print(f"report of 5 seeds × 12 arms: {seconds:.1f} s, {size / 1e6:.2f} MB")
    assert size < 3_000_000
    assert seconds < 20


def test_the_report_never_imports_torch() -> None:
    code = "import sys, headwater.report, headwater.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_arms_way_through_its_stages_is_told_for_teacher_and_student() -> None:
    from headwater.report_stages import paths

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
    assert paths(report, "held_out") == [
        ("direct_grpo", "–", "8.9 → RL 58.0"),
        ("raw_teacher", "22.1", "8.9 → OPD 14.2"),
        ("bridge", "22.1 → RL 97.4", "8.9 → warm-up 56.9 → OPD ?"),
    ]
