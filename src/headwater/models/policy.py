"""A causal language model with its tokenizer: batches, forward passes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup, full_tensor
from headwater.losses.batch import Batch, Row, collate, collate_packed, microbatches, packed_microbatches, packed_tokens
from headwater.losses.output_head import Head, LinearHead
from headwater.losses.packing import gather_rows
from headwater.models import lora
from headwater.models.cached_forward import last_hidden
from headwater.models.folder import ModelFolder
from headwater.models.packed_attention import packed_hidden
from headwater.models.shape import Shape
from headwater.models.tokenizer import stop_ids_of

T = TypeVar("T")
Decoding = Literal["left_padded", "equal_lengths", "recompute"]
"""With a cache: prompts padded on the left, or of one length in each batch; without one: sequences run from their start."""


@dataclass(frozen=True)
class Policy:
    """A causal language model, its tokenizer and what is needed to sample from it and score with it.

    folder            where it was loaded from
    fingerprint       name of the weights: content hash of that folder, or of the node that trained it
    compute_dtype     type of its matrix products; weights that train are float32
    body, head        the modules that make hidden states, and logits of them
    supports_packing  whether sequences can be concatenated without padding (`losses.packing`)
    supports_padding  whether padding on the right leaves the other tokens as they are; else only equal lengths share a batch
    decoding          how transformers' cache is used to sample (`models.batching_probe`)
    ranks             the process group over which FSDP2 shards the weights; a single process holds all of them
    meta_model        if sharded, the same model without weights or hooks, to be filled where all weights are needed
    adapter           the low-rank adapter in the model's layers, if any
    """

    model: Any
    tokenizer: Any
    folder: ModelFolder
    fingerprint: str
    device: torch.device
    compute_dtype: torch.dtype
    body: nn.Module
    head: Head
    supports_packing: bool = False
    supports_padding: bool = True
    decoding: Decoding = "left_padded"
    ranks: ProcessGroup = SINGLE_PROCESS
    meta_model: Any = None
    adapter: lora.Adapter | None = None

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def shape(self) -> Shape:
        return Shape.from_config(self.model.config, self.folder.trust_remote_code)

    @property
    def memory_settings(self) -> list[str]:
        """Unused recipe settings that lower the memory of a training pass; `models.dtype` also lowers that of inference."""
        settings = [] if self.compute_dtype == torch.bfloat16 else ["models.dtype=bfloat16"]
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            return settings
        if not getattr(self.model, "is_gradient_checkpointing", False):
            settings.append("models.gradient_checkpointing=true")
        return settings if self.adapter is not None else [*settings, "models.lora={r: 16}"]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion."""
        return stop_ids_of(getattr(self.model, "generation_config", None), self.model.config, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is masked and never recognised by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def batches(self, rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[Row], Batch]]:
        """Split rows into microbatches of at most `tokens` tokens, packed if the model supports it; yield rows and tensors.

        A model that supports neither packing nor padding gets rows of one length.
        """
        if self.supports_packing:
            for part in packed_microbatches(rows, tokens):
                yield part, collate_packed(part, self.device)
        else:
            for part in microbatches(rows, tokens, self.supports_padding):
                yield part, collate(part, self.pad_id, self.device)

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        """FLOPs of running these rows forward (1) or forward and backward (3); a packed shared prompt counts once."""
        lengths = [row.rollout.length for row in rows]
        if not lengths:
            return 0.0
        tokens = packed_tokens(rows) if self.supports_packing else sum(lengths)
        context = sum(length**2 for length in lengths) / sum(lengths) / 2
        adapter = 0 if self.adapter is None else self.adapter.active_parameters(self.shape.experts_per_token)
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
            return last_hidden(self.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False))

    @property
    def logits(self) -> Head:
        """The head, at the policy's precision; log-probs are computed from it in float32."""
        head = self.head
        if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
            return LinearHead(head.weight, head.bias, self.compute_dtype)
        return self._through_head

    @property
    def has_whole_head(self) -> bool:
        """Whether this rank holds all weights of the head, between passes too."""
        weights = self.head.parameters() if isinstance(self.head, nn.Module) else ()
        return not any(isinstance(parameter, DTensor) for parameter in weights)

    @torch.no_grad()
    def whole_head(self) -> Head:
        """The head for use outside the policy's own passes. Sharded weights are gathered anew: all ranks must call it."""
        head = self.logits
        if not isinstance(head, LinearHead) or self.has_whole_head:
            return head
        weight_VH = full_tensor(head.weight_VH.to(head.dtype))
        bias_V = None if head.bias_V is None else full_tensor(head.bias_V.to(head.dtype))
        return LinearHead(weight_VH, bias_V, head.dtype)

    def _through_head(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            return self.head(hidden)

    def reference(self) -> Policy:
        """An adapted policy as it was before training, on the same weights. Do not run it while the policy itself runs."""
        assert self.adapter is not None
        return replace(self, body=lora.ReferenceBody(self.body, self.adapter), adapter=None)

    def following(self) -> Policy:
        """An adapted policy with a copy of its adapter, on the same weights. Do not run it while the policy itself runs."""
        assert self.adapter is not None
        copies = (nn.Parameter(matrix.detach().clone(), requires_grad=False) for matrix in self.adapter.matrices())
        return replace(self, body=lora.ReferenceBody(self.body, self.adapter, nn.ParameterList(copies)), adapter=None)

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights under the model's own names, with an adapter added in; others are the tensors in memory.

        Sharded ones are gathered one at a time; all ranks must read all of them, in this order.
        """
        weights = self.model.state_dict().items() if self.adapter is None else self.adapter.merged_weights(self.model)
        for name, tensor in weights:
            yield name, full_tensor(tensor.detach())

    def checkpoint_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Merged weights under the names of a checkpoint file, where each fused expert is a separate matrix."""
        if getattr(self.model, "_weight_conversions", None):
            return iter(revert_weight_conversion(self.model, dict(self.merged_weights())).items())
        return self.merged_weights()


def with_root_weights(model: Any, function: Callable[[], T]) -> T:
    """Call `function`, which uses the model's embedding, norm or head outside its forward; FSDP2 gathers them for the call."""
    result: T = model.with_root_weights(function) if hasattr(model, "with_root_weights") else function()
    return result


def split_head(model: Any, device: torch.device) -> tuple[nn.Module, Head]:
    """(body that makes hidden states, head that makes logits of them).

    Some architectures scale or cap their logits after the head. If head(body(x)) is not the model's own output, the whole
    model is the body and its logits count as hidden states: slower, never wrong.
    """
    body, head = model.base_model, model.get_output_embeddings()
    if body is not model and head is not None:
        ids_BT = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():
            logits = model(input_ids=ids_BT, use_cache=False).logits
            split_logits = with_root_weights(
                model, lambda: head(body(input_ids=ids_BT, use_cache=False).last_hidden_state)
            )
        # Compared bit for bit: a cap such as Gemma's changes small logits by less than any tolerance, and large ones by much.
        if torch.equal(logits.float(), split_logits.float()):
            return body, head
    return model, nn.Identity()
