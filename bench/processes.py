"""A process and what it took: seconds, seconds of processors, memory. Linux, by /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PAUSE = 0.01  # seconds between two looks at the memory
MB = 1e6


@dataclass(frozen=True)
class Took:
    """What a process and those that it started took; what it `said` and `told`: its two outputs.

    - `private`: most bytes that are no file's (RssAnon) at any look, of all of them together;
    - `resident`: the same with the pages of mapped files (VmRSS).
    """

    clock: float
    processor: float
    private: int = 0
    resident: int = 0
    said: str = ""
    told: str = ""

    def __add__(self, other: Took) -> Took:
        """One after the other."""
        return Took(
            self.clock + other.clock,
            self.processor + other.processor,
            max(self.private, other.private),
            max(self.resident, other.resident),
            self.said + other.said,
            self.told + other.told,
        )


def took(words: Sequence[str | Path], **environ: str) -> Took:
    """Run a command to its end and watch it; ends this process when it fails."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        begun = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, words)), stdout=said, stderr=told, env={**os.environ, **environ}
        )
        private = resident = 0
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            now = memory(child.pid)
            private, resident = max(private, now[0]), max(resident, now[1])
            time.sleep(PAUSE)
        clock = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        said.seek(0)
        told.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(map(str, words))}:\n{said.read()}{told.read()}")
        processor = ended[2].ru_utime + ended[2].ru_stime
        return Took(clock, processor, private, resident, said.read(), told.read())


def mgen(*words: str | Path, **environ: str) -> Took:
    """An `mgen` command of this environment."""
    return took([sys.executable, "-m", "mgen_core", *words], **environ)


def memory(process: int) -> tuple[int, int]:
    """Bytes that a process and all below it hold now: those of no file, and all."""
    private = resident = 0
    for one in family(process):
        held = sizes(one)
        private += held.get("RssAnon", 0)
        resident += held.get("VmRSS", 0)
    return private, resident


def family(process: int) -> list[int]:
    """The process and all that it started, and they."""
    found = [process]
    for one in found:
        try:
            lists = [file.read_text() for file in Path(f"/proc/{one}/task").glob("*/children")]
        except OSError:  # it has just ended
            continue
        found += (int(child) for text in lists for child in text.split())
    return found


def sizes(process: int, file: str = "status") -> dict[str, int]:
    """Lines like `Rss: 12 kB` of a file of the kernel, in bytes; none when it has ended."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: int(size.split()[0]) * 1024 for name, size in pairs}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def clock(all_of: Sequence[Took]) -> float:
    """The median of the seconds."""
    return median(one.clock for one in all_of)


def ratios(over: Sequence[Took], under: Sequence[Took]) -> tuple[float, float]:
    """Medians of the ratios within each round: by the clock, and by processor time."""
    return (
        median(a.clock / b.clock for a, b in zip(over, under)),
        median(a.processor / b.processor for a, b in zip(over, under)),
    )
