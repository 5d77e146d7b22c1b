"""Advice: hand-computed margins on both sides of every threshold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headwater.doctor import evidence
from headwater.doctor.advice import (
    C1_SATURATED,
    CLOSE_MARGIN,
    MAX_KL_WITHOUT_WARMUP,
    MAX_WARMUP_COST,
    MIN_INFORMATIVE,
    MIN_LEAD,
    arm_to_run,
    follow_up_advice,
    label_advice,
    outcome_advice,
    student_rl_advice,
    teacher_advice,
    warmup_advice,
)
from headwater.doctor.probe_result import ProbeResult
from headwater.doctor.readiness import Continuations, PairMeasures, Readiness
from headwater.stats import Interval
from headwater.tasks.outcomes import Outcomes


def known(share: float) -> Interval:
    return Interval(share, share, share)


MOSTLY_WRONG, CUT = Outcomes({"wrong": 8, "right": 2}), Outcomes({"cut": 48, "wrong": 2})


def model(informative: float, pass_rate: float = 0.2, outcomes: Outcomes = MOSTLY_WRONG) -> Readiness:
    return Readiness(
        pass_rate=known(pass_rate),
        pass_at={8: 0.5},
        group_size=8,
        informative=known(informative),
        informative_formula=informative,
        c1=0.4,
        truncated=0.0,
        ended=1.0,
        entropy=0.5,
        tokens=10.0,
        outcomes=outcomes,
        stage="stages.teacher_rl",
        max_tokens=48,
    )


def pair(student: float, teacher: float, kl: float = 0.0, passes: float = 1.0) -> PairMeasures:
    """Both have a signal; they end right so often from the teacher's right beginnings."""
    return PairMeasures(model(0.5), model(0.9), 0.5, Continuations(100, known(student), known(teacher), kl), passes)


def test_probe_result_is_typed_and_mapping() -> None:
    measures = pair(student=0.30, teacher=0.95)
    result = ProbeResult(measures, {"problems": 16})
    assert (result.arm, result.labels, result.warmup) == (
        arm_to_run(measures)[0],
        label_advice(measures),
        warmup_advice(measures),
    )
    assert result.student is measures.student and result.teacher is measures.teacher
    assert dict(result) == {"problems": 16} and "arm='bridge'" in repr(result)


def test_large_teacher_lead_gives_labels_to_teacher() -> None:
    advice = label_advice(pair(student=0.30, teacher=0.95))
    assert advice.where == "teacher" and advice.arm == "bridge"
    assert advice.margin == pytest.approx(0.65 - MIN_LEAD)
    assert "95 %" in advice.because and "30 %" in advice.because and "65 points" in advice.because


def test_small_teacher_lead_gives_labels_to_student() -> None:
    advice = label_advice(pair(student=0.80, teacher=0.95))
    assert advice.where == "student" and advice.arm == "direct_grpo"
    assert advice.margin == pytest.approx(0.15 - MIN_LEAD)


def test_large_divergence_with_few_rollouts_reduces_lead() -> None:
    # 0.2 nats and 8 passes cost 0.2·3 = 0.6 of the lead of 0.65; 2 passes cost 0.2.
    assert label_advice(pair(0.30, 0.95, kl=0.2, passes=8.0)).margin == pytest.approx(0.65 - 0.6 - MIN_LEAD)
    assert label_advice(pair(0.30, 0.95, kl=0.2, passes=8.0)).where == "student"
    assert label_advice(pair(0.30, 0.95, kl=0.2, passes=2.0)).margin == pytest.approx(0.65 - 0.2 - MIN_LEAD)
    assert label_advice(pair(0.30, 0.95, kl=0.2, passes=2.0)).where == "teacher"


@pytest.mark.parametrize("passes", [0.0, 0.5, 1.0])
def test_rollouts_read_at_most_once_cost_nothing(passes: float) -> None:
    assert label_advice(pair(0.30, 0.95, kl=5.0, passes=passes)).margin == pytest.approx(0.65 - MIN_LEAD)


def test_margin_within_sampling_noise_is_called_close() -> None:
    edge = 0.95 - MIN_LEAD
    assert (
        label_advice(pair(edge - 0.9 * CLOSE_MARGIN, 0.95)).close
        and label_advice(pair(edge + 0.9 * CLOSE_MARGIN, 0.95)).close
    )
    assert not label_advice(pair(edge - 1.1 * CLOSE_MARGIN, 0.95)).close


