"""Comparison of a student with each form of distributions, and a form of a test's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from headwater.losses import per_token, token_losses
from headwater.losses.comparison import Comparison, Student, by_autograd, compare_events
from headwater.losses.distributions import Concatenated, Distributions, FromLogits, Gain, Known, concatenate
from headwater.losses.logprobs import loss_and_stats
from headwater.losses.materialized import Exact, Grouped, Sorted, SpanLogp, TopK
from headwater.losses.output_head import LinearHead
from headwater.losses.token_losses import Divergence
from headwater.losses.token_stats import TokenInputs, TokenStats

N, V = 6, 7
CPU = torch.device("cpu")
TARGETS = torch.arange(N)
GROUP = torch.tensor([0, 2, 1, 2, 2, 0, 1])
COMPARED = torch.tensor([1, 1, 0, 1, 1, 0]) > 0


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(seed: int, events: int = V) -> Tensor:
    return torch.log_softmax(random(N, events, seed=seed), dim=-1)


def forms() -> dict[str, Known]:
    kept = log_probs(1).topk(3, dim=-1)
    grouped = Grouped(log_probs(2, 3), GROUP, COMPARED)
    return {
        "exact": Exact(log_probs(1)),
        "exact gain": Gain((Exact(log_probs(1)), Exact(log_probs(2)))),
        "top k": TopK(kept.indices, kept.values),
        "top k partly filled": TopK(kept.indices, kept.values, torch.tensor([3, 2, 0, 1, 3, 2])),
        "top k of groups": grouped.top_k(2),
        "grouped": grouped,
        "sorted": Sorted(log_probs(2, 5).sort(dim=-1, descending=True).values, COMPARED),
    }


def student_of(logits_NV: Tensor, closed: bool) -> Student:
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    return Student(
        logp_NV, logp_NV.gather(1, TARGETS[: len(logp_NV), None]).squeeze(1), logp_NV.exp() if closed else None
    )


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "entropy aware", "sorted"])
def test_gradient_of_every_form_equals_autograd(form: str, name: str) -> None:
    divergence = {
        "reverse": token_losses.REVERSE, "forward": token_losses.FORWARD, "jsd": token_losses.jensen_shannon(0.3),
        "entropy aware": token_losses.entropy_aware(1.0), "sorted": token_losses.SORTED,
    }[name]  # fmt: skip
    logits, outer = random(N, V, seed=3).requires_grad_(), random(N, seed=4)
    plain = forms()[form].compare(student_of(logits, closed=False), divergence, gradient=False)
    assert plain.divergence_N is not None and plain.gradient is None
    expected = torch.autograd.grad((plain.divergence_N * outer).sum(), logits)[0]
    with torch.no_grad():
        closed = forms()[form].compare(student_of(logits, closed=True), divergence, gradient=True)
    assert closed.gradient is not None and closed.divergence_N is not None and not closed.divergence_N.requires_grad
    torch.testing.assert_close(closed.gradient(outer[:, None]), expected, rtol=1e-9, atol=1e-11)
    assert expected.abs().max() > 1e-3
    for field in ("divergence_N", "kl_student_teacher_N", "kl_teacher_student_N"):
        actual, other = getattr(closed, field), getattr(plain, field)
        assert (actual is None) == (other is None) == (form == "sorted" and field != "divergence_N")
        if other is not None:
            torch.testing.assert_close(actual, other.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", forms())
def test_comparison_measures_kls_alone_without_divergence(form: str) -> None:
    student, outcomes = student_of(random(N, V, seed=3), closed=True), []
    for gradient in (True, False):
        compared = forms()[form].compare(student, None, gradient)
        assert compared.divergence_N is None and compared.gradient is None
        outcomes.append(compared.kl_student_teacher_N)
    assert (outcomes[0] is None) == (outcomes[1] is None) == (form == "sorted")
    if outcomes[0] is not None:
        torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.parametrize("form", [*forms(), "spans", "logits"])
def test_every_form_concatenates_its_rows(form: str) -> None:
    others: dict[str, Distributions] = {
        "spans": SpanLogp(random(N, seed=5), torch.arange(N)),
        "logits": FromLogits(random(N, V, seed=5), 0.7),
    }
    whole = forms().get(form) or others[form]
    joined = concatenate([whole.rows(0, 1), whole.rows(1, 4), whole.rows(4, N)], CPU)
    assert type(joined) is type(whole) and len(joined) == N
    for actual, expected in zip(vars(joined).values(), vars(whole).values(), strict=True):
        if isinstance(expected, tuple):  # the parts of a gain
            actual, expected = (torch.cat([part.logp_NV for part in parts]) for parts in (actual, expected))
        assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected


def test_different_forms_concatenate_after_materializing() -> None:
    logits = FromLogits(random(N, V, seed=5), 0.7)
    mixed = concatenate([Exact(log_probs(1)).rows(0, 2), logits.rows(2, N)], CPU)
    assert isinstance(mixed, Concatenated)
    known = mixed.materialize()
    assert isinstance(known, Exact)
    assert torch.equal(known.logp_NV, torch.cat([log_probs(1)[:2], logits.materialize().logp_NV[2:]]))


def test_cached_events_of_probability_zero_stay_finite() -> None:
    """The divergence from a teacher that excludes a token is large, not infinite, in every form that its log-probs take."""
    logp_NV = log_probs(1)
    logp_NV[:, 3] = -math.inf
    for cached in (Exact(logp_NV), concatenate([Exact(logp_NV).rows(0, 1), FromLogits(logp_NV, 1.0).rows(1, N)], CPU)):
        known = cached.rows(0, 1).materialize()
        for gradient in (True, False):
            compared = known.compare(student_of(random(1, V, seed=3), closed=True), token_losses.REVERSE, gradient)
            assert compared.divergence_N is not None and compared.divergence_N.isfinite().all()
            assert compared.kl_teacher_student_N is not None and compared.kl_teacher_student_N.isfinite().all()


@dataclass(frozen=True)
class Halves:
    """A form outside the package: the teacher's probability of the first `cut` tokens of the vocabulary."""

    logp_N2: Tensor
    cut: int

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate
    materialize = per_token.itself

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        halves = student_logp_NV[:, : self.cut], student_logp_NV[:, self.cut :]
        return torch.stack([half.logsumexp(dim=-1) for half in halves], dim=-1), self.logp_N2

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        return by_autograd(lambda logp_NV: compare_events(*self.align(logp_NV), divergence), student, gradient)


