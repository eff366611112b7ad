"""How a model is spread: whole on every rank, or sharded; what fits, and what `auto` takes.

`choose` is arithmetic on plain data. Ranks that are given the same numbers come to the same
decision, so what differs between them (free memory) is to be the least that any of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from .config import Offload, Strategy
from .errors import MgenError
from .footprint import ModelSize
from .machine import Machine, amount

Groups = tuple[tuple[int, ...], ...]

USABLE = 0.92
"""Of a GPU's free memory. The rest goes to the allocator's fragments and the libraries' space."""

PLACES = {"cpu": "host memory", "nvme": "files on disk"}


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
