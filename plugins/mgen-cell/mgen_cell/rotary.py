"""Rotary positions in two axes: half of a head's features turn by each.

Shapes: S tokens, A heads of d features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10_000.0


class Turn(NamedTuple):
    """Cosines and sines (S, d) of each token's angles."""

    cos: Tensor
    sin: Tensor

    def to(self, dtype: torch.dtype) -> Turn:
        """In another dtype."""
        return Turn(self.cos.to(dtype), self.sin.to(dtype))


def turns(places: Tensor, nowhere: int, size: int) -> Turn:
    """The angles of tokens at `places` (2, S), for heads of `size` features.

    What is `nowhere` on an axis has neither cosine nor sine: that half of its query and key is 0.
    """
    steps = torch.arange(size // 4, device=places.device, dtype=torch.float32)
    angles = places.float().unsqueeze(-1) * BASE ** (-2 * steps / (size // 2))  # (2, S, d / 4)
    angles = torch.cat([angles, angles], dim=-1)
    somewhere = (places != nowhere).unsqueeze(-1)
    cos, sin = angles.cos() * somewhere, angles.sin() * somewhere
    return Turn(torch.cat([*cos], dim=-1), torch.cat([*sin], dim=-1))


def rotate(heads: Tensor, turn: Turn) -> Tensor:
    """Queries or keys (B, A, S, d), turned."""
    a, b, c, d = heads.chunk(4, dim=-1)
    return heads * turn.cos + torch.cat([-b, a, -d, c], dim=-1) * turn.sin
