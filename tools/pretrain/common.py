"""Shared by the pocket and desk models: special tokens, chat template, model config, optimizers, sample statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

PAD, USER, ASSISTANT, END, UNKNOWN = SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>")
ARCHITECTURES = {"qwen3": Qwen3Config, "llama": LlamaConfig}
IGNORE_INDEX = -100  # label of positions without loss, as in transformers
# A system turn and enable_thinking are accepted and ignored: these models know neither.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
Progress = Callable[[int, int, float], None]  # (steps done, total steps, loss of the last step)


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Statistics of samples at temperature 1 on evaluation problems; all but `problems` are fractions.

    An accuracy is None when no sample had that form.
    """

    problems: int
    pass_rate: float
    worked_share: float
    worked_accuracy: float | None
    short_accuracy: float | None
    eos_share: float

    @property
    def cells(self) -> list[str]:
        """The fractions in percent, for the table of a model card."""
        fractions = [value for name, value in asdict(self).items() if name != "problems"]
        return ["none" if value is None else f"{value:.1%}" for value in fractions]


def sample_stats(samples: Sequence[tuple[bool, bool, bool]]) -> SampleStats:
    """Statistics of (worked, correct, ended in EOS) samples."""
    by_form = {form: [correct for worked, correct, _ in samples if worked is form] for form in (True, False)}
    return SampleStats(
        problems=len(samples),
        pass_rate=sum(correct for _, correct, _ in samples) / len(samples),
        worked_share=len(by_form[True]) / len(samples),
        worked_accuracy=sum(by_form[True]) / len(by_form[True]) if by_form[True] else None,
        short_accuracy=sum(by_form[False]) / len(by_form[False]) if by_form[False] else None,
        eos_share=sum(ended for _, _, ended in samples) / len(samples),
    )


def wrap_tokenizer(backend: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the special tokens and chat template of all these models."""
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
    """The shape of a model, as part of its spec."""

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
    """transformers config: tied embeddings, MLP three times as wide as the model, EOS as the only stop token."""
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
    """Generation config: samples from the full distribution, stops at EOS."""
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0
    )


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Learning rate: linear warm-up over 5 % of the steps, constant, linear decay over the last 30 %."""
    progress = (step + 1) / steps
    return lr * min(1.0, progress / 0.05, (1.0 - progress) / 0.3 + 0.02)


def make_optimizers(model: PreTrainedModel, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; AdamW alone learns far slower."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    )


def take_step(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Step every optimizer at this learning rate and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write a model folder: bfloat16 safetensors, tokenizer and generation config."""
    saved: Any = deepcopy(model)
    saved.generation_config = generation_config(tokenizer)
    saved.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
