"""Teacher distributions: the forms agree, compositions are exact, and top-k bounds the exact divergence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from headwater.losses import token_losses
from headwater.losses.comparison import Student
from headwater.losses.distributions import Composed, Distributions, FromHidden, Gain, concatenate
from headwater.losses.materialized import TAIL_FLOOR, Exact, TopK

DIVERGENCES = {
    "forward": token_losses.forward_kl,
    "reverse": token_losses.reverse_kl,
    "jsd": partial(token_losses.jsd, beta=0.5),
}


def random_logp(rows: int, events: int, seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(spread * torch.randn(rows, events, dtype=torch.float64, generator=generator), dim=-1)


def top(logp_NV: Tensor, k: int) -> TopK:
    kept = logp_NV.topk(k, dim=-1)
    return TopK(kept.indices.int(), kept.values)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_of_whole_vocabulary_gives_exact_divergence(name: str) -> None:
    student, teacher = random_logp(20, 11, 0), random_logp(20, 11, 1)
    whole = DIVERGENCES[name](*Exact(teacher).align(student))
    kept = DIVERGENCES[name](*top(teacher, 11).align(student))
    torch.testing.assert_close(kept, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_top_k_divergence_grows_with_k_up_to_exact_one(name: str, k: int) -> None:
    student, teacher = random_logp(200, 11, 2), random_logp(200, 11, 3)
    whole = DIVERGENCES[name](student, teacher)
    kept = DIVERGENCES[name](*top(teacher, k).align(student))
    more = DIVERGENCES[name](*top(teacher, k + 1).align(student))
    assert bool((kept >= -1e-12).all())
    assert bool((kept <= more + 1e-12).all())
    assert bool((more <= whole + 1e-12).all())


def test_top_k_merges_tail_into_one_event_by_hand() -> None:
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    teacher = TopK(torch.tensor([[1]]), torch.tensor([[math.log(0.5)]], dtype=torch.float64))
    student_logp, teacher_logp = teacher.align(student)
    assert student_logp.exp().tolist() == [pytest.approx([0.25, 0.75], rel=1e-12)]
    assert teacher_logp.exp().tolist() == [pytest.approx([0.5, 0.5], rel=1e-12)]
    # ½ ln 2 + ½ ln(⅔) = 0.143841
    assert token_losses.forward_kl(student_logp, teacher_logp).item() == pytest.approx(0.1438410, abs=1e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 3, 11])
def test_top_k_divergence_of_equal_models_and_its_gradient_are_zero(name: str, k: int) -> None:
    logits = (2.0 * torch.randn(20, 11)).requires_grad_()
    student = torch.log_softmax(logits, dim=-1)
    result = DIVERGENCES[name](*top(student.detach(), k).align(student))
    assert result.abs().max().item() < 1e-6
    assert torch.autograd.grad(result.sum(), logits)[0].abs().max().item() < 1e-5


def test_top_k_tail_of_certain_teacher_is_finite_on_both_sides() -> None:
    sure = torch.tensor([[0.0, -200.0, -300.0]])
    student_logp, teacher_logp = top(sure, 2).align(torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0]]), dim=-1))
    # In float32 the teacher's tail 1 − 1 − 0 is 0; the floor stands in for it.
    assert teacher_logp[0, -1].item() == pytest.approx(math.log(TAIL_FLOOR), rel=1e-6)
    # softmax (0.0900, 0.2447, 0.6652): forward KL ≈ −ln 0.0900 = 2.4076, as without a tail.
    assert token_losses.forward_kl(student_logp, teacher_logp).item() == pytest.approx(2.4076, abs=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_divergence_passes_gradcheck(name: str) -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = top(random_logp(3, 6, 4), 2)
    assert gradcheck(lambda x: DIVERGENCES[name](*teacher.align(torch.log_softmax(x, dim=-1))), (logits,))


def test_top_k_token_logp_rejects_tokens_outside_top_k() -> None:
    teacher = TopK(torch.tensor([[4, 2], [0, 3]]), torch.tensor([[-0.5, -1.5], [-0.25, -2.0]]))
    assert teacher.token_logp(torch.tensor([2, 0])).tolist() == [-1.5, -0.25]
    with pytest.raises(ValueError, match="outside the teacher's kept top-k"):
        teacher.token_logp(torch.tensor([2, 1]))


def test_exact_token_logp_gathers_targets() -> None:
    logp = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert Exact(logp).token_logp(torch.tensor([1, 0])).exp().tolist() == pytest.approx([0.75, 0.5])


def test_from_hidden_applies_head_and_temperature_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(3.0)]]))
    plain = FromHidden(hidden, head, 1.0).materialize().logp_NV.exp()
    # logits (0, ln 3) -> (¼, ¾); logits (0, 2 ln 3) -> (1/10, 9/10)
    assert plain.tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([0.1, 0.9])]
    warm = FromHidden(hidden, head, 2.0).materialize().logp_NV.exp()
    # At temperature 2 the second row is what the first was: (0, ln 3) -> (¼, ¾).
    assert warm[1].tolist() == pytest.approx([0.25, 0.75])
    assert not plain.requires_grad


def test_composed_is_normalized_weighted_product_by_hand() -> None:
    parts = Exact(torch.tensor([[0.5, 0.5]]).log()), Exact(torch.tensor([[0.25, 0.75]]).log())
    # (½² / ¼, ½² / ¾) = (1, ⅓), normalized (¾, ¼).
    assert Composed(parts, (2.0, -1.0)).materialize().logp_NV.exp()[0].tolist() == pytest.approx([0.75, 0.25])


def test_composed_divides_each_part_by_its_own_temperature() -> None:
    head = torch.nn.Linear(4, 7)
    warm, plain = FromHidden(torch.randn(3, 4), head, 2.0), FromHidden(torch.randn(3, 4), head, 1.0)
    product = 1.5 * warm.materialize().logp_NV - 0.5 * plain.materialize().logp_NV
    actual = Composed((warm, plain), (1.5, -0.5)).materialize().logp_NV
    torch.testing.assert_close(actual, torch.log_softmax(product, dim=-1))


def test_composed_rejects_top_k_parts() -> None:
    parts = Exact(random_logp(2, 5, 0)), top(random_logp(2, 5, 1), 2)
    with pytest.raises(ValueError, match="whole distributions"):
        Composed(parts, (1.25, -0.25)).materialize()


def test_reverse_kl_to_composed_teacher_has_exopd_gradient() -> None:
    """ExOPD's reward λ (log T − log R) − (log S − log R), averaged over all tokens that the student may draw (2602.12125)."""
    logits = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    teacher, reference, student = random_logp(1, 9, 8), random_logp(1, 9, 9), torch.log_softmax(logits, dim=-1)
    target = Composed((Exact(teacher), Exact(reference)), (1.25, -0.25)).materialize()
    exact = torch.autograd.grad(token_losses.reverse_kl(*target.align(student)).sum(), logits, retain_graph=True)[0]
    drawn = student.detach()
    reward = 1.25 * (teacher - reference) - (drawn - reference)
    expected = torch.autograd.grad(-(drawn.exp() * reward * student).sum(), logits)[0]
    assert exact.abs().max().item() > 0.01
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-14)


