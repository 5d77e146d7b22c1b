"""Model folders, prompts and rewards of the workloads: shipped pocket models, and random models shaped as Qwen3 and Qwen2.5."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.cases import Case
from headwater.config.prompt import Prompt
from headwater.config.recipe import Generate, Source
from headwater.data.sources import load
from headwater.models.folder import ModelFolder
from headwater.models.prompts import Prompter
from headwater.tasks.registry import find_task
from headwater.types import Problem

NEVER = "<|never|>"
"""An end token with an id outside the model's vocabulary, so every completion has full length."""
HEAD_DIM = 64


def folder_of(spec: str, endless: bool, root: Path) -> Path:
    """The folder of a model spec (`cases.py`), created under `root` if missing."""
    if spec.startswith("pocket:"):
        shipped = Path(ModelFolder.open(spec, "benchmark").path)
        return _without_end(shipped, root / f"{shipped.name}-endless") if endless else shipped
    return random_model(root / spec.replace("random:", "").replace(":", "-"), spec)


def config_of(spec: str) -> Any:
    """The config of a random model: tied embeddings, heads of 64, an end token that cannot be sampled.

    `random`: Qwen3's proportions, two query heads per key-value head, MLP of three times the width. `qwen2.5`: those of Qwen2.5-0.5B,
    whose matrices `qwen2.5:24x896:151936` has: two key-value heads, MLP of 38/7 times the width, biases. It is a Llama with biases,
    because transformers gives every folder of type qwen2 a tokenizer of that type.
    """
    family, size, vocabulary = spec.split(":")
    layers, hidden = (int(part) for part in size.split("x"))
    heads = hidden // HEAD_DIM
    families: dict[str, dict[str, Any]] = {
        "random": {
            "model_type": "qwen3", "intermediate_size": 3 * hidden, "num_key_value_heads": heads // 2, "head_dim": HEAD_DIM,
        },
        "qwen2.5": {
            "model_type": "llama", "intermediate_size": hidden * 38 // 7, "num_key_value_heads": 2, "head_dim": HEAD_DIM,
            "attention_bias": True,
        },
    }  # fmt: skip
    return AutoConfig.for_model(
        **families[family],
        vocab_size=int(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=int(vocabulary),
        pad_token_id=0,
    )


def random_model(folder: Path, spec: str) -> Path:
    if (folder / "ready").exists():
        return folder
    config = config_of(spec)
    vocabulary = config.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.num_hidden_layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = vocabulary, 0
    model.save_pretrained(folder)
    vocab = {"<pad>": 0, "<unk>": 1} | {f"t{index}": index for index in range(2, vocabulary)} | {NEVER: vocabulary}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=NEVER, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    (folder / "ready").touch()
    return folder


def _without_end(shipped: Path, folder: Path) -> Path:
    if (folder / "ready").exists():
        return folder
    shutil.copytree(shipped, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": NEVER})
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        assert tokenizer.eos_token_id >= config.get("vocab_size", 0)
        (folder / name).write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}), encoding="utf-8")
    (folder / "ready").touch()
    return folder


def prompts_of(case: Case, folder: Path, steps: int) -> tuple[list[Problem], dict[str, str]]:
    """Distinct prompts for `steps` steps, and the gold answers of pocket problems.

    A problem's text is the whole prompt with special tokens as text, so every peer tokenizes the same string.
    """
    count = steps * case.batch // case.group
    if not case.student.startswith("pocket:"):
        vocabulary = int(case.student.split(":")[2])
        draws = np.random.default_rng(0).integers(2, vocabulary, (count, case.prompt_tokens))
        return [Problem.of(" ".join(f"t{word}" for word in row), "benchmark") for row in draws], {}
    # Generate more than needed, since a sum may occur twice.
    source = Source(generate=Generate(pool="train", count=max(count, 2000)))
    read = load(source, "benchmark", need_answers=True, gold=find_task("sums").gold)
    prompter = Prompter(AutoTokenizer.from_pretrained(folder), Prompt())
    problems = read.problems[:count]
    assert len(problems) == count
    texts = [Problem(problem.id, prompter.text(problem), problem.source) for problem in problems]
    return texts, {problem.id: read.gold[problem.id] for problem in problems}


def completions_of(case: Case, steps: int) -> list[list[list[int]]]:
    """Random completions for the benchmark of the training part, per step."""
    vocabulary = int(case.student.split(":")[2])
    draws = np.random.default_rng(1).integers(2, vocabulary, (steps, case.batch, case.new_tokens))
    return [[[int(token) for token in row] for row in step] for step in draws]


def parity(completion: str) -> bool:
    """Reward without a real task: whether the number of the last token is even, as of about half of all completions.

    Example: `parity("t7 t12")` is True.
    """
    return int((re.findall(r"\d+", completion) or ["0"])[-1]) % 2 == 0
