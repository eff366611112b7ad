"""A run directory to one file: every row exactly once, in input order, or a precise refusal."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from . import order, result, spent, storage
from .api import Writer, WriterCard
from .aside import set_aside
from .catalog import Catalog
from .columns import ERROR, ID, ROW
from .errors import MgenError, RunError, Stopped, opening, printable
from .manifest import Done, Manifest
from .order import Source, Told, listed
from .parts import open_part, outside, read_part
from .selection import Selection, take
from .stop import Stop, stoppable

__all__ = ["Merged", "Selection", "complete", "listed", "merge", "read", "selected"]

SAMPLE_BYTES = 1 << 22  # are written to estimate how much room a file takes
FEW = 3


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    paths: Sequence[Path]
    rows: int
    failed: int
    bytes: int


def merge(
    run: Path,
    to: Path | None,
    catalog: Catalog,
    selection: Selection,
    form: str | None = None,
    *,
    into: Path | None = None,
    rows_per_file: int | None = None,
    delete_parts: bool = False,
    told: Told = lambda rows: None,
) -> Merged:
    """Write the run as one file; its format is `form`, else the suffix of `to`, else Parquet.

    - `into`: the file is a copy of this one, with the run's columns added.
    - `rows_per_file`: several files of so many rows, `NAME-00000-of-00012.parquet`.
    - `delete_parts`: once the result is durable and was read back.
    - `told` hears how many rows of the input have passed.

    Raises `RunError` when batches are missing, a part is damaged, or a row is there twice.
    """
    manifest = Manifest.open(run)
    card = _format(to, form, catalog)
    _check_dtype(card, manifest, catalog)
    path = to or run.parent / f"{run.resolve().name}{card.suffix}"
    if path.is_dir():
        raise RunError(f"{path} is a folder", "name a file with --to")
    if into is not None:
        _check_into(into, path, card, catalog)
        selection = _added(selection, manifest)
        if rows_per_file is not None:
            raise MgenError("--into makes one file", "leave out --rows-per-file")
    if delete_parts and not selection.everything:
        raise MgenError(
            "--delete-parts needs all that was computed in the file",
            "leave out --columns, --where and --allow-missing",
        )
    if delete_parts and (ended := _finished(manifest, path, card.suffix, rows_per_file)):
        return ended
    done = complete(manifest, selection)
    source = open_source(manifest, done, catalog, selection)
    with opening(card):
        writer = card.load(card)
    if selection.where is None:  # nobody knows how many rows that takes
        _check_room(path, writer, source, done, 2 * into.stat().st_size if into else 0)
    writer.source = into
    with stopping() as stop, contextlib.closing(order.ordered(source, done, told)) as tables:
        count = Counted(tables, stop)
        with result.beside(path, digest=delete_parts) as files:
            writer.scratch = files.folder
            for some in cut(count, rows_per_file):
                files.add(partial(writer.write, tables=some, schema=source.schema))
            paths = files.publish(card.suffix, numbered=rows_per_file is not None)
        if delete_parts:
            for file, written in zip(paths, files.written):
                result.check(file, written)
            spent.delete_parts(manifest, done, paths, count.rows, count.failed)
    return Merged(paths, count.rows, count.failed, sum(one.bytes for one in files.written))


def read(run: Path, catalog: Catalog, selection: Selection) -> pa.Table:
    """The run as one Arrow table, in memory."""
    manifest = Manifest.open(run)
    done = complete(manifest, selection)
    schema, tables = selected(manifest, done, catalog, selection)
    batches = [batch for table in tables for batch in table.to_batches()]
    return pa.Table.from_batches(batches, schema=schema)


def selected(
    manifest: Manifest, done: Sequence[Done], catalog: Catalog, selection: Selection
) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """The selected rows in input order, read as they are asked for, and their schema."""
    source = open_source(manifest, done, catalog, selection)
    return source.schema, order.ordered(source, done)


def complete(manifest: Manifest, selection: Selection) -> list[Done]:
    """The done parts. Raises `RunError` naming the batches that are missing, unless allowed."""
    done = manifest.done()
    missing = manifest.missing(done)
    spent.check(manifest, missing)
    if missing and not selection.allow_missing:
        raise RunError(
            f"{len(missing):,} of {manifest.batches:,} batches are missing "
            f"({listed(missing)}) in {manifest.folder}",
            f"finish the run: {manifest.command()} (or --allow-missing for what there is)",
        )
    return done


def refuse_failed(manifest: Manifest) -> None:
    """Raise `RunError` naming the first rows that were set aside, when there are any."""
    done = manifest.done()
    if not (count := manifest.failed(done)):
        return
    first = [
        f"row {failure.row} (id {printable(failure.id)}): {failure.reason}"
        for failure in islice(set_aside(manifest, done), FEW)
    ]
    raise RunError(
        f"{count:,} of {manifest.rows:,} rows were set aside: {'; '.join(first)}",
        f"mgen status --failed {manifest.folder} lists them; --drop-failed leaves them out",
    )


def open_source(
    manifest: Manifest, done: Sequence[Done], catalog: Catalog, selection: Selection
) -> Source:
    """What reads the parts, and the schemas of what goes in and comes out."""
    if not done:
        raise RunError(f"nothing is done in {manifest.folder}", f"run {manifest.command()}")
    card = catalog.find(WriterCard, manifest.record["config"]["writer"])
    with opening(card):
        writer = card.load(card)
    # A part with rows: a format that guesses types has nothing to guess from in the others.
    part = next((part for part in done if part.rows), done[0])
    content = open_part(manifest, part)
    table = read_part(manifest, writer, part, content)
    schema = table.schema.with_metadata({**(table.schema.metadata or {}), **_provenance(manifest)})
    if manifest.failed(done) and not selection.drop_failed:
        schema = schema.append(pa.field(ERROR, pa.string()))
    share = min(1.0, SAMPLE_BYTES / max(table.nbytes, 1))
    sample = take(table, range(max(1, int(len(table) * share))) if len(table) else ())
    wanted, swell = selection.of(schema), outside(table, content) / part.bytes
    return Source(manifest, writer, table.schema, wanted, selection, sample, swell)


def cut(tables: Iterator[pa.Table], rows: int | None) -> Iterator[Iterator[pa.Table]]:
    """The stream as streams of so many rows, one after the other; at least one."""
    if rows is None:
        yield tables
        return
    held: list[pa.Table] = []  # what is left of the last table

    def some(left: int = rows) -> Iterator[pa.Table]:
        while left and (table := held.pop() if held else next(tables, None)) is not None:
            yield table[:left]
            if len(table) > left:
                held.append(table[left:])
            left -= min(left, len(table))

    yield some()
    while held or (table := next(tables, None)) is not None:
        if not held:
            held.append(table)
        yield some()


def _finished(
    manifest: Manifest, path: Path, suffix: str, rows_per_file: int | None
) -> Merged | None:
    """The merge of this kind that was stopped when it deleted parts, once they are deleted."""
    count = len(spent.merged_files(manifest))
    paths = [path] if rows_per_file is None else result.numbered_paths(path, suffix, count)
    if (found := spent.finish(manifest, paths)) is None:
        return None
    result.sweep(path)
    return Merged(paths, found.rows, found.failed, sum(file.stat().st_size for file in paths))


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C, after which nothing is left of a merge."""
    try:
        with stoppable() as stop:
            yield stop
    except Stopped as error:
        error.what = "stopped: no file was written"
        raise


