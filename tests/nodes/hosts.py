"""Hosts on this machine: namespaces with a network, a name and an `/etc/hosts` of their own.

They share the disk. Each is held by a shell that ends with this process, however that ends, and
with the last process in it the kernel takes a namespace and its network down: nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "mgen0"
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}

HOLD = 'hostname "$1" && mount --bind "$2" /etc/hosts && echo ready && read -r end'

# Stand for the programs of the same name: they start a command on another host, in an environment
# that has nothing of this one's.
SSH = """#!/bin/sh
while [ "$1" = -o ] || [ "$1" = -p ]; do shift 2; done
host=$1 && shift
exec nsenter --target "$(cat "{folder}/$host")" --net --uts --mount \\
    env -i HOME=/nowhere PATH="$PATH" sh -c "$*"
"""
PDSH = f"""#!{sys.executable}
import subprocess, sys
hosts, words = sys.argv[sys.argv.index("-w") + 1], sys.argv[sys.argv.index("-w") + 2 :]
text = " ".join(words).replace("%%", "\\0")
shells = []
for number, host in enumerate(hosts.split(",")):
    line = text.replace("%n", str(number)).replace("\\0", "%")
    shells.append(subprocess.Popen(["ssh", host, line]))
sys.exit(max([shell.wait() % 256 for shell in shells]))
"""


@dataclass(frozen=True)
class Host:
    """A host, held by a process."""

    name: str
    holder: subprocess.Popen[str]

    def start(
        self, *words: object, environ: Mapping[str, str], folder: Path = Path("/")
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

    def run(self, *words: object) -> None:
        """Run a command here to its end, which must be a good one."""
        process = self.start(*words, environ=os.environ)
        _, error = process.communicate()
        assert process.returncode == 0, error

    def wire(self, up: bool) -> None:
        """Plug its end of the wire in, or pull it out."""
        self.run("ip", "link", "set", INTERFACE, "up" if up else "down")

    def processes(self) -> list[int]:
        """Those that run here, the holder left out."""
        mine, found = os.stat(f"/proc/{self.holder.pid}/ns/net").st_ino, []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and os.stat(entry / "ns/net").st_ino == mine:
                    found.append(int(entry.name))
        return [process for process in found if process != self.holder.pid]

    def kill(self) -> None:
        """End all that runs here at once."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


def why_not() -> str:
    """Why there can be no such hosts here, or nothing."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make networks"
    tried = "ip link add mgen-try type veth peer name mgen-try2"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", *tried.split()], capture_output=True, text=True
    )
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node1 and node2, joined by a wire; `folder` gets stand-ins for ssh and pdsh."""
    names = {"localhost": "127.0.0.1", **ADDRESSES}
    table = folder / "etc-hosts"
    table.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    for name, text in {"ssh": SSH.format(folder=folder), "pdsh": PDSH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with contextlib.ExitStack() as held:
        one, two = (held.enter_context(_held(name, table)) for name in ADDRESSES)
        ends = [f"netns {host.holder.pid}" for host in (one, two)]
        wire = f"ip link add {INTERFACE} {ends[0]} type veth peer name {INTERFACE} {ends[1]}"
        subprocess.run(wire.split(), check=True)
        for host in (one, two):
            (folder / host.name).write_text(str(host.holder.pid))
            host.run("ip", "addr", "add", f"{ADDRESSES[host.name]}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", "lo", "up")
            host.wire(up=True)
        yield one, two


@contextlib.contextmanager
def _held(name: str, table: Path) -> Iterator[Host]:
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOLD, "sh", name, str(table)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    host = Host(name, holder)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", f"{name} cannot be made"
        yield host
    finally:
        if holder.poll() is None:
            host.kill()
        holder.communicate("end\n")
