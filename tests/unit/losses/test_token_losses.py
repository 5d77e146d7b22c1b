"""Token losses: numbers worked out by hand, gradients against finite differences, limits and edge cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from headwater.losses import token_losses

LN2 = math.log(2.0)
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": token_losses.forward_kl,
    "reverse": token_losses.reverse_kl,
    "jsd half": partial(token_losses.jsd, beta=0.5),
    "jsd tenth": partial(token_losses.jsd, beta=0.1),
    "skewed": partial(token_losses.skewed_reverse_kl, beta=0.9),
    "entropy aware": partial(token_losses.entropy_aware_kl, above=0.5),
}


def logp(*probabilities: float) -> Tensor:
    """One token's distribution as log-probs (1, E), float64; probability 0 gives −inf."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_logp(rows: int = 6, events: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2.0 * torch.randn(rows, events, dtype=torch.float64, generator=generator), dim=-1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "loss", "gradient"),
    [
        # Inside the clip: −r·A, gradient −r·A by the student's log-prob.
        (1.1, 2.0, 0.2, 0.2, -2.2, -2.2),
        (1.1, -2.0, 0.2, 0.2, 2.2, 2.2),
        # Good token, already more likely than under the old policy: −min(1.5·2, 1.2·2) = −2.4, and no further push.
        (1.5, 2.0, 0.2, 0.2, -2.4, 0.0),
        # Good token, less likely than under the old policy: −min(0.5·2, 0.8·2) = −1.0, the push back is kept.
        (0.5, 2.0, 0.2, 0.2, -1.0, -1.0),
        # Bad token, already less likely than under the old policy: −min(0.5·−2, 0.8·−2) = 1.6, and no further push.
        (0.5, -2.0, 0.2, 0.2, 1.6, 0.0),
        # Bad token, more likely than under the old policy: −min(1.5·−2, 1.2·−2) = 3.0, the push back is kept.
        (1.5, -2.0, 0.2, 0.2, 3.0, 3.0),
        # The two clips differ: high 0.5 stops 1.6 at 1.5; low 0.1 stops 0.5 at 0.9.
        (1.6, 1.0, 0.1, 0.5, -1.5, 0.0),
        (1.4, 1.0, 0.1, 0.5, -1.4, -1.4),
        (0.5, -1.0, 0.1, 0.5, 0.9, 0.0),
        (0.95, -1.0, 0.1, 0.5, 0.95, 0.95),
    ],
)
def test_policy_gradient_clips_only_updates_beyond_trust_region(
    ratio: float, advantage: float, low: float, high: float, loss: float, gradient: float
) -> None:
    old = torch.tensor([-1.3], dtype=torch.float64)
    student = (old + math.log(ratio)).requires_grad_()
    result = token_losses.policy_gradient(student, old, torch.tensor([advantage], dtype=torch.float64), low, high)
    assert result.item() == pytest.approx(loss, rel=1e-12)
    assert torch.autograd.grad(result.sum(), student)[0].item() == pytest.approx(gradient, rel=1e-12)


