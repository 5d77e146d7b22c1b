"""Contrasts, predictions and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_runs import ARMS, MORE_ARMS, by_problem, fake_run, graded, names, printed, write_rows
from headwater import stats
from headwater.config.arms import CONTRASTS
from headwater.report import build as report
from headwater.report import contrasts
from headwater.report.predictions import predictions


def test_contrasts_equal_paired_differences_from_files(fake_study: Path, fake_report: dict[str, Any]) -> None:
    contrast = contrasts.find_contrast(fake_report, "bridge", "direct_grpo", "sums")
    assert contrast is not None

    def table(arm: str) -> np.ndarray:
        seeds = [by_problem(graded(fake_study, arm, seed), "correct") for seed in (0, 1, 2)]
        return np.array([[np.mean(by_problem[name]) for name in sorted(by_problem)] for by_problem in seeds])

    values = table("bridge") - table("direct_grpo")
    assert contrast["difference"] == pytest.approx(values.mean(), abs=1e-6)
    assert (contrast["seeds"], contrast["problems"], contrast["labels"]) == (3, 60, {"a": 96, "b": 96})
    # Three stages of 12 steps at 1.5e9 and a cache at 2e9, against one such stage.
    assert (contrast["flops"], contrast["equal"]) == ({"a": 5.6e10, "b": 1.8e10}, ["labels"])
    # A bootstrap of its own, over problems alone, is no wider than the one over seeds too.
    draws = np.random.default_rng(0).integers(0, 60, (4000, 60))
    low, high = np.quantile(values.mean(axis=0)[draws].mean(axis=1), [0.025, 0.975])
    assert contrast["low"] < low + 0.01 and contrast["high"] > high - 0.01
    assert contrast["p"] == pytest.approx(stats.sign_flip_p(values.mean(axis=0)), abs=1e-6)
    pairs = {(c["a"], c["b"]) for c in fake_report["contrasts"]}
    wanted = set(CONTRASTS) | {(arm, "base_student") for arm in ARMS if arm != "base_student"}
    assert pairs == {pair for pair in wanted if set(pair) <= set(ARMS)}


@pytest.mark.parametrize("right", [True, False])
def test_all_correct_or_all_wrong_has_wide_intervals_and_is_undecided(tmp_path: Path, right: bool) -> None:
    values = report.build([fake_run(tmp_path / "out", correct=lambda *_: right)])
    accuracy = values["arms"]["bridge"]["accuracy"]["sums"]
    assert accuracy["mean"] == float(right)
    assert accuracy["high"] - accuracy["low"] == pytest.approx(1.959964**2 / (60 + 1.959964**2), abs=1e-5)
    assert all(c["difference"] == 0 and c["p"] == 1 and c["low"] < 0 < c["high"] for c in values["contrasts"])
    assert "is undecided" in values["verdict"] and "Whether unused labels" in values["verdict"]


def test_verdict_states_accuracies_differences_and_labels(fake_report: dict[str, Any]) -> None:
    verdict = fake_report["verdict"]
    upper = contrasts.find_contrast(fake_report, "bridge", "direct_grpo", "sums")
    assert upper is not None
    assert verdict.startswith(
        "On sums (3 seeds × 60 problems) the paper's ordering raw_teacher < direct_grpo < bridge "
    )
    assert f"bridge {100 * fake_report['arms']['bridge']['accuracy']['sums']['mean']:.1f} %" in verdict
    assert f"bridge − direct_grpo +{100 * upper['difference']:.1f} points" in verdict
    assert "equal labels, 96 each, none on raw_teacher" in verdict
    assert "labels not equal: bridge_rl 128, replay 64" in verdict


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"raw_teacher": 0.1, "direct_grpo": 0.4, "bridge": 0.8}, "bridge holds:"),
        ({"raw_teacher": 0.1, "direct_grpo": 0.8, "bridge": 0.4}, "bridge does not hold:"),
        ({"raw_teacher": 0.4, "direct_grpo": 0.4, "bridge": 0.8}, "bridge is undecided:"),
    ],
)
def test_verdict_on_ordering_follows_numbers(tmp_path: Path, levels: dict[str, float], expected: str) -> None:
    verdict = report.build([fake_run(tmp_path / "out", levels={**levels, "bridge_rl": 0.3, "replay": 0.6})])["verdict"]
    assert expected in verdict
    # Without the state before stage 3, P3 can be refuted, since one of its parts is reversed, but never hold.
    assert (
        "P3, that unused labels after the bridge help and matched replay does not, does not hold: bridge_rl " in verdict
    )


def test_verdict_compares_single_arm_with_untrained_student(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "bridge")}
    values = report.build([fake_run(tmp_path / "out", seeds=(0,), arms=arms)])
    assert values["verdict"].startswith("On sums (1 seed × 60 problems) bridge is better than base_student: bridge ")
    lone = report.build([fake_run(tmp_path / "lone", seeds=(0,), arms={"bridge": ARMS["bridge"]})])
    assert "no two arms to compare" in lone["verdict"]


@pytest.mark.parametrize(
    ("labels", "flops", "expected"),
    [
        ((256, 256), (1.0e12, 0.91e12), ["labels", "compute"]),
        ((256, 256), (0.89e12, 1.0e12), ["labels"]),
        ((256, 128), (1.0e12, 0.9e12), ["compute"]),
        ((256, 0), (1.0e12, 0.0), []),
        ((0, 0), (0.0, 0.0), ["labels", "compute"]),
    ],
)
def test_equal_resources_compare_labels_exactly_and_compute_within_tenth(
    labels: tuple[float, float], flops: tuple[float, float], expected: list[str]
) -> None:
    equal = contrasts.equal_resources(
        dict(zip("ab", labels, strict=True)),
        dict(zip("ab", flops, strict=True)),
    )
    assert equal == expected


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study of all arms in which compute-matched ones are within 10 % of the bridge's 5.6e10 FLOPs."""
    return report.build([fake_run(tmp_path_factory.mktemp("every") / "out", seeds=(0, 1), arms={**ARMS, **MORE_ARMS})])


