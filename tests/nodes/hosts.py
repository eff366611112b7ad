"""Hosts on this machine: namespaces with a network, a name and a `/etc/hosts` of their own.

They share the disk. Each is held by a shell that ends with this process, however that ends, and
the kernel takes the namespaces and their network down with it: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "mgen0"
NETWORK = "10.77.0"

HOLD = """
hostname "$1" && mount --bind "$2" /etc/hosts && echo ready && read -r end
"""
# Stand for the programs of the same name: they start a command on another host, which has none of
# this one's environment.
SSH = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o | -p) shift 2 ;;
        *) break ;;
    esac
done
host=$1 && shift
exec nsenter --target "$(cat "{folder}/$host")" --net --uts --mount \\
    env -i HOME="{folder}" PATH="$PATH" sh -c "$*"
"""
PDSH = f"""#!{sys.executable}
import subprocess, sys
hosts, words = sys.argv[sys.argv.index("-w") + 1], sys.argv[sys.argv.index("-w") + 2 :]
text = " ".join(words).replace("%%", "\\0")
shells = []
for number, host in enumerate(hosts.split(",")):
    line = text.replace("%n", str(number)).replace("%h", host).replace("\\0", "%")
    shells.append(subprocess.Popen(["ssh", host, line]))
sys.exit(max([shell.wait() % 256 for shell in shells]))
"""


@dataclass(frozen=True)
class Host:
    """A host, held by a process."""

    name: str
    address: str
    holder: subprocess.Popen[str]

    def start(
        self, words: Sequence[Any], environ: Mapping[str, str], folder: Path = Path("/")
    ) -> subprocess.Popen[str]:
        """Start a command here, in a folder; what it says comes through pipes."""
        inside = ["nsenter", "--target", self.holder.pid, "--net", "--uts", "--mount"]
        there = ["sh", "-c", 'cd "$0" && exec "$@"', folder]
        return subprocess.Popen(
            [str(word) for word in (*inside, *there, *words)],
            env={**environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[int]:
        """Those that run here, the holder left out."""
        mine = os.stat(f"/proc/{self.holder.pid}/ns/net").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and os.stat(entry / "ns/net").st_ino == mine:
                    found.append(int(entry.name))
        return [process for process in found if process != self.holder.pid]

    def kill(self) -> None:
        """End all that runs here at once, as a power cut does."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


def why_not() -> str:
    """Why hosts cannot be had here, or nothing."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make namespaces and networks"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node1 and node2, joined by a wire; `folder` gets stand-ins for ssh and pdsh."""
    names = ("node1", "node2")
    addresses = [f"{NETWORK}.{number}" for number in (1, 2)]
    lines = [f"{address} {name}\n" for address, name in zip(addresses, names)]
    (folder / "etc-hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    with contextlib.ExitStack() as held:
        hosts = [
            held.enter_context(_held(name, address, folder))
            for name, address in zip(names, addresses)
        ]
        one, two = (host.holder.pid for host in hosts)
        _ip("link", "add", INTERFACE, "netns", one, "type", "veth",
            "peer", "name", INTERFACE, "netns", two)  # fmt: skip
        for host in hosts:
            for words in (
                ("addr", "add", f"{host.address}/24", "dev", INTERFACE),
                ("link", "set", INTERFACE, "up"),
                ("link", "set", "lo", "up"),
            ):
                done = host.start(["ip", *words], os.environ)
                _, error = done.communicate()
                assert done.returncode == 0, error
        for name, text in {"ssh": SSH.format(folder=folder), "pdsh": PDSH}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def _held(name: str, address: str, folder: Path) -> Iterator[Host]:
    words = ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOLD, "sh"]
    holder = subprocess.Popen(
        [*words, name, str(folder / "etc-hosts")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    host = Host(name, address, holder)
    try:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", f"{name} cannot be made"
        (folder / name).write_text(str(holder.pid))
        yield host
    finally:
        if holder.poll() is None:
            host.kill()
        holder.communicate("end\n")


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)
