"""Memory and speed of `mgen embed` over a long table: ten times the rows, as much memory.

    nox -s bench -- long_input

Writes a CSV of 1,000,000 short sequences and one of 10,000,000 (0.4 GB), embeds both with
`dna_onehot --pool mean`, and counts the rows of the result. Needs 2 GB of disk and ten minutes.

`peak` is the most memory that is no file's, RssAnon of /proc/PID/status. On a machine with other
work, `rows/processor s` tells more than `rows/s`.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROWS = (1_000_000, 10_000_000)
DISK = 2e9
MB = 1e6
PAUSE = 0.1  # seconds between two looks
HEADER = f"""\
{"rows":>12}{"seconds":>9}{"rows/s":>9}{"processor s":>13}{"rows/processor s":>18}{"peak MB":>9}\
{"parts":>7}"""


@dataclass(frozen=True)
class Walk:
    """What a run took: seconds, and bytes of memory at most."""

    rows: int
    clock: float
    processor: float
    peak: int
    parts: int

    @property
    def speed(self) -> float:
        """Rows for each second of a processor."""
        return self.rows / self.processor


def main() -> None:
    """The short table, then the long one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < DISK:
            sys.exit(f"{folder}: {DISK / 1e9:.0f} GB of disk are needed (TMPDIR chooses another)")
        print(HEADER)
        short, long = (walked(folder, rows) for rows in ROWS)
    memory, speed = long.peak / short.peak, long.speed / short.speed
    print(f"memory  {memory:.2f} times that of the short one: {_verdict(memory <= 1.15)} 1.15")
    print(f"speed   {speed:.2f} times that of the short one: {_verdict(speed >= 0.9)} 0.90")


def _verdict(good: bool) -> str:
    return "keeps to" if good else "MISSES"


def walked(folder: Path, rows: int) -> Walk:
    """Embed a new table of so many rows, watched; the table and the run are removed."""
    data, run = folder / f"{rows}.csv", folder / f"run-{rows}"
    write(data, rows)
    command = [sys.executable, "-m", "mgen_core", "embed", str(data), "--backbone", "dna_onehot"]
    command += ["--pool", "mean", "--output", str(run)]
    peak, begun = 0, time.perf_counter()
    with open(folder / "log", "w+") as log:
        child = subprocess.Popen(command, stderr=log)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            status = Path(f"/proc/{child.pid}/status").read_text()
            found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(PAUSE)
        clock = time.perf_counter() - begun
        _, code, used = ended
        child.returncode = os.waitstatus_to_exitcode(code)
        log.seek(0)
        told = log.read()
    if child.returncode or f"{rows:,} of {rows:,} rows" not in told:
        sys.exit(f"{' '.join(command)}:\n{told}")
    parts = sum(1 for _ in run.glob("parts/*/*"))
    walk = Walk(rows, clock, used.ru_utime + used.ru_stime, peak, parts)
    data.unlink()
    shutil.rmtree(run)
    print(
        f"{rows:12,}{clock:9.0f}{rows / clock:9,.0f}{walk.processor:13.0f}{walk.speed:18,.0f}"
        f"{peak / MB:9.0f}{parts:7,}",
        flush=True,
    )
    return walk


def write(path: Path, rows: int) -> None:
    """A table of random sequences of 20 to 40 letters."""
    draw = random.Random(1)
    with path.open("w") as file:
        file.write("id,sequence\n")
        for row in range(rows):
            file.write(f"s{row},{''.join(draw.choices('ACGT', k=draw.randint(20, 40)))}\n")


if __name__ == "__main__":
    main()
