"""Padding-free batches: all tokens of a microbatch in one row, with attention restricted to each sequence.

Linear layers, norms and embeddings see L real tokens. Only attention works on padded blocks: queries, keys and values are gathered
into (rows, width) blocks of sequences of similar length, whose padding follows every real token, so that plain causal attention
needs no mask; then the results of the real tokens are gathered back. A prompt that several sequences share is among the L tokens
once, and its keys and values are gathered for each of them.

    L  tokens of a microbatch that are computed      M  slots of the blocks, padding included
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MAX_WASTE = 1 << 20
"""Attention scores that padding may add to a block before a new block is started: about the cost of starting one."""


@dataclass(frozen=True)
class Packing:
    """Positions of the tokens of B sequences in the packed row and in the attention blocks.

    position_1L     each token's position in its own sequence
    blocks          (rows, width) of each block, in order
    to_blocks_M     index of the packed token in each slot; padding repeats some token, whose result is unused
    from_blocks_L   index of the slot that holds each packed token's own result
    start_B         packed index of each sequence's first completion token; its completion follows in order
    prompt_end_B    packed index of each sequence's last prompt token
    """

    position_1L: Tensor
    blocks: tuple[tuple[int, int], ...]
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
    for prompt, completion in sequences:
        if prompt not in prompt_start:
            prompt_start[prompt] = len(ids)
            ids += prompt
            positions += range(len(prompt))
        starts.append(len(ids))
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
    rows = [
        torch.cat(
            [
                torch.arange(prompt_start[prompt], prompt_start[prompt] + len(prompt)),
                torch.arange(start, start + len(completion)),
            ]
        )
        for (prompt, completion), start in zip(sequences, starts, strict=True)
    ]
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
        position_1L=torch.tensor([positions], device=device),
        blocks=tuple(blocks),
        to_blocks_M=torch.cat(to_blocks).to(device),
        from_blocks_L=from_blocks.to(device),
        start_B=tuple(starts),
        prompt_end_B=tuple(prompt_start[prompt] + len(prompt) - 1 for prompt, _ in sequences),
    )
    return torch.tensor([ids], device=device), packing


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
    """Causal attention within each sequence: query (1, heads, L, D) -> (1, L, heads, D)."""
    heads = [tensor.shape[1] for tensor in (query, key, value)]
    slots = [gather_rows(tensor[0].transpose(0, 1).flatten(1), packing.to_blocks_M) for tensor in (query, key, value)]
    outputs, start = [], 0
    for rows, width in packing.blocks:
        q, k, v = (
            tensor[start : start + rows * width].view(rows, width, count, -1).transpose(1, 2)
            for tensor, count in zip(slots, heads, strict=True)
        )
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=heads[0] != heads[1]
        )
        outputs.append(out.transpose(1, 2).reshape(rows * width, -1))
        start += rows * width
    output_ME = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return gather_rows(output_ME, packing.from_blocks_L).view(1, len(packing.from_blocks_L), heads[0], -1)


def gather_rows(x_LE: Tensor, index_M: Tensor) -> Tensor:
    """Rows of x by index, (M, E). `embedding` is the form of indexing with a fast backward pass for repeated rows."""
    return functional.embedding(index_M, x_LE)