def test_contrasts_are_grouped_by_equal_resources(every: dict[str, Any]) -> None:
    groups = {
        title: {(c["a"], c["b"]) for c in members}
        for title, members in contrasts.group_by_equality(contrasts.named_contrasts(every))
    }
    assert ("bridge", "direct_grpo_compute") in groups["Equal labels and compute"]
    assert ("bridge", "opd_then_rl_compute") in groups["Equal labels and compute"]
    assert {("bridge", "direct_grpo"), ("bridge", "opd_then_rl"), ("opd_then_rl", "direct_grpo")} <= groups[
        "Equal labels"
    ]
    assert ("bridge_rl", "replay") in groups["Equal compute"]  # unused labels are the point of it
    assert ("direct_grpo", "raw_teacher") in groups["Neither equal"]
    named = [pair for members in groups.values() for pair in members]
    assert sorted(named) == sorted(pair for pair in CONTRASTS if set(pair) <= every["arms"].keys())


def _report(**differences: tuple[float, float, float]) -> dict[str, Any]:
    """A report of contrasts alone: `a__b=(low, difference, high)` in points; p is 0.01 where the interval excludes zero."""
    contrasts, arms = [], set()
    for pair, (low, middle, high) in differences.items():
        a, b = pair.split("__")
        arms |= {a, b}
        p = 0.01 if low > 0 or high < 0 else 0.4
        scale = {"low": low / 100, "difference": middle / 100, "high": high / 100, "p": p}
        cost = {"labels": {"a": 8, "b": 8}, "flops": {"a": 4.0, "b": 2.0}, "equal": ["labels"]}
        contrasts.append({"a": a, "b": b, "eval": "sums", **scale, "seeds": 2, "problems": 50, **cost})
    entry = {"accuracy": {"sums": {"mean": 0.5}}, "labels": {"distinct": 8}}
    return {"evals": ["sums"], "contrasts": contrasts, "arms": dict.fromkeys(sorted(arms), entry)}


def _reading(name: str, **differences: tuple[float, float, float]) -> dict[str, Any]:
    return next(row for row in predictions(_report(**differences)) if row["name"] == name)


UP, OPEN, DOWN = (1.0, 3.0, 5.0), (-1.0, 1.0, 3.0), (-5.0, -3.0, -1.0)


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (UP, UP, "holds"),
        (UP, OPEN, "undecided"),
        (OPEN, OPEN, "undecided"),
        (DOWN, UP, "does not hold"),
        (OPEN, DOWN, "does not hold"),
    ],
)
def test_prediction_holds_if_all_parts_hold_and_fails_if_any_is_reversed(
    lower: tuple[float, float, float], upper: tuple[float, float, float], expected: str
) -> None:
    row = _reading("P1", direct_grpo__raw_teacher=lower, bridge__direct_grpo=upper)
    assert row["reading"] == expected
    assert [(c["a"], c["b"], c["wants"]) for c in row["rests_on"]] == [
        ("direct_grpo", "raw_teacher", "above"),
        ("bridge", "direct_grpo", "above"),
    ]


