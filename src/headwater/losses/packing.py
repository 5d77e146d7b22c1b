"""Padding-free batches: all tokens of a microbatch in one row, with attention restricted to each sequence.

Linear layers, norms and embeddings see L real tokens. Only attention works on padded blocks: queries, keys and values are gathered
into (rows, width) blocks of sequences of similar length, whose padding follows every real token, so that plain causal attention
needs no mask; then the results of the real tokens are gathered back. A prompt that several sequences share is among the L tokens
once, and its keys and values are gathered for each of them.

    L  tokens of a microbatch that are computed      M  slots of the blocks, padding included
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwater.devices import to_device

try:
    from torch.nn.attention import varlen as torch_varlen
except ImportError:  # torch before 2.10
    torch_varlen = None  # type: ignore[assignment]

VARLEN: Callable[..., Any] | None = None if torch_varlen is None else torch_varlen.varlen_attn

MAX_WASTE = 1 << 20
"""Attention scores that padding may add to a block before a new block is started: about the cost of starting one."""


@dataclass(frozen=True)
class Packing:
    """Positions of the tokens of B sequences in the packed row and in the attention blocks.

    position_1L     each token's position in its own sequence
    blocks          (rows, width) of each block, in order
    block_row_starts  slot at which each row of a block begins, and M
    to_blocks_M     index of the packed token in each slot; padding repeats some token, whose result is unused
    from_blocks_L   index of the slot that holds each packed token's own result
    start_B         packed index of each sequence's first completion token; its completion follows in order
    prompt_end_B    packed index of each sequence's last prompt token
    """

    position_1L: Tensor
    blocks: tuple[tuple[int, int], ...]
    block_row_starts: Tensor
    to_blocks_M: Tensor
    from_blocks_L: Tensor
    start_B: tuple[int, ...]
    prompt_end_B: tuple[int, ...]


def pack(sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device) -> tuple[Tensor, Packing]:
    """Pack (prompt, completion) pairs, each distinct prompt once: token ids (1, L) and their layout.

    Example: prompts (5, 6) twice with completions (7, 2) and (8,): ids 5 6 7 2 8, positions 0 1 2 3 2, and two rows of
    width 4 and 3 that both begin with tokens 0, 1.
    """
    ids: list[int] = []
    positions: list[int] = []
    prompt_start: dict[tuple[int, ...], int] = {}
    starts: list[int] = []
    rows: list[Tensor] = []
    for prompt, completion in sequences:
        if prompt not in prompt_start:
            prompt_start[prompt] = len(ids)
            ids += prompt
            positions += range(len(prompt))
        first, start = prompt_start[prompt], len(ids)
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
        starts.append(start)
        rows.append(torch.cat([torch.arange(first, first + len(prompt)), torch.arange(start, len(ids))]))
    to_blocks, from_blocks, blocks, offset = [], torch.empty(len(ids), dtype=torch.long), [], 0
    for members in group_by_length([len(row) for row in rows]):
        width = len(rows[members[-1]])
        for index in members:
            row = rows[index]
            to_blocks += [row, row[-1:].expand(width - len(row))]
            from_blocks[row] = torch.arange(offset, offset + len(row))
            offset += width
        blocks.append((len(members), width))
    packing = Packing(
        position_1L=to_device(torch.tensor([positions]), device),
        blocks=tuple(blocks),
        block_row_starts=to_device(_row_starts(blocks), device),
        to_blocks_M=to_device(torch.cat(to_blocks), device),
        from_blocks_L=to_device(from_blocks, device),
        start_B=tuple(starts),
        prompt_end_B=tuple(prompt_start[prompt] + len(prompt) - 1 for prompt, _ in sequences),
    )
    return to_device(torch.tensor([ids]), device), packing


def _row_starts(blocks: Sequence[tuple[int, int]]) -> Tensor:
    """First slot of each row of the blocks, and the number of slots: int32. Example: blocks (2, 3), (1, 5) give 0 3 6 11."""
    widths = [width for rows, width in blocks for _ in range(rows)]
    return torch.tensor([0, *accumulate(widths)], dtype=torch.int32)


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group sequence indices by similar length, shortest first: a group ends where its padding would exceed MAX_WASTE."""
    groups: list[list[int]] = []
    scores = 0  # attention scores of the group's real tokens
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        scores += lengths[index] ** 2
        if groups and (len(groups[-1]) + 1) * lengths[index] ** 2 - scores <= MAX_WASTE:
            groups[-1].append(index)
        else:
            groups.append([index])
            scores = lengths[index] ** 2
    return groups


def packed_attention(packing: Packing, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention within each sequence: query (1, heads, L, D) -> (1, L, heads, D).

    On a GPU in half precision torch's varlen kernel does it in one call, where torch has it; else one call for each block.
    """
    if query.device.type == "cuda" and torch.is_autocast_enabled("cuda"):  # which casts for neither indexing nor varlen
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    heads = [part.shape[1] for part in (query, key, value)]
    slots = [gather_rows(part[0].transpose(0, 1).flatten(1), packing.to_blocks_M) for part in (query, key, value)]
    q_MHD, k_MKD, v_MKD = (part.unflatten(1, (count, -1)) for part, count in zip(slots, heads, strict=True))
    if VARLEN is not None and query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        output_MHD = varlen_attention(VARLEN, packing, q_MHD, k_MKD, v_MKD, scaling)
    else:
        output_MHD = block_attention(packing, q_MHD, k_MKD, v_MKD, scaling)
    output_LE = gather_rows(output_MHD.flatten(1), packing.from_blocks_L)
    return output_LE.view(1, len(packing.from_blocks_L), heads[0], -1)


def block_attention(packing: Packing, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, scaling: float | None) -> Tensor:
    """Causal attention within each row of the blocks, (M, heads, D), by torch's dense attention of one block after the other."""
    outputs, start = [], 0
    for rows, width in packing.blocks:
        q, k, v = (
            part[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2)
            for part in (q_MHD, k_MKD, v_MKD)
        )
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += rows * width
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def varlen_attention(
    varlen: Callable[..., Any], packing: Packing, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, scaling: float | None
) -> Tensor:
    """The same by torch's varlen attention, whose arguments differ between versions of torch."""
    known, group = inspect.signature(varlen).parameters, q_MHD.shape[1] // k_MKD.shape[1]
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if group > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif group > 1:
        k_MKD, v_MKD = (part.repeat_interleave(group, dim=1) for part in (k_MKD, v_MKD))
    if scaling is not None and "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        q_MHD = q_MHD * (scaling * q_MHD.shape[-1] ** 0.5)
    starts, longest = packing.block_row_starts, max(width for _, width in packing.blocks)
    output_MHD: Tensor = varlen(q_MHD, k_MKD, v_MKD, starts, starts, longest, longest, **options)
    return output_MHD


def gather_rows(x_LE: Tensor, index_M: Tensor) -> Tensor:
    """Rows of x by index, (M, E). `embedding` is the form of indexing with a fast backward pass for repeated rows."""
    return functional.embedding(index_M, x_LE)