def test_policy_gradient_at_ratio_one_is_minus_advantage() -> None:
    student = torch.tensor([-0.1, -2.0, -30.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    token_losses.policy_gradient(student, student.detach(), advantages, 0.2, 0.2).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == (-advantages).tolist()


def test_policy_gradient_passes_gradcheck_away_from_clip_edges() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    student = (old + torch.tensor([1.1, 0.5, 1.6, 0.7], dtype=torch.float64).log()).requires_grad_()
    advantages = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.float64)
    assert gradcheck(lambda x: token_losses.policy_gradient(x, old, advantages, 0.2, 0.3), (student,))


def test_reference_kl_k3_by_hand() -> None:
    student = torch.tensor([-1.0, -1.0 - LN2, -1.0 + LN2], dtype=torch.float64, requires_grad=True)
    reference = torch.full((3,), -1.0, dtype=torch.float64)
    result = token_losses.reference_kl(student, reference)
    # d = 0: 1 − 0 − 1 = 0;  d = ln 2: 2 − 0.6931 − 1 = 0.3069;  d = −ln 2: ½ + 0.6931 − 1 = 0.1931
    assert result.tolist() == pytest.approx([0.0, 1.0 - LN2, LN2 - 0.5], abs=1e-12)
    # Its derivative by the student is 1 − exp(d): 0, −1, ½.
    assert torch.autograd.grad(result.sum(), student)[0].tolist() == pytest.approx([0.0, -1.0, 0.5], abs=1e-12)
    assert gradcheck(lambda x: token_losses.reference_kl(x, reference), (student,))


def test_reference_kl_k3_is_unbiased_over_vocabulary() -> None:
    student, reference = random_logp(1, 7, seed=1), random_logp(1, 7, seed=2)
    averaged = (student.exp() * token_losses.reference_kl(student, reference)).sum()
    assert averaged.item() == pytest.approx(token_losses.reverse_kl(student, reference).item(), rel=1e-12)


def test_cross_entropy_is_minus_log_prob() -> None:
    student = torch.tensor([math.log(0.25), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    result = token_losses.cross_entropy(student)
    assert result.tolist() == pytest.approx([2 * LN2, LN2], rel=1e-12)
    assert gradcheck(token_losses.cross_entropy, (student,))


def test_divergences_by_hand() -> None:
    student, teacher = logp(0.25, 0.75), logp(0.5, 0.5)
    # KL(T‖S) = ½ ln(½ / ¼) + ½ ln(½ / ¾) = 0.34657 − 0.20273 = 0.14384
    assert token_losses.forward_kl(student, teacher).item() == pytest.approx(0.1438410, abs=1e-7)
    # KL(S‖T) = ¼ ln(¼ / ½) + ¾ ln(¾ / ½) = −0.17329 + 0.30410 = 0.13081
    assert token_losses.reverse_kl(student, teacher).item() == pytest.approx(0.1308120, abs=1e-7)
    # M = (⅜, ⅝). KL(T‖M) = ½ ln(4/3) + ½ ln(4/5) = 0.0322693; KL(S‖M) = ¼ ln(2/3) + ¾ ln(6/5) = 0.0353749
    assert token_losses.jsd(student, teacher, 0.5).item() == pytest.approx((0.0322693 + 0.0353749) / 2, abs=1e-7)
    # β = ¼: M = ¼ T + ¾ S = (5/16, 11/16). KL(T‖M) = ½ ln(8/5) + ½ ln(8/11) = 0.0757750;
    # KL(S‖M) = ¼ ln(4/5) + ¾ ln(12/11) = 0.0094727
    assert token_losses.jsd(student, teacher, 0.25).item() == pytest.approx(
        0.25 * 0.0757750 + 0.75 * 0.0094727, abs=1e-6
    )
    # The second half of the JSD at β = ½: KL(S‖M) = 0.0353749.
    assert token_losses.skewed_reverse_kl(student, teacher, 0.5).item() == pytest.approx(0.0353749, abs=1e-7)
    # H(T) = ln 2 = 0.693: above 0.6 both KLs, 0.1308120 + 0.1438410; above 0.7 the reverse one alone.
    assert token_losses.entropy_aware_kl(student, teacher, 0.6).item() == pytest.approx(0.2746530, abs=1e-7)
    assert token_losses.entropy_aware_kl(student, teacher, 0.7).item() == pytest.approx(0.1308120, abs=1e-7)


def test_skewed_reverse_kl_is_bounded_where_teacher_excludes_student() -> None:
    # Disjoint supports, β = 0.9: M = (0.1, 0.9) and KL((1, 0) ‖ M) = −ln 0.1, where the plain reverse KL is infinite.
    disjoint = logp(1.0, 0.0), logp(0.0, 1.0)
    assert token_losses.skewed_reverse_kl(*disjoint, 0.9).item() == pytest.approx(-math.log(0.1), rel=1e-12)
    assert token_losses.reverse_kl(*disjoint).item() == math.inf


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_pass_gradcheck_for_student_logits(name: str) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = random_logp(4, 5, seed=3)
    assert gradcheck(lambda x: DIVERGENCES[name](torch.log_softmax(x, dim=-1), teacher), (logits,))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_of_equal_distributions_are_zero_with_zero_gradient(name: str) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    student = torch.log_softmax(logits, dim=-1)
    result = DIVERGENCES[name](student, student.detach())
    assert result.tolist() == pytest.approx([0.0] * 4, abs=1e-15)
    assert torch.autograd.grad(result.sum(), logits)[0].abs().max().item() < 1e-15


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_of_different_distributions_are_positive_and_unreduced(name: str) -> None:
    student, teacher = random_logp(6, 5, seed=4), random_logp(6, 5, seed=5)
    result = DIVERGENCES[name](student, teacher)
    alone = [DIVERGENCES[name](student[i : i + 1], teacher[i : i + 1]).item() for i in range(6)]
    assert min(alone) > 1e-3
    assert result.tolist() == pytest.approx(alone, rel=1e-12)


def test_jsd_is_symmetric_at_one_half_and_mirrored_elsewhere() -> None:
    student, teacher = random_logp(seed=6), random_logp(seed=7)
    torch.testing.assert_close(token_losses.jsd(student, teacher, 0.5), token_losses.jsd(teacher, student, 0.5))
    torch.testing.assert_close(token_losses.jsd(student, teacher, 0.2), token_losses.jsd(teacher, student, 0.8))


def test_jsd_divided_by_its_share_tends_to_two_kls() -> None:
    student, teacher = random_logp(seed=6), random_logp(seed=7)
    small = 1e-7
    torch.testing.assert_close(
        token_losses.jsd(student, teacher, small) / small,
        token_losses.forward_kl(student, teacher),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        token_losses.jsd(student, teacher, 1.0 - small) / small,
        token_losses.reverse_kl(student, teacher),
        rtol=1e-5,
        atol=1e-6,
    )


def test_divergences_ignore_events_of_probability_zero_in_both() -> None:
    teacher = logp(0.5, 0.5, 0.0)
    for divergence in DIVERGENCES.values():
        with_it = logp(0.25, 0.75, 0.0).requires_grad_()
        without = logp(0.25, 0.75).requires_grad_()
        value, expected = divergence(with_it, teacher), divergence(without, logp(0.5, 0.5))
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        gradient = torch.autograd.grad(value.sum(), with_it)[0][0].tolist()
        assert gradient == pytest.approx([*torch.autograd.grad(expected.sum(), without)[0][0].tolist(), 0.0], rel=1e-12)


def test_divergences_of_one_sided_zero_probability_give_limit_and_not_nan() -> None:
    sure, even = logp(1.0, 0.0), logp(0.5, 0.5)
    # 0 · ln 0 = 0: KL((1, 0) ‖ (½, ½)) = ln 2, seen from either loss; the other direction is infinite.
    assert token_losses.reverse_kl(sure, even).item() == pytest.approx(LN2, rel=1e-12)
    assert token_losses.forward_kl(even, sure).item() == pytest.approx(LN2, rel=1e-12)
    assert token_losses.reverse_kl(even, sure).item() == math.inf
    assert token_losses.forward_kl(sure, even).item() == math.inf
    # Disjoint supports: every event's mixture is half of one side, so the Jensen–Shannon divergence is ln 2.
    assert token_losses.jsd(sure, logp(0.0, 1.0), 0.5).item() == pytest.approx(LN2, rel=1e-12)
    # M = (¾, ¼): ½ [½ ln(⅔) + ½ ln 2] + ½ ln(4/3) = 0.0719205 + 0.1438410
    assert token_losses.jsd(sure, even, 0.5).item() == pytest.approx(0.2157616, abs=1e-7)


def test_divergences_have_finite_gradient_at_masked_student_logits() -> None:
    """A model that masks unused vocabulary entries gives log-probs of −inf there."""
    logits = torch.tensor([[1.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    for teacher in (logp(0.5, 0.5, 0.0), logp(1.0, 0.0, 0.0)):
        for name in ("forward", "jsd half"):
            result = DIVERGENCES[name](torch.log_softmax(logits, dim=-1), teacher)
            gradient = torch.autograd.grad(result.sum(), logits)[0]
            assert gradient[0, 2].item() == 0.0
            assert gradient[0, 0].item() == pytest.approx(-gradient[0, 1].item(), rel=1e-9)


def test_sampled_reverse_kl_by_hand() -> None:
    student = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([math.log(0.5)], dtype=torch.float64)
    result = token_losses.sampled_reverse_kl(student, student.detach(), teacher, 0.2, 0.2)
    # Advantage ln ½ − ln ¼ = ln 2, ratio 1: loss −ln 2, gradient −ln 2: the token becomes more likely.
    assert result.item() == pytest.approx(-LN2, rel=1e-12)
    assert torch.autograd.grad(result.sum(), student)[0].item() == pytest.approx(-LN2, rel=1e-12)


def test_sampled_reverse_kl_gradient_averages_to_full_gradient() -> None:
    logits = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    teacher = random_logp(1, 9, seed=8)
    student = torch.log_softmax(logits, dim=-1)
    full = torch.autograd.grad(token_losses.reverse_kl(student, teacher).sum(), logits, retain_graph=True)[0]
    # The nine tokens are all outcomes of one draw, weighted by their probability under the student.
    each = token_losses.sampled_reverse_kl(student[0], student[0].detach(), teacher[0], 0.2, 0.2)
    sampled = torch.autograd.grad((student[0].detach().exp() * each).sum(), logits)[0]
    assert full.abs().max().item() > 0.01
    torch.testing.assert_close(sampled, full, rtol=1e-12, atol=1e-15)


def test_sampled_reverse_kl_gradient_is_unbiased_after_update_within_clip() -> None:
    """Tokens drawn from the old policy, weighted by the importance ratio, give the gradient at the new one."""
    logits = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(logits.detach() + 0.05 * torch.randn(1, 6, dtype=torch.float64), dim=-1)
    teacher = random_logp(1, 6, seed=9)
    student = torch.log_softmax(logits, dim=-1)
    full = torch.autograd.grad(token_losses.reverse_kl(student, teacher).sum(), logits, retain_graph=True)[0]
    each = token_losses.sampled_reverse_kl(student[0], old[0], teacher[0], 0.9, 9.0)
    sampled = torch.autograd.grad((old[0].exp() * each).sum(), logits)[0]
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-14)


def test_truncated_importance_by_hand_without_gradient() -> None:
    old, drawn = (torch.tensor(values).log() for values in ([0.3, 0.1, 0.25], [0.1, 0.2, 0.25]))
    # 0.3 / 0.1 = 3, cut to 2; 0.1 / 0.2 = ½; equal: 1.
    torch.testing.assert_close(token_losses.truncated_importance(old, drawn, 2.0), torch.tensor([2.0, 0.5, 1.0]))
    assert not token_losses.truncated_importance(old.requires_grad_(), drawn, 2.0).requires_grad
