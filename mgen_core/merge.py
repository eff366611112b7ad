"""A run directory to one file: every row exactly once, in input order, or a precise refusal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import storage
from .api import Writer, WriterCard
from .catalog import Catalog
from .columns import ERROR, ROW, null_rows
from .errors import MgenError, RunError
from .manifest import Done, Manifest
from .parts import read_part
from .plan import Failure


@dataclass(frozen=True)
class Selection:
    """Which part of a run is wanted: columns by name (None: all), rows by an SQL expression."""

    columns: tuple[str, ...] | None = None
    where: str | None = None
    drop_failed: bool = False
    allow_missing: bool = False


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    path: Path
    rows: int
    failed: int
    bytes: int


def merge(
    run: Path, to: Path | None, catalog: Catalog, selection: Selection, form: str | None = None
) -> Merged:
    """Write the run as one file; its format is `form`, else the suffix of `to`, else Parquet.

    Raises `RunError` when batches are missing, a part is damaged, or a row is there twice.
    """
    manifest = Manifest.open(run)
    card = _format(to, form, catalog)
    _check_dtype(card, manifest, catalog)
    path = to or run.parent / f"{run.resolve().name}{card.suffix}"
    if path.is_dir():
        raise RunError(f"{path} is a folder", "name a file with --to")
    done = complete(manifest, selection)
    _check_room(path, done)
    schema, tables = selected(manifest, done, catalog, selection)
    count = Counted(tables)
    storage.make_folder(path.parent)
    writer = card.load(card)
    storage.write_atomic(path, lambda temporary: writer.write(temporary, count, schema))
    return Merged(path, count.rows, count.failed, path.stat().st_size)


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
    source = open_parts(manifest, catalog)
    stored = _part_schema(manifest, source, done)
    schema = merged_schema(manifest, stored, done, selection)
    full = stored.append(pa.field(ERROR, pa.string()))
    return schema, ordered(manifest, source, done, selection, full, schema)


class Counted:
    """The tables, counted as they pass."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self.tables = tables
        self.rows = self.failed = 0

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self.tables:
            self.rows += table.num_rows
            if ERROR in table.column_names:
                self.failed += table.num_rows - table[ERROR].null_count
            yield table


def complete(manifest: Manifest, selection: Selection) -> list[Done]:
    """The done parts. Raises `RunError` naming the batches that are missing, unless allowed."""
    done = manifest.done()
    missing = manifest.missing(done)
    if missing and not selection.allow_missing:
        raise RunError(
            f"{len(missing):,} of {manifest.batches:,} batches are missing "
            f"({listed(missing)}) in {manifest.folder}",
            f"finish the run: {manifest.command()} (or --allow-missing for what there is)",
        )
    return done


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """A few numbers, and how many more."""
    more = f" and {len(numbers) - most:,} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def open_parts(manifest: Manifest, catalog: Catalog) -> Writer:
    """What reads the parts of this run."""
    card = catalog.find(WriterCard, manifest.record["config"]["writer"])
    return card.load(card)


def merged_schema(
    manifest: Manifest, stored: pa.Schema, done: Sequence[Done], selection: Selection
) -> pa.Schema:
    """The stored columns, and `error` where rows failed; only what was asked for."""
    schema = stored.with_metadata({**(stored.metadata or {}), **_provenance(manifest)})
    if manifest.failed(done) and not selection.drop_failed:
        schema = schema.append(pa.field(ERROR, pa.string()))
    if selection.columns is None:
        return schema
    unknown = [name for name in selection.columns if name not in schema.names]
    if unknown:
        raise MgenError(
            f"no column {unknown[0]!r} in this run", f"its columns: {', '.join(schema.names)}"
        )
    return pa.schema([schema.field(name) for name in selection.columns], schema.metadata)


