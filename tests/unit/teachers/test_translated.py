"""A teacher with a prompt and a tokenizer of its own, read by a student in the student's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.distributions import Aligned
from headwater.losses.materialized import Exact, Grouped, Sorted, SpanLogp, TopK
from headwater.models.policy import Policy
from headwater.models.token_bytes import TokenBytes, TokenPair, same_tokens
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.cache import read_cache, write_distributions, write_rollouts
from headwater.teachers.scoring import distributions_of, logp_of
from headwater.teachers.translated import Form, TranslatedTeacher, begun_tokens, form_of
from headwater.types import Rollout
from tests.support.tokenizer_kinds import token_bytes
from tiny import sampled_rows, stage_of, tiny_policy
from tools.pretrain.pocket import make_tokenizer

PAIRS = make_tokenizer("pairs")
CHARACTERS = make_tokenizer()
PROMPT = (1, 40, 2)
"""Of the teacher, in its own ids: user turn, two digits as one token, assistant turn."""


def bytes_of(tokenizer: object) -> TokenBytes:
    return TokenBytes.of(tokenizer, (CHARACTERS.eos_token_id,))


@pytest.fixture(scope="module")
def pair() -> TokenPair:
    return TokenPair(bytes_of(CHARACTERS), bytes_of(PAIRS))


@pytest.fixture(scope="module")
def student() -> Policy:
    return tiny_policy(seed=3)


@pytest.fixture(scope="module")
def teacher() -> Policy:
    return tiny_policy(seed=4, tokenizer=PAIRS, vocab_size=len(PAIRS))


def translated(teacher: Policy, pair: TokenPair | None, form: Form = "prefix") -> TranslatedTeacher:
    return TranslatedTeacher(teacher, lambda name: PROMPT, pair, form, CHARACTERS, len(CHARACTERS), TorchSampler)


def written(text: str, tokens: TokenBytes, stop: bool = True) -> Rollout:
    ids = (*tokens.tokenizer(text, add_special_tokens=False)["input_ids"], *([tokens.end_id] if stop else []))
    logp = tuple(-0.1 * (index + 1) for index in range(len(ids)))
    return Rollout("p", 0, (1, 6, 2), ids, logp, "stop" if stop else "length", "by-hand")


def teacher_logp(teacher: Policy, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("form", ["prefix", "shared"])
def test_student_reads_groups_where_its_tokens_begin(form: Form, teacher: Policy, pair: TokenPair) -> None:
    rollout = written("=62;1", pair.student)
    ids = (*tuple(PAIRS("=62;1", add_special_tokens=False)["input_ids"]), PAIRS.eos_token_id)
    assert len(ids) == 5 < len(rollout.completion_ids) == 6
    (scored,) = translated(teacher, pair, form).distributions([rollout], 1000)
    assert isinstance(scored, Aligned) and scored.state_N.tolist() == [1, 1, int(form == "prefix"), 1, 1, 1]
    known, exact = scored.materialize(), teacher_logp(teacher, ids).exp()
    assert isinstance(known, Grouped)
    spelt, vocabulary = {group: token for token, group in enumerate(known.group_V.tolist())}, PAIRS.get_vocab()
    for position, row in ((0, 0), (1, 1), (3, 2), (4, 3), (5, 4)):
        for group, token in spelt.items():
            name = CHARACTERS.convert_ids_to_tokens(token)
            with_it = [name, *(name + digit for digit in "0123456789" if form == "prefix" and name in "0123456789")]
            expected = sum(exact[row, vocabulary[each]].item() for each in with_it)
            assert known.logp_NE[position, group].exp().item() == pytest.approx(expected, abs=1e-5), name
    if form == "prefix":  # the second digit: the pairs that begin with 6
        pairs = {digit: exact[1, vocabulary["6" + digit]].item() for digit in "0123456789"}
        for group, token in spelt.items():
            expected = pairs.get(CHARACTERS.convert_ids_to_tokens(token), 0.0) / sum(pairs.values())
            assert known.logp_NE[2, group].exp().item() == pytest.approx(expected, abs=1e-5)


def test_begun_tokens_of_finer_and_coarser_teachers() -> None:
    assert begun_tokens([b"6", b"2", b";"], [b"62", b";"]) == [(0, b""), (0, b"6"), (1, b"")]
    assert begun_tokens([b"62", b";"], [b"6", b"2", b";"]) == [(0, b""), (2, b"")]
    assert begun_tokens([b"ab", b"cd"], [b"abc", b"d"]) == [(0, b""), (0, b"ab")]


def test_span_logps_are_sums_of_both_models(student: Policy, teacher: Policy, pair: TokenPair) -> None:
    rollout = written("=62;1", pair.student)
    ids = (*tuple(PAIRS("=62;1", add_special_tokens=False)["input_ids"]), PAIRS.eos_token_id)
    (form,) = translated(teacher, pair, "spans").distributions([rollout], 1000)
    assert isinstance(form, SpanLogp)
    exact = teacher_logp(teacher, ids)[torch.arange(len(ids)), torch.tensor(ids)]
    assert form.logp_N[0].item() == pytest.approx(exact[0].item(), abs=1e-5)
    # `62`: the teacher's token, less the student's log-prob of the other digit.
    assert form.logp_N[1:3].tolist() == pytest.approx([exact[1].item() + 0.3, exact[1].item() + 0.2], abs=1e-5)
    assert form.logp_N[5].item() == pytest.approx(exact[4].item(), abs=1e-5)


def test_sorted_form_holds_teacher_probabilities(teacher: Policy, pair: TokenPair) -> None:
    (form,) = translated(teacher, pair, "sorted").distributions([written("=6", pair.student)], 1000)
    known = form.materialize()
    ids = (*PAIRS("=6", add_special_tokens=False)["input_ids"], PAIRS.eos_token_id)
    assert isinstance(known, Sorted)
    torch.testing.assert_close(
        known.logp_NV, teacher_logp(teacher, tuple(ids)).sort(dim=-1, descending=True).values, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("form", ["prefix", "shared", "spans", "sorted"])
def test_forms_do_not_depend_on_batches(form: Form, teacher: Policy, pair: TokenPair) -> None:
    rollouts = [written(text, pair.student, stop) for text, stop in (("=62;1", True), ("1", False), ("12+34=46", True))]
    whole = translated(teacher, pair, form).distributions(rollouts, 1000)
    for rollout, scored in zip(rollouts, whole, strict=True):
        (alone,) = translated(teacher, pair, form).distributions([rollout], 5)
        for a, b in zip(vars(scored.materialize()).values(), vars(alone.materialize()).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_equal_tokenizers_give_present_forms_bit_for_bit(policy: Policy) -> None:
    """With one tokenizer the ids are not translated: the teacher's distributions and log-probs are the plain ones."""
    assert same_tokens(bytes_of(CHARACTERS), bytes_of(make_tokenizer()))
    rollouts = [row.rollout for row in sampled_rows(policy)]
    prompts = {rollout.problem_id: rollout.prompt_ids for rollout in rollouts}
    for form in ("shared", "spans"):
        same = TranslatedTeacher(policy, prompts.__getitem__, None, form, CHARACTERS, 30, TorchSampler)  # type: ignore[arg-type]
        for own, plain in zip(same.distributions(rollouts, 100), distributions_of(policy, rollouts, 100), strict=True):
            a, b = own.materialize(), plain.materialize()
            assert isinstance(a, Exact) and isinstance(b, Exact) and torch.equal(a.logp_NV, b.logp_NV)


