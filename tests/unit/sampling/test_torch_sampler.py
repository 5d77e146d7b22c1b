"""Embedded sampler: named draws, log-probs equal to the trainer's, token frequencies, independence of sequences."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats

from headwater.config.stage import Sampling
from headwater.models.cached_forward import CachedBatch
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.sampling.base import Request, requests_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.torch_sampler import TorchSampler, draw_tokens
from headwater.teachers.scoring import logp_of
from headwater.types import Rollout
from tiny import MODELS, PROMPTS, policy_of, tiny_folder, tiny_model, tiny_policy

CAPPED = {
    # Architectures whose logits are not head(body(x)): Gemma 2 caps them, Cohere and Granite scale them.
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}  # fmt: skip
ARCHITECTURES = {"qwen3": {}, "llama": {}, **CAPPED}


def requests(samples: int = 6, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[Request]:
    return requests_for([(f"p{index}", prompt) for index, prompt in enumerate(prompts)], samples, 0, "test", 3)


def outcomes_by_request(rollouts: list[Rollout]) -> dict[tuple[str, int], tuple[tuple[int, ...], str]]:
    return {(rollout.problem_id, rollout.sample): (rollout.completion_ids, rollout.finish) for rollout in rollouts}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_draws_do_not_depend_on_request_order_or_batch_size(name: str) -> None:
    policy = tiny_policy(name, seed=2, **ARCHITECTURES[name])
    wanted, sampling = requests(), Sampling(max_tokens=24)
    whole = TorchSampler(policy, batch=64).sample(wanted, sampling)
    assert [(rollout.problem_id, rollout.sample) for rollout in whole] == [
        (request.problem_id, request.sample) for request in wanted
    ]
    assert {rollout.finish for rollout in whole} == {"stop", "length"} or name in CAPPED
    for batch, order in ((1, wanted), (64, wanted[::-1]), (5, wanted[7:] + wanted[:7])):
        again = TorchSampler(policy, batch=batch).sample(order, sampling)
        assert outcomes_by_request(again) == outcomes_by_request(whole)
        logps = {(rollout.problem_id, rollout.sample): rollout.sampler_logp for rollout in whole}
        for rollout in again:
            assert rollout.sampler_logp == pytest.approx(logps[rollout.problem_id, rollout.sample], abs=1e-4)


def test_rng_key_changes_draws_and_samples_may_be_requested_alone() -> None:
    policy = tiny_policy(seed=2)
    first = TorchSampler(policy).sample(requests(), Sampling(max_tokens=12))
    other = TorchSampler(policy).sample(
        [replace(request, rng_key=(1, *request.rng_key[1:])) for request in requests()], Sampling(max_tokens=12)
    )
    assert sum(a.completion_ids == b.completion_ids for a, b in zip(first, other, strict=True)) < 4
    # Samples 4 and 5 requested alone are samples 4 and 5 of the six.
    alone = requests_for([("p0", PROMPTS[0])], 6, 0, "test", 3)[4:]
    later = TorchSampler(policy).sample(alone, Sampling(max_tokens=12))
    assert outcomes_by_request(later) == {
        key: value for key, value in outcomes_by_request(first).items() if key in {("p0", 4), ("p0", 5)}
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logp_equals_trainer_log_prob(name: str, temperature: float) -> None:
    policy = tiny_policy(name, seed=4, **ARCHITECTURES[name])
    rollouts = TorchSampler(policy, batch=8).sample(requests(), Sampling(max_tokens=20, temperature=temperature))
    for rollout, trained in zip(rollouts, logp_of(policy, rollouts, 256), strict=True):
        assert rollout.sampler_logp == pytest.approx(trained.tolist(), abs=2e-5)
        # Both equal the plain model's, without cache, padding or other sequences.
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        whole = torch.log_softmax(logits / temperature, dim=-1)
        chosen = whole[torch.arange(len(whole)), torch.tensor(rollout.completion_ids)]
        assert rollout.sampler_logp == pytest.approx(chosen.tolist(), abs=2e-5)
        assert rollout.temperature == temperature and rollout.sampler == policy.fingerprint


@pytest.mark.parametrize("name", CAPPED)
def test_split_head_keeps_capped_and_scaled_heads_whole(name: str) -> None:
    capped = tiny_policy(name, **CAPPED[name])
    assert capped.body is capped.model and isinstance(capped.head, torch.nn.Identity)
    for plain in (tiny_policy("qwen3"), tiny_policy("llama", tied=False)):
        assert plain.body is plain.model.model and plain.head is plain.model.lm_head


def test_split_head_detects_softcap_even_with_small_logits() -> None:
    """Logits of 0.1 under a cap of 30 change by 4e-7; after training they would be far from head(body(x))."""
    fresh = tiny_policy("gemma2", std=0.02, **{**CAPPED["gemma2"], "final_logit_softcapping": 30.0})
    assert fresh.body is fresh.model


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 4)]
)
def test_first_token_frequencies_match_probabilities(temperature: float, top_p: float, top_k: int) -> None:
    policy, count = tiny_policy(seed=1), 6000
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=1)
    rollouts = TorchSampler(policy, batch=count).sample(requests_for([("p", PROMPTS[0])], count, "chi"), sampling)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature
    expected = torch.softmax(logits, dim=-1)
    if top_k:
        expected = expected * (expected >= expected.topk(top_k).values[-1])
    if top_p < 1.0:
        order = expected.argsort(descending=True)
        kept = [int(i) for n, i in enumerate(order) if expected[order[:n]].sum() < top_p]
        expected = torch.zeros_like(expected).index_copy(0, torch.tensor(kept), expected[kept])
    expected = expected / expected.sum()
    drawn = Counter(rollout.completion_ids[0] for rollout in rollouts)
    assert all(expected[token] > 0 for token in drawn)
    # The chi-square test needs expected counts of at least ten, so rarer tokens are counted together.
    common = [token for token in range(len(expected)) if count * expected[token] >= 10]
    observed = [drawn[token] for token in common]
    expected_counts = [count * expected[token].item() for token in common]
    if count - sum(expected_counts) > 5:
        observed, expected_counts = [*observed, count - sum(observed)], [*expected_counts, count - sum(expected_counts)]
    else:
        expected_counts = [number * sum(observed) / sum(expected_counts) for number in expected_counts]
    assert len(observed) >= 3
    assert stats.chisquare(observed, expected_counts).pvalue > 0.001
    for rollout in rollouts[:50]:
        assert math.exp(rollout.sampler_logp[0]) == pytest.approx(expected[rollout.completion_ids[0]].item(), rel=1e-4)


def test_second_token_frequencies_match_conditional_probabilities() -> None:
    """Draws of one rollout's tokens are independent: given the first token, the second follows the model."""
    policy, count = tiny_policy(seed=1, std=0.5), 8000
    rollouts = TorchSampler(policy, batch=2000).sample(
        requests_for([("p", PROMPTS[0])], count, "chi2"), Sampling(max_tokens=2)
    )
    pairs = [rollout.completion_ids for rollout in rollouts if len(rollout.completion_ids) == 2]
    first = Counter(pair[0] for pair in pairs).most_common(1)[0][0]
    second = Counter(pair[1] for pair in pairs if pair[0] == first)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].double()
    expected = torch.softmax(logits, dim=-1)
    total = sum(second.values())
    common = [token for token in range(len(expected)) if total * expected[token] >= 10]
    observed, expected_counts = [second[t] for t in common], [total * expected[t].item() for t in common]
    observed, expected_counts = [*observed, total - sum(observed)], [*expected_counts, total - sum(expected_counts)]
    assert total > 500 and len(observed) >= 4
    assert stats.chisquare(observed, expected_counts).pvalue > 0.001


