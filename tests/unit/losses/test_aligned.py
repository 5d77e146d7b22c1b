"""Losses across tokenizers: spans, shared tokens and sorted probabilities, by hand and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from headwater.losses import token_losses
from headwater.losses.alignment import align
from headwater.losses.comparison import Student
from headwater.losses.distributions import (
    Aligned,
    FromHidden,
    FromLogits,
    TokenGroups,
    concatenate,
    select_rows,
)
from headwater.losses.logprobs import loss_and_stats, token_stats
from headwater.losses.materialized import Exact, Grouped, Sorted, SpanLogp, TopK
from headwater.losses.output_head import LinearHead
from headwater.losses.token_stats import TokenInputs, TokenStats

CPU = torch.device("cpu")
STUDENT, TEACHER = 6, 5
GROUP_OF_STUDENT, GROUP_OF_TEACHER = torch.tensor([0, 3, 1, 3, 3, 2]), torch.tensor([1, 0, 3, 3, 2])
"""The student's tokens 0, 2, 5 are the teacher's 1, 0, 4; group 3 holds the others."""
WHOLE = TokenGroups(torch.arange(TEACHER), GROUP_OF_TEACHER, whole=True)
BEGUN = TokenGroups(torch.tensor([2, 3]), torch.tensor([0, 2]), whole=False)
"""Within a token of the teacher, which must be 2 or 3; what follows begins with the student's token 0 or 5."""


def head(width: int, seed: int, dtype: torch.dtype = torch.float64) -> LinearHead:
    return LinearHead(torch.randn(width, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype), None, dtype)


def hidden(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aligned(grouped: bool, tokens: list[TokenGroups | None]) -> Aligned:
    base = FromHidden(hidden(len(tokens), 1), head(TEACHER, 2), 1.0)
    state_N = torch.tensor([int(row is not None) for row in tokens])
    return Aligned(base, tuple(tokens), state_N, GROUP_OF_STUDENT if grouped else None, 4 if grouped else 0)


def test_groups_sum_tokens_of_both_models() -> None:
    known = aligned(True, [WHOLE, None, BEGUN]).materialize()
    assert isinstance(known, Grouped)
    teacher_p = torch.softmax(head(TEACHER, 2)(hidden(3, 1)), dim=-1)
    student_logp = torch.log_softmax(torch.arange(6.0, dtype=torch.float64), dim=-1).repeat(3, 1)
    student_p = student_logp.exp()[0]
    student_NE, teacher_NE = (logp.exp() for logp in known.align(student_logp))
    assert torch.allclose(teacher_NE[0], torch.stack([*teacher_p[0, [1, 0, 4]], teacher_p[0, [2, 3]].sum()]))
    assert torch.allclose(student_NE[0], torch.stack([*student_p[[0, 2, 5]], student_p[[1, 3, 4]].sum()]))
    assert torch.equal(student_NE[1], torch.zeros(4, dtype=torch.float64)) and torch.equal(teacher_NE[1], student_NE[1])
    begun = teacher_p[2, [2, 3]] / teacher_p[2, [2, 3]].sum()
    assert torch.allclose(teacher_NE[2, [0, 2]], begun) and teacher_NE[2, [1, 3]].max() < 1e-20


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    "divergence", [token_losses.REVERSE, token_losses.FORWARD, token_losses.jensen_shannon(0.5), token_losses.SORTED]
)
def test_fused_and_plain_losses_agree_and_skip_inner_tokens(grouped: bool, divergence: token_losses.Divergence) -> None:
    tokens = [WHOLE, None, BEGUN if grouped else WHOLE, None, WHOLE]
    student_head = head(STUDENT, 3)
    if not grouped:
        divergence = token_losses.SORTED
    inputs = TokenInputs(torch.tensor([0, 1, 2, 3, 4]), 0.7, aligned(grouped, tokens), divergence)

    def loss(stats: TokenStats, chunk: slice) -> Tensor:
        assert stats.divergence_N is not None
        return stats.divergence_N * torch.arange(1.0, 6.0, dtype=torch.float64)[chunk]

    gradients, values = [], []
    for used in (student_head, lambda h: student_head(h)):  # fused; plain autograd
        for chunk in (None, 2 * STUDENT):
            hidden_NH = hidden(5, 4).requires_grad_()
            value, stats = loss_and_stats(hidden_NH, used, inputs, loss, chunk)
            value.backward()
            values.append(value.detach())
            gradients.append(hidden_NH.grad)
            assert stats.divergence_N is not None and stats.divergence_N[[1, 3]].abs().max() == 0.0
            assert (stats.kl_student_teacher_N is None) == (not grouped)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        assert torch.allclose(value, values[0], atol=1e-9)
        assert torch.allclose(gradient, gradients[0], atol=1e-7)
    assert gradients[0][[1, 3]].abs().max() == 0.0 < gradients[0][[0, 2, 4]].abs().min()