def test_renamed_ids_change_nothing_but_rounding(policy: Policy) -> None:
    """A teacher whose ids are permuted: shared-token KL and span ratios are those of one tokenizer."""
    rollouts = [row.rollout for row in sampled_rows(policy)]
    prompts = {rollout.problem_id: rollout.prompt_ids for rollout in rollouts}
    itself = TokenPair(bytes_of(CHARACTERS), bytes_of(CHARACTERS))
    made = {
        form: TranslatedTeacher(policy, prompts.__getitem__, itself, form, CHARACTERS, 30, TorchSampler)  # type: ignore[arg-type]
        for form in ("shared", "prefix", "spans")
    }
    for name in ("shared", "prefix"):
        for form, plain in zip(
            made[name].distributions(rollouts, 100), distributions_of(policy, rollouts, 100), strict=True
        ):
            known, exact = form.materialize(), plain.materialize()
            assert isinstance(known, Grouped) and isinstance(exact, Exact)
            torch.testing.assert_close(known.logp_NE[:, known.group_V], exact.logp_NV, atol=1e-5, rtol=1e-5)
    for form, logp in zip(made["spans"].distributions(rollouts, 100), logp_of(policy, rollouts, 100), strict=True):
        assert isinstance(form, SpanLogp) and torch.equal(form.logp_N, logp)


def test_teacher_samples_become_student_ids_and_are_scored_as_sampled(teacher: Policy, pair: TokenPair) -> None:
    both = translated(teacher, pair)
    rollouts = both.sample(requests_for([("p", (1, 6, 2))], 16, 0, "x"), stage_of("opd").sampling)
    own = TorchSampler(teacher).sample(requests_for([("p", PROMPT)], 16, 0, "x"), stage_of("opd").sampling)
    for rollout, sampled in zip(rollouts, own, strict=True):
        assert rollout.prompt_ids == (1, 6, 2)
        assert rollout.teacher_ids == sampled.completion_ids
        pieces = b"".join(pair.student.pieces(rollout.completion_ids))
        assert b"".join(pair.teacher.pieces(sampled.completion_ids)).startswith(pieces) or not pair.is_whole(rollout)
        if pair.is_whole(rollout):
            assert sum(rollout.sampler_logp) == pytest.approx(sum(sampled.sampler_logp))
            assert rollout.finish == sampled.finish
    # A rollout that the teacher divided in another way than its tokenizer would is scored in the ids that it sampled.
    divided = (PAIRS.get_vocab()["6"], PAIRS.get_vocab()["2"])
    spelt = replace(written("62", pair.student, stop=False), teacher_ids=divided)
    (form,) = translated(teacher, pair, "shared").distributions([spelt], 1000)
    assert isinstance(form, Aligned) and form.state_N.tolist() == [1, 1]


