"""Published Qwen3 and Llama models, scaled down: positions, heads, tied heads, templates, thinking, stop ids, bfloat16."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from headwater.config.prompt import Prompt
from headwater.config.stage import Sampling
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.save import save_policy
from headwater.runs.hardware import MODELS
from headwater.sampling.base import requests_for
from headwater.sampling.decoder import decoder_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import Problem
from runs import temporary
from tiny import CPU
from tiny import MODELS as ASKED

LETTERS = [*"0123456789+=?. \n:,", *(chr(code) for code in range(ord("a"), ord("z") + 1)), *"ABCDJTWK"]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
LLAMA_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
]  # fmt: skip
# In our words, what the published templates do for the turns that are used here.
QWEN_TEMPLATE = (
    "{%- for turn in messages -%}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
LLAMA_TEMPLATE = (
    "{%- set said = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set said = messages[0].content | trim -%}{%- set turns = messages[1:] -%}{%- endif -%}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' "
    "+ said + '<|eot_id|>' }}"
    "{%- for turn in turns -%}{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
ENDS = {"qwen3": ["<|im_end|>", "<|endoftext|>"], "llama": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]}

GENERATION: dict[str, dict[str, Any]] = {
    "qwen3": {
        "eos_token_id": [151_645, 151_643],
        "pad_token_id": 151_643,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
    },
    "llama": {"eos_token_id": [128_001, 128_008, 128_009], "temperature": 0.6, "top_p": 0.9},
}
"""Published generation_config.json by `model_type`: stop ids, and sampling settings, which runs ignore."""


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A letter a token, and the special tokens of the family."""
    special = QWEN_TOKENS if kind == "qwen3" else LLAMA_TOKENS
    vocabulary = {token: index for index, token in enumerate([*special, *LETTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.decoder = decoders.Fuse()
    if kind == "qwen3":
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN_TEMPLATE
        )
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA_TEMPLATE
    )


@cache
def folder_of(name: str) -> Path:
    """A published configuration with a sixteenth of its heads and less of all else; what decides how it computes is as it was."""
    published = MODELS[name]
    group = published["num_attention_heads"] // published["num_key_value_heads"]
    tokenizer = tokenizer_of(published["model_type"])
    ends = tokenizer.convert_tokens_to_ids(ENDS[published["model_type"]])
    small = {
        "num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2,
        "hidden_size": 16 * round(2 * group * published["hidden_size"] / published["num_attention_heads"] / 128),
        "intermediate_size": 96, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if published["model_type"] == "qwen3" else ends,
    }  # fmt: skip
    small["initializer_range"] = (
        1.6 / small["hidden_size"] ** 0.5
    )  # wide models of the same numbers would round more in bfloat16
    torch.manual_seed(len(name))
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**published, **small}))
    generation = {**GENERATION[published["model_type"]], "eos_token_id": ends, "pad_token_id": 0}
    made.generation_config = GenerationConfig(**generation, do_sample=True)
    out = temporary() / name.rpartition("/")[2]
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def loaded(name: str, dtype: str = "float32", frozen: bool = False) -> Policy:
    return load_policy(
        ModelFolder.open(str(folder_of(name)), "models.student"),
        LoadOptions(ASKED.model_copy(update={"dtype": dtype}), CPU, frozen),
    )


PROBLEM = Problem.of("What is 17+45?", "test")
REAL = [
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct",
]


def samples(policy: Policy, count: int, tokens: int = 24) -> list[Any]:
    prompt = Prompter(policy.tokenizer, Prompt()).ids(PROBLEM)
    requests = requests_for([(PROBLEM.id, prompt)], count, "real")
    return TorchSampler(policy).sample(requests, Sampling(max_tokens=tokens))


