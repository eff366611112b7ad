"""How a model is spread: whole on every rank, or sharded; what fits, and what `auto` takes.

`choose` is arithmetic on plain data. Ranks that are given the same numbers come to the same
decision, so what differs between them (free memory) is to be the least that any of them has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from .api import Backbone, BackboneCard, Want
from .errors import MgenError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import nn

Strategy = Literal["auto", "replicate", "zero3"]
Offload = Literal["none", "cpu", "nvme"]
Groups = tuple[tuple[int, ...], ...]

USABLE = 0.92
"""Of a GPU's free memory. The rest goes to the allocator's fragments and the libraries' space."""

WIDTHS = 20
LAYERS = 32  # of a model of which only the number of parameters is known
PLACES = {"cpu": "host memory", "nvme": "files on disk"}


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


class Machine(NamedTuple):
    """What a host has to offer. `memory` is free bytes: of a GPU, or of the host for "cpu"."""

    device: str
    memory: int
    host_memory: int


class Decision(NamedTuple):
    """What is done and why. `groups` holds the ranks of each copy of the model.

    `fits` is False where something that was asked for, or has no alternative, seems too large.
    """

    strategy: Literal["replicate", "zero3"]
    groups: Groups
    offload: Offload
    why: str
    fits: bool = True


MAPPED = Decision("replicate", ((0,),), "none", "one process maps the weights, whatever their size")
"""What `auto` takes for one rank on a CPU, where there is nothing to choose."""


# --------------------------------------------------------------------------- measuring


def measure_model(backbone: Backbone, needs: Want, dtype: torch.dtype) -> ModelSize:
    """The size of the backbone as built for `needs`; of its weights, only the index is read.

    Where they are elsewhere, they are taken to be stored as most are, in float32, and a backbone
    that cannot be built without them has the size that its card tells. Raises `WeightsError` for
    weights that do not fit, or where nothing tells the size.
    """
    from .weights import parameters_on_meta

    backbone.want = needs
    try:
        with parameters_on_meta():
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


# --------------------------------------------------------------------------- the machine


def stored_bytes(weights: Path | None) -> int:
    """Bytes of the files of the weights."""
    if weights is None:
        return 0
    files = [weights] if weights.is_file() else weights.iterdir()
    return sum(file.stat().st_size for file in files if file.is_file())


def least(machines: Sequence[Machine]) -> Machine:
    """What every one of them has to offer."""
    return Machine(*(min(numbers) for numbers in zip(*machines)))


