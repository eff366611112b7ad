"""Memory and speed of `mgen embed` over a long table: ten times the rows, as much memory.

    nox -s bench -- long_input

Writes a CSV of 1,000,000 short sequences and one of 10,000,000 (0.4 GB), embeds both with
`dna_onehot --pool mean`, and counts the rows of the result. Needs 2 GB of disk and ten minutes.

`peak` is the most memory that is no file's (RssAnon). On a machine with other work,
`rows/processor s` tells more than `rows/s`.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import MB, Took, mgen

ROWS = (1_000_000, 10_000_000)
DISK = 2e9
HEADER = f"""\
{"rows":>12}{"seconds":>9}{"rows/s":>9}{"processor s":>13}{"rows/processor s":>18}{"peak MB":>9}\
{"parts":>7}"""


@dataclass(frozen=True)
class Walk:
    """What a run of so many rows took."""

    rows: int
    took: Took

    @property
    def speed(self) -> float:
        """Rows for each second of a processor."""
        return self.rows / self.took.processor


def main() -> None:
    """The short table, then the long one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < DISK:
            sys.exit(f"{folder}: {DISK / 1e9:.0f} GB of disk are needed (TMPDIR chooses another)")
        print(HEADER)
        short, long = (walked(folder, rows) for rows in ROWS)
    memory = long.took.private / short.took.private
    speed = long.speed / short.speed
    print(f"memory  {memory:.2f} times that of the short one: {_verdict(memory <= 1.15)} 1.15")
    print(f"speed   {speed:.2f} times that of the short one: {_verdict(speed >= 0.9)} 0.90")


def _verdict(good: bool) -> str:
    return "keeps to" if good else "MISSES"


def walked(folder: Path, rows: int) -> Walk:
    """Embed a new table of so many rows, watched; the table and the run are removed."""
    data, run = folder / f"{rows}.csv", folder / f"run-{rows}"
    write(data, rows)
    took = mgen("embed", data, "--backbone", "dna_onehot", "--pool", "mean", "--output", run)
    if f"{rows:,} of {rows:,} rows" not in took.told:
        sys.exit(f"not all rows were done:\n{took.told}")
    parts = sum(1 for _ in run.glob("parts/*/*"))
    walk = Walk(rows, took)
    data.unlink()
    shutil.rmtree(run)
    print(
        f"{rows:12,}{took.clock:9.0f}{rows / took.clock:9,.0f}{took.processor:13.0f}"
        f"{walk.speed:18,.0f}{took.private / MB:9.0f}{parts:7,}",
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