def plain_logp(plain: Any, rollout: Any) -> torch.Tensor:
    """The completion's log-probs from transformers' own forward pass."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        logits = plain(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_sampler_trainer_and_transformers_log_probs_agree(name: str, dtype: str, near: float) -> None:
    policy = loaded(name, dtype)
    assert isinstance(decoder_for(policy), FastDecoder) and policy.supports_packing
    rollouts = samples(policy, 8)
    plain = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    for rollout, ours in zip(rollouts, logp_of(policy, rollouts, 4096), strict=True):
        assert (torch.tensor(rollout.sampler_logp) - ours).abs().mean().item() < near
        assert (plain_logp(plain, rollout) - ours).abs().mean().item() < near


@pytest.mark.parametrize("name", REAL)
def test_positions_heads_and_ties_equal_published_model(name: str) -> None:
    policy, published = loaded(name), MODELS[name]
    config = policy.model.config
    assert (
        config.num_attention_heads / config.num_key_value_heads
        == published["num_attention_heads"] / published["num_key_value_heads"]
    )
    assert config.tie_word_embeddings is published["tie_word_embeddings"]
    assert (policy.head.weight is policy.model.get_input_embeddings().weight) is published["tie_word_embeddings"]  # type: ignore[union-attr]
    # RoPE by hand: Llama 3's long wavelengths are stretched by 8, short ones left, and those between blended.
    rope, half = published["rope_parameters"], torch.arange(0, 16, 2) / 16
    expected = 1.0 / rope["rope_theta"] ** half
    if rope["rope_type"] == "llama3":
        length = 2 * torch.pi / expected
        low, high = (
            rope["original_max_position_embeddings"] / rope[f"{level}_freq_factor"] for level in ("low", "high")
        )
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = (1 - smooth) * expected / rope["factor"] + smooth * expected
        expected = torch.where(length > low, expected / rope["factor"], torch.where(length < high, expected, between))
        assert (length > low).any() and (length < high).any()
    torch.testing.assert_close(policy.model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_completion_ends_at_published_stop_ids_only(name: str) -> None:
    policy = loaded(name)
    ends = set(policy.tokenizer.convert_tokens_to_ids(ENDS[MODELS[name]["model_type"]]))
    assert set(policy.stop_ids) == ends
    rollouts = samples(policy, 192, tokens=40)
    assert {rollout.completion_ids[-1] for rollout in rollouts if rollout.finish == "stop"} == ends
    assert not any(set(rollout.completion_ids[:-1]) & ends for rollout in rollouts)
    assert all(rollout.completion_ids[-1] not in ends for rollout in rollouts if rollout.finish == "length")


def test_qwen3_thinking_follows_recipe() -> None:
    tokenizer = loaded("Qwen/Qwen3-1.7B", frozen=True).tokenizer
    on, off = (Prompter(tokenizer, Prompt(thinking=thinking, system="Be brief.")) for thinking in (True, False))
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 17+45?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert on.text(PROBLEM) == turns and off.text(PROBLEM) == turns + "<think>\n\n</think>\n\n"
    think = tuple(tokenizer.convert_tokens_to_ids(["<think>", "\n", "\n", "</think>", "\n", "\n"]))
    assert off.ids(PROBLEM) == on.ids(PROBLEM) + think
    assert tokenizer.bos_token_id is None and on.ids(PROBLEM)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_llama_3_template_has_one_bos_and_dates_in_each_mode() -> None:
    tokenizer = loaded("meta-llama/Llama-3.1-8B-Instruct", frozen=True).tokenizer
    plain, thinking = (Prompter(tokenizer, Prompt(thinking=thinking)) for thinking in (False, True))
    ids = plain.ids(PROBLEM)
    # The tokenizer adds a BOS of its own to plain text; the template has written one already.
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert thinking.ids(PROBLEM) == ids
    text = plain.text(PROBLEM)
    assert "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>" in text
    assert text.endswith("17+45?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    tokenizer.chat_template = None
    assert Prompter(tokenizer, Prompt()).ids(PROBLEM)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_saved_student_has_published_layout_and_same_log_probs(name: str, tmp_path: Path) -> None:
    policy = loaded(name)
    rollouts = samples(policy, 4)
    save_policy(policy, tmp_path / "model", torch.float32)
    ours, published = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", folder_of(name))
    )
    changed = {key for key in ours.keys() | published.keys() if ours.get(key) != published.get(key)}
    assert changed <= {"attention_dropout", "transformers_version", "dtype"}
    ends = policy.tokenizer.convert_tokens_to_ids(ENDS[MODELS[name]["model_type"]])
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == ends
    kept = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert ("lm_head.weight" in kept) is not MODELS[name]["tie_word_embeddings"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for rollout, logp in zip(rollouts, logp_of(policy, rollouts, 4096), strict=True):
        torch.testing.assert_close(plain_logp(plain, rollout), logp, rtol=0, atol=1e-4)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == policy.tokenizer.chat_template
    assert again("17+45?")["input_ids"] == policy.tokenizer("17+45?")["input_ids"]
