"""Mixture of experts: a token passes through the few experts that its router likes best.

All experts of a layer are one stacked parameter, taken as a whole whichever tokens come: what a
rank gathers never depends on its data.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgen_core.dense import FUNCTIONS, Act, linear

from .config import Config

ACTS: dict[str, Act] = {"swiglu": "silu", "geglu": "gelu"}


class Experts(nn.Module):
    """E gated MLPs, of which each token takes the C best (`experts_per_token`).

    `router_weight` is (E, H), float32; `up_gate_weight` (E, 2I, H), the gate second;
    `down_weight` (E, H, I).
    """

    up_gate_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, width, inner = config.experts, config.width, config.inner
        self.router_weight = nn.Parameter(torch.empty(experts, width))
        self.up_gate_weight = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_weight = nn.Parameter(torch.empty(experts, width, inner))
        bias = config.bias
        self.up_gate_bias = nn.Parameter(torch.empty(experts, 2 * inner)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, width)) if bias else None
        self.experts, self.chosen = experts, config.experts_per_token
        self.act = FUNCTIONS[ACTS[config.act]]
        self.aligned = width % 8 == 0 and inner % 8 == 0

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) to (T, H)."""
        # Near ties are common, and bfloat16 would send such tokens elsewhere.
        scores, chosen = F.linear(x.float(), self.router_weight.float()).topk(self.chosen)
        shares = scores.softmax(-1).to(x.dtype)
        # Visits of tokens to experts, T x C, sorted by expert.
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(1, self.experts + 1, device=x.device))
        if x.is_cuda and x.dtype == torch.bfloat16 and self.aligned:
            return self.grouped(x, shares, order, expert, ends)
        # Where the loop runs, the counts must be on the host: a stall a layer on a GPU.
        return self.looped(x, shares, order, [0, *ends.tolist()])

    def grouped(
        self, x: Tensor, shares: Tensor, order: Tensor, expert: Tensor, ends: Tensor
    ) -> Tensor:
        """All experts in one kernel a projection."""
        ends = ends.int()
        both = F.grouped_mm(x[order // self.chosen], self.up_gate_weight.mT, offs=ends)
        if self.up_gate_bias is not None:
            both += self.up_gate_bias[expert]
        up, gate = both.chunk(2, dim=-1)
        answers = F.grouped_mm(self.act(gate).mul_(up), self.down_weight.mT, offs=ends)
        if self.down_bias is not None:
            answers += self.down_bias[expert]
        # Back to the order of tokens, so that each token's answers are added up alike every time.
        home = torch.empty_like(answers).index_copy_(0, order, answers)
        return (home.view(*shares.shape, -1) * shares[..., None]).sum(1)

    def looped(self, x: Tensor, shares: Tensor, order: Tensor, bounds: list[int]) -> Tensor:
        """One expert after another, those that nobody visits left out."""
        total = torch.zeros_like(x)
        visitors, weights = order // self.chosen, shares.flatten()[order, None]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if start == stop:
                continue
            tokens = visitors[start:stop]
            both = linear(x[tokens], self.up_gate_weight[number], _of(self.up_gate_bias, number))
            up, gate = both.chunk(2, dim=-1)
            inner = self.act(gate).mul_(up)
            answers = linear(inner, self.down_weight[number], _of(self.down_bias, number))
            total.index_add_(0, tokens, answers.mul_(weights[start:stop]))
        return total


def _of(bias: Tensor | None, number: int) -> Tensor | None:
    return None if bias is None else bias[number]
