"""GenBio's encoders as a textbook has them: padded, one matrix a projection, nothing fused.

What the benchmarks compare with. Modules bear the published names: with "bert." before each, the
state dict is a published checkpoint. B rows, L padded length, H width, A heads of d features.
"""

from __future__ import annotations

from typing import cast

import torch
from mgen_aido.config import Config
from torch import Tensor, nn
from torch.nn import functional as F


def norm(config: Config) -> nn.Module:
    kind = nn.RMSNorm if config.rms else nn.LayerNorm
    return kind(config.width, eps=config.eps)


def rotated(heads: Tensor) -> Tensor:
    """Rotary positions on (B, A, L, d)."""
    length, size = heads.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * angles.cos().to(heads.dtype) + turned * angles.sin().to(heads.dtype)


class SelfAttention(nn.Module):
    """Scores, mask, softmax, sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, config.width, bias=config.bias)
        self.value = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, L, H) to (B, L, H); `real` is (B, L) bool."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~real[:, None, None], torch.finfo(scores.dtype).min)
        # In float32 at any precision, as under autocast and in every fused kernel.
        shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        mixed: Tensor = shares @ v
        return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln = norm(config)
        self.self = SelfAttention(config)
        self.output = nn.ModuleDict({"dense": nn.Linear(config.width, config.width, config.bias)})

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return x + cast(Tensor, self.output["dense"](self.self(self.ln(x), real)))


class MLP(nn.Module):
    """The dense one of AIDO.RNA and AIDO.DNA."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.inner, bias=config.bias)
        self.gate_proj = nn.Linear(config.width, config.inner, bias=config.bias)
        self.down_proj = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Mixture(nn.Module):
    """AIDO.Protein's experts; each is called with the tokens that chose it, padding included."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.experts, self.chosen = config.experts, config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        for e in range(config.experts):
            up = nn.Linear(config.width, 2 * config.inner, bias=config.bias)
            down = nn.Linear(config.inner, config.width, bias=config.bias)
            self.add_module(f"dense_h_to_4h_{e}", up)
            self.add_module(f"dense_4h_to_h_{e}", down)

    def shares(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and what it takes of each, (T, chosen)."""
        scores, chosen = self.router(tokens.float()).topk(self.chosen)
        return scores.softmax(-1).to(tokens.dtype), chosen

    def expert(self, e: int, tokens: Tensor) -> Tensor:
        up, gate = self.get_submodule(f"dense_h_to_4h_{e}")(tokens).chunk(2, dim=-1)
        return cast(Tensor, self.get_submodule(f"dense_4h_to_h_{e}")(up * F.silu(gate)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.shares(tokens)
        total = torch.zeros_like(tokens)
        for e in range(self.experts):
            visitor, rank = torch.where(chosen == e)
            answers = self.expert(e, tokens[visitor]) * shares[visitor, rank, None]
            total.index_add_(0, visitor, answers)
        return total.view_as(x)


class AllExperts(Mixture):
    """The same numbers from every expert for every token, most of them times 0."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.shares(tokens)
        weights = shares.new_zeros(len(tokens), self.experts).scatter(1, chosen, shares)
        total = torch.zeros_like(tokens)
        for e in range(self.experts):
            total += self.expert(e, tokens) * weights[:, e, None]
        return total.view_as(x)


class Layer(nn.Module):
    def __init__(self, config: Config, mixture: type[Mixture]) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.ln = norm(config)
        self.mlp = mixture(config) if config.experts else MLP(config)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.attention(x, real)
        return x + cast(Tensor, self.mlp(self.ln(x)))


class Encoder(nn.Module):
    """Token ids (B, L), 0 where padded, to the last hidden state (B, L, H)."""

    def __init__(self, config: Config, mixture: type[Mixture] = Mixture) -> None:
        super().__init__()
        words = nn.Embedding(config.vocabulary, config.width)
        self.embeddings = nn.ModuleDict({"word_embeddings": words})
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(config, mixture) for _ in range(config.depth))
        self.encoder.ln = norm(config)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.embeddings["word_embeddings"](tokens)
        for layer in cast(nn.ModuleList, self.encoder.layer):
            x = layer(x, real)
        return cast(Tensor, cast(nn.Module, self.encoder.ln)(x))
