"""What a host has to offer: the memory that is free, for a rank or for all of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Machine(NamedTuple):
    """What a host has to offer. `memory` is free bytes: of a GPU, or of the host for "cpu"."""

    device: str
    memory: int
    host_memory: int


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


def processor(proc: Path = Path("/proc")) -> str:
    """What the processor calls itself."""
    import platform

    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", (proc / "cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()


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


def amount(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