@pytest.mark.parametrize(
    ("student", "teacher", "where"),
    [
        (MIN_INFORMATIVE - 0.01, MIN_INFORMATIVE - 0.01, "nowhere"),
        (MIN_INFORMATIVE - 0.01, MIN_INFORMATIVE + 0.01, "teacher"),
        (MIN_INFORMATIVE + 0.01, MIN_INFORMATIVE - 0.01, "student"),
    ],
)
def test_model_without_signal_gets_no_labels(student: float, teacher: float, where: str) -> None:
    # By the lead alone each of these would be the other way round.
    lead = 0.0 if where == "teacher" else 0.9
    advice = label_advice(replace(pair(0.95 - lead, 0.95), student=model(student), teacher=model(teacher)))
    assert (advice.where, advice.margin) == (where, None)
    assert f"{100 * student:.0f} %" in advice.because and f"{100 * teacher:.0f} %" in advice.because


def test_perfect_teacher_needs_no_labels() -> None:
    advice = label_advice(replace(pair(0.5, 1.0), teacher=model(0.02, pass_rate=0.99)))
    assert advice.where == "student" and "opd_then_rl" in advice.because


@pytest.mark.parametrize(
    ("rates", "message"),
    [((0.01, 0.01), "easier problems"), ((0.99, 0.99), "harder problems"), ((0.01, 0.99), "raw_teacher")],
)
def test_advice_without_signal_names_remedies(rates: tuple[float, float], message: str) -> None:
    advice = label_advice(replace(pair(0.5, 1.0), student=model(0.0, rates[0]), teacher=model(0.0, rates[1])))
    assert advice.where == "nowhere" and advice.arm is None and message in advice.because


def test_teacher_at_its_best_of_k_leaves_labels_to_student() -> None:
    # Whatever its lead: labels upstream could raise it from 93 % to 98 % at most.
    measures = pair(student=0.30, teacher=0.95)
    sated = replace(measures.teacher, pass_rate=known(0.93), pass_at={8: 0.98}, c1=0.949)
    advice = label_advice(replace(measures, teacher=sated))
    assert advice.where == "student" and advice.margin is None
    assert "93 %" in advice.because and "98 %" in advice.because and "0.95" in advice.because
    hungry = replace(sated, c1=C1_SATURATED - 0.01)
    assert label_advice(replace(measures, teacher=hungry)).where == "teacher"
    # A student without a signal can spend none, so they go where there is one all the same.
    silent = replace(measures.student, informative=known(0.0))
    assert label_advice(replace(measures, teacher=sated, student=silent)).where == "teacher"


def test_teacher_without_correct_answer_is_not_advised() -> None:
    assert label_advice(replace(pair(0.5, 1.0), continuations=None)).where == "student"


def test_warmup_advice_follows_c2_on_student_prefixes() -> None:
    near, far = (
        warmup_advice(replace(pair(0.5, 0.9), kl_student_prefixes=kl))
        for kl in (0.9 * MAX_KL_WITHOUT_WARMUP, 1.1 * MAX_KL_WITHOUT_WARMUP)
    )
    assert (near.needed, far.needed) == (False, True)
    assert f"{1.1 * MAX_KL_WITHOUT_WARMUP:.2f} nats" in far.because


def test_warmup_is_omitted_if_overfitting_unless_coverage_is_low() -> None:
    # At 4 passes the toll is twice the divergence.
    few, enough = (pair(0.3, 0.9, kl=half * MAX_WARMUP_COST, passes=4.0) for half in (0.55, 0.45))
    assert (
        not warmup_advice(few).needed
        and "opd_only" in warmup_advice(few).because
        and "4.0 times" in warmup_advice(few).because
    )
    assert warmup_advice(enough).needed
    assert warmup_advice(replace(few, student=model(MIN_INFORMATIVE - 0.01))).needed


def test_switch_advice_names_existing_metrics_and_valid_until() -> None:
    from headwater.config.stage import Until

    result = student_rl_advice(pair(0.5, 0.9))
    assert "`informative`" in result and "50 %" in result and "kl_student_teacher" in result
    assert "{metric: validation, every: 10, patience: 2}" in result
    assert Until(metric="validation", every=10, patience=2).metric == "validation"


def test_close_advice_runs_bridge_rl_with_half_of_labels_each() -> None:
    edge = 0.95 - MIN_LEAD
    for student, arm in ((edge - 0.9 * CLOSE_MARGIN, "bridge_rl"), (edge + 0.9 * CLOSE_MARGIN, "bridge_rl")):
        assert arm_to_run(pair(student, 0.95))[0] == arm
    clear = arm_to_run(pair(edge - 1.1 * CLOSE_MARGIN, 0.95)), arm_to_run(pair(edge + 1.1 * CLOSE_MARGIN, 0.95))
    assert clear == (("bridge", "the labels go to the teacher"), ("direct_grpo", "the labels go to the student"))


