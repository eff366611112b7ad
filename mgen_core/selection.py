"""Which part of a run is wanted: columns by name, rows by an SQL expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .columns import ERROR, ROW, numbers
from .errors import MgenError

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Selection:
    """What of a run is wanted. `columns` None: all of them but those of `without`.

    `drop_failed` leaves out the rows that were set aside; `allow_missing` takes what there is of
    an unfinished run.
    """

    columns: tuple[str, ...] | None = None
    where: str | None = None
    drop_failed: bool = False
    allow_missing: bool = False
    without: tuple[str, ...] = ()

    @property
    def everything(self) -> bool:
        """Whether every number that was computed is wanted."""
        return self.columns is None and self.where is None and not self.allow_missing

    def of(self, schema: pa.Schema) -> pa.Schema:
        """The wanted columns, in the order asked for. Raises `MgenError` for an unknown one."""
        columns = self.columns
        if columns is None:
            columns = tuple(name for name in schema.names if name not in self.without)
        for name in columns:
            if name not in schema.names:
                known = ", ".join(schema.names)
                raise MgenError(f"no column {name!r} in this run", f"its columns: {known}")
        return pa.schema([schema.field(name) for name in dict.fromkeys(columns)], schema.metadata)


class RowFilter:
    """An SQL expression over a table's text and number columns, as `WHERE` takes it.

    Several threads may call it at once.
    """

    def __init__(self, expression: str, stored: pa.Schema) -> None:
        """`stored` is the schema of the parts. Raises `MgenError` for what is no condition."""
        import duckdb

        # DuckDB knows neither half floats nor our vectors: it sees the scalar columns alone.
        scalars = [field for field in stored if _scalar(field.type)]
        self.schema = pa.schema([*scalars, pa.field(ERROR, pa.string())])
        self.expression = expression
        self._database = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})
        self(pa.Table.from_batches([], self.schema))

    @property
    def names(self) -> list[str]:
        """The columns of a part that it needs."""
        return [name for name in self.schema.names if name != ERROR]

    def __call__(self, table: pa.Table) -> Indices:
        """Places of the rows for which it holds, ascending."""
        import duckdb

        seen = pa.Table.from_arrays(
            [_column(table, field) for field in self.schema], self.schema.names
        )
        places = numbers(np.arange(len(table)))
        with self._database.cursor() as database:
            try:
                relation = database.from_arrow(seen.append_column("mgen_place", places))
                found = relation.filter(self.expression).project("mgen_place").to_arrow_table()
            except duckdb.Error as error:
                raise MgenError(
                    f"--where {self.expression!r}: {str(error).splitlines()[0]}",
                    f"write an SQL condition over {', '.join(self.schema.names)}",
                ) from error
        return np.sort(integers(found, "mgen_place"))


def integers(table: pa.Table, name: str = ROW) -> Indices:
    """A column of int64 without nulls; not by Arrow's `to_numpy`, which imports pandas."""
    chunks = [np.from_dlpack(chunk) for chunk in table[name].cast(pa.int64()).chunks]
    return np.concatenate([np.zeros(0, np.int64), *chunks])


def take(table: pa.Table, places: Sequence[int] | Indices) -> pa.Table:
    """The rows at these places."""
    return table.take(numbers(np.asarray(places, np.int64)))


def _column(table: pa.Table, field: pa.Field) -> Any:
    if field.name in table.column_names:
        return table[field.name].cast(field.type)
    return pa.nulls(len(table), field.type)


def _scalar(of: pa.DataType) -> bool:
    return not (pa.types.is_nested(of) or pa.types.is_float16(of))
