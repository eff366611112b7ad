"""A module filled from a checkpoint. The core loads weights, never a plugin."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .api import Backbone, BackboneCard, TaskCard
from .checkpoint import Checkpoint, SeededCheckpoint, TensorInfo, listed_names
from .errors import PluginError, WeightsError

RANDOM_FILLS = {Tensor.normal_, Tensor.uniform_}
Elsewhere = Callable[[nn.Parameter, Sequence[str], torch.dtype], bool]
SIZES = ("model_type", "hidden_size", "num_hidden_layers")  # of config.json, told in errors


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have meta parameters: no memory, and initialisation costs nothing.

    Buffers are built for real, since rotary tables and position ids are in no file. A parameter
    keeps its identity, so tied ones stay tied.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            swap(param, torch.empty_like(param, device="meta"))
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with _NoInit():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Names(Protocol):
    """How a module's parameters are called in a checkpoint: a backbone, or a task's head."""

    @property
    def card(self) -> BackboneCard | TaskCard: ...

    @property
    def ignored(self) -> Sequence[str]: ...

    @property
    def keep_float32(self) -> Sequence[str]: ...

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]: ...


class _NoInit(TorchFunctionMode):
    """Random initialisation of meta tensors does nothing, instead of nothing at great length.

    Torch decomposes it in Python, for which it imports its compiler: a second at every start.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def swap(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another tensor, under all its names."""
    # The object stays and changes its tensor: a tied parameter changes under all its names.
    torch.utils.swap_tensors(  # type: ignore[no-untyped-call]
        parameter, nn.Parameter(value, requires_grad=False)
    )


def fill(
    module: nn.Module,
    backbone: Names,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    elsewhere: Elsewhere = lambda slot, keys, dtype: False,
) -> None:
    """Give every parameter and persistent buffer its values; the module is then on `device`.

    A parameter for which `elsewhere` says so was filled by it.

    On the CPU a parameter of one source in the file's own dtype is the mapped file itself. All
    else is converted tensor by tensor, so memory peaks one tensor above the model. Floating
    parameters become `dtype`, those of `backbone.keep_float32` float32; buffers keep the dtype
    they were built with. Raises what `match` raises, before anything is read.
    """
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise PluginError(
                f"backbone {backbone.card.name}: buffer {name} was built on the meta device",
                "this is a defect of the backbone plugin: report it to its author",
            )
    matched = match(module, backbone, checkpoint)
    for (name, *_), slot in slots_of(module):
        keys = matched.get(name)
        if keys is None:
            continue
        if not isinstance(slot, nn.Parameter):
            slot.copy_(_assembled(checkpoint, keys, slot.shape, slot.dtype, slot.device))
            continue
        wanted = dtype if slot.is_floating_point() else slot.dtype
        if is_kept_float32(name, backbone):
            wanted = torch.float32
        if not elsewhere(slot, keys, wanted):
            swap(slot, _assembled(checkpoint, keys, slot.shape, wanted, device))
    module.to(device)
    module.eval()


def is_kept_float32(name: str, backbone: Names) -> bool:
    """Whether a parameter is float32 at any precision."""
    return any(re.fullmatch(pattern, name) for pattern in backbone.keep_float32)


def _assembled(
    checkpoint: Checkpoint,
    keys: Sequence[str],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if len(keys) == 1:
        return checkpoint.tensor(keys[0]).to(device, dtype)  # itself where nothing changes
    whole = torch.empty(shape, dtype=dtype, device=device)
    start = 0
    for key in keys:
        piece = checkpoint.tensor(key).reshape(-1)
        whole.view(-1)[start : start + piece.numel()].copy_(piece)
        start += piece.numel()
    return whole


def match(module: nn.Module, backbone: Names, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Checkpoint keys of every parameter and persistent buffer, by its first name.

    A tied parameter may be stored under any of its names, or under all. A buffer for which
    `backbone.sources` is empty stays as built. Raises `WeightsError` with the missing and
    unexpected keys and the wrong shapes; reads no tensor.
    """
    matched: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    wrong: list[str] = []
    used: set[str] = set()
    for names, slot in slots_of(module):
        offers = [_sources(name, backbone, checkpoint) for name in names]
        used.update(key for keys in offers for key in keys)
        whole = (keys for keys in offers if keys and checkpoint.keys.keys() >= set(keys))
        keys = next(whole, offers[0])
        if keys:
            matched[names[0]] = keys
        absent = [key for key in keys if key not in checkpoint.keys]
        if absent:
            missing += absent
        elif keys:
            found = [checkpoint.keys[key] for key in keys]
            wrong += _misfit(keys[0], tuple(slot.shape), found)
        elif isinstance(slot, nn.Parameter):
            missing.append(names[0])
    known = re.compile("|".join(f"(?:{pattern})" for pattern in backbone.ignored) or "(?!)")
    unexpected = [key for key in checkpoint.keys if key not in used and not known.fullmatch(key)]
    if missing or unexpected or wrong:
        raise _unfit(backbone, checkpoint, missing, unexpected, wrong)
    return matched


def slots_of(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every parameter and persistent buffer once, with all the names it is tied under."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, slot in module.state_dict(keep_vars=True).items():
        if isinstance(slot, Tensor):  # a module may add what it likes
            found.setdefault(id(slot), ([], slot))[0].append(name)
    return list(found.values())


def _sources(name: str, backbone: Names, checkpoint: Checkpoint) -> tuple[str, ...]:
    if isinstance(checkpoint, SeededCheckpoint):  # its keys are the module's names, not a file's
        return (name,) if name in checkpoint.keys else ()
    return tuple(backbone.sources(name, checkpoint.keys))


def _misfit(name: str, shape: tuple[int, ...], found: Sequence[TensorInfo]) -> list[str]:
    """What is wrong with the shapes of a parameter's sources; nothing, when they fit.

    Several sources may also fill a parameter whose first axes are folded into one in the file:
    a stack of E matrices (I, H) is (E, I, H).
    """
    shapes = [info.shape for info in found]
    rest = shapes[0][1:]
    fits = shapes == [shape] or (
        len(shapes) > 1
        and all(piece[1:] == rest for piece in shapes)
        and shape[len(shape) - len(rest) :] == rest
        and sum(map(math.prod, shapes)) == math.prod(shape)
    )
    if fits:
        return []
    stored = " + ".join(
        f"{count} x {piece}" if count > 1 else str(piece)
        for piece, count in Counter(shapes).items()
    )
    return [f"{name} is {stored} in the file, {shape} in the model"]


def _unfit(
    backbone: Names,
    checkpoint: Checkpoint,
    missing: Sequence[str],
    unexpected: Sequence[str],
    wrong: Sequence[str],
) -> WeightsError:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    lists = [
        f"{len(found)} {kind} ({listed_names(found)})" for kind, found in kinds.items() if found
    ]
    config = {}
    if isinstance(backbone, Backbone):
        with suppress(WeightsError):
            config = backbone.options.config()
    facts = [f"{name} {config[name]}" for name in SIZES if name in config]
    said = f": config.json says {', '.join(facts)}" if facts else ""
    return WeightsError(
        f"{checkpoint.path} does not fit {backbone.card.name}: tensors {'; '.join(lists)}",
        f"these weights are of another architecture or size{said}",
    )