def test_gain_moves_student_by_hand() -> None:
    # A^Δ = log(T/T₀) = ±1.0986 and A = log(T/S) = 0.4055, −0.6931, centred ±0.5493: both agree, so T̂ ∝ (½ · 3, ½ / 3).
    gain = Gain((Exact(torch.tensor([[0.75, 0.25]]).log()), Exact(torch.tensor([[0.25, 0.75]]).log())))
    student = torch.tensor([[0.5, 0.5]]).log()
    assert gain.target(student).exp()[0].tolist() == pytest.approx([0.9, 0.1])
    # A student beyond the teacher: the distance now has the other sign, and the target is the student itself.
    beyond = torch.tensor([[0.9, 0.1]]).log()
    torch.testing.assert_close(gain.target(beyond), beyond)


def test_gain_has_gradient_of_enumerated_policy_gradient() -> None:
    logits = random_logp(6, 7, 3).requires_grad_()
    teacher, base = random_logp(6, 7, 4), random_logp(6, 7, 5)
    gain = Gain((Exact(teacher), Exact(base))).materialize()
    student = torch.log_softmax(logits, dim=-1)
    loss = token_losses.reverse_kl(student, gain.target(student)).sum()
    actual = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    p = student.detach().exp()

    def centred(ratio: Tensor) -> Tensor:
        return ratio - (p * ratio).sum(dim=-1, keepdim=True)

    moved, distance = centred(teacher - base), centred(teacher - student.detach())
    advantage = moved * (moved * distance > 0)
    assert 0.2 < (advantage != 0).double().mean() < 0.8
    sampled = -(p * advantage * student).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(sampled, logits)[0])


def test_gain_rejects_top_k_parts() -> None:
    logp = random_logp(2, 5, 0)
    with pytest.raises(ValueError, match="whole distributions"):
        Gain((Exact(logp), top(logp, 2))).materialize()


def divergence_from(form: Distributions, student: Tensor) -> Tensor:
    divergence_N = form.materialize().compare(Student(student, student[:, 0]), token_losses.REVERSE, False).divergence_N
    assert divergence_N is not None
    return divergence_N


@pytest.mark.parametrize("form", ["hidden", "exact", "top", "composed", "composed of two heads", "gain", "exact gain"])
def test_concatenate_keeps_row_order_in_every_form(form: str) -> None:
    head = torch.nn.Linear(4, 7)
    hidden = torch.randn(6, 4)
    whole = FromHidden(hidden, head, 1.0)
    logp = whole.materialize().logp_NV
    two_heads = concatenate([whole.rows(0, 2), FromHidden(hidden[2:], torch.nn.Linear(4, 7), 1.0)], torch.device("cpu"))
    forms = {
        "hidden": whole,
        "exact": Exact(logp),
        "top": top(logp, 3),
        "composed": Composed((whole, Exact(logp.flip(1))), (1.25, -0.25)),
        "composed of two heads": Composed((whole, two_heads), (1.25, -0.25)),
        "gain": Gain((whole, Exact(logp.flip(1)))),
        "exact gain": Gain((Exact(logp), Exact(logp.flip(1)))),
    }
    chosen = forms[form]
    rejoined = concatenate([chosen.rows(0, 2), chosen.rows(2, 3), chosen.rows(3, 6)], torch.device("cpu"))
    student = torch.log_softmax(torch.randn(6, 7), dim=-1)
    expected = divergence_from(chosen, student)
    for start, stop in ((0, 6), (1, 4)):
        torch.testing.assert_close(
            divergence_from(rejoined.rows(start, stop), student[start:stop]), expected[start:stop]
        )
    assert len(rejoined) == 6