def ordered(
    manifest: Manifest,
    source: Writer,
    done: Sequence[Done],
    selection: Selection,
    full: pa.Schema,
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    """A window of the plan at a time; `full` is what is read, `schema` what is given."""
    keep = RowFilter(selection.where, full) if selection.where else None
    planned = manifest.planned_failures()
    later: Failure | None = next(planned, None)
    for first, rows, batches, parts in manifest.by_window(done):
        failures: list[Failure] = []
        while later is not None and later.row < first + rows:
            failures.append(later)
            later = next(planned, None)
        table = _window(manifest, source, parts, failures, full)
        _check_rows(table, first, rows, whole=sum(len(part.batches) for part in parts) == batches)
        if selection.drop_failed:
            table = table.filter(pc.is_null(table[ERROR]))
        if keep is not None:
            table = keep(table)
        yield table.select(schema.names).cast(schema)


def _window(
    manifest: Manifest,
    source: Writer,
    parts: Sequence[Done],
    failures: list[Failure],
    full: pa.Schema,
) -> pa.Table:
    tables = []
    for part in parts:
        if part.rows:  # where all failed, nobody knew what the columns would be
            table = read_part(manifest, source, part)
            table = table.append_column(full.field(ERROR), pa.nulls(len(table), pa.string()))
            tables.append(table.cast(full))
        failures.extend(manifest.part_failures(part))
    tables.append(null_rows(full, failures))
    table = pa.concat_tables(tables)
    return table.take(pc.sort_indices(table[ROW]))


def _check_rows(table: pa.Table, first: int, rows: int, *, whole: bool) -> None:
    """Every row of the window exactly once; a window with missing batches: none twice."""
    found = table[ROW].to_numpy()
    expected = np.arange(first, first + rows)
    if whole and np.array_equal(found, expected):
        return
    twice = found[1:][found[1:] == found[:-1]]
    missing = np.setdiff1d(expected, found)
    if len(twice) or whole:
        raise RunError(
            f"rows are wrong in the parts: twice {listed(twice.tolist()) or 'none'}; "
            f"missing {listed(missing.tolist()) or 'none'}",
            "the run directory was changed by hand: start anew with --overwrite",
        )


class RowFilter:
    """An SQL expression over a table's text and number columns, as `WHERE` takes it."""

    def __init__(self, expression: str, schema: pa.Schema) -> None:
        # DuckDB knows neither half floats nor our vectors: it sees the scalar columns alone.
        self.names = [f.name for f in schema if not pa.types.is_nested(f.type) and not _half(f)]
        self.expression = expression
        self(pa.Table.from_batches([], schema=schema))

    def __call__(self, table: pa.Table) -> pa.Table:
        import duckdb

        scalars = table.select(self.names)
        numbered = scalars.append_column("mgen_position", pa.array(np.arange(len(table))))
        with duckdb.connect(config={"enable_external_access": "false"}) as database:
            try:
                relation = database.from_arrow(numbered).filter(self.expression)
                found = relation.project("mgen_position").order("mgen_position").to_arrow_table()
            except duckdb.Error as error:
                raise MgenError(
                    f"--where {self.expression!r}: {str(error).splitlines()[0]}",
                    f"write an SQL condition over {', '.join(self.names)}",
                ) from error
        return table.take(found["mgen_position"])


def _half(field: pa.Field) -> bool:
    return bool(pa.types.is_float16(field.type))


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


def _part_schema(manifest: Manifest, source: Writer, done: Sequence[Done]) -> pa.Schema:
    if not done:
        raise RunError(f"nothing is done in {manifest.folder}", f"run {manifest.command()}")
    # Of a part with rows: a format that guesses types has nothing to guess from in the others.
    told = next((part for part in done if part.rows), done[0])
    return read_part(manifest, source, told).schema


def _format(to: Path | None, form: str | None, catalog: Catalog) -> WriterCard:
    if form is not None:
        return catalog.find(WriterCard, form)
    if to is None:
        return catalog.find(WriterCard, "parquet")
    cards = [offer.card for offer in catalog.offers(WriterCard)]
    for card in cards:
        if to.name.lower().endswith(card.suffix):
            return card
    raise MgenError(
        f"no writer for {to.name}",
        f"use one of {' '.join(card.suffix for card in cards)}, or say --format",
    )


def _check_dtype(card: WriterCard, manifest: Manifest, catalog: Catalog) -> None:
    stored = manifest.record["identity"]["dtype"]
    if stored not in card.dtypes:
        able = [o.card.suffix for o in catalog.offers(WriterCard) if stored in o.card.dtypes]
        raise MgenError(
            f"{card.name} cannot hold {stored}, which this run stored",
            f"name a file with --to that ends in {' or '.join(able)}",
        )


def _check_room(path: Path, done: Sequence[Done]) -> None:
    needed, free = sum(part.bytes for part in done), storage.free_bytes(path)
    if free is not None and needed > free:
        raise RunError(
            f"{path} needs about {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free",
            "write to another disk with --to, or fewer columns with --columns",
        )
