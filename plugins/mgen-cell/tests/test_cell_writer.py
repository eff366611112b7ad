"""What was computed for cells as AnnData."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_cell.plugin import WRITERS
from typer.testing import CliRunner

import mgen_core
from mgen_core import MgenError, RunError
from mgen_core.cli import app

NAMES = [f"GENE{number}" for number in range(30)]  # of the model in conftest
WRITER = WRITERS[0].load(WRITERS[0])


class Forward(io.BytesIO):
    """A file on its way to another machine."""

    def seek(self, *where: int) -> int:
        raise io.UnsupportedOperation("seek")


def written(table: pa.Table, rows: int = 2) -> bytes:
    file = Forward()
    pieces = [table[first : first + rows] for first in range(0, table.num_rows, rows)]
    WRITER.write(file, iter(pieces), table.schema)
    return file.getvalue()


VECTORS = st.none() | st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3)
LINES = st.tuples(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    VECTORS,
    st.none() | st.sampled_from(["", "a", "é"]),
    st.none() | st.integers(0, 9),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(LINES, max_size=7))
def test_a_table_comes_back(lines: list[tuple[str, list[float] | None, str | None, int]]) -> None:
    ids, vectors, texts, numbers = zip(*lines) if lines else ((), (), (), ())
    fields = {
        "row": (pa.int64(), range(len(lines))),
        "id": (pa.string(), ids),
        "embedding": (pa.list_(pa.float32(), 3), vectors),
        "label": (pa.int32(), numbers),
        "error": (pa.string(), texts),
    }
    arrays = [pa.array(list(values), kind) for kind, values in fields.values()]
    schema = pa.schema([(name, kind) for name, (kind, _) in fields.items()], {"mgen.task": "embed"})
    table = pa.Table.from_arrays(arrays, schema=schema)
    back = WRITER.read(io.BytesIO(written(table)))
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.to_pydict() == table.to_pydict()


def test_some_columns_and_no_damaged_file_are_read() -> None:
    table = pa.table({"row": [0, 1], "id": ["a", "b"], "label": ["x", None]})
    whole = written(table)
    some = WRITER.read(io.BytesIO(whole), columns=["label", "row"])
    assert some.to_pydict() == {"row": [0, 1], "label": ["x", None]}
    for damaged in (b"", whole[:1000], b"\0" * len(whole)):
        with pytest.raises(RunError, match="damaged"):
            WRITER.read(io.BytesIO(damaged))


def test_ragged_columns_are_refused() -> None:
    table = pa.table({"embedding": pa.array([[[1.0]], []], pa.list_(pa.list_(pa.float32(), 1)))})
    with pytest.raises(MgenError, match="cannot hold the column 'embedding'"):
        written(table)


def test_merged_vectors_are_in_obsm(
    weights: Path, h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    counts = np.random.default_rng(1).poisson(0.5, (5, 30))
    counts[1] = 0
    words = ["embed", str(h5ad(counts, NAMES)), "--backbone", "aido_cell_3m"]
    run, merged = tmp_path / "run", tmp_path / "out.h5ad"
    words += ["--weights", str(weights), "--output", str(run)]
    for command in (words, ["merge", str(run), "--to", str(merged)]):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    expected = mgen_core.read(run)
    with h5py.File(merged) as file:
        found = file["obsm/X_aido_cell_3m"][:]
        assert list(file["obs/_index"].asstr()[:]) == [f"cell-{number}" for number in range(5)]
        assert file["uns/mgen/backbone"].asstr()[()] == "aido_cell_3m"
    for vector, row in zip(found, expected["embedding"].to_pylist()):
        assert np.isnan(vector).all() if row is None else vector.tolist() == row
