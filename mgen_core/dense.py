"""Linear layers on a CPU, by the faster of the two libraries that come with PyTorch.

PyTorch multiplies float32 matrices by MKL, which leaves half of AVX-512 unused on a processor that
is not Intel's. oneDNN asks what the processor can do, not who made it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .machine import processor

Act = Literal["none", "gelu", "silu"]

FUNCTIONS: dict[Act, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
}
ONEDNN: dict[Act, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "silu": ("swish", ""),
}


class Dense(nn.Linear):
    """What `quicken` makes of an `nn.Linear`."""

    def forward(self, input: Tensor, act: Act = "none") -> Tensor:
        """(..., H) to (..., I)."""
        return linear(input, self.weight, self.bias, act)


def quicken(module: nn.Module) -> None:
    """Let every `nn.Linear` in it multiply by `linear`."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Dense


def activated(layer: nn.Module, x: Tensor, act: Act) -> Tensor:
    """The activation of what a layer gives: without a pass of its own where `quicken` was."""
    if isinstance(layer, Dense):
        found: Tensor = layer(x, act)
        return found
    return FUNCTIONS[act](layer(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: Act = "none") -> Tensor:
    """`F.linear`, then the activation."""
    if x.device.type == "cpu" and not torch.is_grad_enabled() and onednn_wins(x.dtype):
        name, algorithm = ONEDNN[act]
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
        return found
    return FUNCTIONS[act](F.linear(x, weight, bias))


@cache
def onednn_wins(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this type faster than PyTorch does by itself."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not _multiplies(dtype):
        return False
    if dtype == torch.bfloat16:  # PyTorch takes oneDNN anyway: what is saved is the activation
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return dtype == torch.float32 and avx512 and "Intel" not in processor()


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operator as it is used here: it is none of the public ones."""
    ones = torch.ones(2, 2, dtype=dtype, device="cpu")
    try:
        found = torch.ops.mkldnn._linear_pointwise(ones, ones, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, ones + ones)
