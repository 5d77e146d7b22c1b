"""Packed sequences: equal to each sequence alone, no leakage between them, shared prompts computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headwater.losses import packing
from headwater.losses.batch import Row, collate_packed, packed_microbatches, packed_tokens
from headwater.losses.packing import group_by_length, pack
from headwater.models import packed_attention
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.packed_attention import ATTENTION, packed_hidden
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.teachers.scoring import logp_of
from tiny import (
    CPU,
    MODELS,
    furthest,
    gradient_of,
    largest,
    rollout_of,
    sampled_rows,
    stage_of,
    taught,
    tiny_folder,
    tiny_policy,
)

ARCHITECTURES = ("qwen3", "llama", "qwen2", "olmo2", "phi3")
TEXTS = (
    ((1, 6, 15, 7, 2), (7, 8, 9, 3)),
    ((1, 6, 15, 7, 2), (8,)),
    ((1, 8, 2), tuple(range(4, 24))),
    ((1, 6, 15, 7, 2), (9, 9, 3)),
    ((5,), (6, 7)),
)


def padded(policy: Policy) -> Policy:
    return replace(policy, supports_packing=False)


def test_pack_by_hand() -> None:
    ids, result = pack([((5, 6), (7, 2)), ((5, 6), (8,)), ((9,), (4,))], CPU)
    assert ids.tolist() == [[5, 6, 7, 2, 8, 9, 4]]
    assert result.position_1L.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert result.start_B == (2, 4, 6) and result.prompt_end_B == (1, 1, 5)
    # One block, shortest first: (9, 4), (5, 6, 8), (5, 6, 7, 2), the first two padded with their own last token.
    assert result.blocks == ((3, 4),)
    assert result.block_row_starts.tolist() == [0, 4, 8, 12]
    assert result.to_blocks_M.tolist() == [5, 6, 6, 6, 0, 1, 4, 4, 0, 1, 2, 3]
    assert ids[0][result.to_blocks_M[result.from_blocks_L]].tolist() == ids[0].tolist()
    # A token's own place is in its own sequence, at its own position.
    assert [place % 4 for place in result.from_blocks_L.tolist()] == result.position_1L[0].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("waste", [0, 1 << 20])
def test_packed_hidden_states_equal_each_sequence_alone(name: str, waste: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_WASTE", waste)
    policy = tiny_policy(name, seed=3)
    assert policy.supports_packing
    ids, result = pack(TEXTS, CPU)
    assert len(result.blocks) == (5 if waste == 0 else 1)
    with torch.no_grad():
        hidden = packed_hidden(policy.body, ids, result)
        for (prompt, text), start, last in zip(TEXTS, result.start_B, result.prompt_end_B, strict=True):
            alone = policy.body(input_ids=torch.tensor([prompt + text]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[start : start + len(text)], alone[len(prompt) :], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(hidden[last], alone[len(prompt) - 1], rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_influence_each_other() -> None:
    policy = tiny_policy(seed=3)
    with torch.no_grad():
        hidden_states = []
        for other in ((7, 8, 9, 3), (20, 21, 22, 23)):
            ids, result = pack([((1, 6, 2), (10, 11)), ((1, 8, 2), other)], CPU)
            start = result.start_B[0]
            hidden_states.append(packed_hidden(policy.body, ids, result)[start : start + 2])
    assert torch.equal(hidden_states[0], hidden_states[1])


@pytest.mark.parametrize("objective", ["grpo", "opd", "sft"])
def test_packed_and_padded_rows_have_same_gradient(policy: Policy, teacher: Policy, objective: str) -> None:
    rows = taught(sampled_rows(policy, groups=4), teacher)
    assert policy.supports_packing and teacher.supports_packing
    stage = stage_of(objective, batch_size=16)
    for tokens in (40, 4096):
        packed_value, padded_value = (
            gradient_of(policy, rows, stage, tokens),
            gradient_of(padded(policy), rows, stage, tokens),
        )
        assert furthest(packed_value, padded_value) < 1e-5 * max(1.0, largest(padded_value))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_and_padded_rows_have_same_log_probs(policy: Policy, temperature: float) -> None:
    rollouts = [row.rollout for row in sampled_rows(policy, groups=4, temperature=temperature)]
    for packed_value, padded_value in zip(
        logp_of(policy, rollouts, 50), logp_of(padded(policy), rollouts, 50), strict=True
    ):
        torch.testing.assert_close(packed_value, padded_value, rtol=1e-4, atol=1e-5)


def varlen_of_new_torch(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Interface of torch 2.13's kernel, which needs a GPU: each sequence by dense attention."""
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert max(lengths) == max_q == max_k
    sequences = (part.split(lengths) for part in (query, key, value))
    return torch.cat(
        [
            functional.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in parts), is_causal=True, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
            for parts in zip(*sequences, strict=True)
        ]
    )


def varlen_of_old_torch(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """Interface of torch 2.10's kernel: without a scale and without groups of heads."""
    assert is_causal and query.shape == key.shape
    return varlen_of_new_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))


