"""What came of faults, counted: the table that `nox -s faults` ends with."""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter  # as it is, where a test bends that of `time`
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HEADER = ("fault", "tries", "rows lost", "rows doubled", "wrong results", "seconds to recover")


@dataclass
class Tries:
    """What came of one kind of fault."""

    seconds: list[float] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    wrong: int = 0


class Tally:
    """A line a kind of fault."""

    def __init__(self) -> None:
        self.faults: dict[str, Tries] = defaultdict(Tries)

    @contextlib.contextmanager
    def recovering(self, fault: str) -> Iterator[Check]:
        """A try: what is done in it makes the fault good."""
        tries, start = self.faults[fault], perf_counter()
        yield Check(tries)
        tries.seconds.append(perf_counter() - start)

    def plain(self) -> dict[str, dict[str, Any]]:
        """What came of faults here, for the process that shows the table."""
        return {fault: asdict(tries) for fault, tries in self.faults.items()}

    def add(self, plain: Mapping[str, Mapping[str, Any]]) -> None:
        """What came of faults in another process."""
        for fault, told in plain.items():
            tries = self.faults[fault]
            tries.seconds += told["seconds"]
            tries.lost += told["lost"]
            tries.doubled += told["doubled"]
            tries.wrong += told["wrong"]

    def lines(self) -> list[str]:
        """The table: of the seconds, the median."""
        cells = [HEADER]
        for fault, tries in self.faults.items():
            median = f"{statistics.median(tries.seconds):.2f}" if tries.seconds else "never"
            counts = (len(tries.seconds), tries.lost, tries.doubled, tries.wrong)
            cells.append((fault, *(f"{count:,}" for count in counts), median))
        widths = [max(map(len, column)) for column in zip(*cells)]
        return [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths))
            )
            for row in cells
        ]


class Check:
    """Compares merged files with that of an undisturbed run."""

    def __init__(self, tries: Tries) -> None:
        self.tries = tries

    def same(self, merged: Path, expected: bytes) -> None:
        """The very same bytes; else counts the rows that are lost, doubled or other ones."""
        if merged.read_bytes() != expected:
            self._same_rows(merged, expected)
            self.tries.wrong += 1
            raise AssertionError("the same rows, and other bytes")

    def _same_rows(self, merged: Path, expected: bytes) -> None:
        found = merged.read_bytes()
        before, after = (pq.read_table(pa.BufferReader(data)) for data in (expected, found))
        counted = Counter(after["row"].to_pylist())
        rows = {row["row"]: row for row in after.to_pylist()}
        lost = [row for row in before["row"].to_pylist() if row not in counted]
        doubled = [row for row, count in counted.items() if count > 1]
        wrong = [row for row in before.to_pylist() if rows.get(row["row"], row) != row]
        if before.equals(after):
            return
        self.tries.lost += len(lost)
        self.tries.doubled += len(doubled)
        self.tries.wrong += len(wrong) or not (lost or doubled)
        raise AssertionError(f"lost {lost}, doubled {doubled}, wrong {wrong}")


TALLY = Tally()
