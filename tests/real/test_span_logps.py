"""Span log-probs of two real checkpoints with two tokenizers against plain transformers (`make real`).

Both sides hold float64 weights, because in float32 plain transformers itself is up to 4.2e-4 from float64 on these texts (40 texts,
Qwen2.5-Coder-0.5B). The environment variable SPAN_TEXTS says on how many texts: 100 by default.
"""

from __future__ import annotations

import gc
import os
import unicodedata
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwater.losses.alignment import Spans
from headwater.losses.materialized import SpanLogp
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.token_bytes import TokenBytes, TokenPair
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.teachers.translated import TranslatedTeacher
from headwater.types import Rollout
from tests.support.texts import sentences
from tiny import CPU, MODELS
from tools.real.__main__ import CACHE

STUDENT, TEACHER = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
TEXTS = int(os.environ.get("SPAN_TEXTS", "100"))
PROMPT = "<|im_start|>assistant\n"
BATCH, TOLERANCE = 16, 1e-4

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not all((CACHE / name / "config.json").is_file() for name in (STUDENT, TEACHER)),
        reason=f"{STUDENT} and {TEACHER} are not in {CACHE}: `make real` fetches them; NOT tested",
    ),
]


def policy_of(name: str) -> Policy:
    policy = load_policy(ModelFolder.open(str(CACHE / name), "models.student"), LoadOptions(MODELS, CPU, frozen=True))
    policy.model.double()
    return policy


def tokens_of(name: str) -> TokenBytes:
    folder = ModelFolder.open(str(CACHE / name), "models.student")
    return TokenBytes.of(folder.tokenizer, folder.stop_ids)


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def plain_logps(name: str, rows: list[Rollout]) -> list[Tensor]:
    """transformers' log-prob of each completion token: batches of sequences of one length, without padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(CACHE / name, dtype=torch.float64).eval()
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_shape[len(row.prompt_ids), len(row.completion_ids)].append(index)
    logps: dict[int, Tensor] = {}
    for (prompt, _), indices in by_shape.items():
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            ids_BT = torch.tensor([rows[index].prompt_ids + rows[index].completion_ids for index in part])
            logits_BTV = model(input_ids=ids_BT).logits[:, prompt - 1 : -1]
            logp_BT = torch.stack([row_TV.log_softmax(-1).gather(1, ids_T[:, None])[:, 0]
                                   for row_TV, ids_T in zip(logits_BTV, ids_BT[:, prompt:], strict=True)])  # fmt: skip
            logps.update(zip(part, logp_BT, strict=True))
    del model
    gc.collect()
    return [logps[index] for index in range(len(rows))]


def sums(logp_N: Tensor, ends: tuple[int, ...]) -> Tensor:
    return torch.stack([logp_N[start:end].sum() for start, end in pairwise((0, *ends))])


def assert_texts_agree(
    pair: TokenPair, student_ids: tuple[int, ...], teacher_ids: tuple[int, ...], spans: Spans
) -> None:
    """By the tokenizers' own decoders: at each span's end both have written the same text. A last end is an end on both sides."""
    for own, other in zip(spans.first_ends, spans.second_ends, strict=True):
        texts = [
            tokens.tokenizer.decode([id_ for id_ in ids if id_ != tokens.end_id], clean_up_tokenization_spaces=False)
            for tokens, ids in ((pair.student, student_ids[:own]), (pair.teacher, teacher_ids[:other]))
        ]
        assert texts[0] == texts[1]
        assert (student_ids[own - 1] == pair.student.end_id) == (teacher_ids[other - 1] == pair.teacher.end_id)


def test_span_log_probs_of_real_pair_agree_with_transformers() -> None:
    pair = TokenPair(tokens_of(STUDENT), tokens_of(TEACHER))
    texts = sentences(TEXTS)  # the languages take turns
    prompts = {tokens: ids_of(tokens.tokenizer, PROMPT) for tokens in (pair.student, pair.teacher)}
    rows = [
        Rollout("p", index, prompts[pair.student], ids, (0.0,) * len(ids), "stop", "by-hand")
        for index, text in enumerate(texts)
        for ids in [(*ids_of(pair.student.tokenizer, text), pair.student.end_id)]
    ]
    readings = [pair.to_teacher(row) for row in rows]
    cut = [
        text
        for text, row, (_, spans) in zip(texts, rows, readings, strict=True)
        if spans.first_read < len(row.completion_ids)
    ]
    assert cut == [
        text for text in texts if unicodedata.normalize("NFC", text) != text
    ]  # Qwen normalizes, SmolLM2 does not
    for row, (ids, spans) in zip(rows, readings, strict=True):
        assert_texts_agree(pair, row.completion_ids, ids, spans)

    own = logp_of(policy_of(STUDENT), rows, 2048)
    sampled = [replace(row, sampler_logp=tuple(logp.tolist())) for row, logp in zip(rows, own, strict=True)]
    teacher = TranslatedTeacher(
        policy_of(TEACHER),
        lambda name: prompts[pair.teacher],
        pair,
        "spans",
        pair.student.tokenizer,
        49_152,
        TorchSampler,
    )
    scored = teacher.distributions(sampled, 2048)
    del teacher
    gc.collect()
    plain_own = plain_logps(STUDENT, rows)
    plain_other = plain_logps(
        TEACHER,
        [
            replace(row, prompt_ids=prompts[pair.teacher], completion_ids=ids)
            for row, (ids, _) in zip(rows, readings, strict=True)
        ],
    )
    worst, spans_compared = [0.0, 0.0], 0
    for own_N, signal, plain_N, plain_M, (_, spans) in zip(own, scored, plain_own, plain_other, readings, strict=True):
        assert isinstance(signal, SpanLogp)
        if not spans.first_ends:  # Qwen's tokenizer normalizes the text's first characters
            continue
        own_C, starts = sums(own_N, spans.first_ends), [0, *spans.first_ends[:-1]]
        teacher_C = signal.logp_N[starts] + (own_C - own_N[starts])  # SpanLogp's definition, solved for log p_T(c)
        for side, (ours_C, plain_C) in enumerate(
            ((own_C, sums(plain_N, spans.first_ends)), (teacher_C, sums(plain_M, spans.second_ends)))
        ):
            worst[side] = max(worst[side], float((ours_C - plain_C).abs().max()))
        spans_compared += len(spans.first_ends)
    several = sum(len(a) > 1 or len(b) > 1 for _, spans in readings for a, b in spans.pairs())
    print(
        f"{len(texts)} texts, {len(cut)} of them compared up to where Qwen's tokenizer normalizes; {spans_compared} spans, {several} "
        f"of several tokens; largest difference: student {worst[0]:.1e}, teacher {worst[1]:.1e}"
    )
    assert len(texts) - len(cut) >= 0.9 * len(texts) and several > len(texts)
    assert max(worst) < TOLERANCE
