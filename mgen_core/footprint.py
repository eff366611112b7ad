"""What a model takes: bytes of its parameters and of a batch beside them. Reads no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .api import Backbone, BackboneCard, Want
from .errors import WeightsError, opening

if TYPE_CHECKING:
    import torch
    from torch import nn

WIDTHS = 20
LAYERS = 32  # of a model of which only the number of parameters is known


class ModelSize(NamedTuple):
    """A model, in the precision of the run.

    - `bytes`: of parameters and buffers.
    - `private`: of those, what a process on a CPU holds for itself. The others are the mapped
      file, of which a host has one copy however many ranks it has.
    - `unit`: of the largest shard unit; `rest`: outside of the units, whole on every rank.
    - `exact`: False where only weights that are elsewhere would tell.
    """

    parameters: int
    bytes: int
    private: int
    unit: int
    rest: int
    exact: bool = True


def measure_model(backbone: Backbone, needs: Want, dtype: torch.dtype) -> ModelSize:
    """The size of the backbone as built for `needs`; of its weights, only the index is read.

    Where they are elsewhere, they are taken to be stored as most are, in float32, and a backbone
    that cannot be built without them has the size that its card tells. Raises `WeightsError` for
    weights that do not fit, or where nothing tells the size.
    """
    from .weights import parameters_on_meta

    backbone.want = needs
    try:
        with parameters_on_meta(), opening(backbone.card):
            module = backbone.build()
    except Exception:
        # Without its weights a backbone need not be able to, and fails in a way of its own.
        if not _elsewhere(backbone):
            raise
        return guess_size(backbone.card, dtype.itemsize)
    stored = _stored(backbone, module)
    sizes: dict[nn.Parameter, int] = {}
    private = buffers = sum(buffer.nbytes for buffer in module.buffers())
    for name, parameter in module.named_parameters():
        wanted = _wanted(name, parameter, backbone, dtype)
        sizes[parameter] = parameter.numel() * wanted.itemsize
        private += 0 if stored.get(name) == [wanted] else sizes[parameter]
    unit, sharded = _units(module, backbone, sizes)
    total = sum(sizes.values()) + buffers
    return ModelSize(sum(p.numel() for p in sizes), total, private, unit, total - sharded)


def weigh(
    backbone: Backbone, needs: Want, dtype: torch.dtype, tokens: int
) -> tuple[ModelSize, int]:
    """The model's size, and what a batch of so many tokens takes beside it."""
    size = measure_model(backbone, needs, dtype)
    try:
        width = backbone.width
    except (NotImplementedError, WeightsError):
        width = guess_width(size.parameters)
    outputs = len(backbone.vocabulary) if needs.logits else 0
    kept = len(needs.layers)
    return size, activation_bytes(width, tokens, dtype.itemsize, layers=kept, outputs=outputs)


def guess_size(card: BackboneCard, itemsize: int) -> ModelSize:
    """The size of a model of which the card is all there is, as one of many equal layers.

    Raises `WeightsError` where the card does not tell it.
    """
    if card.parameters is None:
        raise WeightsError(f"only its weights tell how large {card.name} is", "give --weights")
    total = card.parameters * itemsize
    private = 0 if itemsize == 4 else total
    return ModelSize(card.parameters, total, private, total // LAYERS, total // LAYERS, False)


def guess_width(parameters: int) -> int:
    """Features per token of such a model: a layer is about 12 squares of them."""
    return math.isqrt(parameters // (12 * LAYERS))


def activation_bytes(
    width: int, tokens: int, itemsize: int, *, layers: int = 0, outputs: int = 0
) -> int:
    """Upper estimate of what a forward pass of so many tokens takes beside the parameters.

    Of one layer, since inference frees the one before: residual, normed input, q, k, v, q and k
    turned, mixed values, projection (9 widths a token); gate and up of an MLP, 4 widths each,
    their product and the way down (13 at most); not all of them at once. Measured: 10 to 14 of
    the 20 that are counted. `layers` are hidden states that the task keeps, `outputs` further
    numbers a token (logits). Attention that is not fused, and experts, may take more: running
    out of memory is dealt with where it happens.
    """
    return tokens * itemsize * (width * (WIDTHS + layers) + outputs)


def _elsewhere(backbone: Backbone) -> bool:
    """Whether there are weights, but not here."""
    card = backbone.card
    return backbone.options.weights is None and bool(card.weights or card.weights_required)


def _stored(backbone: Backbone, module: nn.Module) -> dict[str, list[torch.dtype]]:
    """The dtype of each tensor that a parameter is read from; none where values are drawn."""
    from .checkpoint import open_checkpoint
    from .weights import match

    if (path := backbone.options.weights) is not None:
        checkpoint = open_checkpoint(path)
        matched = match(module, backbone, checkpoint)
        return {name: [checkpoint.keys[key].dtype for key in matched[name]] for name in matched}
    if _elsewhere(backbone):
        return {name: _assumed(name, backbone) for name, _ in module.named_parameters()}
    return {}


def _assumed(name: str, backbone: Backbone) -> list[torch.dtype]:
    import torch

    try:
        keys = backbone.sources(name, {})
    except Exception:  # it was promised the keys of a checkpoint
        keys = ()
    return [torch.float32] * max(1, len(keys))


def _wanted(
    name: str, parameter: nn.Parameter, backbone: Backbone, dtype: torch.dtype
) -> torch.dtype:
    """What `weights.fill` makes of a parameter."""
    import torch

    from .weights import is_kept_float32

    if is_kept_float32(name, backbone):
        return torch.float32
    return dtype if parameter.is_floating_point() else parameter.dtype


def _units(
    module: nn.Module, backbone: Backbone, sizes: dict[nn.Parameter, int]
) -> tuple[int, int]:
    """Bytes of the largest unit, and of all units together."""
    from .units import units_of

    units = [set(unit.parameters()) for unit in units_of(module, backbone.units)]
    largest = max((sum(sizes[p] for p in unit) for unit in units), default=0)
    return largest, sum(sizes[p] for p in set().union(*units))


def stored_bytes(weights: Path | None) -> int:
    """Bytes of the files of the weights."""
    if weights is None:
        return 0
    files = [weights] if weights.is_file() else weights.iterdir()
    return sum(file.stat().st_size for file in files if file.is_file())