def test_groups_of_one_token_give_exact_divergence() -> None:
    """One vocabulary in another order."""
    order = torch.tensor([3, 0, 4, 1, 2])
    logp = torch.log_softmax(head(5, 2)(hidden(4, 1)), dim=-1)
    student = torch.log_softmax(head(5, 5)(hidden(4, 6)), dim=-1)
    renamed = TokenGroups(order, torch.arange(5), whole=True)
    form = Aligned(Exact(logp), (renamed,) * 4, torch.ones(4), torch.arange(5), 5)
    for divergence in (token_losses.reverse_kl, token_losses.forward_kl):
        assert torch.allclose(divergence(*form.materialize().align(student)), divergence(student, logp[:, order]))


def test_groups_without_student_tokens_have_no_gradient() -> None:
    """All of the student's tokens are shared: its tail is empty, however large the teacher's is."""
    logits = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    known = Grouped(
        torch.tensor([[0.2, 0.1, 0.7]], dtype=torch.float64).log(), torch.tensor([0, 1]), torch.tensor([True])
    )
    token_losses.forward_kl(*known.align(torch.log_softmax(logits, dim=-1))).sum().backward()
    # Of the two tokens alone: p_S(j) · (p_T(0) + p_T(1)) − p_T(j).
    p = torch.softmax(logits.detach(), dim=-1)
    assert torch.allclose(logits.grad, p * 0.3 - torch.tensor([[0.2, 0.1]], dtype=torch.float64))  # type: ignore[arg-type]


def test_served_tokens_are_grouped_and_begun_ones_skipped() -> None:
    torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1], [0.4, 0.3, 0.1]])
    served = TopK(
        torch.tensor([[2, 0, 4], [1, 3, 0], [2, 3, 0]]),
        torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1], [0.4, 0.3, 0.1]]).log(),
    )
    known = Aligned(served, (WHOLE, WHOLE, BEGUN), torch.tensor([1, 1, 1]), GROUP_OF_STUDENT, 4).materialize()
    assert isinstance(known, TopK) and known.count_N is not None
    assert known.count_N.tolist() == [3, 3, 0]
    assert known.ids_NK[:2].tolist() == [[3, 1, 2], [0, 3, 1]]
    student = torch.log_softmax(torch.zeros(3, STUDENT), dim=-1)
    student_NE, teacher_NE = (logp.exp() for logp in known.align(student))
    assert torch.allclose(teacher_NE[0], torch.tensor([0.5, 0.2, 0.1, 0.2]), atol=1e-6)
    assert torch.allclose(student_NE[0], torch.tensor([3 / 6, 1 / 6, 1 / 6, 1 / 6]), atol=1e-6)
    assert torch.equal(student_NE[2], teacher_NE[2]) and teacher_NE[2, -1] == 1.0


def test_top_k_of_groups_has_groups_of_student() -> None:
    known = aligned(True, [WHOLE, None]).materialize()
    assert isinstance(known, Grouped)
    kept, student = known.top_k(2), torch.log_softmax(torch.zeros(2, STUDENT, dtype=torch.float64), dim=-1)
    whole = dict(enumerate(known.align(student)[1][0].exp().tolist()))
    chosen = sorted(whole, key=lambda group: -whole[group])[:2]
    assert kept.ids_NK[0].tolist() == chosen
    expected = [float((group == GROUP_OF_STUDENT).sum()) / STUDENT for group in chosen]
    assert kept.align(student)[0][0].exp().tolist() == pytest.approx([*expected, 1 - sum(expected)])
    assert kept.align(student)[0][1].exp().tolist() == [0.0, 0.0, 1.0]


