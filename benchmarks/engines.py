"""Sampling by others: `transformers.generate`, transformers' continuous batching, and vLLM's CPU build. All in float32."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from benchmarks.cases import Case
from benchmarks.models import folder_of, prompts_of

Step = Callable[[int], dict[str, float]]
PAGE = 64
"""Tokens in a page of the continuous batching's cache."""


def asked(case: Case, root: Path) -> tuple[Path, list[list[int]]]:
    """The model's folder, and the prompts' ids: each prompt `group` times."""
    folder = folder_of(case.student, case.endless, root)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems, _ = prompts_of(case, folder, 1)
    return folder, [tokenizer(one.text)["input_ids"] for one in problems for _ in range(case.group)]


def model_of(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def generation(model: Any, case: Case) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=case.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )


def transformers_generate(case: Case, root: Path) -> Step:
    folder, ids = asked(case, root)
    model, width = model_of(folder), max(len(one) for one in ids)
    padded = torch.tensor([[0] * (width - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
    told = generation(model, case)

    def step(number: int) -> dict[str, float]:
        with torch.inference_mode():
            found = model.generate(input_ids=padded, attention_mask=mask, generation_config=told)
        return {"tokens_sampled": (found.shape[1] - width) * found.shape[0]}

    return step


def continuous_batching(case: Case, root: Path) -> Step:
    """Left alone it takes nearly all of the machine's memory for its cache; here it gets what the batch needs, twice."""
    folder, ids = asked(case, root)
    model, longest = model_of(folder), max(len(one) for one in ids)
    told = generation(model, case)
    pages = 2 * len(ids) * math.ceil((longest + case.new_tokens) / PAGE)
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages, max_batch_tokens=len(ids) * longest, max_requests_per_batch=len(ids)
    )

    def step(number: int) -> dict[str, float]:
        found = model.generate_batch(
            ids, generation_config=told, continuous_batching_config=settings, persistent_manager=True
        )
        return {"tokens_sampled": sum(len(one.generated_tokens) for one in found.values())}

    return step


def vllm(case: Case, root: Path) -> Step:
    """In this process and not in an engine process, so that its memory is counted; its compiler on, as by default."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    folder, ids = asked(case, root)
    longest = max(len(one) for one in ids) + case.new_tokens
    engine = LLM(model=str(folder), dtype="float32", max_model_len=longest, max_num_seqs=case.batch, seed=0)
    told = SamplingParams(temperature=1.0, max_tokens=case.new_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": one} for one in ids]

    def step(number: int) -> dict[str, float]:
        found = engine.generate(prompts, told, use_tqdm=False)
        return {"tokens_sampled": sum(len(one.outputs[0].token_ids) for one in found)}

    return step


ENGINES: dict[str, Callable[[Case, Path], Step]] = {
    "transformers": transformers_generate,
    "continuous": continuous_batching,
    "vllm": vllm,
}
