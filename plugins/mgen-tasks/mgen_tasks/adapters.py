"""Heads of fine-tuned models, under the tensor names of ModelGenerator's checkpoints.

An adapter turns hidden states (B, L, H) into numbers for each row, each token, or each pair of
tokens. Whatever it gives for a row is that row's own: neither padding nor neighbours in the batch
enter. With `as_reference` two of them count both, as ModelGenerator does.
"""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgen_core import MgenError

Gives = Literal["rows", "tokens", "pairs"]
Pool = Callable[[Tensor, Tensor], Tensor]

PAIRS = 65_536  # computed at a time: more leaves the cache of a CPU, fewer keep a GPU idle
HEADS = 8  # of the transformer adapter
ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardswish", "Identity", "LeakyReLU", "LogSigmoid", "Mish", "ReLU",
    "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh",
)  # fmt: skip
IGNORED = ("dropout",)  # arguments of training


class Adapter(nn.Module):
    """What a task calls: the methods of the kinds that its class gives.

    - rows: `forward(hidden (B, L, H), real (B, L) bool)` is (B, C); `real` is False at padding.
    - tokens: `forward(hidden (..., H))` is (..., C).
    - pairs: `triangle(hidden (L, H))` is (P, C): one row's pairs i <= j in row-major order.
    """

    as_reference = False
    self_pairs = True
    """Whether the numbers of a token with itself mean anything."""

    def triangle(self, hidden_LH: Tensor) -> Tensor:
        """(P, C) of one row: see the class."""
        raise NotImplementedError


# --------------------------------------------------------------------------- layers


def activation(given: Any) -> nn.Module:
    """From "torch.nn.Tanh", "Tanh", or {class_path, init_args} as configs have it.

    Raises `MgenError` for what is no activation without parameters.
    """
    path = given.get("class_path") if isinstance(given, Mapping) else given
    arguments = (given.get("init_args") or {}) if isinstance(given, Mapping) else {}
    name = str(path).removeprefix("torch.nn.").removeprefix("modules.activation.")
    if name not in ACTIVATIONS:
        raise MgenError(f"no activation {path!r}", f"there are: {', '.join(ACTIVATIONS)}")
    return cast(nn.Module, getattr(nn, name)(**arguments))


def mlp_layers(
    in_features: int,
    outputs: int,
    start: int,
    *,
    hidden_sizes: Sequence[int] = (),
    activation_layer: Any = "Tanh",
    bias: bool = True,
    dropout_in_middle: bool = True,
) -> dict[str, nn.Module]:
    """The layers of an MLP by their places in ModelGenerator's sequence.

    Linear layer k is at `start` + k steps, its activation before it. Dropouts are counted, though
    they are not here.
    """
    layers: dict[str, nn.Module] = {}
    step = 3 if dropout_in_middle else 2
    for number, sizes in enumerate(pairwise([in_features, *hidden_sizes, outputs])):
        place = start + number * step
        if number:
            layers[str(place - step + 1)] = activation(activation_layer)
        layers[str(place)] = nn.Linear(*sizes, bias=bias)
    return layers