def test_prediction_missing_part_is_unmeasured_unless_other_is_reversed() -> None:
    row = _reading("P2", bridge__warmup_only=UP)
    assert row["reading"] == "not measured" and "; missing: opd_only" in row["why"]
    assert _reading("P2", bridge__warmup_only=DOWN)["reading"] == "does not hold"
    assert _reading("P2", bridge_rl__replay=UP)["reading"] == "not measured"


def test_p2_shows_confounded_arm_of_paper_without_using_it() -> None:
    row = _reading("P2", bridge__warmup_only=UP, bridge__opd_only=UP, bridge__teacher_sft=DOWN)
    assert row["reading"] == "holds"
    assert [(c["a"], c["b"], c["reading"]) for c in row["beside"]] == [("bridge", "teacher_sft", "does not hold")]
    assert "the paper's “no OPD”, which makes the targets hard as well: bridge − teacher_sft −3.0 points" in row["why"]
    assert "warmup_only takes 50.0 % of the bridge's FLOPs" in row["why"]


@pytest.mark.parametrize(
    ("fresh", "against", "again", "expected"),
    [
        (UP, UP, OPEN, "holds"),  # no gain of replay is shown
        (UP, UP, DOWN, "holds"),
        (UP, UP, UP, "does not hold"),  # replay gains as well
        (OPEN, UP, DOWN, "undecided"),  # the gap is replay doing harm; that unused labels help is not shown
        (DOWN, UP, DOWN, "does not hold"),
    ],
)
def test_p3_requires_gain_from_fresh_labels_and_none_from_replay(
    fresh: tuple[float, float, float],
    against: tuple[float, float, float],
    again: tuple[float, float, float],
    expected: str,
) -> None:
    row = _reading("P3", bridge_rl__bridge_1h=fresh, bridge_rl__replay=against, replay__bridge_1h=again)
    assert row["reading"] == expected


def test_p3_splits_gap_into_gain_and_replay_loss() -> None:
    """60.8 before stage 3, 62.5 after unused labels, 59.4 after replay: of 3.1 points 1.7 are gained and 1.4 (45 %) lost."""
    row = _reading(
        "P3",
        bridge_rl__bridge_1h=(0.2, 1.7, 3.2),
        bridge_rl__replay=(0.3, 3.1, 5.7),
        replay__bridge_1h=(-3.0, -1.4, 0.2),
    )
    assert row["reading"] == "holds"
    text = "+1.7 are unused labels over bridge_1h and +1.4 (45 % of it) replay falling below it"
    assert f"of the +3.1 points between bridge_rl and replay, {text}" in row["why"]
    assert "replay may still add up to +0.2 points" in row["why"]
    # Where replay gained, nothing of the gap is harm; without the middle the gap cannot be divided.
    gained = _reading("P3", bridge_rl__bridge_1h=(1, 4, 6), bridge_rl__replay=(1, 3, 5), replay__bridge_1h=(-1, 1, 3))
    assert "falling below" not in gained["why"]


def test_verdict_includes_p2_p3_and_equal_compute_if_measured(every: dict[str, Any]) -> None:
    verdict = every["verdict"]
    by_name = {row["name"]: row["reading"].replace("undecided", "is undecided") for row in every["predictions"]}
    assert f"P2, that the bridge needs both its warm-up and OPD, {by_name['P2']}: bridge " in verdict
    assert f"matched replay does not, {by_name['P3']}: bridge_1h " in verdict
    compute = contrasts.find_contrast(every, "bridge", "direct_grpo_compute", "sums")
    assert compute is not None
    assert (
        f"At equal compute the bridge is better than direct_grpo_compute ({contrasts.difference_text(compute)};"
        in verdict
    )
    assert "; 56.0 GFLOPs and 54.0 GFLOPs)" in verdict and "not equal after all" not in verdict


def test_verdict_states_if_compute_matched_arms_are_not_equal(tmp_path: Path) -> None:
    arms = {**ARMS, "direct_grpo_compute": ARMS["direct_grpo"]}
    verdict = report.build([fake_run(tmp_path / "out", seeds=(0,), arms=arms)])["verdict"]
    assert "; 56.0 GFLOPs and 18.0 GFLOPs, not equal after all)" in verdict