def test_unknown_characters_are_not_compared(teacher: Policy, pair: TokenPair) -> None:
    rollout = written("1x2", token_bytes("bytes"))
    other = TokenPair(token_bytes("bytes"), pair.teacher)
    (form,) = translated(teacher, other).distributions([rollout], 1000)
    assert isinstance(form, Aligned) and form.state_N.tolist() == [1, -1, -1, -1]
    # `<s>` is a special token that the student lacks: its text ends before it.
    first, *rest = token_bytes("bytes").tokenizer("12", add_special_tokens=False)["input_ids"]
    sampled = replace(rollout, completion_ids=(first, 1, *rest), sampler_logp=(-1.0,) * (2 + len(rest)))
    cut_pair = TokenPair(pair.student, token_bytes("bytes"))
    read = cut_pair.to_student(sampled, (1,))
    assert (read.completion_ids, read.finish) == ((6,), "length") and not cut_pair.is_whole(read)
    # Nothing of a text that begins with it can be read: an end alone, which is not compared.
    nothing = cut_pair.to_student(replace(sampled, completion_ids=(1, first), sampler_logp=(-1.0, -1.0)), (1,))
    assert nothing.completion_ids == (pair.student.end_id,) and nothing.finish == "length"
    assert cut_pair.to_teacher(nothing)[1].first_read == 0


def test_text_without_common_bytes_is_scored_and_not_compared(teacher: Policy, pair: TokenPair) -> None:
    other = TokenPair(token_bytes("bytes"), pair.teacher)
    for form in ("shared", "spans"):
        (scored,) = translated(teacher, other, form).distributions([written("é", token_bytes("bytes"))], 1000)  # type: ignore[arg-type]
        assert isinstance(scored, (Aligned, SpanLogp))
        assert ((scored.state_N if isinstance(scored, Aligned) else scored.size_N) < 0).all()


@dataclass(frozen=True)
class Recorded(ProcessGroup):
    """One process, whose gathered values are kept."""

    gathered: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return [value]


@dataclass(frozen=True)
class FirstOfTwo(ProcessGroup):
    """Rank 0 of two where rank 1 scores every rollout and sends `other`."""

    other: Any = None

    def shard(self, items: Sequence[Any]) -> list[Any]:
        return []

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize("top_k", [None, 3])
def test_cache_is_same_where_rank_0_scores_nothing(
    top_k: int | None, teacher: Policy, pair: TokenPair, tmp_path: Path
) -> None:
    """With more ranks than rollouts the groups of tokens are known to other ranks alone."""
    both = translated(teacher, pair)
    rollouts = both.sample(requests_for([("p", (1, 6, 2))], 3, 0, "x"), stage_of("opd").sampling)
    recorded = Recorded()
    write_distributions(tmp_path, translated(replace(teacher, ranks=recorded), pair), rollouts, top_k, 100)
    alone = load_file(tmp_path / "distributions.safetensors")
    shared = translated(replace(teacher, ranks=FirstOfTwo(other=recorded.gathered[0])), pair)
    write_distributions(tmp_path, shared, rollouts, top_k, 100)
    again = load_file(tmp_path / "distributions.safetensors")
    assert "group_of_token" in alone and alone.keys() == again.keys()
    assert all(torch.equal(alone[name], again[name]) for name in alone)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("form", ["prefix", "shared", "sorted"])
def test_cached_teacher_equals_live_one(
    top_k: int | None, form: Form, teacher: Policy, pair: TokenPair, tmp_path: Path
) -> None:
    if form == "sorted" and top_k is not None:
        pytest.skip("uld needs whole distributions")
    both = translated(teacher, pair, form)
    rollouts = both.sample(requests_for([("p", (1, 6, 2))], 6, 0, "x"), stage_of("opd").sampling)
    write_rollouts(tmp_path, rollouts)
    write_distributions(tmp_path, both, rollouts, top_k, 100)
    rows = read_cache(tmp_path)
    assert [row.rollout for row in rows] == rollouts
    student = torch.log_softmax(torch.randn(1, len(CHARACTERS)), dim=-1)
    for row, live in zip(rows, both.distributions(rollouts, 100), strict=True):
        assert row.teacher is not None
        known, other = row.teacher.materialize(), live.materialize()
        if isinstance(other, Grouped) and top_k is not None:
            other = other.top_k(top_k)
        assert isinstance(known, (TopK, Grouped, Sorted)) and type(other) is type(known)
        logp = student.expand(row.tokens, -1)
        for a, b in zip(known.align(logp), other.align(logp), strict=True):
            torch.testing.assert_close(a.exp(), b.exp(), atol=1e-3 if top_k else 1e-6, rtol=1e-3)


def test_form_follows_divergence() -> None:
    forms = {"reverse": "prefix", "jsd": "prefix", "sampled": "spans", "uld": "sorted"}
    for divergence, form in forms.items():
        assert form_of(stage_of("opd", dense={"divergence": divergence, "tokenizers": "prefix"}).dense) == form
    assert form_of(stage_of("opd", dense={"tokenizers": "shared"}).dense) == "shared"