def test_top_k_of_partly_filled_rows_keeps_most_probable() -> None:
    known = TopK(
        torch.tensor([[4, 2, 0], [3, 1, 0]]),
        torch.tensor([[0.1, 0.4, 0.9], [0.2, 0.1, 0.05]]).log(),
        torch.tensor([2, 3]),
    )
    kept = known.top_k(2)
    assert kept.ids_NK.tolist() == [[2, 4], [3, 1]]
    assert kept.count_N is not None and kept.count_N.tolist() == [2, 2]
    assert torch.allclose(kept.logp_NK.exp(), torch.tensor([[0.4, 0.1], [0.2, 0.1]]))


def test_sorted_difference_by_hand() -> None:
    """Student (½, ¼, ¼), teacher (0.3, 0.7): ranks ½ − 0.7, ¼ − 0.3, ¼ − 0 give 0.2 + 0.05 + 0.25."""
    student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    known = Sorted(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([True]))
    assert token_losses.sorted_difference(*known.align(student)).item() == pytest.approx(0.5, abs=1e-6)


def test_forms_are_cut_and_joined_like_their_rows() -> None:
    for form in (aligned(True, [WHOLE, None, BEGUN, WHOLE]), aligned(False, [WHOLE, None, WHOLE, WHOLE])):
        whole = form.materialize()
        joined = concatenate([form.rows(0, 1), form.rows(1, 4)], CPU)
        assert isinstance(joined, Aligned)
        student = torch.log_softmax(head(STUDENT, 5)(hidden(4, 6)), dim=-1)
        for made in (joined.materialize(), concatenate([whole.rows(0, 3), whole.rows(3, 4)], CPU).materialize()):
            assert all(map(torch.equal, made.align(student), whole.align(student)))
    spans = SpanLogp(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2, 2, 0]))
    joined_spans = concatenate([spans.rows(0, 1), spans.rows(1, 3)], CPU)
    assert isinstance(joined_spans, SpanLogp)
    assert torch.equal(joined_spans.logp_N, spans.logp_N) and torch.equal(joined_spans.size_N, spans.size_N)


