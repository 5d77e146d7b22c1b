"""Sequences without padding: all tokens of a microbatch in one row, and each attends only to its own sequence.

Linear layers, norms and embeddings see L real tokens. Attention alone is laid out by sequence: queries, keys and values are spread
to (rows, width) blocks of like length, whose padding stands behind every real token, so that plain causal attention
needs no mask; then the real tokens' results are taken back. A prompt that several sequences begin with stands among the L tokens
once, and its keys and values are spread to each of them.

    L  tokens of a microbatch that are computed      M  places of the blocks, padding included
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WASTE = 1 << 20
"""Attention scores that padding may cost a block before a new one is begun: about what beginning one costs."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B sequences stand among L.

    position_1L  each token's position in its own sequence
    blocks       (rows, width) of each block, in order
    spread_M     which of the L tokens stands at each place of the blocks; padding repeats some token, whose result is not used
    back_L       at which place of the blocks each token's own result stands
    start_B      place among L of each sequence's first completion token; its completion follows in order
    prompt_B     place among L of each sequence's last prompt token
    """

    position_1L: Tensor
    blocks: tuple[tuple[int, int], ...]
    spread_M: Tensor
    back_L: Tensor
    start_B: tuple[int, ...]
    prompt_B: tuple[int, ...]


def pack(sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device) -> tuple[Tensor, Packing]:
    """Token ids (1, L) of (prompt, completion) pairs, each distinct prompt once, and where everything stands.

    Example: prompts (5, 6) twice with completions (7, 2) and (8,): ids 5 6 7 2 8, positions 0 1 2 3 2, and two rows of
    width 4 and 3 that both begin with places 0, 1.
    """
    ids: list[int] = []
    positions: list[int] = []
    first: dict[tuple[int, ...], int] = {}
    starts: list[int] = []
    for prompt, completion in sequences:
        if prompt not in first:
            first[prompt] = len(ids)
            ids += prompt
            positions += range(len(prompt))
        starts.append(len(ids))
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
    rows = [
        torch.cat([torch.arange(first[prompt], first[prompt] + len(prompt)), torch.arange(at, at + len(completion))])
        for (prompt, completion), at in zip(sequences, starts, strict=True)
    ]
    spread, back, blocks, offset = [], torch.empty(len(ids), dtype=torch.long), [], 0
    for members in blocked([len(row) for row in rows]):
        width = len(rows[members[-1]])
        for index in members:
            row = rows[index]
            spread += [row, row[-1:].expand(width - len(row))]
            back[row] = torch.arange(offset, offset + len(row))
            offset += width
        blocks.append((len(members), width))
    packing = Packing(
        position_1L=torch.tensor([positions], device=device),
        blocks=tuple(blocks),
        spread_M=torch.cat(spread).to(device),
        back_L=back.to(device),
        start_B=tuple(starts),
        prompt_B=tuple(first[prompt] + len(prompt) - 1 for prompt, _ in sequences),
    )
    return torch.tensor([ids], device=device), packing


def blocked(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences grouped by like length, shortest first: a block ends where its padding would cost too much."""
    found: list[list[int]] = []
    whole = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        whole += lengths[index] ** 2
        if found and (len(found[-1]) + 1) * lengths[index] ** 2 - whole <= WASTE:
            found[-1].append(index)
        else:
            found.append([index])
            whole = lengths[index] ** 2
    return found


def attended(packing: Packing, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of every token to its own sequence: q (1, heads, L, D) -> (1, L, heads, D)."""
    spread = [spread_out(one[0].transpose(0, 1).flatten(1), packing.spread_M) for one in (query, key, value)]
    found, at = [], 0
    for rows, width in packing.blocks:
        q, k, v = (
            one[at : at + rows * width].view(rows, width, whole.shape[1], -1).transpose(1, 2)
            for one, whole in zip(spread, (query, key, value), strict=True)
        )
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        found.append(out.transpose(1, 2).reshape(rows * width, -1))
        at += rows * width
    whole_ME = found[0] if len(found) == 1 else torch.cat(found)
    return spread_out(whole_ME, packing.back_L).view(1, len(packing.back_L), query.shape[1], -1)


def spread_out(x_LE: Tensor, index_M: Tensor) -> Tensor:
    """Rows of x by index, (M, E). An embedding is the indexing whose backward pass is quick for repeated rows."""
    return functional.embedding(index_M, x_LE)
