"""The encoder of GenBio's cell models: a token a gene, its value a mixture of learned bins.

Shapes: B cells, S tokens, D width, K bins, A heads of d features, I inner width.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config
from .rotary import Turn, rotate


class Way(NamedTuple):
    """How tokens attend: turned by their places, and each to those of its own row.

    `lengths` of the rows that lie end to end; None: each of the B is one row.
    """

    turn: Turn | None = None
    lengths: tuple[int, ...] | None = None

    def cast(self, dtype: torch.dtype) -> Way:
        """With angles in the dtype of the arithmetic."""
        return self if self.turn is None else Way(self.turn.to(dtype), self.lengths)


STRAIGHT = Way()


def norm(config: Config) -> nn.Module:
    """The norm that the config names."""
    if config.rms:
        return nn.RMSNorm(config.width, eps=config.eps)
    return nn.LayerNorm(config.width, eps=config.eps)


class Values(nn.Module):
    """Numbers to vectors: each is scored against K bins and becomes their weighted mean."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.score = nn.Linear(1, config.bins)
        self.mix = nn.Linear(config.bins, config.bins)
        self.bins_weight = nn.Parameter(torch.empty(config.bins, config.width))
        self.masked_weight = nn.Parameter(torch.empty(1, config.width))
        self.padding_weight = nn.Parameter(torch.empty(1, config.width))
        self.alpha = config.alpha
        self.masked, self.padding = config.masked, config.padding

    def forward(self, values: Tensor) -> Tensor:
        """(B, S) to (B, S, D)."""
        numbers = values.to(self.bins_weight.dtype).unsqueeze(-1)
        scores = F.leaky_relu(self.score(numbers), 0.1)
        shares = self.mix(scores).add_(scores, alpha=self.alpha).softmax(-1)
        found = shares @ self.bins_weight
        found = torch.where(numbers == self.masked, self.masked_weight, found)
        return torch.where(numbers == self.padding, self.padding_weight, found)


class Attention(nn.Module):
    """Every token attends to every other: scores are never held, and nothing is masked."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)
        self.heads = config.heads

    def forward(self, x: Tensor, way: Way) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, A, 3, S, d)
        query, key, value = heads.unbind(2)
        if way.turn is not None:
            query, key = rotate(query, way.turn), rotate(key, way.turn)
        lengths = way.lengths or x.shape[1:2]
        pieces = zip(*(part.split(tuple(lengths), dim=2) for part in (query, key, value)))
        mixed = [F.scaled_dot_product_attention(*piece) for piece in pieces]
        joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
        return cast(Tensor, self.output(joined.transpose(1, 2).flatten(2)))


class GatedMLP(nn.Module):
    """down(up(x) * silu(gate(x))), up and gate as one matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_gate = nn.Linear(config.width, 2 * config.inner, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        up, gate = self.up_gate(x).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate).mul_(up)))


class Block(nn.Module):
    """One layer: attention, then MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, way: Way) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x = self.attention(self.attention_norm(x), way).add_(x)
        return cast(Tensor, self.mlp(self.mlp_norm(x)).add_(x))


class ExpressionHead(nn.Module):
    """What the model makes of each gene's value: one number a token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = norm(config)
        self.decoder = nn.Linear(config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, 1)."""
        return cast(Tensor, self.decoder(self.norm(F.gelu(self.dense(x)))))


class CellNetwork(nn.Module):
    """Values and positions, blocks, final norm and, where logits are wanted, the head."""

    def __init__(self, config: Config, head: bool, positions: int) -> None:
        super().__init__()
        self.values = Values(config)
        self.positions = nn.Embedding(positions, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = norm(config)
        self.head = ExpressionHead(config) if head else None

    def forward(
        self,
        values: Tensor,
        positions: Tensor,
        layers: Collection[int],
        logits: bool,
        way: Way = STRAIGHT,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Hidden states (B, S, D) of the wanted layers, and logits (B, S, 1).

        `values` (B, S) float, `positions` (S) or (B, S) int.
        """
        depth = len(self.blocks)
        last = depth if logits else max(layers, default=0)
        x = self.values(values) + self.positions(positions)
        way = way.cast(x.dtype)
        hidden: dict[int, Tensor] = {}
        for number, block in enumerate(islice(self.blocks, last)):
            if number in layers:
                hidden[number] = x
            x = block(x, way)
        x = self.norm(x) if last == depth else x
        if last in layers:
            hidden[last] = x
        return hidden, self.head(x) if logits and self.head is not None else None
