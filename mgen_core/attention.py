"""Attention of packed rows: softmax(q k / sqrt(d)) v, by the fastest way the device has.

Shapes: T tokens of all rows end to end, A heads of d features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .packed import Spans

# Scores held at once: 2 MiB of float32, which stay in a core's own cache between the steps.
TILE = 2**19


def mix(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """(T, A, d) each, to (T, A, d): block by block of rows of equal length, nothing masked."""
    blocks, start = [], 0
    for rows, length in spans:
        stop = start + rows * length
        q, k, v = (
            heads[start:stop].view(rows, length, *heads.shape[1:]).transpose(1, 2)
            for heads in (query, key, value)
        )
        blocks.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
        start = stop
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, A, L, d) each, to (B, A, L, d); nothing is masked."""
    if value.device.type == "cpu" and value.dtype == torch.bfloat16:
        return attend_in_tiles(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attend_in_tiles(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same, tile by tile: float32 scores of some heads and queries against all keys.

    PyTorch's fused attention on the CPU takes as long in bfloat16 as in float32; here the second
    product runs at bfloat16's speed. Shares are rounded to bfloat16 for it, as fused kernels do.
    """
    length, size = query.shape[-2:]
    q = (query.float() * size**-0.5).flatten(0, 1)
    k = key.float().flatten(0, 1).mT
    v = value.flatten(0, 1)
    heads = max(torch.get_num_threads(), TILE // length**2)
    queries = max(1, TILE // (length * heads))
    mixed = torch.empty_like(v)
    for head in range(0, len(q), heads):
        some = slice(head, head + heads)
        for first in range(0, length, queries):
            tile = slice(first, first + queries)
            shares = (q[some, tile] @ k[some]).softmax(-1).to(v.dtype)
            mixed[some, tile] = shares @ v[some]
    return mixed.view(value.shape)
