"""Sampling by the peers: `transformers.generate`, transformers' continuous batching, vLLM's CPU build; all in float32."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from benchmarks.cases import Case, Figures, Step
from benchmarks.models import folder_of, prompts_of

PAGE = 64
"""Tokens per page of the continuous batching cache."""


def prompts_and_folder(case: Case, root: Path) -> tuple[Path, list[list[int]]]:
    """The model folder, and the token ids of the prompts, each repeated `group` times."""
    folder = folder_of(case.student, case.endless, root)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems, _ = prompts_of(case, folder, 1)
    return folder, [tokenizer(problem.text)["input_ids"] for problem in problems for _ in range(case.group)]


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


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
    folder, ids = prompts_and_folder(case, root)
    model, width = model_of(folder), max(len(prompt) for prompt in ids)
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in ids])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids])
    config = generation(model, case)

    def step(number: int) -> Figures:
        with torch.inference_mode():
            output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
        return {"tokens_sampled": (output.shape[1] - width) * output.shape[0]}

    return step


def continuous_batching(case: Case, root: Path) -> Step:
    """The cache gets twice what the batch needs; its default takes nearly all memory of the machine."""
    folder, ids = prompts_and_folder(case, root)
    model, longest = model_of(folder), max(len(prompt) for prompt in ids)
    config = generation(model, case)
    pages = 2 * len(ids) * math.ceil((longest + case.new_tokens) / PAGE)
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages, max_batch_tokens=len(ids) * longest, max_requests_per_batch=len(ids)
    )

    def step(number: int) -> Figures:
        outputs = model.generate_batch(
            ids, generation_config=config, continuous_batching_config=settings, persistent_manager=True
        )
        return {"tokens_sampled": sum(len(output.generated_tokens) for output in outputs.values())}

    return step


def vllm(case: Case, root: Path) -> Step:
    """Runs in this process rather than in an engine process, so that its memory is counted; compiler on (the default)."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    folder, ids = prompts_and_folder(case, root)
    longest = max(len(prompt) for prompt in ids) + case.new_tokens
    engine = LLM(model=str(folder), dtype="float32", max_model_len=longest, max_num_seqs=case.batch, seed=0)
    params = SamplingParams(temperature=1.0, max_tokens=case.new_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]

    def step(number: int) -> Figures:
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return {"tokens_sampled": sum(len(output.outputs[0].token_ids) for output in outputs)}

    return step


ENGINES: dict[str, Callable[[Case, Path], Step]] = {
    "transformers": transformers_generate,
    "continuous": continuous_batching,
    "vllm": vllm,
}
