"""Rotary positions: tables once a forward pass, applied in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotation(NamedTuple):
    """cos and sin, each (T, 1, S, D/2): S parts of every head turn by a position of their own."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, turning: int, dtype: torch.dtype) -> Rotation:
    """Tables for positions (T,) or (S, T); `turning` (D) features of each part turn.

    Computed in float32: bfloat16 cannot count positions beyond 256.
    """
    steps = torch.arange(0, turning, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (THETA ** (steps / turning))
    parts = positions.reshape(-1, positions.shape[-1]).t()
    angles = (parts[..., None].float() * frequencies)[:, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(heads: Tensor, table: Rotation) -> None:
    """Turn (T, A, d) in place; the first and second half of the turning features are the pairs."""
    parts, half = table.cos.shape[-2:]
    split = heads.view(*heads.shape[:-1], parts, -1)
    first, second = split[..., :half], split[..., half : 2 * half]
    # Two roundings, not a fused one: these are the bits that the reference gets.
    turned = (first * table.cos).sub_(second * table.sin)
    second.mul_(table.cos).add_(first * table.sin)
    first.copy_(turned)