def test_completion_ends_at_its_first_stop_token() -> None:
    policy = tiny_policy(seed=2)
    rollouts = TorchSampler(policy).sample(requests(samples=20), Sampling(max_tokens=24))
    stopped = [rollout for rollout in rollouts if rollout.finish == "stop"]
    cut = [rollout for rollout in rollouts if rollout.finish == "length"]
    assert len(stopped) > 5 and len(cut) > 5
    end = policy.tokenizer.eos_token_id
    for rollout in stopped:
        assert rollout.completion_ids[-1] == end and end not in rollout.completion_ids[:-1]
    for rollout in cut:
        assert len(rollout.completion_ids) == 24 and end not in rollout.completion_ids
    assert all(len(rollout.sampler_logp) == len(rollout.completion_ids) for rollout in rollouts)


def test_max_tokens_truncates_but_stop_token_at_limit_counts_as_stop() -> None:
    policy = tiny_policy(seed=2)
    long = TorchSampler(policy).sample(requests(samples=20), Sampling(max_tokens=24))
    short = TorchSampler(policy).sample(requests(samples=20), Sampling(max_tokens=6))
    assert any(rollout.finish == "stop" and len(rollout.completion_ids) == 6 for rollout in short)
    for ours, longer in zip(short, long, strict=True):
        assert ours.completion_ids == longer.completion_ids[:6]
        assert ours.finish == (longer.finish if len(longer.completion_ids) <= 6 else "length")


