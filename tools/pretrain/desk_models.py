"""Desk models: Qwen3 with 15 to 127 million parameters for word problems in English; specs and tokenizer.

Configs and tokenizer ship with the package; `python -m tools.pretrain desk` trains the weights (desk.py). The tokenizer is a
byte-level BPE, so decoding returns any text exactly; each digit is a token of its own, so that arithmetic can be learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwater.tasks.word_problems import DIALS, WordsDials, problems
from tools.pretrain import common
from tools.pretrain.common import SPECIAL, generation_config, wrap_tokenizer
from tools.pretrain.solutions import words_worked

SHIPPED = Path(str(files("headwater"))) / "desk"
VOCABULARY = 4096
POSITIONS = 2048
CORPUS_PROBLEMS = 4000


@dataclass(frozen=True, slots=True)
class DeskSpec:
    """Shape and training length of one model. A step is an optimizer step on `batch` solutions.

    p_cot  fraction of worked solutions in the final mixture; before it all solutions are worked
    width  tokens in a row of packed solutions

    Example: `DeskSpec(hidden=384, layers=8, heads=6, kv_heads=2, worked_steps=3000, mixture_steps=500)`
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    worked_steps: int
    mixture_steps: int
    p_cot: float = 0.2
    lr: float = 1e-3
    batch: int = 256
    width: int = 1024
    dials: WordsDials = DIALS

    @property
    def steps(self) -> int:
        return self.worked_steps + self.mixture_steps


# Shapes follow small Qwen3 models: head size 64, MLP three times as wide. Steps and learning rates were tried on models with
# 1 million parameters only (docs/results.md); at these sizes they are untested guesses.
DESK: dict[str, DeskSpec] = {
    "student": DeskSpec(hidden=384, layers=8, heads=6, kv_heads=2, worked_steps=4000, mixture_steps=800),
    "teacher-small": DeskSpec(
        hidden=512, layers=10, heads=8, kv_heads=4, worked_steps=5000, mixture_steps=1000, p_cot=0.25, lr=8e-4
    ),
    "teacher": DeskSpec(
        hidden=640, layers=12, heads=10, kv_heads=5, worked_steps=6000, mixture_steps=1200, p_cot=0.25, lr=6e-4
    ),
    "teacher-large": DeskSpec(
        hidden=768, layers=18, heads=12, kv_heads=4, worked_steps=6000, mixture_steps=1200, p_cot=0.4, lr=5e-4
    ),
}


def with_steps(spec: DeskSpec, steps: int) -> DeskSpec:
    """The same spec with so many steps, worked and mixed in the same proportion.

    Example: `with_steps(DESK["student"], 12)` has 10 worked steps and 2 mixed ones.
    """
    worked = round(steps * spec.worked_steps / spec.steps)
    return replace(spec, worked_steps=worked, mixture_steps=steps - worked)


def corpus() -> list[str]:
    """Training text of the tokenizer: general English (a frozen copy of this project's docs) and worked word problems."""
    english = Path(__file__).with_name("english.txt").read_text(encoding="utf-8")
    examples = islice(problems("pretrain", "tokenizer"), CORPUS_PROBLEMS)
    return [*english.splitlines(keepends=True), *(f"{example.text}\n{words_worked(example)}" for example in examples)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; equal to the shipped one with the version of `tokenizers` in constraints.txt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return wrap_tokenizer(backend, POSITIONS)


def shipped_tokenizer() -> Any:
    """The tokenizer of every desk model."""
    return AutoTokenizer.from_pretrained(SHIPPED / "student")


def model_config(spec: DeskSpec, tokenizer: PreTrainedTokenizerFast) -> Any:
    return common.model_config(spec, "qwen3", tokenizer, POSITIONS, init_std=0.02, theta=10_000.0)


def ship(out_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write out_dir/NAME for every desk model: config and tokenizer without weights, as the package ships them."""
    for name, spec in DESK.items():
        folder = Path(out_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        config = model_config(spec, tokenizer)
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
        generation_config(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The library writes one indented line per merge, which triples the file size.
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