def test_selected_rows_of_every_form() -> None:
    index = torch.tensor([2, 0, 0])
    logits = torch.log_softmax(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    top = Exact(logits).top_k(2)
    chosen = [select_rows(form, index) for form in (Exact(logits), FromLogits(logits, 1.0), top)]
    assert torch.equal(chosen[0].materialize().logp_NV, logits[index])  # type: ignore[union-attr]
    assert torch.allclose(chosen[1].materialize().logp_NV, logits[index])  # type: ignore[union-attr]
    assert torch.equal(chosen[2].materialize().ids_NK, top.ids_NK[index])  # type: ignore[union-attr]


# Span likelihood, by enumeration ----------------------------------------------------------------------------------------

STUDENT_TOKENS = (b"a", b"b", b"ab", b"$")
TEACHER_TOKENS = (b"a", b"b", b"ba", b"bb", b"$")
LENGTH = 3


def conditional(logits: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """Log-probs of the next token: they depend on the last token and the length of the prefix."""
    return torch.log_softmax(logits[len(prefix), prefix[-1] if prefix else -1], dim=-1)


def sequence_logp(logits: Tensor, ids: tuple[int, ...]) -> list[Tensor]:
    return [conditional(logits, ids[:t])[token] for t, token in enumerate(ids)]


def canonical(text: bytes, tokens: tuple[bytes, ...]) -> tuple[int, ...]:
    """Longest match from the left, as a tokenizer divides a text."""
    ids: list[int] = []
    while text:
        token = max((token for token in tokens if text.startswith(token)), key=len)
        ids.append(tokens.index(token))
        text = text[len(token) :]
    return tuple(ids)


def rollouts(logits: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Every completion of the student, up to the end token `$` or LENGTH tokens, and its log-prob."""
    made = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(len(STUDENT_TOKENS)), repeat=length):
            ended = ids[-1] == len(STUDENT_TOKENS) - 1
            if len(STUDENT_TOKENS) - 1 not in ids[:-1] and (ended or length == LENGTH):
                made.append((ids, torch.stack(sequence_logp(logits, ids)).sum()))
    return made


def spans_of(student_logits: Tensor, teacher_logits: Tensor, ids: tuple[int, ...]) -> SpanLogp:
    """The form as it is made from a rollout: log p_T of each span less the student's log-probs of the span's other tokens."""
    own = [logp.detach() for logp in sequence_logp(student_logits, ids)]
    text = b"".join(STUDENT_TOKENS[i] for i in ids)
    other_ids = canonical(text, TEACHER_TOKENS)
    other = sequence_logp(teacher_logits, other_ids)
    spans = align([STUDENT_TOKENS[i] for i in ids], [TEACHER_TOKENS[i] for i in other_ids])
    return SpanLogp.of(spans, torch.stack(own), torch.stack(other))


def compared(form: SpanLogp, student_logp_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sampled reverse KL, the teacher's log-prob) of each token; spans read no other log-prob than the targets'."""
    comparison = form.compare(Student(torch.empty(len(form), 0), student_logp_N), None, gradient=False)
    assert comparison.kl_student_teacher_N is not None and comparison.teacher_logp_N is not None
    return comparison.kl_student_teacher_N, comparison.teacher_logp_N


@pytest.fixture
def models() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(LENGTH, len(STUDENT_TOKENS), len(STUDENT_TOKENS), generator=draw, dtype=torch.float64)
    teacher = torch.randn(2 * LENGTH, len(TEACHER_TOKENS), len(TEACHER_TOKENS), generator=draw, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_span_estimate_averages_to_kl_of_texts(models: tuple[Tensor, Tensor]) -> None:
    """Σ_y π_S(y) Σ_c [log p_S(c) − log p_T(c)] = KL between the student's completions and the teacher's reading of them."""
    student, teacher = models
    exact = average = torch.zeros((), dtype=torch.float64)
    for ids, logp in rollouts(student):
        kl_N, _ = compared(spans_of(student, teacher, ids), torch.stack(sequence_logp(student, ids)))
        average = average + logp.exp() * kl_N.sum()
        text = b"".join(STUDENT_TOKENS[i] for i in ids)
        teacher_logp = torch.stack(sequence_logp(teacher, canonical(text, TEACHER_TOKENS))).sum()
        exact = exact + logp.exp() * (logp - teacher_logp)
    assert average.item() == pytest.approx(exact.item(), abs=1e-12)
    assert sum(logp.exp().item() for _, logp in rollouts(student)) == pytest.approx(1.0)


def test_span_gradient_averages_to_gradient_of_span_divergence(models: tuple[Tensor, Tensor]) -> None:
    """Averaged over all completions, the loss's gradient is E[Σ_c (log p_S(c) − log p_T(c)) ∇ log p_S(c)], each span's own.

    The right-hand side is computed by autograd from whole spans: ∇ of Σ_y sg(π_S(y)) Σ_c sg(A_c) log p_S(c).
    """
    student, teacher = models
    loss = whole = torch.zeros((), dtype=torch.float64)
    for ids, logp in rollouts(student):
        own = torch.stack(sequence_logp(student, ids))
        form = spans_of(student, teacher, ids)
        _, teacher_logp_N = compared(form, own)
        loss_N = token_losses.sampled_reverse_kl(own, own.detach(), teacher_logp_N, 0.2, 0.2)
        loss = loss + logp.exp().detach() * loss_N.sum()
        text = b"".join(STUDENT_TOKENS[i] for i in ids)
        other_ids = canonical(text, TEACHER_TOKENS)
        other = sequence_logp(teacher, other_ids)
        spans = align([STUDENT_TOKENS[i] for i in ids], [TEACHER_TOKENS[i] for i in other_ids])
        for left, right in spans.pairs():
            span_logp = own[left.start : left.stop].sum()
            advantage = torch.stack(other[right.start : right.stop]).sum() - span_logp.detach()
            whole = whole - logp.exp().detach() * advantage * span_logp
    by_loss, by_spans = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (loss, whole))
    assert torch.allclose(by_loss, by_spans, atol=1e-12)
    assert by_loss.abs().max() > 0.01


def test_gradient_of_self_delimiting_spans_is_unbiased() -> None:
    """One span of one or two tokens (`ab` or `a`, `b`): the averaged gradient is that of the exact KL over the span's spellings."""
    logits = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]], dtype=torch.float64, requires_grad=True)
    first, second = torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1], -1)
    # Spellings of the first span: (ab), and a followed by each of three tokens, and the other single token.
    events = [first[0], first[1], *(first[2] + second[token] for token in range(3))]
    sizes = [1, 1, 2, 2, 2]
    teacher = torch.log_softmax(torch.tensor([0.2, 0.1, -0.3, 0.4, 0.0], dtype=torch.float64), -1)
    exact = torch.stack([event.exp() * (event - goal) for event, goal in zip(events, teacher, strict=True)]).sum()
    tokens = [(first[0],), (first[1],), *((first[2], second[token]) for token in range(3))]
    loss = torch.zeros((), dtype=torch.float64)
    for own, size, goal in zip(tokens, sizes, teacher, strict=True):
        own_N = torch.stack(own)
        form = SpanLogp.of(align([b"x"] * size, [b"x" * size]), own_N.detach(), goal[None])
        _, teacher_logp_N = compared(form, own_N)
        loss_N = token_losses.sampled_reverse_kl(own_N, own_N.detach(), teacher_logp_N, 0.2, 0.2)
        loss = loss + own_N.sum().exp().detach() * loss_N.sum()
    by_loss, by_kl = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, exact))
    assert torch.allclose(by_loss, by_kl, atol=1e-12)