@pytest.mark.parametrize("chunk", [None, 2 * V])
def test_loss_accepts_form_of_one_new_class(chunk: int | None) -> None:
    teacher = concatenate([Halves(log_probs(8, 2)[:2], 3), Halves(log_probs(8, 2)[2:], 3)], CPU)
    head = LinearHead(random(V, 4, seed=6), None, torch.float64)
    inputs = TokenInputs(TARGETS, 0.7, teacher, token_losses.REVERSE, teacher_tokens=True)
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)

    def loss_of(stats: TokenStats, rows: slice) -> Tensor:
        assert stats.divergence_N is not None
        return stats.divergence_N * weights[rows]

    results = []
    for used in (head, lambda hidden: head(hidden)):  # fused; plain autograd
        hidden = random(N, 4, seed=7).requires_grad_()
        loss, stats = loss_and_stats(hidden, used, inputs, loss_of, chunk)
        assert stats.teacher_logp_N is None
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    # By hand: Σ_h p_S(h) (log p_S(h) − log p_T(h)) over the two halves h.
    p_NV = torch.softmax(head(random(N, 4, seed=7)) / 0.7, dim=-1)
    p_N2 = torch.stack([p_NV[:, :3].sum(dim=-1), p_NV[:, 3:].sum(dim=-1)], dim=-1)
    by_hand_N = (p_N2 * (p_N2.log() - log_probs(8, 2))).sum(dim=-1)
    torch.testing.assert_close(results[0][0], (by_hand_N * weights).sum())
    for actual, expected in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
