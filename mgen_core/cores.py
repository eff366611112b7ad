"""The cores of a host, shared fairly by its ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from .join import slurm_task
from .world import World


def share_cores(world: World, environ: MutableMapping[str, str]) -> None:
    """Ranks of one host share its cores fairly, unless the user set OMP_NUM_THREADS.

    A rank that is alone on its host keeps what torch takes by itself.
    """
    given = environ.get("OMP_NUM_THREADS")
    # torchrun sets 1 where the user set nothing.
    if given and not (given == "1" and "TORCHELASTIC_RUN_ID" in environ):
        return
    if world.local_size == 1:
        return
    threads = _threads(world, environ)
    environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # it read the variable when it was imported
        import torch

        torch.set_num_threads(threads)


def _threads(world: World, environ: Mapping[str, str]) -> int:
    cores = len(usable_cores())
    granted = environ.get("SLURM_CPUS_PER_TASK", "")
    slurm = slurm_task(environ)
    place = {"rank": str(world.rank), "size": str(world.size)}
    # A task of srun may be bound to cores of its own: then they are not to be shared again.
    if granted.isdecimal() and slurm is not None and place.items() <= slurm.values.items():
        return max(min(cores, int(granted)), 1)
    # mpirun binds a rank to some of the host's cores, its own or those of a few ranks.
    bound = "OMPI_COMM_WORLD_RANK" in environ or ("PMI_RANK" in environ and slurm is None)
    of = (os.cpu_count() or cores) if bound else cores
    return max(min(cores, of // world.local_size), 1)


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_of(cores: Sequence[int], index: int, count: int) -> Sequence[int]:
    """The index-th of `count` fair shares; one core each, in turn, where there are too few."""
    if count > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // count : (index + 1) * len(cores) // count]


def socket_and_core(cpu: int) -> tuple[int, int, int]:
    """Sorts hardware threads so that those of a core, and the cores of a socket, are together."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        chip = int((folder / "physical_package_id").read_text())
        return chip, int((folder / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, 0, cpu


@contextlib.contextmanager
def bound(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside may use these cores only: a child inherits them."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
