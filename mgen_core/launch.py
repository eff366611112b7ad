"""Processes of a run: ranks on this host, or through DeepSpeed's launcher on several."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .cores import bound, share_of, socket_and_core, usable_cores
from .errors import MgenError
from .join import FAILED, HERE, LAUNCHER, LOCAL, PARENT, free_port, listing
from .ranks import TOGETHER

MODULE = "mgen_core"
PAUSE_S = 0.05
GRACE_S = 10.0  # for the rest of a group that has lost a rank


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
    with _hearing() as told, tempfile.TemporaryDirectory(prefix="mgen-") as failed:
        ranks = _start_ranks(count, words, failed, bind=bind)

        def pass_on(number: int) -> None:
            for rank in ranks:
                rank.send_signal(_PASSED[signal.Signals(number)])

        def ended(rank: int) -> None:
            code = ranks[rank].returncode
            if code:  # who waits for it need not wait longer
                Path(failed, str(rank)).touch()
            if code < 0 and not (told.signals and -code in _PASSED.values()):
                _say(f"rank {rank} (process {ranks[rank].pid}) was killed by {_signal(-code)}")
            if code == TOGETHER:  # a rank may be frozen: it does not end with its group
                timer = threading.Timer(GRACE_S, _kill, [ranks])
                timer.daemon = True
                timer.start()

        _wait(ranks, told, pass_on, ended)
    codes = [rank.returncode for rank in ranks]
    if not told.signals and any(codes) and all(code <= 0 or code == TOGETHER for code in codes):
        _say("  try: start the same command again: it goes on from there")  # no rank could say it
    return _exit_code(codes, told.signals)


def _start_ranks(
    count: int, words: Sequence[str], failed: str, *, bind: bool
) -> list[subprocess.Popen[bytes]]:
    cores = usable_cores()
    environ = _environ(count, len(cores)) | {FAILED: failed}
    if bind:
        cores.sort(key=socket_and_core)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with bound(share_of(cores, rank, count) if bind else ()):
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
            f"{listing(list(hosts)[:3])} cannot be reached: pdsh, which DeepSpeed starts ranks "
            "with, is not installed",
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


def hosts_of(hostfile: Path, nodes: int | None, devices: int | None) -> list[str]:
    """The host of each rank that `start_nodes` would start."""
    chosen = _chosen_hosts(hostfile, nodes, devices)
    return [host for host, slots in chosen.items() for _ in range(devices or slots)]


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