def test_spans_of_one_token_are_sampled_tokens_bit_for_bit() -> None:
    own, other = torch.randn(7), torch.randn(7)
    spans = align([b"x"] * 7, [b"x"] * 7)
    _, teacher_logp_N = compared(SpanLogp.of(spans, own, other), torch.randn(7))
    assert torch.equal(teacher_logp_N, other)


def test_uncompared_tokens_have_advantage_zero() -> None:
    spans = align([b"a", b"b"], [b"a", b"x"])
    form = SpanLogp.of(spans, torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -9.0]))
    assert form.size_N.tolist() == [1, -1]
    own = torch.tensor([-1.1, -2.2])
    kl_N, teacher_logp_N = compared(form, own)
    assert teacher_logp_N[1] == own[1] and kl_N.tolist() == pytest.approx([-0.6, 0.0])


def test_measured_kl_is_shared_among_tokens_of_span() -> None:
    form = SpanLogp.of(align([b"a", b"b"], [b"ab"]), torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]))
    kl_N, _ = compared(form, torch.tensor([-1.0, -2.0]))
    assert kl_N.sum().item() == pytest.approx(-3.0 + 0.5)


def test_statistics_of_spans_in_fused_and_plain_passes() -> None:
    form = SpanLogp(torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64), torch.tensor([1, 2, 0]))
    student_head, hidden_NH = head(STUDENT, 3), hidden(3, 4)
    inputs = TokenInputs(torch.tensor([0, 1, 2]), 1.0, form, None, True)
    with torch.no_grad():
        fused = token_stats(hidden_NH, student_head, inputs)
    plain = token_stats(hidden_NH, lambda h: student_head(h), inputs)
    for name in ("kl_student_teacher_N", "teacher_logp_N"):
        assert torch.allclose(getattr(fused, name), getattr(plain, name))
    assert fused.teacher_logp_N is not None and torch.equal(fused.teacher_logp_N[2], fused.logp_N[2])
    assert fused.kl_teacher_student_N is None
    assert math.isclose(fused.kl_student_teacher_N[0].item(), fused.logp_N[0].item() + 1.0)  # type: ignore[index]
