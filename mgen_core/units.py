"""Which modules of a model are one shard unit each: its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn


def units_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The outermost modules whose class has one of the names, in registration order.

    Where there are none: the children of the outermost lists with two children of one class.
    """
    named = _outermost(module, lambda inner: type(inner).__name__ in names)
    return named or [child for stack in _outermost(module, _is_stack) for child in stack.children()]


def _is_stack(module: nn.Module) -> bool:
    kinds = Counter(map(type, module.children()))
    return isinstance(module, nn.ModuleList) and max(kinds.values(), default=0) > 1


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    found: list[nn.Module] = []
    within: set[nn.Module] = set()
    for inner in module.modules():  # a module comes before what is in it
        if inner not in within and wanted(inner):
            found.append(inner)
            within.update(inner.modules())
    return found
