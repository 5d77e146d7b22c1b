"""Load, save, fingerprint and run causal language models; refuse a pair whose token maps differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from headwater.config import recipe as config
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UserError
from headwater.losses.batch import Batch, Row, collate, collate_packed, microbatches, packed_microbatches, packed_tokens
from headwater.losses.distributions import Head, LinearHead
from headwater.losses.packing import gather_rows
from headwater.models import lora, untrusted_files
from headwater.models.locate import base_of, fingerprint_of, refuse_untrusted, refuse_without_weights, resolve
from headwater.models.packed_attention import packed_hidden, prepare
from headwater.models.shape import Shape

T = TypeVar("T")

transformers_logging.disable_progress_bar()  # a run loads and saves dozens of models; its own progress is what counts
transformers_logging.set_verbosity_error()  # what it warns of when it loads a folder is refused here in a sentence

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
    adapter      the low-rank adapter in the model's layers, where it has one
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
    ranks: ProcessGroup = SINGLE_PROCESS
    plain: Any = None
    adapter: lora.Adapter | None = None

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
        adapter = 0 if self.adapter is None else self.adapter.parameters
        return self.shape.flops(tokens, context, passes, adapter)

    def completion_hidden(self, batch: Batch) -> Tensor:
        """Hidden states (N, H) at the positions that predict the completion tokens."""
        if batch.packing is not None:
            with self.autocast():
                hidden = packed_hidden(self.body, batch.ids_BT, batch.packing)
        else:
            assert batch.mask_BT is not None
            hidden = self.hidden(batch.ids_BT, batch.mask_BT).flatten(0, 1)
        return gather_rows(hidden, batch.predictor_N)

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


def read_generation(where: str, held: Any) -> GenerationConfig:
    """A model's generation config; where it has none, what transformers makes of its config."""
    try:
        return GenerationConfig.from_pretrained(where)
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(held)


def read_tokenizer(where: str, trust_remote_code: bool) -> Any:
    """Raises ValueError where there is none: for some architectures transformers then makes an empty one."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how this process reads would be saved with what it trains
    # Some fail only when used.
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1", *PROBES)]
    if not found[0]:
        raise ValueError("its tokenizer gives no ids for the text '1'; are the tokenizer's files there?")
    return tokenizer


@dataclass(frozen=True)
class Layout:
    """How weights come from their files to where they run: all of them here, or a part on each of several ranks (`sharded`).

    read    (folder or hub id, type, trusted, quantisation, device, what an error's sentence begins with) -> a model, perhaps
            still without numbers in its weights
    spread  (that model, complete with its adapter; folder or hub id; device) -> it with its weights where they belong, and
            its `Policy.plain`
    """

    read: Callable[[str, torch.dtype, bool, Any, torch.device, str], Any]
    spread: Callable[[Any, str, torch.device], tuple[Any, Any]]
    ranks: ProcessGroup = SINGLE_PROCESS


def load(
    name: str,
    field: str,
    models: config.Models,
    device: torch.device,
    frozen: bool,
    fingerprint: str | None = None,
    adapt: lora.Wanted | None = None,
    layout: Layout | None = None,
) -> Policy:
    """Load a model and its tokenizer.

    A model that will be trained keeps float32 weights even where it computes in bfloat16: steps of 1e-6 vanish when they are
    rounded to bfloat16. A frozen one is held in the compute type.

    adapt   train an adapter of this kind and leave the weights frozen; None trains all weights
    layout  None has all weights in this process

    Raises UserError that names the field when the folder, hub id or tokenizer cannot be loaded.
    """
    layout = layout or HERE
    where = resolve(name, field)
    refuse_without_weights(name, where, field)
    refuse_untrusted(where, field, name, models.trust_remote_code)
    base, compute = base_of(where, field), getattr(torch, models.dtype)
    still = frozen or adapt is not None
    quantised = None if adapt is None else lora.quantisation(adapt.lora.quantize, compute)
    with untrusted_files.reading(f"{field}: {name} cannot be loaded"):
        tokenizer = read_tokenizer(where, models.trust_remote_code)
        dtype = compute if still else torch.float32
        model = layout.read(base, dtype, models.trust_remote_code, quantised, device, f"{field}: {name}")
    without_dropout(model)
    model.requires_grad_(not still)
    start = Path(where) if base != where else None
    resumed = start if goes_on(adapt) else None
    if start is not None and resumed is None and quantised is not None:
        raise UserError(
            f"{field}: {name} is an adapter, which cannot be added to weights in four bits; say models.lora.output: adapter to "
            "go on with it, or merge it first (`headwater merge`)"
        )
    adapter = None if adapt is None else lora.attach(model, base, adapt, field, resumed)
    if models.gradient_checkpointing and not frozen:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    else:
        model.eval()
    model, plain = layout.spread(model, base, device)
    if start is not None and resumed is None:
        lora.fold_in(model, start, field)
    body, head = split(model, device)
    name, packs = fingerprint or fingerprint_of(where), in_reach(model, lambda: prepare(model, body, device))
    return Policy(
        model, tokenizer, where, name, device, compute, body, head, packs, layout.ranks, plain=plain, adapter=adapter
    )


def goes_on(adapt: lora.Wanted | None) -> bool:
    """Whether training goes on with the adapter that it starts from; else that becomes part of the weights first."""
    return adapt is not None and adapt.lora.output == "adapter"


def read_weights(base: str, dtype: torch.dtype, trusted: bool, quantised: Any, device: torch.device, what: str) -> Any:
    """The model of a folder or hub id. Raises UserError where its files lack weights: they would be random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        trust_remote_code=trusted,
        use_safetensors=True,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the name
        quantization_config=quantised,
        device_map=None if quantised is None else {"": device},  # quantised while they are read, where they will be
    )
    model, found = loaded
    made_up = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if made_up:
        raise UserError(
            f"{what} cannot be loaded (its files lack {len(made_up)} weights that its config.json asks for, such as "
            f"{made_up[0]}, or hold them in another shape; they would be random)"
        )
    return model