def instance_norm(x: Tensor, real: Tensor | None) -> Tensor:
    """Each channel of x (B, C, ...) over its row's positions; `real` (B, 1, L), else all are.

    Padding stays 0, which is what a convolution sees beyond the end of a row.
    """
    if real is None:
        return F.layer_norm(x, x.shape[2:])  # no affine, and a row of one position is no error
    count = real.sum(-1, keepdim=True)
    wide = x.float().masked_fill(~real, 0)
    centred = (wide - wide.sum(-1, keepdim=True) / count).masked_fill(~real, 0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return (centred * torch.rsqrt(variance + 1e-5)).to(x.dtype)


class Residual(nn.Module):
    """x + f(x), f: a convolution, an instance norm and an activation, several times."""

    def __init__(self, convolutions: Sequence[nn.Module], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # Norms and activations have no parameters, but places in the names.
        self.residual_block = nn.ModuleDict({str(3 * n): c for n, c in enumerate(convolutions)})
        self.act = act

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, C, ...) to the same; `real` as in `instance_norm`, x then 0 at padding."""
        y = x
        for convolution in self.residual_block.values():
            y = self.act(instance_norm(convolution(y), real))
        return x + y


# --------------------------------------------------------------------------- rows


def _first(hidden_BLH: Tensor, real_BL: Tensor) -> Tensor:
    """(B, H): the first token, which is [CLS] where there is one."""
    rows = torch.arange(len(hidden_BLH), device=hidden_BLH.device)
    return hidden_BLH[rows, real_BL.int().argmax(dim=1)]


def _mean(hidden_BLH: Tensor, real_BL: Tensor) -> Tensor:
    """(B, H), in float32: a bfloat16 sum over a thousand tokens would lose most of its digits."""
    # Filled, not multiplied: what a model leaves in padding may be NaN.
    filled = hidden_BLH.float().masked_fill(~real_BL.unsqueeze(-1), 0)
    return filled.sum(dim=1) / real_BL.sum(dim=1, keepdim=True)


def _max(hidden_BLH: Tensor, real_BL: Tensor) -> Tensor:
    """(B, H)."""
    return hidden_BLH.masked_fill(~real_BL.unsqueeze(-1), float("-inf")).amax(dim=1)


class Pooled(Adapter):
    """Pool each row, then the layers, one after the other."""

    def __init__(self, pool: Pool, **layers: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.layers = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, hidden_BLH: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """(B, C)."""
        x = _as_weights(self, self.pool(hidden_BLH, _or_all(real_BL, hidden_BLH)))
        for name in self.layers:
            x = self.get_submodule(name)(x)
        return x


def linear_cls(in_features: int, outputs: int) -> Adapter:
    """The first token, a linear layer."""
    return Pooled(_first, linear=nn.Linear(in_features, outputs))


def linear_mean_pool(in_features: int, outputs: int) -> Adapter:
    """The mean of all tokens, special ones included, a linear layer."""
    return Pooled(_mean, linear=nn.Linear(in_features, outputs))


def linear_max_pool(in_features: int, outputs: int) -> Adapter:
    """The maximum over all tokens, special ones included, a linear layer."""
    return Pooled(_max, linear=nn.Linear(in_features, outputs))


def mlp_pool(in_features: int, outputs: int, pooling: str = "mean_pooling", **mlp: Any) -> Adapter:
    """The mean of all tokens, or the first one, an MLP."""
    pools: dict[str, Pool] = {"mean_pooling": _mean, "cls_pooling": _first}
    if pooling not in pools:
        raise MgenError(f"no pooling {pooling!r}", f"there are: {', '.join(pools)}")
    return Pooled(pools[pooling], mlp=mlp_of(in_features, outputs, **mlp))


def legacy(in_features: int, outputs: int) -> Adapter:
    """The regression head of fm4bio itself (`use_legacy_adapter`)."""
    return Pooled(
        _mean,
        ffn=nn.Linear(in_features, in_features // 2),
        tanh=nn.Tanh(),
        out_proj=nn.Linear(in_features // 2, outputs),
    )


class LinearTransformer(Adapter):
    """Two transformer layers over the row's tokens, then a linear layer on the first."""

    def __init__(self, in_features: int, outputs: int) -> None:
        super().__init__()
        if in_features % HEADS:
            raise MgenError(
                f"LinearTransformerAdapter has {HEADS} heads, which {in_features} features do not "
                "fill evenly",
                "use another adapter with this backbone",
            )
        layer = nn.TransformerEncoderLayer(in_features, HEADS, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.linear = nn.Linear(in_features, outputs)

    def forward(self, hidden_BLH: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """(B, C)."""
        real_BL = _or_all(real_BL, hidden_BLH)
        if self.as_reference:
            # There, attention runs over the batch, each position by itself: only the first counts.
            across = _first(hidden_BLH, real_BL).unsqueeze(0)
            return cast(Tensor, self.linear(self.transformer(_as_weights(self, across))[0]))
        x = _as_weights(self, hidden_BLH).masked_fill(~real_BL.unsqueeze(-1), 0)
        x = self.transformer(x, src_key_padding_mask=~real_BL)
        return cast(Tensor, self.linear(_first(x, real_BL)))


class ResNet1D(Adapter):
    """Convolutions along the row, their mean, a linear layer."""

    def __init__(
        self, in_features: int, outputs: int, channels: int = 256, num_blocks: int = 9
    ) -> None:
        super().__init__()
        self.in_to_conv = nn.Linear(in_features, channels)

        def block() -> nn.Module:
            pair = [nn.Conv1d(channels, channels, 3, padding="same", bias=False) for _ in "12"]
            return Residual(pair, F.elu)

        self.resnet = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(num_blocks))})
        self.conv_to_output = nn.Linear(channels, outputs)

    def forward(self, hidden_BLH: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """(B, C)."""
        real_BL = _or_all(real_BL, hidden_BLH)
        if self.as_reference:  # padding enters the convolutions and the norms, not the mean
            return self._pooled(self._convolved(hidden_BLH, None), real_BL)
        filled = hidden_BLH.masked_fill(~real_BL.unsqueeze(-1), 0)
        return self._pooled(self._convolved(filled, real_BL.unsqueeze(1)), real_BL)

    def scaled_as_reference(self, hidden_BLH: Tensor, real_BL: Tensor) -> Tensor:
        """(B, C) of SequenceRegressionWithScaling.

        Its mask, inverted bit by bit and used as an index, empties the last rows of the batch
        instead of padding: the second to last, and the last where any row is padded.
        """
        hidden_BLH, real_BL = hidden_BLH[:, 1:-1].clone(), real_BL[:, 1:-1]
        count = len(hidden_BLH)
        emptied = [count - 2] if bool(real_BL.all()) else [count - 2, count - 1]
        emptied = [row for row in emptied if row >= 0]
        hidden_BLH[emptied] = 0
        x = self._convolved(hidden_BLH, None)
        x[emptied] = 0
        summed = x.float().sum(dim=-1) / real_BL.sum(dim=1, keepdim=True)
        return cast(Tensor, self.conv_to_output(_as_weights(self, summed)))

    def _convolved(self, hidden_BLH: Tensor, real_B1L: Tensor | None) -> Tensor:
        """(B, channels, L)."""
        x = cast(Tensor, self.in_to_conv(_as_weights(self, hidden_BLH))).transpose(1, 2)
        if real_B1L is not None:
            x = x.masked_fill(~real_B1L, 0)
        for block in cast(nn.ModuleList, self.resnet["blocks"]):
            x = block(x, real_B1L)
        return x

    def _pooled(self, x_BCL: Tensor, real_BL: Tensor) -> Tensor:
        pooled = _as_weights(self, _mean(x_BCL.transpose(1, 2), real_BL))
        return cast(Tensor, self.conv_to_output(pooled))


# --------------------------------------------------------------------------- tokens and pairs

# A pair's features are those of its smaller index and its larger one, alternating, so that it is
# the same from both sides. They are never put side by side for all pairs: a linear layer of them
# is a sum of two, one for each token, and half of the pairs are the other half's mirror image.


def mirror(values_PC: Tensor, length: int) -> Tensor:
    """(L, L, C) of what `triangle` gave."""
    i, j = pairs(length, values_PC.device)
    whole = values_PC.new_empty(length, length, values_PC.shape[-1])
    whole[i, j] = values_PC
    whole[j, i] = values_PC
    return whole


def pairs(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(P,) i and j of all pairs i <= j, row-major; P = L (L + 1) / 2."""
    i, j = torch.triu_indices(length, length, device=device)
    return i, j


def _sides(hidden_LH: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(L, F) each: what a token adds to a pair as its smaller index, and as its larger one."""
    x = hidden_LH.to(weight.dtype)
    return F.linear(x, weight[:, 0::2], bias), F.linear(x, weight[:, 1::2])


def _triangle(smaller_LF: Tensor, larger_LF: Tensor, rest: Sequence[nn.Module]) -> Tensor:
    """(P, C). Memory: L^2 / 2 outputs and pairs of indices, and `PAIRS` x the widest layer."""
    i, j = pairs(len(smaller_LF), smaller_LF.device)
    pieces = []
    for some_i, some_j in zip(torch.split(i, PAIRS), torch.split(j, PAIRS)):
        x = smaller_LF[some_i].add_(larger_LF[some_j])
        for layer in rest:
            x = layer(x)
        pieces.append(x)
    return torch.cat(pieces)


class TokenMLP(Adapter):
    """The same layers at every token, or at every pair of tokens."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., C)."""
        x = _as_weights(self, x)
        for layer in self.children():
            x = layer(x)
        return x

    def triangle(self, hidden_LH: Tensor) -> Tensor:
        first, *rest = self.children()
        assert isinstance(first, nn.Linear)
        return _triangle(*_sides(hidden_LH, first.weight, first.bias), rest)


def mlp_of(in_features: int, outputs: int, **mlp: Any) -> TokenMLP:
    """An MLP at every token."""
    return TokenMLP(mlp_layers(in_features, outputs, 1, **mlp))


def linear(in_features: int, outputs: int) -> Adapter:
    """A linear layer at every token."""
    return mlp_of(in_features, outputs)


class PairMLP(Adapter):
    """An MLP at every pair of tokens; `in_features` are those of one token."""

    def __init__(self, in_features: int, outputs: int, **mlp: Any) -> None:
        super().__init__()
        if not mlp.get("hidden_sizes"):
            raise MgenError(
                "MLPAdapterWithoutOutConcat has no hidden_sizes", "give them in adapter_args"
            )
        layers = mlp_layers(2 * in_features, outputs, -1, **mlp)
        first = cast(nn.Linear, layers.pop("-1"))
        # Its first layer is stored bare.
        self.first_linear, self.first_bias = first.weight, first.bias
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        """(B, L, L, C)."""
        length = hidden_BLH.shape[1]
        return torch.stack([mirror(self.triangle(row), length) for row in hidden_BLH])

    def triangle(self, hidden_LH: Tensor) -> Tensor:
        sides = _sides(hidden_LH, self.first_linear, self.first_bias)
        return _triangle(*sides, list(self.layers))


class ResNet2D(Adapter):
    """Convolutions over the square of pairs, then one number a pair, none for a token itself.

    Memory: about 4 x conv_channels x L^2 numbers, one row at a time.
    """

    self_pairs = False

    def __init__(
        self,
        in_features: int,
        outputs: int,
        num_res_blocks: int = 2,
        conv_channels: int = 64,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if outputs != 1:
            raise MgenError("ResNet2DAdapter gives one number a pair", "give outputs=1")
        self.in_to_conv = nn.Linear(in_features, conv_channels)

        def block() -> nn.Module:
            sizes = (1, kernel_size, 1)
            same = [nn.Conv2d(conv_channels, conv_channels, n, padding="same", bias=False)
                    for n in sizes]  # fmt: skip
            return Residual(same, F.relu)

        blocks = nn.ModuleList(block() for _ in range(num_res_blocks))
        self.resnet = nn.ModuleDict({"res2D_blocks": blocks})
        self.conv_to_output = nn.Conv2d(conv_channels, 1, kernel_size, padding="same")

    def triangle(self, hidden_LH: Tensor) -> Tensor:
        smaller, larger = _sides(hidden_LH, self.in_to_conv.weight, self.in_to_conv.bias)
        x = _square(smaller, larger).unsqueeze(0)
        for block in cast(nn.ModuleList, self.resnet["res2D_blocks"]):
            x = block(x)
        i, j = pairs(len(hidden_LH), x.device)
        values = cast(Tensor, self.conv_to_output(x))[0, 0, i, j]
        return values.masked_fill(i == j, 0).unsqueeze(-1)


def _square(smaller_LF: Tensor, larger_LF: Tensor) -> Tensor:
    """(F, L, L): the sum of both sides at every pair, the same from both."""
    upper = smaller_LF.T.unsqueeze(2) + larger_LF.T.unsqueeze(1)
    place = torch.arange(len(smaller_LF), device=smaller_LF.device)
    return torch.where(place.unsqueeze(1) <= place, upper, upper.transpose(1, 2))


# --------------------------------------------------------------------------- by name

ADAPTERS: Mapping[str, tuple[Callable[..., Adapter], tuple[Gives, ...]]] = {
    "LinearCLSAdapter": (linear_cls, ("rows",)),
    "LinearMeanPoolAdapter": (linear_mean_pool, ("rows",)),
    "LinearMaxPoolAdapter": (linear_max_pool, ("rows",)),
    "MLPPoolAdapter": (mlp_pool, ("rows",)),
    "LinearTransformerAdapter": (LinearTransformer, ("rows",)),
    "ResNet1DAdapter": (ResNet1D, ("rows",)),
    "legacy": (legacy, ("rows",)),
    "LinearAdapter": (linear, ("tokens", "pairs")),
    "MLPAdapter": (mlp_of, ("tokens", "pairs")),
    "MLPAdapterWithoutOutConcat": (PairMLP, ("pairs",)),
    "ResNet2DAdapter": (ResNet2D, ("pairs",)),
}


def make_adapter(
    name: str,
    args: Mapping[str, Any],
    in_features: int,
    outputs: int,
    *,
    as_reference: bool = False,
) -> Adapter:
    """An adapter, empty, with the arguments that a ModelGenerator config gives it.

    `in_features` is the width of a token; for pairs twice that, but not for
    MLPAdapterWithoutOutConcat. Raises `MgenError` for a name or an argument that there is not.
    """
    check_adapter(name, args)
    make, _ = ADAPTERS[name]
    known = {key: value for key, value in args.items() if key in _arguments(make)}
    try:
        adapter = make(in_features, outputs, **known)
    except (TypeError, ValueError) as error:
        raise MgenError(f"{name} cannot be made of {args}: {error}", "mend adapter_args") from error
    adapter.as_reference = as_reference
    return adapter


def check_adapter(name: str, args: Mapping[str, Any], gives: Gives | None = None) -> None:
    """Raise `MgenError` for an unknown name or argument, or for numbers of another kind."""
    able = [key for key, (_, kinds) in ADAPTERS.items() if gives is None or gives in kinds]
    if name not in ADAPTERS:
        raise MgenError(f"no adapter {name!r}", _near(name, able))
    if name not in able:
        raise MgenError(f"{name} does not give numbers for {gives}", _near("", able))
    arguments = [*_arguments(ADAPTERS[name][0]), *IGNORED]
    for key in args:
        if key not in arguments:
            raise MgenError(f"{name} has no argument {key!r}", _near(key, arguments))


def _arguments(make: Callable[..., Adapter]) -> list[str]:
    """Without the sizes, which come from the backbone and the task."""
    own = list(inspect.signature(make).parameters)[2:]
    if own[-1:] != ["mlp"]:
        return own
    inner = inspect.signature(mlp_layers).parameters.values()
    return own[:-1] + [one.name for one in inner if one.kind is one.KEYWORD_ONLY]


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"{f'did you mean {found[0]}? ' if found else ''}there are: {', '.join(known)}"


def _or_all(real_BL: Tensor | None, hidden_BLH: Tensor) -> Tensor:
    """The mask; without one every position is real."""
    if real_BL is not None:
        return real_BL
    return torch.ones(hidden_BLH.shape[:2], dtype=torch.bool, device=hidden_BLH.device)


def _as_weights(module: nn.Module, x: Tensor) -> Tensor:
    """In the dtype of the module's parameters."""
    return x.to(next(module.parameters()).dtype)