def test_every_stop_id_of_generation_config_ends_completion() -> None:
    logps = tiny_model(seed=2)
    logps.generation_config.eos_token_id = [7, 9]
    policy = policy_of(logps)
    assert policy.stop_ids == (3, 7, 9)  # the tokenizer's EOS is one of them
    rollouts = TorchSampler(policy).sample(requests(samples=30), Sampling(max_tokens=24))
    last = Counter(rollout.completion_ids[-1] for rollout in rollouts if rollout.finish == "stop")
    assert set(last) == {3, 7, 9}
    assert not any({3, 7, 9} & set(rollout.completion_ids[:-1]) for rollout in rollouts)


def test_finished_sequences_do_not_change_remaining_ones() -> None:
    """A long completion is the same alone and in a batch where many stop early."""
    policy = tiny_policy(seed=2, std=0.15)
    rollouts = TorchSampler(policy, batch=256).sample(requests(samples=40), Sampling(max_tokens=40))
    lengths = sorted(len(rollout.completion_ids) for rollout in rollouts)
    assert lengths[0] <= 2 and lengths[len(lengths) // 4] < 30 and lengths[-1] == 40
    by_name = {(request.problem_id, request.sample): request for request in requests(samples=40)}
    for long in [rollout for rollout in rollouts if len(rollout.completion_ids) >= 25][:12]:
        single = TorchSampler(policy).sample([by_name[long.problem_id, long.sample]], Sampling(max_tokens=40))[0]
        assert single.completion_ids == long.completion_ids
        assert single.sampler_logp == pytest.approx(long.sampler_logp, abs=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1e-5])
def test_lowest_temperatures_equal_greedy_decoding_of_transformers(name: str, temperature: float) -> None:
    policy = tiny_policy(name, seed=6, **ARCHITECTURES[name])
    rollouts = TorchSampler(policy).sample(requests(samples=1), Sampling(max_tokens=16, temperature=temperature))
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids])
        greedy = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=3, pad_token_id=0
        )
        expected = tuple(greedy[0, len(rollout.prompt_ids) :].tolist())
        assert rollout.completion_ids == expected


def test_draw_tokens_inverts_cumulative_distribution() -> None:
    logits = torch.tensor([[0.25, 0.75]]).log().expand(5, 2)
    draws = torch.tensor([0.0, 0.2499, 0.2501, 0.75, 1.0 - 2**-53], dtype=torch.float64)
    token, logp = draw_tokens(logits, draws, Sampling())
    assert token.tolist() == [0, 0, 1, 1, 1]
    assert logp.exp().tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75, 0.75])


def test_draw_tokens_never_returns_token_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().expand(4, 5)
    draws = torch.tensor([0.0, 0.5, 0.49999999, 1.0 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, draws, Sampling())[0].tolist() == [1, 3, 1, 3]


def test_draw_tokens_at_temperature_zero_takes_first_maximum() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, -torch.inf, 0.0], [0.0, torch.nan, 1.0]])
    token, logp = draw_tokens(logits, torch.full((3,), 0.9, dtype=torch.float64), Sampling(temperature=0.0))
    assert token.tolist()[:2] == [1, 0] and logp.tolist()[:2] == [0.0, 0.0]
    assert math.isnan(logp[2])  # a model whose logits are not finite is noticed


