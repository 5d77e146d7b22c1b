"""Tiny models with Qwen's special tokens, vocabulary width and chat turns, for tests of the doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tiny import tiny_model

PAD, END = 151643, 151645  # <|endoftext|>, where Qwen's Base models end, and <|im_end|>, where Instruct does
PLAIN = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + ';' + m['content'] + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant;' }}{%- endif -%}"
)


def qwen_tokenizer(
    eos: str = "<|im_end|>", pad: str = "<|endoftext|>", template: str = PLAIN
) -> PreTrainedTokenizerFast:
    """Few characters, and Qwen's special tokens at Qwen's own ids."""
    characters = {
        character: index for index, character in enumerate("0123456789+=; -*/(),.?:%\nabcdefghijklmnopqrstuvwxyz?!")
    }
    special = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<think>": 151667,
        "</think>": 151668,
    }
    backend = Tokenizer(models.BPE(vocab=characters | special | {"<|unk|>": 100}, merges=[], unk_token="<|unk|>"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, unk_token="<|unk|>", chat_template=template
    )


def qwen_folder(
    folder: Path,
    eos: str = "<|im_end|>",
    pad: str = "<|endoftext|>",
    template: str = PLAIN,
    width: int = 151936,
    ends: int | list[int] | None = None,
    **generation: Any,
) -> str:
    """A model of Qwen's vocabulary, 8 wide and one layer deep."""
    tokenizer = qwen_tokenizer(eos, pad, template)
    model = tiny_model(
        vocab_size=width, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if ends is None else ends, pad_token_id=tokenizer.pad_token_id, **generation
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
