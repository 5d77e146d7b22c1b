"""Token statistics in the plain form: by hand, in chunks, at the sampling temperature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headwater.losses import token_losses
from headwater.losses.distributions import Distributions, FromHidden
from headwater.losses.logprobs import token_stats
from headwater.losses.materialized import Exact, TopK
from headwater.losses.token_stats import TokenInputs, TokenStats

N, H, V = 23, 5, 11
DIVERGENCES: dict[str, token_losses.Divergence] = {
    "forward": token_losses.FORWARD,
    "reverse": token_losses.REVERSE,
    "jsd": token_losses.jensen_shannon(0.3),
}


def identity(logits: Tensor) -> Tensor:
    """A head whose hidden states are the logits themselves."""
    return logits


def test_token_stats_of_zero_head_are_uniform() -> None:
    result = token_stats(torch.randn(4, H), lambda x: x.new_zeros(len(x), V), TokenInputs(torch.arange(4), 1.0))
    assert result.logp_N.tolist() == pytest.approx([-math.log(V)] * 4)
    assert result.entropy_N.tolist() == pytest.approx([math.log(V)] * 4)


def test_token_stats_by_hand_at_two_temperatures() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    at_one = token_stats(logits, identity, TokenInputs(torch.tensor([0, 1]), 1.0))
    # softmax (0, ln 3) = (¼, ¾); entropy ¼ ln 4 + ¾ ln(4/3) = 0.34657 + 0.21576 = 0.56234
    assert at_one.logp_N.exp().tolist() == pytest.approx([0.25, 0.75])
    assert at_one.entropy_N.tolist() == pytest.approx([0.562335] * 2, abs=1e-6)
    at_two = token_stats(logits, identity, TokenInputs(torch.tensor([0, 1]), 2.0))
    # softmax (0, ½ ln 3) = (1, √3) / (1 + √3) = (0.366025, 0.633975); entropy 0.366025·1.005053 + 0.633975·0.455747
    assert at_two.logp_N.exp().tolist() == pytest.approx([0.366025, 0.633975], abs=1e-6)
    assert at_two.entropy_N.tolist() == pytest.approx([0.366025 * 1.005053 + 0.633975 * 0.455747] * 2, abs=1e-5)


def teachers(head: Callable[[Tensor], Tensor]) -> dict[str, Distributions]:
    hidden = torch.randn(N, H)
    logp = FromHidden(hidden, head, 0.7).materialize().logp_NV
    kept = logp.topk(3, dim=-1)
    return {"hidden": FromHidden(hidden, head, 0.7), "exact": Exact(logp), "top": TopK(kept.indices, kept.values)}


def measured(
    head: torch.nn.Linear, hidden: Tensor, targets: Tensor, chunk: int, **options: object
) -> tuple[TokenStats, Tensor, Tensor]:
    """The stats, and the gradients of a weighted sum of log-probs and divergences to hidden states and head."""
    hidden = hidden.clone().requires_grad_()
    result = token_stats(hidden, head, TokenInputs(targets, 0.7, **options), chunk_elements=chunk)  # type: ignore[arg-type]
    weight = torch.linspace(-1.0, 1.0, len(targets))
    loss = (weight * result.logp_N).sum()
    if result.divergence_N is not None:
        loss = loss + (weight.square() * result.divergence_N).sum()
    return result, *torch.autograd.grad(loss, (hidden, head.weight))


@pytest.mark.parametrize("form", ["none", "hidden", "exact", "top"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_token_stats_in_chunks_equal_whole_in_values_and_gradients(form: str, name: str) -> None:
    head, hidden = torch.nn.Linear(H, V), torch.randn(N, H)
    targets = torch.randint(0, V, (N,))
    options: dict[str, object] = {}
    if form != "none":
        options = {"teacher": teachers(torch.nn.Linear(H, V))[form], "divergence": DIVERGENCES[name]}
    whole, to_hidden, to_head = measured(head, hidden, targets, N * V, **options)
    for chunk in (1, 2 * V, 5 * V + 3):
        cut, cut_to_hidden, cut_to_head = measured(head, hidden, targets, chunk, **options)
        for actual, expected in zip(vars(cut).values(), vars(whole).values(), strict=True):
            if expected is None:
                assert actual is None
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cut_to_hidden, to_hidden, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cut_to_head, to_head, rtol=1e-5, atol=1e-5)


def test_token_stats_never_allocate_logits_of_all_tokens() -> None:
    rows: list[int] = []
    linear = torch.nn.Linear(H, V)

    def head(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return linear(hidden)

    result = token_stats(
        torch.randn(N, H), head, TokenInputs(torch.zeros(N, dtype=torch.long), 1.0), chunk_elements=4 * V
    )
    result.logp_N.sum().backward()
    # 23 tokens in chunks of 4: one row to learn V, six chunks forward, and the same six again for the backward pass.
    assert max(rows) == 4
    assert sum(rows) == 1 + 2 * N


def test_token_stats_kls_send_gradients_to_log_prob_and_divergence_only() -> None:
    hidden = torch.randn(N, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    teacher = teachers(torch.nn.Linear(H, V))["exact"]
    assert isinstance(teacher, Exact)
    targets = torch.randint(0, V, (N,))
    result = token_stats(hidden, head, TokenInputs(targets, 0.7, teacher, token_losses.FORWARD, teacher_tokens=True))
    student = torch.log_softmax(head(hidden) / 0.7, dim=-1)
    for ours, expected in (
        (result.divergence_N, token_losses.forward_kl(student, teacher.logp_NV)),
        (result.kl_teacher_student_N, token_losses.forward_kl(student, teacher.logp_NV)),
        (result.kl_student_teacher_N, token_losses.reverse_kl(student, teacher.logp_NV)),
        (result.teacher_logp_N, teacher.logp_NV[torch.arange(N), targets]),
    ):
        assert ours is not None
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    carries = {name for name, value in vars(result).items() if value is not None and value.requires_grad}
    assert carries == {"logp_N", "divergence_N"}


def test_token_stats_send_no_gradient_to_teacher() -> None:
    teacher_head = torch.nn.Linear(H, V)
    teacher = FromHidden(torch.randn(N, H), teacher_head, 1.0)
    head = torch.nn.Linear(H, V)
    targets = torch.zeros(N, dtype=torch.long)
    result = token_stats(
        torch.randn(N, H), head, TokenInputs(targets, 1.0, teacher, DIVERGENCES["jsd"]), chunk_elements=3 * V
    )
    assert result.divergence_N is not None
    result.divergence_N.sum().backward()
    assert teacher_head.weight.grad is None
    assert head.weight.grad is not None and head.weight.grad.abs().max().item() > 1e-3


def test_token_stats_accept_masked_vocabulary_entries() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]])
    teacher = Exact(torch.tensor([[0.5, 0.5, 0.0]]).log())
    result = token_stats(logits, identity, TokenInputs(torch.tensor([1]), 1.0, teacher, token_losses.REVERSE))
    assert result.entropy_N.item() == pytest.approx(0.562335, abs=1e-6)
    assert result.divergence_N is not None and result.kl_teacher_student_N is not None
    # As for the two other events alone: KL(S‖T) = 0.130812, KL(T‖S) = 0.143841.
    assert result.divergence_N.item() == pytest.approx(0.130812, abs=1e-6)
    assert result.kl_teacher_student_N.item() == pytest.approx(0.143841, abs=1e-6)


def test_token_stats_normalize_bfloat16_logits_in_float32() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16)  # exact in bfloat16
    result = token_stats(logits, identity, TokenInputs(torch.tensor([2]), 1.0))
    # 2 − ln(1 + e + e² + e³) = 2 − 3.4401897
    assert result.logp_N.dtype == torch.float32
    assert result.logp_N.item() == pytest.approx(2.0 - 3.4401897, abs=1e-6)