class Counted(Iterator[pa.Table]):
    """The tables that have rows, counted as they pass; raises `Stopped` after a signal."""

    def __init__(self, tables: Iterator[pa.Table], stop: Stop) -> None:
        self.tables, self.stop = tables, stop
        self.rows = self.failed = 0

    def __next__(self) -> pa.Table:
        self.stop.check()
        table = next(self.tables)
        self.rows += table.num_rows
        if ERROR in table.column_names:
            self.failed += table.num_rows - table[ERROR].null_count
        return table


def _provenance(manifest: Manifest) -> dict[str, str]:
    """What the file's own metadata tells of the run."""
    identity = manifest.record["identity"]
    return {
        "mgen.version": manifest.record["versions"]["mgen"],
        "mgen.task": identity["task"],
        "mgen.backbone": identity["backbone"],
        "mgen.weights": str(identity["weights"]),
        "mgen.input": identity["input"],
    }


def _format(to: Path | None, form: str | None, catalog: Catalog) -> WriterCard:
    if form is not None or to is None:
        return catalog.find(WriterCard, form or "parquet")
    cards = [offer.card for offer in catalog.offers(WriterCard)]
    for card in sorted(cards, key=lambda card: -len(card.suffix)):
        if to.name.lower().endswith(card.suffix):
            return card
    raise MgenError(
        f"no writer for {to.name}",
        f"use one of {' '.join(card.suffix for card in cards)}, or say --format",
    )


def _check_into(into: Path, path: Path, card: WriterCard, catalog: Catalog) -> None:
    if not card.into:
        able = [offer.card.suffix for offer in catalog.offers(WriterCard) if offer.card.into]
        raise MgenError(
            f"{card.name} cannot add to a file",
            f"name a file with --to that ends in {' or '.join(able)}"
            if able
            else "leave out --into",
        )
    if not into.is_file():
        raise MgenError(f"no such file: {into}", "check what --into names")
    if into.resolve() == path.resolve():
        raise MgenError(f"{into} would be overwritten", "name another file with --to")


def _added(selection: Selection, manifest: Manifest) -> Selection:
    """What is added to a file: all but what was kept of it, and by what its rows are found."""
    columns = selection.columns
    return replace(
        selection,
        columns=None if columns is None else (ROW, ID, *columns),
        without=tuple(manifest.record["identity"].get("keep", ())),
    )


def _check_dtype(card: WriterCard, manifest: Manifest, catalog: Catalog) -> None:
    stored = manifest.record["identity"]["dtype"]
    if stored not in card.dtypes:
        able = [o.card.suffix for o in catalog.offers(WriterCard) if stored in o.card.dtypes]
        raise MgenError(
            f"{card.name} cannot hold {stored}, which this run stored",
            f"name a file with --to that ends in {' or '.join(able)}",
        )


def _check_room(
    path: Path, writer: Writer, source: Source, done: Sequence[Done], more: int
) -> None:
    """Raise `RunError` where the disk has too little room, judged by how some rows are written.

    `more`: bytes that are needed beside them.
    """
    names = [name for name in source.schema.names if name in source.stored.names]
    sample = source.sample.select(names)
    file = _Measured()
    writer.write(cast("BinaryIO", file), [sample], sample.schema)
    scale = sum(part.rows for part in done) / max(len(sample), 1)
    needed = file.size * scale * (2 if writer.spools else 1) + more
    place = result.waiting(path)
    free = storage.free_bytes(place)
    if free is not None and needed > free:
        where, how = ("", "--to") if place is path else (f" in {place}", "TMPDIR")
        raise RunError(
            f"{path} needs about {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free{where}",
            f"write to another disk with {how}, or fewer columns with --columns",
        )


class _Measured(io.RawIOBase):
    """Takes anything and keeps its size."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            self.size += view.nbytes
            return view.nbytes

    def tell(self) -> int:
        return self.size