def here(model: Any, base: str, device: torch.device) -> tuple[Any, None]:
    """All weights on one device."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Weights mapped from a file may lie at odd addresses, on which some kernels round differently.
            parameter.data = parameter.data.clone()
    return model, None


HERE = Layout(read_weights, here)


def without_dropout(model: Any) -> None:
    """With dropout the trainer's log-probs would not be the sampler's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # attention layers hold a copy of the config's
    model.config.attention_dropout = 0.0


def beneath(policy: Policy) -> Policy:
    """An adapted policy as it was when its training began, on the same weights; run it only while the policy itself does not run."""
    assert policy.adapter is not None
    return replace(policy, body=lora.Beneath(policy.body, policy.adapter), adapter=None)


def in_reach(model: Any, attempt: Callable[[], T]) -> T:
    """`attempt()`, with weights in reach that it uses past the model's own forward: also where ranks hold a part each."""
    found: T = model.within(attempt) if hasattr(model, "within") else attempt()
    return found


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
            parts = in_reach(model, lambda: head(body(input_ids=ids_BT, use_cache=False).last_hidden_state))
        # Equal to the bit: a cap such as Gemma's changes small logits by less than any tolerance, and large ones by much.
        if torch.equal(whole.float(), parts.float()):
            return body, head
    return model, nn.Identity()


def save(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder: config, safetensors, tokenizer; or, where the recipe wants that, an adapter's.

    The model in memory is left as it is.
    """
    if policy.adapter is not None and policy.adapter.lora.output == "adapter":
        policy.adapter.save(folder)
    else:
        plain = policy.model if policy.adapter is None else skeleton(policy.model)
        held = policy.model.config.dtype
        plain.config.dtype = dtype
        try:
            plain.save_pretrained(folder, state_dict={name: one.to(dtype) for name, one in weights_of(policy)})
            plain.config.dtype = dtype  # save_pretrained put down the type in memory, not the one in the file
            plain.config.save_pretrained(folder)
        finally:
            policy.model.config.dtype = held
    policy.tokenizer.save_pretrained(folder)


def weights_of(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights under their checkpoint's names, an adapter added to them; as they are in memory, but for the sums."""
    state = policy.model.state_dict().items()
    for name, tensor in state if policy.adapter is None else policy.adapter.merged(policy.model):
        yield name, tensor.detach()


def skeleton(model: Any) -> Any:
    """A model of the same kind without adapters, quantisation or numbers."""
    held = copy.deepcopy(model.config)
    if hasattr(held, "quantization_config"):
        del held.quantization_config
    with torch.device("meta"):
        found = type(model)(held)
    found.generation_config = model.generation_config
    return found


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
