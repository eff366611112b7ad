"""Processes of a run: started here, or by a launcher whose environment is told in one way.

`join` reads the environment of torchrun, DeepSpeed, MPI and Slurm and writes it as torch and
DeepSpeed want it, so it comes before they are imported. `start_local` and `start_nodes` start
the ranks themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import MgenError
from .ranks import TOGETHER
from .world import World

LAUNCHER, PARENT = "MGEN_LAUNCHER", "MGEN_PARENT"
LOCAL = "local"
HERE = "127.0.0.1"
DEFAULT_PORT = "29500"
MODULE = "mgen_core"
PAUSE_S = 0.05
GRACE_S = 10.0  # for the rest of a group that has lost a rank


# --- joining ---


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
    torch, mpi, slurm = _torch(environ), _mpi(environ), _slurm(environ)
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


def _slurm(environ: Mapping[str, str]) -> _Said | None:
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
        f"{_list(present)} {_is(present)} set, but {_list(missing)} {_is(missing)} not",
        f"set {_list(missing)}, or let torchrun, srun, mpirun or mgen --devices start the ranks; "
        f"to start one process alone: unset {' '.join(present)}",
    )


def _list(words: Sequence[str]) -> str:
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


def die_with_parent(parent: int | None = None) -> None:
    """SIGTERM for this process when its parent ends, even by SIGKILL. Linux only."""
    if sys.platform != "linux":
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGTERM)


# --- cores ---


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
    cores = len(_cores())
    granted = environ.get("SLURM_CPUS_PER_TASK", "")
    slurm = _slurm(environ)
    place = {"rank": str(world.rank), "size": str(world.size)}
    # A task of srun may be bound to cores of its own: then they are not to be shared again.
    if granted.isdecimal() and slurm is not None and place.items() <= slurm.values.items():
        return max(min(cores, int(granted)), 1)
    return max(cores // world.local_size, 1)


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _slice(cores: Sequence[int], index: int, count: int) -> Sequence[int]:
    """The index-th of `count` fair shares; one core each, in turn, where there are too few."""
    if count > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // count : (index + 1) * len(cores) // count]


def _socket_and_core(cpu: int) -> tuple[int, int, int]:
    """Sorts hardware threads so that those of a core, and the cores of a socket, are together."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        chip = int((folder / "physical_package_id").read_text())
        return chip, int((folder / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, 0, cpu


@contextlib.contextmanager
def _bound(cores: Sequence[int]) -> Iterator[None]:
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


# --- starting ---


def devices(asked: int | None) -> int:
    """How many ranks to start here: as asked, else one for each GPU, else one."""
    if asked is not None:
        if asked < 1:
            raise MgenError(f"--devices is {asked}", "give auto, or a number from 1 on")
        return asked
    # Importing torch takes a second, in vain where there is no GPU. The last is WSL's.
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def start_local(count: int, *, bind: bool = False, command: Sequence[str] | None = None) -> int:
    """Start `count` ranks of the same command on this host, wait for them, give the exit code.

    This is not torchrun's agent, which ends all ranks when one is lost: replicated ranks go on
    without it, and sharded ones notice by themselves. `bind` pins each to cores of its own.
    """
    words = list(command or [sys.executable, "-m", MODULE, *sys.argv[1:]])
    with _hearing() as told:
        ranks = _start_ranks(count, words, bind=bind)

        def pass_on(number: int) -> None:
            for rank in ranks:
                rank.send_signal(_PASSED[signal.Signals(number)])

        def ended(rank: int) -> None:
            code = ranks[rank].returncode
            if code < 0 and not (told.signals and -code in _PASSED.values()):
                _say(f"rank {rank} (process {ranks[rank].pid}) was killed by {_signal(-code)}")
                if rank == 0:  # which tells it otherwise
                    _say("  try: when the others are through, start the same command again")
            if code == TOGETHER:  # a rank may be frozen: it does not end with its group
                timer = threading.Timer(GRACE_S, _kill, [ranks])
                timer.daemon = True
                timer.start()

        _wait(ranks, told, pass_on, ended)
    return _exit_code([rank.returncode for rank in ranks], told.signals)


def _start_ranks(count: int, words: Sequence[str], *, bind: bool) -> list[subprocess.Popen[bytes]]:
    cores = _cores()
    environ = _environ(count, len(cores))
    if bind:
        cores.sort(key=_socket_and_core)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with _bound(_slice(cores, rank, count) if bind else ()):
                ranks.append(_start(words, own))
    except OSError as error:
        for process in ranks:
            process.kill()
            process.wait()
        raise MgenError(
            f"rank {len(ranks)} cannot be started: {error.strerror or error}",
            "ask for fewer --devices, or end other processes",
        ) from error
    return ranks


def _environ(count: int, cores: int) -> dict[str, str]:
    """What all ranks are told."""
    environ = dict(os.environ)
    if count > 1:
        environ.setdefault("OMP_NUM_THREADS", str(max(cores // count, 1)))
    return environ | {
        LAUNCHER: LOCAL,
        PARENT: str(os.getpid()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HERE,
        "MASTER_PORT": str(free_port()),
    }


def _start(words: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C comes to this process only, which passes it on."""
    return subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)


# What the children hear: mgen ends in good order on the first two. A lost terminal is the third.
_PASSED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


class _Told:
    """The signals that came, kept for the loop that passes them on."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.passed = 0

    def __call__(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def take(self) -> list[int]:
        """Those that came since the last call."""
        new = self.signals[self.passed :]
        self.passed += len(new)
        return new


@contextlib.contextmanager
def _hearing() -> Iterator[_Told]:
    """Signals are kept instead of ending this process; those it ignores (nohup) stay ignored."""
    told = _Told()
    before = {
        number: signal.signal(number, told)
        for number in _PASSED
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield told
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    told: _Told,
    pass_on: Callable[[int], None],
    ended: Callable[[int], None],
) -> None:
    """Until all have ended; `ended` is called for each, `pass_on` for each signal that came."""
    alive = set(range(len(processes)))
    while alive:
        for number in told.take():
            pass_on(number)
        for index in sorted(alive):
            if processes[index].poll() is not None:
                alive.remove(index)
                ended(index)
        time.sleep(PAUSE_S)


def _exit_code(codes: Sequence[int], signals: Sequence[int]) -> int:
    if signals:
        return 128 + signals[0]
    return next((code for code in codes if code > 0 and code != TOGETHER), int(any(codes)))


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# --- several hosts ---


def start_nodes(hostfile: Path | None, nodes: int | None, devices: int | None) -> int:
    """Start this command's ranks on the hosts of the file, by DeepSpeed's launcher."""
    if hostfile is None and nodes in (None, 1):
        return _start_here(devices)
    hosts = _chosen_hosts(hostfile, nodes, devices)
    if importlib.util.find_spec("deepspeed") is None:
        raise MgenError(
            "--hostfile starts the ranks by DeepSpeed, which is not installed",
            "pip install deepspeed, or start mgen by torchrun or srun: it joins by itself",
        )
    here = len(hosts) == 1 and hosts.keys() <= _own_names()
    if not here and shutil.which("pdsh") is None:
        raise MgenError(
            f"{_list(list(hosts)[:3])} cannot be reached: pdsh, which DeepSpeed starts ranks with, "
            "is not installed",
            "install pdsh, or start mgen by torchrun or srun: it joins by itself",
        )
    words = _runner(hostfile, nodes, devices, here=here)
    with _hearing() as told:
        runner = _start(words, _without_place(os.environ))

        def pass_on(number: int) -> None:
            # DeepSpeed's runner passes signals on to other hosts only. Here its child must hear.
            for process in (_children(runner.pid) if here else []) or [runner.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, _PASSED[signal.Signals(number)])

        _wait([runner], told, pass_on, lambda _: None)
    if runner.returncode < 0 and not told.signals:
        _say(f"DeepSpeed's launcher was killed by {_signal(-runner.returncode)}")
    return _exit_code([runner.returncode], told.signals)


def _start_here(asked: int | None) -> int:
    return start_local(devices(asked))


def _chosen_hosts(hostfile: Path | None, nodes: int | None, devices: int | None) -> dict[str, int]:
    """The hosts to use and their slots."""
    if hostfile is None:
        raise MgenError(
            f"--num-nodes {nodes} needs --hostfile, which names the hosts",
            "write a file of lines such as these, and give it with --hostfile:\n"
            f"    node1 slots={devices or 4}\n    node2 slots={devices or 4}\n"
            "  under torchrun or srun neither is needed: mgen joins by itself",
        )
    hosts = _read_hostfile(hostfile)
    if nodes is not None and not 1 <= nodes <= len(hosts):
        raise MgenError(
            f"--num-nodes is {nodes}, but {hostfile} names {len(hosts)} "
            f"{'host' if len(hosts) == 1 else 'hosts'}",
            f"add hosts to {hostfile}, or give --num-nodes of 1 to {len(hosts)}",
        )
    chosen = dict(list(hosts.items())[:nodes])
    for host, slots in chosen.items():
        if devices is not None and not 1 <= devices <= slots:
            raise MgenError(
                f"--devices is {devices}, but {host} has slots={slots} in {hostfile}",
                f"mend {hostfile}, or give --devices of 1 to {slots}",
            )
    return chosen


def _read_hostfile(hostfile: Path) -> dict[str, int]:
    hosts: dict[str, int] = {}
    for number, line in enumerate(_lines(hostfile), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=0*([1-9]\d*)", text)
        if match is None or match[1] in hosts:
            wrong = "is not of the form HOST slots=N" if match is None else "names a host again"
            raise MgenError(
                f"line {number} of {hostfile} {wrong}: {text}",
                "write each host once, with its number of ranks, such as: node1 slots=4",
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise MgenError(f"{hostfile} names no host", "write lines such as: node1 slots=4")
    return hosts


def _lines(hostfile: Path) -> list[str]:
    try:
        return hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise MgenError(
            f"--hostfile {hostfile} cannot be read: {reason}",
            "give a file of lines such as: node1 slots=4",
        ) from error


def _own_names() -> set[str]:
    name = socket.gethostname()
    return {"localhost", HERE, name, name.partition(".")[0]}


def _runner(
    hostfile: Path | None, nodes: int | None, devices: int | None, *, here: bool
) -> list[str]:
    """The command of DeepSpeed's launcher."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    words += ["--hostfile", str(hostfile)]
    words += ["--num_nodes", str(nodes)] if nodes is not None else []
    words += ["--num_gpus", str(devices)] if devices is not None else []
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if here:
        host, port = HERE, port or str(free_port())
        words += ["--no_ssh_check"]
    else:  # otherwise a file with one host would start the ranks on this one
        words += ["--force_multi"]
    words += ["--master_addr", host] if host else []
    words += ["--master_port", port] if port else []
    # Without the next, each rank gets a --local_rank=N, which is no option of mgen.
    words += ["--no_local_rank", "--module", MODULE]
    return words + [word if here else _for_pdsh(word) for word in sys.argv[1:]]


def _for_pdsh(word: str) -> str:
    """Quoted for the shell of the other host; DeepSpeed quotes only what has spaces, and in "".

    pdsh itself replaces %h and its like.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def _without_place(environ: Mapping[str, str]) -> dict[str, str]:
    """DeepSpeed's launcher sets these but the last, which it would pass on as it is."""
    place = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    return {name: value for name, value in environ.items() if name not in place}


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        return [int(word) for word in text.split()]
    return []
