"""Counts as csv or tsv: the names of genes in the first line, then a line a cell, its id first."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgen_core import InputError, Reader, RowError, Rows

from ..cell import Cell, Genes
from .matrix import MOST_GENES
from .source import COUNTS, IDS
from .stores import file_digest, readable

CHUNK = 64
LONGEST = 256 << 20


class CountsReader(Reader):
    """Opens such a file: `.tsv` has tabs, anything else commas; `.gz` is unpacked."""

    def open(self, uri: str) -> Rows:
        return CountsRows(readable(uri))


class CountsRows(Rows):
    """The cells of one file. Columns: `X` and `obs_names`."""

    columns = (COUNTS, IDS)
    default_x = COUNTS
    default_id = IDS

    def __init__(self, path: Path) -> None:
        self.path = path
        header = next(self._lines(), [])
        if len(header) < 2:
            raise InputError(f"{path} names no genes", "its first line must: one a column")
        if len(header) > MOST_GENES:
            raise InputError(f"{path} has {len(header):,} columns", "genes are its columns")
        self.genes = Genes(header[1:])

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        lines = self._lines()
        next(lines)
        held: list[tuple[Any, str]] = []
        for cells in lines:
            held.append((self._cell(cells), cells[0]))
            if len(held) == CHUNK:
                yield self._chunk(held, columns)
                held = []
        if held:
            yield self._chunk(held, columns)

    def _chunk(
        self, held: Sequence[tuple[Any, str]], columns: Sequence[str]
    ) -> Mapping[str, Sequence[Any]]:
        found = dict(zip((COUNTS, IDS), zip(*held)))
        return {name: found[name] for name in columns}

    def _cell(self, cells: Sequence[str]) -> Cell | RowError:
        wanted = len(self.genes.names) + 1
        if len(cells) != wanted:
            return RowError(f"{len(cells):,} columns, the first line has {wanted:,}")
        try:
            counts = np.array(cells[1:], dtype=np.float64)
        except ValueError:
            return RowError("a count is no number")
        places = np.flatnonzero(counts)
        return Cell(self.genes, places, counts[places])

    def _lines(self) -> Iterator[list[str]]:
        """Lines that are not blank, in cells. Raises `InputError` for what is not such a text."""
        delimiter = "\t" if ".tsv" in self.path.suffixes[-2:] else ","
        with contextlib.ExitStack() as held:
            file: Any = held.enter_context(self.path.open("rb"))
            if self.path.suffix == ".gz":
                file = held.enter_context(gzip.open(file))
            text = held.enter_context(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            try:
                yield from filter(None, csv.reader(_bounded(text), delimiter=delimiter))
            except (UnicodeDecodeError, csv.Error, EOFError) as error:
                raise InputError(f"cannot read {self.path}: {error}", "check the file") from error

    def digest(self) -> str:
        return file_digest(self.path)


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(LONGEST):
        if len(line) == LONGEST:
            raise csv.Error(f"a line is longer than {LONGEST >> 20} MiB")
        yield line
