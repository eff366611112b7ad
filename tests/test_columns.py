"""Columns become Arrow without loss, duplicates are copied, NaN is caught."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import Row
from mgen_core.columns import HostColumn, null_rows, to_array, to_table
from mgen_core.plan import Batch, Entry


def batch_of(*groups):
    entries = tuple(Entry(3, tuple(Row(i, f"r{i}", "x") for i in group)) for group in groups)
    return Batch(0, entries, computed=3 * len(entries))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_ragged_columns_keep_every_number(lengths, width):
    values = np.arange(sum(lengths) * width, dtype=np.float32).reshape(-1, width)
    array = to_array(HostColumn(values, np.array(lengths)))
    start = 0
    for entry, length in zip(array.to_pylist(), lengths):
        assert entry == values[start : start + length].tolist()
        start += length


def test_rows_that_share_an_input_each_get_a_copy():
    column = HostColumn(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
    table, failures = to_table(batch_of([5, 2], [9]), {"embedding": column}, {"k": "v"}, "float32")
    assert failures == []
    assert table.to_pydict() == {
        "row": [5, 2, 9],
        "id": ["r5", "r2", "r9"],
        "embedding": [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]],
    }
    assert table.schema.metadata == {b"k": b"v"}
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)


def test_rows_that_are_not_finite_are_named_and_left_out():
    pooled = HostColumn(np.array([[1.0], [np.nan], [3.0]], dtype=np.float32))
    ragged = HostColumn(np.array([[1.0], [2.0], [np.inf]], dtype=np.float16), np.array([0, 2, 1]))
    table, failures = to_table(
        batch_of([0], [1, 4], [2]), {"a": pooled, "b": ragged}, {}, "float16"
    )
    assert table["row"].to_pylist() == [0]
    assert [failure.row for failure in failures] == [1, 2, 4]
    assert "not finite" in failures[0].reason


def test_bfloat16_is_marked_and_checked_bit_by_bit():
    bits = np.array([[0x3F80], [0x7F80], [0x7FC0]], dtype=np.uint16)  # 1, infinity, NaN
    column = HostColumn(bits, bfloat16=True)
    assert column.finite().tolist() == [True, False, False]
    table, _ = to_table(batch_of([0], [1], [2]), {"e": column}, {}, "bfloat16")
    assert table.schema.field("e").metadata == {b"mgen.dtype": b"bfloat16"}


def test_failed_rows_are_null_but_for_their_reason():
    from mgen_core.plan import Failure

    schema = pa.schema(
        [("row", pa.int64()), ("id", pa.string()), ("e", pa.list_(pa.float16(), 2))]
    ).append(pa.field("error", pa.string()))
    table = null_rows(schema, [Failure(3, "x", "empty sequence")])
    assert table.to_pylist() == [{"row": 3, "id": "x", "e": None, "error": "empty sequence"}]


def test_rows_without_any_entry_are_finite():
    nothing = HostColumn(np.zeros((0, 4), dtype=np.float32), np.array([0, 0]))
    assert nothing.finite().tolist() == [True, True]
