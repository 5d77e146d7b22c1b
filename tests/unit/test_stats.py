"""Statistics: estimates, intervals and p-values against scipy, hand computations and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit

from headwater import stats


def test_avg_at_k_is_share_of_correct_samples() -> None:
    assert stats.avg_at_k([1, 4, 0], [4, 4, 2]).tolist() == [0.25, 1.0, 0.0]


def test_pass_at_k_equals_share_of_subsets_with_correct_sample() -> None:
    # n=4, c=2, k=2: of the C(4,2)=6 pairs only {wrong, wrong} fails. c=3: no pair is all wrong. c=0: all are.
    assert stats.pass_at_k([2, 3, 0], [4, 4, 4], 2).tolist() == pytest.approx([5 / 6, 1.0, 0.0])
    # k=1 is the accuracy, k=n is "any at all".
    assert stats.pass_at_k([2], [5], 1) == pytest.approx(0.4)
    assert stats.pass_at_k([1], [5], 5) == pytest.approx(1.0)


def test_pass_at_k_neither_overflows_nor_cancels_at_1000_samples() -> None:
    exact = 1 - math.comb(997, 500) / math.comb(1000, 500)
    assert stats.pass_at_k([3], [1000], 500)[0] == pytest.approx(exact, rel=1e-12)
    # One correct sample of a million: pass@1 = 1e-6, where 1 - C/C would have lost digits.
    assert stats.pass_at_k([1], [1_000_000], 1)[0] == pytest.approx(1e-6, rel=1e-9)


def test_pass_at_k_rejects_k_above_number_of_samples() -> None:
    with pytest.raises(ValueError, match="at least 5 samples"):
        stats.pass_at_k([1, 1], [8, 4], 5)


def test_maj_at_k_takes_most_frequent_answer_and_averages_ties() -> None:
    right, wrong, other, none = ("7", True), ("9", False), ("8", False), (None, False)
    assert stats.maj_at_k([right, right, wrong]) == 1.0
    assert stats.maj_at_k([right, wrong, wrong]) == 0.0
    assert stats.maj_at_k([right, wrong]) == 0.5
    assert stats.maj_at_k([right, wrong, other]) == pytest.approx(1 / 3)
    # Missing answers count as one wrong answer: two of them beat one right answer, and tie with two.
    assert stats.maj_at_k([right, none, none]) == 0.0
    assert stats.maj_at_k([right, right, none, none]) == 0.5
    assert stats.maj_at_k([none, (None, True)]) is None


def test_maj_at_k_gives_correct_answers_one_vote_in_any_spelling() -> None:
    def votes(*answers: tuple[str, bool]) -> float | None:
        return stats.maj_at_k(answers)

    assert votes(("5", True), ("x=5", True), ("3", False), ("3", False)) == 0.5
    assert votes(("2k+2", True), ("2(k+1)", True), ("k", False)) == 1.0
    assert votes(("1", True), ("2/2", True), ("0", False), ("0", False), ("0", False)) == 0.0
    # Wrong answers stay apart, so two of them do not outvote one right answer twice as often.
    assert votes(("5", True), ("6", False), ("7", False)) == pytest.approx(1 / 3)
    # One of three copies ran out of time: the vote counts as two thirds correct.
    assert votes(("5", True), ("5", True), ("5", False), ("3", False)) == pytest.approx(2 / 3)
    # Where different answers can be correct they stay different: two ways to the target are no majority of three.
    attempts = [("50+24-46", True), ("24-46+50", True), ("1+1", False), ("1+1", False)]
    assert stats.maj_at_k(attempts, one_answer=False) == 0.0
    assert stats.maj_at_k(attempts) == 0.5


def test_wilson_matches_scipy_and_closed_form_at_0_and_1() -> None:
    # Zero of n: high = z²/(n+z²) = 3.8415/13.8415.
    assert stats.wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert stats.wilson(1.0, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)
    expected = scipy.stats.binomtest(81, 263).proportion_ci(method="wilson")
    assert stats.wilson(81 / 263, 263) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_accuracy_interval_has_width_if_all_answers_are_wrong_or_all_right(value: float, seeds: int) -> None:
    result = stats.accuracy_interval(np.full((seeds, 100), value))
    width = 1.959964**2 / (100 + 1.959964**2)
    assert result.mean == value
    assert result.high - result.low == pytest.approx(width, abs=1e-6)
    assert result.low == 0.0 or result.high == 1.0


def test_accuracy_interval_of_one_seed_matches_scipy_bootstrap() -> None:
    values = np.random.default_rng(3).binomial(4, np.random.default_rng(4).beta(1, 2, 300)) / 4
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(5)
    ).confidence_interval
    result = stats.accuracy_interval(values[None])
    assert result.mean == pytest.approx(values.mean())
    # Two percentile bootstraps differ by their draws (0.001) and by t/z with 299 degrees of freedom (0.4 % of 0.045).
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_variance_matches_two_way_analysis_of_variance_by_hand() -> None:
    # x = [[0, 1], [1, 1]]: seed means .5 and 1, problem means .5 and 1, residuals ±.25.
    # var_s/S = .125/2, var_p/P = .125/2, MS_rest/(SP) = (4·.0625/1)/4 = .0625; sum .0625 each: .0625+.0625-.0625.
    variance, freedom = stats._variance(np.array([[0.0, 1.0], [1.0, 1.0]]))
    assert variance == pytest.approx(0.0625)
    # .0625² / (.0625²/1 + .0625²/1 + .0625²/1) = 1/3.
    assert freedom == pytest.approx(1 / 3)


def test_accuracy_interval_widens_with_spread_of_seeds() -> None:
    values = np.random.default_rng(0).binomial(1, 0.5, (3, 200)).astype(float)
    shifted = np.clip(values + np.array([[-0.2], [0.0], [0.2]]), 0, 1)
    narrow, wide = stats.accuracy_interval(values), stats.accuracy_interval(shifted)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("seeds", "seed_effect", "offset"), [(1, 0.0, -1.0), (3, 0.4, -1.0), (5, 0.4, -1.0), (1, 0.0, -5.5)]
)
def test_accuracy_interval_has_its_nominal_coverage(seeds: int, seed_effect: float, offset: float) -> None:
    """Pass rates logit-normal over 80 problems, 4 samples each; the truth is the mean over problems and seeds."""
    rng = np.random.default_rng(11)
    truth = expit(offset + math.hypot(1.5, seed_effect) * rng.normal(size=400_000)).mean()
    trials, covered = 300, 0
    for _ in range(trials):
        logits = offset + 1.5 * rng.normal(size=(1, 80)) + seed_effect * rng.normal(size=(seeds, 1))
        result = stats.accuracy_interval(rng.binomial(4, expit(logits), (seeds, 80)) / 4)
        covered += result.low <= truth <= result.high
    # Three standard errors of 300 trials at 95 % are 3.8 points; a wider interval is acceptable.
    assert covered / trials > 0.912


@pytest.mark.parametrize(("seeds", "seed_effect"), [(2, 0.3), (5, 0.0), (5, 0.3)])
def test_contrast_interval_has_its_nominal_coverage_and_is_not_too_wide(seeds: int, seed_effect: float) -> None:
    """Two arms on the same 80 problems, 4 samples each; without a seed effect the plain bootstrap covers 99.5 %."""
    rng = np.random.default_rng(12)

    def trial(problems: int) -> tuple[np.ndarray, np.ndarray]:
        hard, shift = 1.5 * rng.normal(size=problems), seed_effect * rng.normal(size=(seeds, 1))
        return expit(hard - 0.3 + shift + 0.3 * rng.normal(size=(seeds, problems))), expit(hard - 0.8 + 0 * shift)

    gaps = [np.subtract(*trial(200)).mean() for _ in range(3000)]
    truth, trials, covered = float(np.mean(gaps)), 400, 0
    for _ in range(trials):
        a, b = trial(80)
        b = np.broadcast_to(b, a.shape)
        result = stats.contrast(rng.binomial(4, a) / 4, rng.binomial(4, b) / 4)
        covered += result.low <= truth <= result.high
    assert 0.895 < covered / trials < 0.995


def test_contrast_of_swapped_arms_is_exact_negative() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.binomial(4, 0.4, (3, 60)) / 4, rng.binomial(4, 0.35, (3, 60)) / 4
    ab, ba = stats.contrast(a, b), stats.contrast(b, a)
    assert (ab.difference, ab.low, ab.high, ab.p) == (-ba.difference, -ba.high, -ba.low, ba.p)
    even = np.array([[0.0, 1.0, 0.25, 0.75]])
    ab, ba = stats.contrast(even, even[:, ::-1]), stats.contrast(even[:, ::-1], even)
    assert (ab.difference, ab.low, ab.high, ab.p) == (-ba.difference, -ba.high, -ba.low, ba.p)


def test_contrast_of_equal_arms_is_zero_with_p_one_and_nonzero_width() -> None:
    same = np.random.default_rng(2).binomial(4, 0.4, (2, 50)) / 4
    result = stats.contrast(same, same)
    half_width = stats.wilson(0.0, 50)[1]
    assert (result.difference, result.p) == (0.0, 1.0)
    assert (result.low, result.high) == pytest.approx((-half_width, half_width))


def test_contrast_is_narrower_than_arms_with_shared_problem_difficulty() -> None:
    hard = np.random.default_rng(3).random(200)
    a, b = np.clip(hard + 0.1, 0, 1)[None], hard[None]
    paired = stats.contrast(a, b)
    assert paired.high - paired.low < 0.02
    assert paired.low < paired.difference < paired.high
    alone = stats.accuracy_interval(a)
    assert alone.high - alone.low > 0.06


def test_sign_flip_p_is_exact_if_few_problems_differ() -> None:
    # [1, 1, 1]: |sum| = 3 in 2 of 8 patterns. [2, 1, 1, 0]: |sum| = 4 in 2 of 8; the 0 changes nothing.
    assert stats.sign_flip_p(np.array([1.0, 1.0, 1.0])) == 0.25
    assert stats.sign_flip_p(np.array([2.0, 1.0, 1.0, 0.0])) == 0.25
    # [3, -1, -1]: sum 1; the patterns' sums are ±5, ±3 (twice), ±1: all are at least 1 in size.
    assert stats.sign_flip_p(np.array([3.0, -1.0, -1.0])) == 1.0
    assert stats.sign_flip_p(np.zeros(5)) == 1.0


def test_sign_flip_p_matches_scipy_permutation_test() -> None:
    values = np.random.default_rng(6).normal(0.18, 1.0, 120)
    expected = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(7), axis=0
    ).pvalue
    assert 0.01 < expected < 0.2
    assert stats.sign_flip_p(values) == pytest.approx(expected, abs=0.015)


def test_sign_flip_p_is_uniform_under_null_hypothesis() -> None:
    rng = np.random.default_rng(8)
    result = [stats.sign_flip_p(rng.normal(size=40)) for _ in range(400)]
    assert scipy.stats.kstest(result, "uniform").pvalue > 0.01


def test_contrast_p_keeps_level_with_repeated_problem_effects() -> None:
    """Flipping each (problem, seed) independently would count the effect of one problem five times."""
    rng, low = np.random.default_rng(9), 0
    for _ in range(300):
        effect = rng.normal(0, 0.2, 60)
        a = np.clip(0.5 + effect + rng.normal(0, 0.05, (5, 60)), 0, 1)
        low += stats.contrast(a, np.full((5, 60), 0.5)).p < 0.05
    assert low / 300 < 0.09


def test_intervals_reject_missing_values_and_unpaired_shapes() -> None:
    with pytest.raises(ValueError, match="finite"):
        stats.accuracy_interval(np.array([[0.5, np.nan]]))
    with pytest.raises(ValueError, match="same seeds and problems"):
        stats.contrast(np.zeros((1, 3)), np.zeros((2, 3)))


def test_intervals_accept_single_problem() -> None:
    result = stats.accuracy_interval(np.array([[0.5]]))
    assert result.low < 0.5 < result.high
    assert stats.contrast(np.array([[1.0]]), np.array([[0.0]])).p == 1.0