@pytest.mark.usefixtures("undrawn")
def test_failed_node_is_reported_with_its_sentence_and_skipped_arms(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "direct_grpo", "bridge_rl", "replay")}
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms=arms)
    opd = names(out, "bridge_rl", 1)[-2]  # OPD on 1H, which bridge_rl and replay share
    own = names(out, "direct_grpo", 0)[-1]
    for node, sentence in ((opd, "opd, step 3 of 12: the loss is <b>not finite</b>"), (own, "no group differs.")):
        (out / "nodes" / node / "DONE").unlink()
        failed = {"sentence": sentence, "code": 4, "traceback": "a/private/path"}
        (out / "nodes" / node / "FAILED").write_text(json.dumps(failed))
    (out / "nodes" / names(out, "replay", 1)[-1] / "DONE").unlink()
    values = report.write(out)
    direct, replay = values["arms"]["direct_grpo"], values["arms"]["replay"]
    assert direct["failed"]["0"] == {
        "state": "failed", "node": own, "stage": "student_rl", "sentence": "no group differs.", "code": 4
    }  # fmt: skip
    assert direct["unfinished"] == {} and set(direct["accuracy"]["sums"]["per_seed"]) == {"1"}
    assert (replay["failed"]["1"]["state"], replay["failed"]["1"]["node"]) == ("not run", opd)
    assert (
        "Failed: student_rl (seed 0): no group differs. Stopped: opd (seed 1): opd, step 3 of 12: " in values["verdict"]
    )
    assert values["verdict"].endswith("Not run because of it: bridge_rl, replay.")
    page, text = (out / "report.html").read_text(), " ".join(printed(values, 110).split())
    assert ">failed on seed 0<" in page and page.count(">not run on seed 1<") == 2
    assert "Failed: Student RL (seed 0; direct_grpo): no group differs." in page
    where = "On-policy distillation at step 3 of 12 (seed 1; bridge_rl, replay)"
    assert f"Stopped: {where}: the loss is &lt;b&gt;not finite&lt;/b&gt;." in page
    assert "replay: not run on seed 1 (opd stopped: opd, step 3 of 12: the loss is <b>not finite</b>)" in text
    assert "private" not in page + text + json.dumps(values)


@pytest.mark.usefixtures("undrawn")
def test_validation_labels_are_counted_apart_and_noted_below_table(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,))
    ledger = out / "nodes" / names(out, "bridge", 0)[-1] / "ledger.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    looks = {**rows[0], "purpose": "validation", "labels": [f"v{i}" for i in range(30)], "checks": 120, "flops": 5e9}
    write_rows(ledger, [*rows, looks, {**looks, "step": 4}])
    values = report.write(out)
    bridge = values["arms"]["bridge"]
    assert bridge["labels"] == {"distinct": 96, "checks": 768} and bridge["flops"] == 5.6e10  # as without them
    assert bridge["apart"]["validation"]["labels"] == {"distinct": 30, "checks": 240}
    assert bridge["apart"]["validation"]["flops"] == 1e10
    page, text = (out / "report.html").read_text(), " ".join(printed(values, 110).split())
    assert "Accuracy on sums and costs (and 30 validation labels)" in page
    assert "and 30 validation labels, which decided when stages end, in bridge" in text
    assert "validation 10.0 GFLOPs" in text


@pytest.mark.parametrize(
    ("low", "high", "p", "result", "note"),
    [
        (0.01, 0.06, 0.009, "holds", ""),
        (-0.06, -0.01, 0.009, "does not hold", ""),
        (-0.01, 0.06, 0.3, "undecided", ""),
        (0.001, 0.06, 0.061, "undecided", " (the interval excludes 0 but p is not below 0.05: undecided)"),
        (-0.001, 0.06, 0.041, "undecided", " (p is below 0.05 but the interval includes 0: undecided)"),
    ],
)
def test_contrast_is_decided_only_by_interval_and_p(low: float, high: float, p: float, result: str, note: str) -> None:
    contrast = {"a": "bridge", "b": "replay", "difference": (low + high) / 2, "low": low, "high": high, "p": p}
    assert contrasts.reading(contrast) == result
    assert contrasts.difference_text(contrast).endswith(f", p {p:.3f}{note}")