def test_draw_tokens_with_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(3, 4)
    draws = torch.tensor([0.05, 0.66, 0.67], dtype=torch.float64)
    # top_k 2 keeps 0.5 and 0.25, renormalised to ⅔ and ⅓.
    token, logp = draw_tokens(logits, draws, Sampling(top_k=2))
    assert token.tolist() == [1, 1, 3]
    assert logp.exp().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # top_p 0.6 keeps 0.5 and 0.25: a token is kept while the mass before it (0, then 0.5) is below 0.6.
    assert draw_tokens(logits, draws, Sampling(top_p=0.6))[1].exp().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # top_p 0.8 keeps 0.15 too (0.75 before it): cumulative 0, 5/9, 6.5/9 (token 2), 1.
    token, logp = draw_tokens(logits, draws, Sampling(top_p=0.8))
    assert token.tolist() == [1, 2, 2]
    assert logp.exp().tolist() == pytest.approx([5 / 9, 1.5 / 9, 1.5 / 9])
    # However small, top_p keeps the most probable token.
    assert draw_tokens(logits, draws, Sampling(top_p=1e-6))[0].tolist() == [1, 1, 1]
    # Both: top_k first, then top_p over what is left: ⅔ is not below 0.6, so one token remains.
    assert draw_tokens(logits, draws, Sampling(top_k=2, top_p=0.6))[1].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    # A top_k wider than the vocabulary keeps everything.
    assert draw_tokens(logits, draws, Sampling(top_k=9))[1].exp().tolist() == pytest.approx([0.1, 0.15, 0.15])


def test_gradient_checkpointing_does_not_change_sampling(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Gradient checkpointing refuses a KV cache in training mode; sampling works around it and leaves it on."""
    folder = str(tiny_folder(tmp_path / "model"))
    plain = load_policy(
        ModelFolder.open(folder, "models.student"), LoadOptions(MODELS, torch.device("cpu"), frozen=False)
    )
    settings = MODELS.model_copy(update={"gradient_checkpointing": True})
    checkpointing = load_policy(
        ModelFolder.open(folder, "models.student"), LoadOptions(settings, torch.device("cpu"), frozen=False)
    )
    assert checkpointing.model.training and checkpointing.model.is_gradient_checkpointing
    ours, expected = (
        TorchSampler(policy).sample(requests(), Sampling(max_tokens=12)) for policy in (checkpointing, plain)
    )
    assert outcomes_by_request(ours) == outcomes_by_request(expected)
    assert checkpointing.model.training


def test_on_finished_reports_every_rollout_once() -> None:
    reports: list[list[Rollout]] = []
    rollouts = TorchSampler(tiny_policy(), batch=12).sample(
        requests(), Sampling(max_tokens=30), lambda finished: reports.append(list(finished))
    )
    assert len(reports) > 2  # not only at the end of each of the two batches
    reported = [rollout for finished in reports for rollout in finished]
    assert sorted(reported, key=lambda rollout: (rollout.problem_id, rollout.sample)) == sorted(
        rollouts, key=lambda rollout: (rollout.problem_id, rollout.sample)
    )


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_samples_of_one_prompt_share_its_prefill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(name, **ARCHITECTURES[name])
    decoder = FastDecoder if name == "qwen3" else CachedBatch
    shapes: list[tuple[int, ...]] = []
    whole = decoder._forward

    def record_shapes(self, ids, *rest):  # type: ignore[no-untyped-def]
        shapes.append(tuple(ids.shape))
        return whole(self, ids, *rest)

    monkeypatch.setattr(decoder, "_forward", record_shapes)
    TorchSampler(policy).sample(requests(samples=6), Sampling(max_tokens=2))
    # Four distinct prompts, the longest of 9 tokens, then at most one token for each of the 24 rollouts.
    assert shapes[0] == (4, 9)
    assert shapes[1][1] == 1 and 4 < shapes[1][0] <= 24
    assert len(shapes) == 2
