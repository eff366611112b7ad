"""Rotary positions: tables once a forward pass, applied in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Rotation(NamedTuple):
    """cos and sin, each (T, 1, S, d/S): S parts of every head turn by a position of their own."""

    cos: Tensor
    sin: Tensor
    half: int
    """So many features of a part turn with as many others; what is beyond both stays."""


def frequencies(turning: int, theta: float, device: torch.device | None = None) -> Tensor:
    """By how much each pair of `turning` features turns from one position to the next."""
    steps = torch.arange(0, turning, 2, dtype=torch.float32, device=device)
    return 1.0 / (theta ** (steps / turning))


def rotation(positions: Tensor, frequencies: Tensor, size: int, dtype: torch.dtype) -> Rotation:
    """Tables for positions (T,) or (S, T); `size` features has a head, `dtype` the tables.

    Computed in float32: bfloat16 cannot count positions beyond 256.
    """
    parts = positions.reshape(-1, positions.shape[-1]).t()
    angles = (parts[..., None].float() * frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    rest = (0, size // parts.shape[1] - 2 * len(frequencies))
    return Rotation(
        F.pad(torch.cat((cos, cos), -1), rest, value=1.0).to(dtype),
        F.pad(torch.cat((-sin, sin), -1), rest).to(dtype),
        len(frequencies),
    )


def rotate(heads: Tensor, table: Rotation) -> None:
    """Turn (T, A, d) in place; the first and second half of the turning features are the pairs."""
    half = table.half
    split = heads.view(*heads.shape[:-1], *table.cos.shape[-2:])
    first, second, rest = split[..., :half], split[..., half : 2 * half], split[..., 2 * half :]
    # Whole features at a time: halves of small heads are too short for vectors. And two
    # roundings, not a fused one: these are the bits that the reference gets.
    swapped = torch.cat((second, first, rest), dim=-1).mul_(table.sin)
    split.mul_(table.cos).add_(swapped)
