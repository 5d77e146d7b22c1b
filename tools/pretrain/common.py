"""What models made from scratch share, small (`pretrain`) and larger (`desk`): special tokens, shape, optimizers, measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

PAD, USER, ASSISTANT, END, UNKNOWN = SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>")
ARCHITECTURES = {"qwen3": Qwen3Config, "llama": LlamaConfig}
IGNORE_INDEX = -100  # label of a position without loss, as in transformers
# A system turn and enable_thinking are accepted and leave no trace: these models know neither.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
Progress = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last step)


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Samples at temperature 1 on evaluation problems; all but `problems` are shares between 0 and 1.

    An accuracy is None when no sample was of that form.
    """

    problems: int
    pass_rate: float
    worked_share: float
    worked_accuracy: float | None
    short_accuracy: float | None
    eos_share: float


def sample_stats(samples: Sequence[tuple[bool, bool, bool]]) -> SampleStats:
    """(whether it is worked, right, ended in EOS) of each sample -> the shares."""
    by_form = {form: [right for worked, right, _ in samples if worked is form] for form in (True, False)}
    return SampleStats(
        problems=len(samples),
        pass_rate=sum(right for _, right, _ in samples) / len(samples),
        worked_share=len(by_form[True]) / len(samples),
        worked_accuracy=sum(by_form[True]) / len(by_form[True]) if by_form[True] else None,
        short_accuracy=sum(by_form[False]) / len(by_form[False]) if by_form[False] else None,
        eos_share=sum(ended for _, _, ended in samples) / len(samples),
    )


def wrap_tokenizer(backend: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens and the chat template of every model that is made here."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
        padding_side="left",
    )


class ModelShape(Protocol):
    """What a spec says of a model's shape."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...


def model_config(
    spec: ModelShape,
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    positions: int,
    init_std: float,
    theta: float,
) -> Any:
    """The transformers config of a model made here: tied embeddings, inner layers three times as wide, EOS as the only end."""
    return ARCHITECTURES[architecture](
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=3 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.hidden // spec.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=init_std,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Samples the plain distribution and ends at EOS."""
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0
    )


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Learning rate: 5 % linear warm-up, constant, and a linear fall over the last 30 % of the steps."""
    done = (step + 1) / steps
    return lr * min(1.0, done / 0.05, (1.0 - done) / 0.3 + 0.02)


def make_optimizers(model: PreTrainedModel, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; AdamW alone is far slower."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write a model folder: bfloat16 safetensors to stay small, tokenizer, and a generation config that ends at EOS."""
    saved: Any = deepcopy(model)
    saved.generation_config = generation_config(tokenizer)
    saved.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
