"""Rows put in order: the same as Arrow's `take`, whatever the columns are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgen_core.gather import gather, lying

TYPES = {
    "vector": pa.list_(pa.float32(), 200),
    "vectors": pa.list_(pa.list_(pa.float16(), 400)),
    "stack": pa.list_(pa.list_(pa.uint16(), 100), 3),
    "narrow": pa.list_(pa.float32(), 3),
    "text": pa.string(),
    "number": pa.int64(),
}


def filled(of: pa.DataType, rows: int, draw: np.random.Generator) -> pa.Array:
    """A column of random values."""
    if pa.types.is_fixed_size_list(of):
        inner = filled(of.value_type, rows * of.list_size, draw)
        return pa.FixedSizeListArray.from_arrays(inner, type=of)
    if pa.types.is_list(of):
        offsets = np.concatenate([[0], np.cumsum(draw.integers(0, 4, rows))])
        inner = filled(of.value_type, int(offsets[-1]), draw)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, type=of)
    values = draw.integers(0, 1000, rows)
    return pa.array(values.astype(str)) if pa.types.is_string(of) else pa.array(values).cast(of)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    names=st.lists(st.sampled_from(sorted(TYPES)), unique=True, min_size=1),
    nulls=st.integers(0, 3),
    skip=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_those_that_take_gives(
    sizes: list[int], names: list[str], nulls: int, skip: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    schema = pa.schema([pa.field(name, TYPES[name]) for name in names], {"a": "b"})
    tables = [
        pa.Table.from_arrays([filled(TYPES[n], size, draw) for n in names], schema=schema)
        for size in sizes
    ]
    tables = [table[min(skip, len(table)) :] for table in tables]
    none = pa.Table.from_arrays([pa.nulls(nulls, TYPES[n]) for n in names], schema=schema)
    lengths = [len(table) for table in [*tables, none]]
    of = np.repeat(np.arange(len(lengths)), lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    order = draw.permutation(len(of))[: draw.integers(0, len(of) + 1)]
    found = gather(tables).rows(of[order], places[order], none)
    expected = pa.concat_tables([*tables, none]).combine_chunks().take(pa.array(order))
    found.validate(full=True)
    assert found.equals(expected, check_metadata=True)


@pytest.mark.parametrize("name", ["vector", "vectors", "stack"])
def test_wide_columns_are_copied_from_where_they_lie(name: str) -> None:
    tables = [
        pa.table({name: filled(TYPES[name], 30, np.random.default_rng(seed))}) for seed in (0, 1)
    ]
    assert set(gather(tables).wide) == {name}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1.0, None]], pa.list_(pa.float32(), 2)),
        pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        pa.array([[True, False]], pa.list_(pa.bool_(), 2)),
        pa.array(["text"]),
        pa.array([[1, 2]]),
    ],
)
def test_what_has_holes_or_no_numbers_is_left_to_arrow(column: Any) -> None:
    assert lying(column) is None