@pytest.mark.parametrize("varlen", [varlen_of_new_torch, varlen_of_old_torch])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_varlen_attention_equals_attention_of_blocks(
    varlen: Callable[..., Tensor], scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_WASTE", 20)  # several blocks
    _, layout = pack(TEXTS, CPU)
    slots = len(layout.to_blocks_M)
    q, k, v = (torch.randn(slots, heads, 8) for heads in (4, 2, 2))
    assert len(layout.blocks) > 1 and layout.block_row_starts[-1] == slots
    ours = packing.varlen_attention(varlen, layout, q, k, v, scaling)
    torch.testing.assert_close(ours, packing.block_attention(layout, q, k, v, scaling))


def test_packed_forward_pass_computes_shared_prompt_once(policy: Policy) -> None:
    rows = sampled_rows(policy, groups=2, group_size=4)
    batch = collate_packed(rows, CPU)
    prompts = {row.rollout.prompt_ids for row in rows}
    assert batch.ids_BT.shape == (1, sum(map(len, prompts)) + sum(row.tokens for row in rows))
    assert batch.ids_BT.shape[1] == packed_tokens(rows)
    computed: list[int] = []
    hook = policy.body.layers[0].mlp.register_forward_hook(
        lambda module, given, out: computed.append(given[0].shape[1])
    )  # type: ignore[union-attr,index]
    gradient_of(policy, rows, stage_of("grpo"))
    hook.remove()
    assert computed == [packed_tokens(rows)]


def test_group_by_length_separates_rows_of_very_different_length(monkeypatch: pytest.MonkeyPatch) -> None:
    # Widths 3 and 3 beside 900: padding two rows of 3 to 900 would cost 1.6 million scores.
    assert group_by_length([900, 3, 3]) == [[1, 2], [0]]
    assert group_by_length([40, 3, 3]) == [[1, 2, 0]]
    monkeypatch.setattr(packing, "MAX_WASTE", 100)
    assert group_by_length([10, 8, 2, 9]) == [[2, 1, 3], [0]]  # up to 9: 243 scores for 149; with the 10: 400 for 249


def test_packing_works_with_gradient_checkpointing_and_bfloat16(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    for settings_, tolerance in (({"gradient_checkpointing": True}, 1e-5), ({"dtype": "bfloat16"}, 0.05)):
        config = MODELS.model_copy(update=settings_)
        policy = load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(config, CPU, frozen=False))
        assert policy.supports_packing
        rows = sampled_rows(policy, groups=2)
        packed_value = gradient_of(policy, rows, stage_of("grpo"))
        padded_value = gradient_of(padded(policy), rows, stage_of("grpo"))
        assert furthest(packed_value, padded_value) < tolerance * max(1.0, largest(padded_value))


def test_saved_model_config_does_not_mention_packing(tmp_path: Path) -> None:
    policy = tiny_policy()
    save_policy(policy, tmp_path, torch.float32)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    ],
)
def test_models_without_plain_causal_attention_are_padded(name: str, more: dict[str, object]) -> None:
    policy = tiny_policy(name, **more)
    assert not policy.supports_packing
    assert policy.model.config._attn_implementation == "sdpa"
    rollouts = [rollout_of(prompt, text) for prompt, text in TEXTS]
    result = logp_of(policy, rollouts, 64)
    for rollout, logp in zip(rollouts, result, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1)[torch.arange(len(logp)), torch.tensor(rollout.completion_ids)]
        torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)


def test_model_leaking_between_packed_sequences_falls_back_to_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture listed as packable whose attention nevertheless crosses sequences."""

    def leaking(module, query, key, value, mask, *, packing=None, scaling=None, **others):  # type: ignore[no-untyped-def]
        return packing_free(module, query, key, value, None, scaling=scaling)

    packing_free = packed_attention.sdpa_attention_forward
    monkeypatch.setitem(packed_attention.AttentionInterface._global_mapping, ATTENTION, leaking)
    policy = tiny_policy(seed=3)
    assert not policy.supports_packing and policy.model.config._attn_implementation == "sdpa"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=24),
    budget=st.integers(1, 200),
)
def test_packed_microbatches_respect_budget_and_keep_every_row(lengths: list[tuple[int, int]], budget: int) -> None:
    rows = [Row(rollout_of((5,) * p, (7,) * c, sample=i)) for i, (p, c) in enumerate(lengths)]
    parts = packed_microbatches(rows, budget)
    assert sorted(row.rollout.sample for part in parts for row in part) == list(range(len(rows)))
    assert all(packed_tokens(part) <= budget or len(part) == 1 for part in parts)
    if packed_tokens(rows) <= budget:
        assert len(parts) == 1


def test_packed_microbatches_have_similar_sizes_and_keep_prompts_together() -> None:
    rows = [Row(rollout_of((5,) * 10, (7,) * 10, sample=i)) for i in range(8)]
    rows += [Row(rollout_of((6,) * 10, (7,) * 10, sample=i)) for i in range(8)]
    # 10 + 80 tokens a prompt, 180 in all: two parts of 90 and no prompt twice.
    assert [packed_tokens(part) for part in packed_microbatches(rows[::2] + rows[1::2], 100)] == [90, 90]
    long = [Row(rollout_of((5,), (7,) * n)) for n in (9, 9, 9, 9, 9)]
    assert sorted(map(packed_tokens, packed_microbatches(long, 30))) == [19, 28]
