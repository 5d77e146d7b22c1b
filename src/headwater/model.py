"""Load, save, fingerprint and run causal language models; refuse a pair whose token maps differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from headwater import config
from headwater.distributions import Head
from headwater.errors import UserError

transformers_logging.disable_progress_bar()  # a run loads and saves dozens of models; its own progress is what counts

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

WHOLE, SAMPLES, BLOCK = 256 << 20, 512, 16 << 10
"""Bytes up to which a weights file is read whole to name it; how many blocks of a larger one, and of how many bytes."""

PROBES = (
    "17+45+82+03", "=62;", "Hello, world!\n", " The answer is \\boxed{\\frac{3}{4}}.", "αβγ – naïve 数学 🙂", "def f(x):\n    return x",
    "<think>\n\n</think>\n\n", "<|im_start|>user\n1 + 1?<|im_end|>\n", "1234567890", "  two  spaces\t tab",
)  # fmt: skip
"""Texts whose ids must agree before one model may teach another: equal width is not enough."""


@dataclass(frozen=True)
class Policy:
    """A causal language model, its tokenizer and what is needed to sample from it and score with it.

    where        the folder or hub id it came from
    fingerprint  names the weights: content hash of the folder it was loaded from, or of the node that trained it
    stop_ids     every id that ends a completion (generation config, model config and tokenizer together)
    """

    model: Any
    tokenizer: Any
    where: str
    fingerprint: str
    device: torch.device
    compute: torch.dtype
    body: nn.Module
    head: Head

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return stop_ids_of(getattr(self.model, "generation_config", None), self.model.config, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is never recognised by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Last hidden states (B, T, H) of right-padded sequences, as the head expects them."""
        with self.autocast():
            out = self.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, at the policy's precision; log-probs are made from it in float32."""
        with self.autocast():
            return self.head(hidden)