def test_completions_cut_at_their_limit_are_named_before_any_other_advice() -> None:
    measures = replace(pair(0.5, 1.0), student=model(0.5), teacher=model(0.0, 0.0, CUT))
    assert outcome_advice(measures) == {
        "teacher": "96 % of the completions were cut at max_tokens = 48, 4 % were wrong: raise stages.teacher_rl.sampling."
        "max_tokens or, if the answers never end, lower stages.teacher_rl.sampling.temperature or check stop ids and chat template"
    }
    # A signal from the few that ended says little about the model: most of its answers were not judged.
    assert outcome_advice(replace(measures, teacher=model(0.5, 0.1, CUT))).keys() == {"teacher"}
    nowhere = replace(measures, student=model(0.0, 0.0, CUT))
    assert outcome_advice(nowhere).keys() == {"student", "teacher"}
    assert "First fix what prevents their answers from being graded" in label_advice(nowhere).because


def test_outcomes_of_models_with_signal_need_no_advice() -> None:
    assert outcome_advice(pair(0.5, 1.0)) == {}


def test_teacher_no_better_than_its_student_is_named_with_numbers() -> None:
    better = replace(pair(0.5, 1.0), student=model(0.5, 0.41), teacher=model(0.5, 0.43))
    assert teacher_advice(better) is None
    worse = str(teacher_advice(replace(better, teacher=model(0.5, 0.40))))
    assert "the teacher is right 40 % of the time, the student 41 %" in worse and "(bridge)" in worse
    assert "the teacher is right 41 %" in str(teacher_advice(replace(better, teacher=model(0.5, 0.41))))
    same = str(teacher_advice(replace(better, same_weights=True, kl_student_prefixes=0.0)))
    assert same.startswith("student and teacher are the same weights: KL(student‖teacher) is 0.000 nats a token")


def test_saturated_teacher_no_better_than_its_student_is_not_distilled() -> None:
    measures = pair(student=0.90, teacher=0.90)
    sated = replace(model(0.5, 0.9), c1=0.95)
    advice = label_advice(replace(measures, student=sated, teacher=sated))
    assert advice.where == "student" and "raw_teacher" not in advice.because


GAIN = evidence.Evidence("bridge_plus", 9.0, 8.0, 10.0, 5, "pocket", needs_prompts=True)
SMALLER = evidence.Evidence("short_rl", 3.0, 1.0, 5.0, 5, "pocket", needs_prompts=False)
NO_GAIN = evidence.Evidence("opd2", 20.0, -1.0, 41.0, 2, "pocket", needs_prompts=False)


@pytest.mark.parametrize(("spare", "arm"), [(1744, "bridge_plus"), (0, "short_rl")])
def test_follow_up_with_best_evidence_is_named(spare: int, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MEASURED", (NO_GAIN, SMALLER, GAIN))
    advice = follow_up_advice(replace(pair(student=0.30, teacher=0.95, passes=2.5), spare_prompts=spare))
    assert advice is not None and advice.arm == arm
    assert ("1,744 problems" in advice.because and "2.5 times" in advice.because) == bool(spare)
    assert "over bridge at equal labels and FLOPs, on 5 seeds of pocket" in advice.because


def test_follow_up_with_loss_elsewhere_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(GAIN, difference=-27.0, low=-30.0, high=-23.0, recipe="pocket-skills")
    monkeypatch.setattr(evidence, "MEASURED", (SMALLER, GAIN, lost))
    advice = follow_up_advice(replace(pair(student=0.30, teacher=0.95, passes=2.5), spare_prompts=1744))
    assert advice is not None and advice.arm == "short_rl"


def test_no_follow_up_without_gain_or_with_labels_on_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MEASURED", (NO_GAIN,))
    assert follow_up_advice(pair(student=0.30, teacher=0.95)) is None
    monkeypatch.setattr(evidence, "MEASURED", (SMALLER,))
    assert follow_up_advice(pair(student=0.80, teacher=0.95)) is None  # the labels go to the student


def test_evidence_agrees_with_results_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-")
    assert evidence.MEASURED
    for row in evidence.MEASURED:
        lines = [line for line in page.splitlines() if line.startswith(f"| `{row.arm}` - `bridge` |")]
        figures = f"| {row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}] |"
        assert any(figures in line for line in lines), row
