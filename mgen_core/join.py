"""A launcher's environment, told in one way: torchrun's, DeepSpeed's, MPI's, Slurm's and our own.

It is written as torch and DeepSpeed want it, so `join` comes before they are imported.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from .errors import MgenError
from .world import World

LAUNCHER, PARENT = "MGEN_LAUNCHER", "MGEN_PARENT"
LOCAL = "local"
FAILED = "MGEN_FAILED"  # a folder in which our launcher leaves a file for each rank that failed
HERE = "127.0.0.1"
DEFAULT_PORT = "29500"


@dataclass(frozen=True)
class _Launcher:
    """The names under which a launcher tells a process its place."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_TORCH = _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = _Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_MPICH = _Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SLURM = _Launcher(
    "Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
)


@dataclass(frozen=True)
class _Said:
    """What a launcher said of this process: values by the field names of `_Launcher`."""

    launcher: _Launcher
    values: Mapping[str, str]

    def agrees(self, other: _Said) -> bool:
        """Neither the rank nor the size is told in two ways."""
        both = {"rank", "size"} & self.values.keys() & other.values.keys()
        return all(self.values[field] == other.values[field] for field in both)

    def variable(self, field: str) -> str:
        """The launcher's own name of the field, which users know."""
        return str(getattr(self.launcher, field))


def join(environ: MutableMapping[str, str]) -> World | None:
    """This process's place among those of its launcher; None when no launcher started it.

    Fills in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in
    `environ`. Raises `MgenError` when launchers contradict each other or leave something out.
    """
    if environ.get(LAUNCHER) == LOCAL:
        parent = environ.get(PARENT, "")
        die_with_parent(int(parent) if parent.isdecimal() else None)
    heard = _heard(environ)
    if not heard:
        return None
    world = _world(heard, environ)
    host, port = _meeting_point(world, heard, environ)
    environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    return world


def _heard(environ: Mapping[str, str]) -> list[_Said]:
    """The launchers that speak of this very process, the nearest first."""
    torch, mpi, slurm = _torch(environ), _mpi(environ), slurm_task(environ)
    # srun sets the variables of MPICH too: then they are Slurm's, who may have started torchrun.
    of_slurm = mpi is not None and slurm is not None and mpi.agrees(slurm)
    if torch and mpi and not of_slurm and environ.get(LAUNCHER) != LOCAL and not torch.agrees(mpi):
        raise _mixed(torch, mpi)
    heard: list[_Said] = []
    for said in (torch, mpi, slurm):
        if said is not None and all(said.agrees(other) for other in heard):
            heard.append(said)
    return heard


def _torch(environ: Mapping[str, str]) -> _Said | None:
    """torchrun, DeepSpeed's launcher, and our own."""
    values = _values(_TORCH, environ)
    if not values.keys() - {"local_size"}:
        return None
    if "LOCAL_SIZE" in environ:  # DeepSpeed's word for it
        values.setdefault("local_size", environ["LOCAL_SIZE"])
    return _Said(_TORCH, values)


def _mpi(environ: Mapping[str, str]) -> _Said | None:
    for launcher in (_OPEN_MPI, _MPICH):
        values = _values(launcher, environ)
        if "rank" in values or "size" in values:
            return _Said(launcher, values)
    return None


def slurm_task(environ: Mapping[str, str]) -> _Said | None:
    """A task of `srun`. The batch script has SLURM_PROCID and SLURM_NTASKS too, but is alone."""
    values = _values(_SLURM, environ)
    if not {"rank", "size"} <= values.keys():
        return None
    tasks = values.pop("local_size", None)
    node = environ.get("SLURM_NODEID")
    if tasks is not None and node is not None:
        values["local_size"] = _tasks_on(tasks, node)
    return _Said(_SLURM, values)


def _values(launcher: _Launcher, environ: Mapping[str, str]) -> dict[str, str]:
    fields = ("rank", "size", "local_rank", "local_size")
    names = {field: getattr(launcher, field) for field in fields}
    return {field: environ[name] for field, name in names.items() if name in environ}


def _tasks_on(tasks: str, node: str) -> str:
    """How many tasks the node has, of "4(x2),3": two nodes of four, then one of three."""
    counts: list[str] = []
    try:
        for item in tasks.split(","):
            count, _, times = item.rstrip(")").partition("(x")
            counts += [count] * int(times or 1)
        return counts[int(node)]
    except (ValueError, IndexError):
        raise MgenError(
            f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, which says nothing of node {node}",
            "start mgen with srun, and leave Slurm's variables as they are",
        ) from None


def _mixed(torch: _Said, mpi: _Said) -> MgenError:
    both = torch.values.keys() & mpi.values.keys() & {"rank", "size"}
    field = next(field for field in sorted(both) if torch.values[field] != mpi.values[field])
    return MgenError(
        f"two launchers disagree: {torch.variable(field)} is {torch.values[field]}, but "
        f"{mpi.variable(field)} ({mpi.launcher.name}) is {mpi.values[field]}",
        "start mgen with one launcher only; if none of them is torchrun: "
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
    )