def stop_ids_of(generation: Any, held: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: what the generation config, the model's config and the tokenizer name together."""
    found: set[int] = set()
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(held, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(sorted(found))


def resolve(name: str, field: str) -> str:
    """The folder or hub id that a recipe's model name stands for.

    `pocket:NAME` ships with the package. `desk:NAME` is ./desk/NAME where that holds weights; else what ships, which is all
    but the weights and enough to plan with (`refuse_without_weights` tells).

    Raises UserError that names the field when it is a missing folder or an unknown pocket or desk model.
    """
    family, colon, short = name.partition(":")
    if colon and family in ("pocket", "desk"):
        made, shipped = Path(family) / short, Path(str(files("headwater"))) / family
        if family == "desk" and list(made.glob("*.safetensors")):
            return str(made)
        known = sorted(path.parent.name for path in shipped.glob("*/config.json"))
        if short not in known:
            listed = ", ".join(f"{family}:{one}" for one in known)
            raise UserError(f"{field}: no {family} model {name!r}; there are {listed}")
        return str(shipped / short)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{field}: the folder {name} holds no config.json, so no model")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"{field}: the folder {name} holds no *.safetensors; other weight formats are not read")
        return str(folder)
    if HUB_ID.match(name):
        return name
    raise UserError(f"{field}: no such model folder: {name}")


def refuse_without_weights(name: str, where: str, field: str) -> None:
    """Raises UserError for a desk model that has not been made yet; `where` is what its name stands for."""
    if Path(where).is_dir() and not list(Path(where).glob("*.safetensors")):
        raise UserError(f"{field}: {name} has no weights yet; `headwater pretrain desk` makes them in ./desk")


def read_tokenizer(where: str, trust_remote_code: bool) -> Any:
    """Raises ValueError where there is none: for some architectures transformers then makes an empty one."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how this process reads would be saved with what it trains
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        raise ValueError("its tokenizer gives no ids for the text '1'; are the tokenizer's files there?")
    return tokenizer


def load(
    name: str,
    field: str,
    models: config.Models,
    device: torch.device,
    frozen: bool,
    fingerprint: str | None = None,
) -> Policy:
    """Load a model and its tokenizer.

    A model that will be trained keeps float32 weights even where it computes in bfloat16: steps of 1e-6 vanish when they are
    rounded to bfloat16. A frozen one is held in the compute type.

    Raises UserError that names the field when the folder, hub id or tokenizer cannot be loaded.
    """
    where = resolve(name, field)
    refuse_without_weights(name, where, field)
    compute = getattr(torch, models.dtype)
    try:
        tokenizer = read_tokenizer(where, models.trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=compute if frozen else torch.float32,
            trust_remote_code=models.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        # What a damaged folder raises (safetensors, JSON, shapes) differs; the sentence is the same.
        raise UserError(f"{field}: {name} cannot be loaded ({first_sentence(error)})") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust", "huggingface_hub", "httpx"):
            raise
        raise UserError(f"{field}: {name} cannot be loaded ({first_sentence(error)})") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # with dropout the trainer's log-probs would not be the sampler's
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # attention layers hold a copy of the config's
    model.config.attention_dropout = 0.0
    model.to(device)
    model.requires_grad_(not frozen)
    if not frozen:
        for parameter in model.parameters():
            # Weights mapped from a file may lie at odd addresses, on which some kernels round differently.
            parameter.data = parameter.data.clone()
    if models.gradient_checkpointing and not frozen:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    else:
        model.eval()
    body, head = split(model, device)
    return Policy(model, tokenizer, where, fingerprint or fingerprint_of(where), device, compute, body, head)


def split(model: Any, device: torch.device) -> tuple[nn.Module, Head]:
    """The body that makes hidden states and the head that makes logits of them.

    Some architectures scale or cap their logits after the head. Where head(body(x)) is not the model's own output, the whole
    model is the body and its logits count as hidden states: slower, never wrong.
    """
    body, head = model.base_model, model.get_output_embeddings()
    if body is not model and head is not None:
        ids_BT = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():
            whole = model(input_ids=ids_BT, use_cache=False).logits
            parts = head(body(input_ids=ids_BT, use_cache=False).last_hidden_state)
        # Equal to the bit: a cap such as Gemma's changes small logits by less than any tolerance, and large ones by much.
        if torch.equal(whole.float(), parts.float()):
            return body, head
    return model, nn.Identity()


def first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def save(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder: config, safetensors, tokenizer. The model in memory is left as it is."""
    state = {name: tensor.detach().to(dtype) for name, tensor in policy.model.state_dict().items()}
    held = policy.model.config.dtype
    policy.model.config.dtype = dtype
    try:
        policy.model.save_pretrained(folder, state_dict=state)
        policy.model.config.dtype = dtype  # save_pretrained put down the type in memory, not the one in the file
        policy.model.config.save_pretrained(folder)
    finally:
        policy.model.config.dtype = held
    policy.tokenizer.save_pretrained(folder)


def fingerprint_of(where: str) -> str:
    """Names the weights of a model folder by content; a hub id by its name.

    Files up to WHOLE bytes count whole; of larger ones the size and SAMPLES blocks spread evenly from the first MiB to the last,
    so that a 16 GB model is named in a moment. A change that touches none of the blocks would go unseen; training touches
    all of a tensor.
    """
    digest = hashlib.sha256()
    folder = Path(where)
    if not folder.is_dir():
        return hashlib.sha256(where.encode()).hexdigest()[:16]
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                while part := file.read(1 << 20):
                    digest.update(part)
                continue
            digest.update(file.read(1 << 20))
            for place in range(1, SAMPLES):
                file.seek(place * (size - BLOCK) // SAMPLES)
                digest.update(file.read(BLOCK))
            file.seek(size - (1 << 20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def refuse_different_tokens(student: Any, teacher: Any, fields: tuple[str, str], texts: Sequence[str] = ()) -> None:
    """Refuse a pair of tokenizers that give different ids for the same text.

    Distillation compares distributions token by token; with different ids it would teach noise without an error.
    Raises UserError that names the first text on which they differ.
    """
    for text in (*PROBES, *texts):
        ours, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"{fields[0]} and {fields[1]}: their tokenizers give different ids for the same text {text!r:.60} "
                f"({ours[:6]} and {theirs[:6]}), so the teacher cannot supervise the student token by token"
            )


def refuse_different_widths(student: Policy, teacher: Policy, fields: tuple[str, str]) -> None:
    """Refuse a pair whose output layers have different widths. Raises UserError."""
    if student.vocabulary != teacher.vocabulary:
        raise UserError(
            f"{fields[0]} and {fields[1]}: their output layers have {student.vocabulary} and {teacher.vocabulary} columns; "
            "resize one (resize_token_embeddings) so that both have the same"
        )


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's shape that decide its cost; from its config alone, without its weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool

    @staticmethod
    def of(where: str, trust_remote_code: bool = False) -> Shape:
        return Shape.from_config(AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))

    @staticmethod
    def from_config(held: Any) -> Shape:
        held = held.get_text_config()
        heads = held.num_attention_heads
        return Shape(
            layers=held.num_hidden_layers,
            hidden=held.hidden_size,
            heads=heads,
            kv_heads=getattr(held, "num_key_value_heads", None) or heads,
            head_dim=getattr(held, "head_dim", None) or held.hidden_size // heads,
            inner=getattr(held, "intermediate_size", None) or 4 * held.hidden_size,
            vocabulary=held.vocab_size,
            tied=bool(held.tie_word_embeddings),
        )

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: attention, gated MLP and head; embeddings are looked up, not multiplied."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.matrix_parameters + (0 if self.tied else self.hidden * self.vocabulary)

    def flops(self, tokens: float, context: float, passes: Literal[1, 3] = 1) -> float:
        """Floating-point operations of a forward pass (1) or a forward and backward pass (3) over `tokens` tokens.

        Two for each matrix weight and token, and 4·layers·heads·head_dim a token and each earlier token it attends to;
        `context` is the mean number of those. A backward pass costs twice the forward one.
        """
        attention = 4.0 * self.layers * self.heads * self.head_dim * context
        return passes * tokens * (2.0 * self.matrix_parameters + attention)