def this_machine(device: torch.device) -> Machine:
    """What is free here, for a rank on this device."""
    free = free_memory()
    if device.type != "cuda":
        return Machine("cpu", free, free)
    import torch

    return Machine("cuda", torch.cuda.mem_get_info(device)[0], free)


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that are free on this host, or less where a container or batch system sets a limit."""
    return max(0, min([_available(proc), *_below_limits(proc, groups)]))


def _available(proc: Path) -> int:
    import os

    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all there is


# Of a control group: its limit, what it uses, and which of that is cached files, which give way.
VERSION_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    r"^total_(?:in)?active_file (\d+)$",
)
VERSION_2 = ("memory.max", "memory.current", r"^(?:in)?active_file (\d+)$")


def _below_limits(proc: Path, groups: Path) -> Iterator[int]:
    """What is left of each limit that holds for this process, its own and those around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder == root or root in folder.parents:
                yield from _left(folder, *(VERSION_1 if controllers else VERSION_2))


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        most, taken = (int((folder / name).read_text()) for name in (limit, used))
        files = re.findall(cached, (folder / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no such group in here, or no limit ("max")
        return
    yield most - taken + sum(map(int, files))


# --------------------------------------------------------------------------- choosing


def choose(
    size: ModelSize,
    activations: int,
    machine: Machine,
    hosts: Sequence[str],
    asked: Strategy = "auto",
    offload: Offload = "none",
) -> Decision:
    """How the model is spread over the ranks; `hosts[r]` is the host of rank r.

    `auto` takes the first that fits: whole on each rank, sharded over the ranks of each host, over
    all ranks, and on GPUs with the shards in host memory or on disk. One rank alone on a CPU
    always has the whole model: what is mapped may be larger than memory. What is asked for is
    obeyed, with a warning. Raises `MgenError` where nothing fits.
    """
    case = _Case(size, activations, machine, tuple(hosts))
    if offload != "none":
        return _offloaded_as_asked(case, asked, offload)
    if asked == "replicate":
        return _replicated(case)
    if asked == "zero3":
        return _sharded_as_asked(case)
    if case.replicas_fit or (case.on_cpu and case.world == 1):
        return _replicated(case)
    for groups in case.groupings:
        if case.shards_fit(groups):
            why = f"{case.whole} do not fit {case.room}: sharded {_over(groups)}"
            return Decision("zero3", groups, "none", why)
    return _offloaded(case)


def describe(decision: Decision, world_size: int) -> str:
    """The decision in a line."""
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    sizes = sorted({len(group) for group in decision.groups}, reverse=True)
    if decision.strategy == "replicate":
        form = "with the whole model" if world_size == 1 else "each with the whole model"
    elif world_size == 1:
        form = "one layer at a time"
    elif len(decision.groups) == 1:
        form = "sharded"
    else:
        form = f"sharded in {len(decision.groups)} groups of {' and '.join(map(str, sizes))}"
    if decision.offload != "none":
        form += f", shards in {PLACES[decision.offload]}"
    return f"{ranks}, {form}: {decision.why}"


@dataclass(frozen=True)
class _Case:
    """What there is to choose from; every number is in bytes."""

    size: ModelSize
    activations: int
    machine: Machine
    hosts: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        return self.machine.device == "cpu"

    @property
    def usable(self) -> int:
        """For one rank on a GPU, for all ranks of a host on a CPU."""
        return self.machine.memory if self.on_cpu else int(self.machine.memory * USABLE)

    @cached_property
    def by_host(self) -> Groups:
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            ranks.setdefault(host, []).append(rank)
        return tuple(map(tuple, ranks.values()))

    @property
    def groupings(self) -> list[Groups]:
        """Ways to shard. Within a host first: its links are the fast ones."""
        return list(dict.fromkeys([self.by_host, (tuple(range(self.world)),)]))

    @property
    def world(self) -> int:
        return len(self.hosts)

    @property
    def busiest(self) -> int:
        """Ranks of the host that has most."""
        return max(map(len, self.by_host))

    def local(self, group: Sequence[int]) -> int:
        """How many ranks of a group share a host, at most."""
        return min(len(group), self.busiest)

    @property
    def in_units(self) -> int:
        return self.size.bytes - self.size.rest

    @property
    def beside_shard(self) -> int:
        """What is on every rank: all that is not sharded, a layer and the next, a batch."""
        return self.size.rest + 2 * self.size.unit + self.activations

    @property
    def replicated(self) -> int:
        """Needed by whole models, of what is `usable`."""
        if not self.on_cpu:
            return self.size.bytes + self.activations
        shared = self.size.bytes - self.size.private
        return shared + self.busiest * (self.size.private + self.activations)

    def sharded(self, groups: Groups) -> int:
        """Needed by shards, of what is `usable`."""
        return max(
            (self.in_units // len(group) + self.beside_shard)
            * (self.local(group) if self.on_cpu else 1)
            for group in groups
        )

    def offloaded(self, groups: Groups) -> int:
        """Needed by offloaded shards, of a host's memory."""
        return max(self.in_units // len(group) * self.local(group) for group in groups)

    @property
    def replicas_fit(self) -> bool:
        return self.replicated <= self.usable

    def shards_fit(self, groups: Groups) -> bool:
        return self.sharded(groups) <= self.usable

    def offload_fits(self, groups: Groups, offload: Offload) -> bool:
        held = self.offloaded(groups) if offload == "cpu" else 0
        return self.beside_shard <= self.usable and held <= self.machine.host_memory

    @property
    def enough(self) -> int | None:
        """How many GPUs, or hosts of CPUs, hold the model in shards; None when no number does."""
        ranks = self.busiest if self.on_cpu else 1
        left = self.usable - ranks * self.beside_shard
        return -(-self.in_units // left) if left > 0 else None

    @property
    def maps(self) -> bool:
        """Whether one rank can run on this CPU, at the worst reading from disk as it goes."""
        return self.on_cpu and self.size.private + self.activations <= self.usable

    @property
    def whole(self) -> str:
        several = self.on_cpu and self.busiest > 1
        together = f" ({amount(self.replicated)} for {self.busiest} ranks)" if several else ""
        parameters, batch = amount(self.size.bytes), amount(self.activations)
        return f"{parameters} of parameters and {batch} for a batch{together}"

    @property
    def room(self) -> str:
        if self.on_cpu:
            return f"in {amount(self.machine.memory)} of free memory"
        return f"on a device with {self.free}"

    @property
    def free(self) -> str:
        return f"{amount(self.machine.memory)} free ({amount(self.usable)} to use)"


def _replicated(case: _Case) -> Decision:
    groups = tuple((rank,) for rank in range(case.world))
    fits = case.replicas_fit
    why = _why_whole(case) if fits else _why_whole_all_the_same(case)
    return Decision("replicate", groups, "none", why, fits or (case.maps and case.world == 1))


def _why_whole(case: _Case) -> str:
    if case.on_cpu:
        return f"{case.whole} fit {case.room}"
    devices = "a device" if case.world == 1 else f"each of {case.world} devices"
    return f"{case.whole} fit on {devices} with {case.free}"


def _why_whole_all_the_same(case: _Case) -> str:
    if not case.on_cpu or case.world > 1:
        return f"as asked, though {case.whole} do not seem to fit {case.room}: try --strategy auto"
    if case.maps:
        return (
            f"{case.whole} are more than {amount(case.usable)} of free memory: the weights are "
            "mapped, and read from disk again in each batch"
        )
    return (
        f"{amount(case.size.private)} of parameters cannot be the mapped file (drawn from a seed, "
        f"joined, or stored in another precision) and do not seem to fit {case.room}"
    )


def _sharded_as_asked(case: _Case) -> Decision:
    # Groups of one rank would be no shards at all.
    real = [groups for groups in case.groupings if len(groups) < case.world] or case.groupings
    fitting = [groups for groups in real if case.shards_fit(groups)]
    groups = [*fitting, real[-1]][0]
    share = amount(case.in_units // min(map(len, groups)))
    why = f"as asked, {share} of {amount(case.size.bytes)} of parameters on a rank"
    if not fitting:
        why += f", though this does not seem to fit {case.room}"
    return Decision("zero3", groups, "none", why, bool(fitting))


def _offloaded(case: _Case) -> Decision:
    """Where shards do not fit. Raises `MgenError` when they do not fit elsewhere either."""
    places: tuple[Offload, ...] = () if case.on_cpu else ("cpu", "nvme")
    for offload in places:
        for groups in case.groupings:
            if case.offload_fits(groups, offload):
                why = (
                    f"{case.whole} do not fit {case.room}, sharded neither; "
                    f"{case.enough} devices would hold the shards"
                )
                return Decision("zero3", groups, offload, why)
    raise _too_large(case)


def _offloaded_as_asked(case: _Case, asked: Strategy, offload: Offload) -> Decision:
    if case.on_cpu:
        raise MgenError(
            "there is no device to offload from: on a CPU the weights are mapped from the file "
            "already",
            "leave out --offload",
        )
    if asked == "replicate":
        raise MgenError(
            f"--offload {offload} is for shards, and --strategy replicate makes none",
            "leave out one of them",
        )
    fitting = [groups for groups in case.groupings if case.offload_fits(groups, offload)]
    groups = [*fitting, case.groupings[-1]][0]
    why = (
        f"as asked, {amount(case.offloaded(groups))} of a host's {PLACES[offload]} and "
        f"{amount(case.beside_shard)} of a device with {case.free}"
    )
    if not fitting:
        why += ", which does not seem to fit"
        if offload == "cpu":
            why += f" {amount(case.machine.host_memory)} of free host memory"
    return Decision("zero3", groups, offload, why, bool(fitting))


def _too_large(case: _Case) -> MgenError:
    if not case.on_cpu:
        return MgenError(
            f"{case.whole} do not fit {case.room}: {amount(case.beside_shard)} are needed there "
            "even with the parameters elsewhere, on any number of devices",
            "give a smaller --batch-tokens, or devices with more memory",
        )
    shards = min(map(case.sharded, case.groupings))
    hints = []
    if case.maps:
        hints.append("--devices 1 maps the weights and reads them from disk as it goes")
    if case.enough:
        hints.append(f"{case.enough} hosts like this one would hold the shards")
    return MgenError(
        f"{case.whole} do not fit {case.room}, and {amount(shards)} with shards neither",
        "; ".join(hints) or "give a smaller --batch-tokens, or take a host with more memory",
    )


def _over(groups: Groups) -> str:
    sizes = {len(group) for group in groups}
    if len(groups) == 1:
        return f"over all {max(sizes)} ranks"
    number = f"{max(sizes)} " if len(sizes) == 1 else ""
    return f"over the {number}ranks of each host"


def amount(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