def _world(heard: Sequence[_Said], environ: Mapping[str, str]) -> World:
    """The place of this process, with what one launcher leaves out told by the next."""
    numbers: dict[str, int] = {}
    for said in heard:
        for field, text in said.values.items():
            if field not in numbers:
                numbers[field] = _number(said.variable(field), text)
    if numbers.get("size") == 1:
        numbers = {"local_rank": 0, "local_size": 1, **numbers}
    elif environ.get("MASTER_ADDR") in (HERE, "localhost") and "size" in numbers:
        numbers.setdefault("local_size", numbers["size"])
    first = heard[0]
    missing = [field for field in ("rank", "size", "local_rank", "local_size")
               if field not in numbers]  # fmt: skip
    if missing:
        raise _incomplete(first, [first.variable(field) for field in missing])
    _check_below(first, numbers, "rank", "size")
    _check_below(first, numbers, "local_rank", "local_size")
    return World(
        rank=numbers["rank"],
        size=numbers["size"],
        local_rank=numbers["local_rank"],
        local_size=numbers["local_size"],
    )


def _number(variable: str, text: str) -> int:
    if not text.isdecimal():
        raise MgenError(
            f"{variable} is {text!r}, which is not a number",
            f"unset {variable}, or start mgen with torchrun, srun or mpirun, which set it",
        )
    return int(text)


def _check_below(said: _Said, numbers: Mapping[str, int], rank: str, size: str) -> None:
    if numbers[rank] >= numbers[size]:
        raise MgenError(
            f"{said.variable(rank)} is {numbers[rank]}, but {said.variable(size)} is "
            f"{numbers[size]}: ranks are counted from 0",
            f"mend {said.variable(rank)} or {said.variable(size)}, or let torchrun, srun or "
            "mpirun set them",
        )


def _incomplete(said: _Said, missing: Sequence[str]) -> MgenError:
    present = [said.variable(field) for field in said.values]
    return MgenError(
        f"{listing(present)} {_is(present)} set, but {listing(missing)} {_is(missing)} not",
        f"set {listing(missing)}, or let torchrun, srun, mpirun or mgen --devices start the ranks; "
        f"to start one process alone: unset {' '.join(present)}",
    )


def listing(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _is(words: Sequence[str]) -> str:
    return "is" if len(words) == 1 else "are"


def _meeting_point(
    world: World, heard: Sequence[_Said], environ: Mapping[str, str]
) -> tuple[str, str]:
    """Where the ranks find each other: all of them must come to the same answer by themselves."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host and port:
        return host, port
    if world.size == 1:
        return host or HERE, port or str(free_port())
    launchers = [said.launcher for said in heard]
    if _SLURM in launchers:
        return host or _slurm_host(world, environ), port or _slurm_port(environ)
    if _TORCH in launchers and len(launchers) == 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        raise _incomplete(heard[0], missing)
    if host:
        return host, port or DEFAULT_PORT
    if world.local_size < world.size:
        raise _no_host(world, launchers[-1])
    return HERE, port or _mpi_port(environ)


def _slurm_host(world: World, environ: Mapping[str, str]) -> str:
    if world.local_size == world.size:
        return HERE
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise MgenError(
            "SLURM_STEP_NODELIST is not set, so the host of rank 0 is unknown",
            f"export MASTER_ADDR=HOST MASTER_PORT={DEFAULT_PORT} before srun",
        )
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """The first of Slurm's list, such as node01 of "node[01-03,07],login"."""
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes)
    return first.split(",")[0]


def _slurm_port(environ: Mapping[str, str]) -> str:
    return _port_of(f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}")


def _mpi_port(environ: Mapping[str, str]) -> str:
    """All ranks are children of one process here, where MPI does not name the job."""
    job = environ.get("OMPI_MCA_orte_jobid") or environ.get("PMIX_NAMESPACE")
    return _port_of(job or str(os.getppid()))


def _port_of(key: str) -> str:
    """A port of 20000 to 31999: below those that systems give to connections going out."""
    return str(20000 + zlib.crc32(key.encode()) % 12000)


def _no_host(world: World, launcher: _Launcher) -> MgenError:
    host = world.host if world.rank == 0 else "HOST_OF_RANK_0"
    flags = f"-x MASTER_ADDR={host} -x MASTER_PORT={DEFAULT_PORT}"
    if launcher is _MPICH:
        flags = f"-genv MASTER_ADDR {host} -genv MASTER_PORT {DEFAULT_PORT}"
    return MgenError(
        f"{launcher.name} started {world.size} ranks on several hosts, and MASTER_ADDR is not set",
        f"give mpirun {flags}",
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        return int(listener.getsockname()[1])


def has_ended(rank: int, environ: Mapping[str, str]) -> bool:
    """Whether our own launcher has seen a rank fail, and has told the user."""
    folder = environ.get(FAILED)
    return folder is not None and os.path.exists(os.path.join(folder, str(rank)))


def die_with_parent(parent: int | None = None) -> None:
    """SIGTERM for this process when its parent ends, even by SIGKILL. Linux only."""
    if sys.platform != "linux":
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGTERM)
