"""Memory and time that `mgen merge` takes, beside `cat` of the same bytes to the same disk.

    nox -s bench -- merge                     two shapes, 2.5 GB and 9.6 GB of numbers
    python bench/merge.py --share 0.01        a hundredth of the rows

The parts are made by mgen's own storage, writer and manifest, in batches that hold the rows of a
window in no order, as a run leaves them. `cat` and merge take turns, each until its bytes are
durable; figures are medians. `peak` is the most memory that is no file's (RssAnon). TMPDIR chooses
the disk; the larger shape needs 32 GB of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import Took, clock, mgen

from mgen_core import Row, WriterCard, storage
from mgen_core.catalog import discover
from mgen_core.columns import HostColumn, to_table
from mgen_core.job import Job
from mgen_core.manifest import FORMAT, RECORD, Manifest
from mgen_core.parts import Computed, write_parts
from mgen_core.plan import Batch, Entry

GB = 1e9
TOGETHER = 8  # batches that wait when a part is written
MOST_DISK = 3.3  # times the numbers: parts, merged file, copy


@dataclass(frozen=True)
class Shape:
    """A run's output; `residues`: vectors of a row, about, or None for one vector a row."""

    name: str
    rows: int
    width: int
    dtype: str
    window: int
    batch: int
    residues: int | None = None

    @property
    def bytes(self) -> int:
        """Of all numbers."""
        return self.rows * (self.residues or 1) * self.width * np.dtype(self.dtype).itemsize


SHAPES = (
    Shape("a vector a row", 1_000_000, 640, "float32", 52_429, 1024),
    Shape("a vector a residue", 50_000, 320, "float16", 699, 64, residues=300),
)


def main() -> None:
    """Each shape: parts made, then cat and merge in turn."""
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--share", type=float, default=1.0, help="of the rows")
    given.add_argument("--rounds", type=int, default=3)
    asked = given.parse_args()
    print(f"{'':20} {'GB':>6} {'parts':>6} {'cat s':>7} {'merge s':>8} {'ratio':>6} {'peak MB':>8}")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            if shutil.disk_usage(name).free < MOST_DISK * shape.bytes * asked.share:
                sys.exit(f"{name}: {MOST_DISK * shape.bytes / GB:.0f} GB of disk are needed")
            measure(shape, max(1, int(shape.rows * asked.share)), Path(name), asked.rounds)


def measure(shape: Shape, rows: int, folder: Path, rounds: int) -> None:
    """One line of the table."""
    run = folder / "run"
    files = make_run(shape, rows, run)
    size = sum(file.stat().st_size for file in files)
    cats, merges = [], []
    for _ in range(rounds):
        cats.append(cat(files, folder / "copy"))
        merges.append(merge(run, folder / "merged.parquet"))
        check(folder / "merged.parquet", rows)
    slow, fast = clock(merges), statistics.median(cats)
    peak = max(one.private for one in merges)
    print(
        f"{shape.name:20} {size / GB:6.2f} {len(files):6} {fast:7.2f} {slow:8.2f} "
        f"{fast / slow:6.2f} {peak / 1e6:8.0f}",
        flush=True,
    )


def make_run(shape: Shape, rows: int, folder: Path) -> list[Path]:
    """A finished run directory; its parts in the order of the plan."""
    windows = list(make_windows(shape, rows))
    storage.make_folder(folder / "done")
    storage.make_folder(folder / "failed")
    nothing = storage.write_atomic(folder / "failed/plan.jsonl", lambda file: None)
    plan = {"rows": rows, "failed": 0, "failures_sha256": nothing.sha256, "digest": ""}
    record = {
        "format": FORMAT,
        "identity": {
            "task": "embed",
            "backbone": "none",
            "weights": None,
            "input": "none",
            "dtype": shape.dtype,
        },
        "command": ["mgen", "embed"],
        "directory": str(folder),
        "config": {"writer": "parquet"},
        "versions": {"mgen": "bench"},
        "plan": {**plan, "windows": windows, "batches": sum(window[3] for window in windows)},
    }
    storage.write_text(folder / RECORD, json.dumps(record))
    manifest, card = Manifest.open(folder), discover().find(WriterCard, "parquet")
    job = cast(Job, SimpleNamespace(writer=card.load(card)))
    computed = make_batches(shape, windows)
    while some := list(itertools.islice(computed, TOGETHER)):
        write_parts(job, manifest, 0, some)
    return [folder / part.file for part in manifest.done()]


def make_windows(shape: Shape, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """First row, rows, first batch, batches of each window."""
    batch = 0
    for first in range(0, rows, shape.window):
        held = min(shape.window, rows - first)
        count = -(-held // shape.batch)
        yield first, held, batch, count
        batch += count


def make_batches(shape: Shape, windows: Sequence[tuple[int, int, int, int]]) -> Iterator[Computed]:
    """Batches of random numbers, the rows of each window in no order."""
    draw = np.random.default_rng(0)
    for first, rows, number, batches in windows:
        dealt = np.array_split(first + draw.permutation(rows), batches)
        for batch, indices in enumerate(dealt, number):
            columns = {"embedding": numbers(shape, len(indices), draw)}
            entries = tuple(Entry(1, (Row(i, f"row-{i}", ""),)) for i in indices.tolist())
            made = Batch(batch, entries, len(entries))
            table, failures = to_table(made, columns, {}, shape.dtype)
            yield Computed(made, table, failures, 0.0)


def numbers(shape: Shape, rows: int, draw: np.random.Generator) -> HostColumn:
    """So many random vectors, or lists of them."""
    lengths = None
    if shape.residues:
        lengths = draw.integers(shape.residues // 2, 3 * shape.residues // 2 + 1, rows)
    count = rows if lengths is None else int(lengths.sum())
    values = draw.standard_normal((count, shape.width), np.float32).astype(shape.dtype)
    return HostColumn(values, lengths)


def cat(files: Sequence[Path], to: Path) -> float:
    """Seconds until a copy of the files, end to end, is durable."""
    to.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    with to.open("wb") as file:
        subprocess.run(
            ["xargs", "-0", "cat"],
            input=b"\0".join(map(os.fsencode, files)),
            stdout=file,
            check=True,
        )
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return seconds


def merge(run: Path, to: Path) -> Took:
    """The whole command."""
    to.unlink(missing_ok=True)
    os.sync()
    return mgen("merge", run, "--to", to)


def check(path: Path, rows: int) -> None:
    """Every row once, in order."""
    with pq.ParquetFile(path) as file:
        start = 0
        for batch in file.iter_batches(columns=["row"]):
            found: Any = batch.column("row")
            if not found.equals(pa.array(np.arange(start, start + len(batch)))):
                sys.exit(f"{path}: rows are not in order from {start} on")
            start += len(batch)
    if start != rows:
        sys.exit(f"{path}: {start} rows instead of {rows}")


if __name__ == "__main__":
    main()
