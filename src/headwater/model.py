"""Load, save, fingerprint and run causal language models; refuse a pair whose token maps differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from headwater import config, model_files
from headwater.attention import packed_hidden, prepare
from headwater.batch import Batch, Row, collate, collate_packed, microbatches, packed_microbatches, packed_tokens
from headwater.distributions import Head, LinearHead
from headwater.errors import UserError
from headwater.packing import spread_out
from headwater.ranks import ALONE, Ranks

transformers_logging.disable_progress_bar()  # a run loads and saves dozens of models; its own progress is what counts
transformers_logging.set_verbosity_error()  # what it warns of when it loads a folder is refused here in a sentence

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
    packs        whether sequences may stand behind one another without padding (`packing`)
    ranks        the processes that hold a part each of the weights (`sharded`); one alone holds all
    plain        then the same model without weights or hooks, to be filled where all of them are needed
    """

    model: Any
    tokenizer: Any
    where: str
    fingerprint: str
    device: torch.device
    compute: torch.dtype
    body: nn.Module
    head: Head
    packs: bool = False
    ranks: Ranks = ALONE
    plain: Any = None

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def shape(self) -> Shape:
        return Shape.from_config(self.model.config)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return stop_ids_of(getattr(self.model, "generation_config", None), self.model.config, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is never recognised by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16)

    def batches(self, rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[Row], Batch]]:
        """Rows cut into microbatches of at most `tokens` tokens, each with its tensors: packed where the model packs."""
        for part in packed_microbatches(rows, tokens) if self.packs else microbatches(rows, tokens):
            batch = collate_packed(part, self.device) if self.packs else collate(part, self.pad_id, self.device)
            yield part, batch

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        """FLOPs of running these rows forward (1) or forward and backward (3); a shared prompt counts once where it is run once."""
        lengths = [len(row.rollout.prompt_ids) + row.tokens for row in rows]
        if not lengths:
            return 0.0
        tokens = packed_tokens(rows) if self.packs else sum(lengths)
        context = sum(length**2 for length in lengths) / sum(lengths) / 2
        return self.shape.flops(tokens, context, passes)

    def completion_hidden(self, batch: Batch) -> Tensor:
        """Hidden states (N, H) at the positions that predict the completion tokens."""
        if batch.packing is not None:
            with self.autocast():
                hidden = packed_hidden(self.body, batch.ids_BT, batch.packing)
        else:
            assert batch.mask_BT is not None
            hidden = self.hidden(batch.ids_BT, batch.mask_BT).flatten(0, 1)
        return spread_out(hidden, batch.predictor_N)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Last hidden states (B, T, H) of right-padded sequences, as the head expects them."""
        with self.autocast():
            out = self.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits

    @property
    def logits(self) -> Head:
        """The head, at the policy's precision; log-probs are made from it in float32."""
        held = self.head
        if type(held) is nn.Linear and not held._forward_hooks and not held._forward_pre_hooks:
            return LinearHead(held.weight, held.bias, self.compute)
        return self._through_head

    def _through_head(self, hidden: Tensor) -> Tensor:
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
        model_files.refuse_unsafe(folder, field, name)
        return str(folder)
    if HUB_ID.match(name):
        return name
    raise UserError(f"{field}: no such model folder: {name}")


def refuse_without_weights(name: str, where: str, field: str) -> None:
    """Raises UserError for a desk model that has not been made yet; `where` is what its name stands for."""
    if Path(where).is_dir() and not list(Path(where).glob("*.safetensors")):
        raise UserError(f"{field}: {name} has no weights yet; `headwater pretrain desk` makes them in ./desk")


def refuse_untrusted(where: str, field: str, name: str, trust_remote_code: bool) -> None:
    """Raises UserError for a folder whose configs name code to be run, or a model unlike the weights beside it."""
    folder = Path(where)
    if not folder.is_dir():
        return  # a hub id: the library asks the same of it as we do, and downloads safetensors alone
    if not trust_remote_code:
        model_files.refuse_code(folder, field, name)
    if list(folder.glob("*.safetensors")):
        model_files.refuse_unlike_weights(folder, field, name)


def read_tokenizer(where: str, trust_remote_code: bool) -> Any:
    """Raises ValueError where there is none: for some architectures transformers then makes an empty one."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how this process reads would be saved with what it trains
    # Some fail only when used.
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1", *PROBES)]
    if not found[0]:
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
    refuse_untrusted(where, field, name, models.trust_remote_code)
    compute = getattr(torch, models.dtype)
    with model_files.reading(f"{field}: {name} cannot be loaded"):
        tokenizer = read_tokenizer(where, models.trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=compute if frozen else torch.float32,
            trust_remote_code=models.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name
        )
    model, found = loaded
    made_up = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if made_up:
        raise UserError(
            f"{field}: {name} cannot be loaded (its files lack {len(made_up)} weights that its config.json asks for, such as "
            f"{made_up[0]}, or hold them in another shape; they would be random)"
        )
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
    name, packs = fingerprint or fingerprint_of(where), prepare(model, body, device)
    return Policy(model, tokenizer, where, name, device, compute, body, head, packs)


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


def refuse_different_widths(student: Policy, teacher: Any, fields: tuple[str, str]) -> None:
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
        found = Shape.from_config(AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))
        for name, value in vars(found).items():
            if not isinstance(value, int) or (value < 1 and name != "tied"):
                raise ValueError(f"{name} is {value!r:.40}")
        return found

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
