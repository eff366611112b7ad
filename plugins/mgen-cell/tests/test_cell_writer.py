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


def run(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_genes_by_name_are_layers_and_vectors_of_genes(
    weights: Path, h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    path = h5ad(np.random.default_rng(1).poisson(0.5, (3, 30)), NAMES)
    words = [path, "--backbone", "aido_cell_3m", "--weights", weights]
    words += ["--option", "over=GENE7,GENE2"]
    run("infer", *words, "--kind", "logits", "--output", tmp_path / "a")
    run("embed", *words, "--pool", "tokens", "--output", tmp_path / "b", "--keep-obs", "kind,x")
    for name in ("a", "b"):
        run("merge", tmp_path / name, "--to", tmp_path / f"{name}.h5ad")
    with h5py.File(tmp_path / "a.h5ad") as file:
        assert list(file["var/_index"].asstr()[:]) == ["GENE2", "GENE7"]
        logits = mgen_core.read(tmp_path / "a")["logits"].to_pylist()
        assert file["layers/logits"][:].tolist() == logits
        assert np.shape(logits) == (3, 2)
    with h5py.File(tmp_path / "b.h5ad") as file:
        assert file["obsm/X_aido_cell_3m"].shape == (3, 2, 16)
        assert list(file["uns/mgen/tokens"].asstr()[:]) == ["GENE2", "GENE7"]
        assert file["obs/x"][:].tolist() == [0, 1, 4]
        assert list(file["obs"].attrs["column-order"]) == ["row", "kind", "x"]
        assert file["obs/kind/codes"][:].tolist() == [-1, 0, 1]


# --------------------------------------------------------------------------- into


def result(ids: list[str], rows: list[int] | None = None, **columns: list[object]) -> pa.Table:
    """A merged table; vectors tell their rows."""
    numbers = list(range(len(ids))) if rows is None else rows
    vectors = pa.array([[n, n + 0.5] for n in numbers], pa.list_(pa.float32(), 2))
    table = pa.table({"row": numbers, "id": ids, "embedding": vectors, **columns})
    return table.replace_schema_metadata({"mgen.backbone": "model", "mgen.task": "embed"})


def added(original: Path, *tables: pa.Table, to: Path | None = None) -> Path:
    writer = WRITERS[0].load(WRITERS[0])
    writer.source = original
    to = to or original.with_name("out.h5ad")
    with to.open("wb") as file:
        writer.write(file, iter(tables), tables[0].schema)
    return to


def everything(path: Path) -> dict[str, object]:
    """All that a file holds: data, attributes and how it is stored."""
    found: dict[str, object] = {}

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        attributes = {key: str(value) for key, value in node.attrs.items()}
        data = np.asarray(node).tolist() if isinstance(node, h5py.Dataset) else None
        found[name] = (attributes, data, getattr(node, "compression", None))

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_all_that_is_in_a_file_stays_as_it_is(h5ad: Callable[..., Path]) -> None:
    original = h5ad(np.eye(4), NAMES[:4], ids=list("abcd"))
    with h5py.File(original, "r+") as file:
        file.create_dataset("obsm/X_pca", data=np.ones((4, 2)), compression="gzip")
        file["obs"].attrs["column-order"] = ["x", "kind"]
    before, bytes_before = everything(original), original.read_bytes()
    to = added(original, result(list("abcd"), score=[1, 2, 3, 4], label=["u", "v", None, "u"]))
    after = everything(to)
    new = {"obsm/X_model", "obs/model_score", "uns", "uns/mgen", "uns/mgen/model"}
    new |= {f"uns/mgen/model/{name}" for name in ("backbone", "task")}
    new |= {f"obs/model_label{name}" for name in ("", "/codes", "/categories")}
    assert set(after) - set(before) == new
    assert {name: after[name] for name in before if name != "obs"} == {
        name: told for name, told in before.items() if name != "obs"
    }
    assert original.read_bytes() == bytes_before
    with h5py.File(to) as file:
        assert file["obsm/X_model"][:].tolist() == [[n, n + 0.5] for n in range(4)]
        assert list(file["obs"].attrs["column-order"]) == [
            "x",
            "kind",
            "model_score",
            "model_label",
        ]
        assert file["obs/model_label/codes"][:].tolist() == [0, 1, -1, 0]
    again = added(to, result(list("abcd"), [3, 2, 1, 0]), to=to.with_name("again.h5ad"))
    with h5py.File(again) as file:
        assert file["obsm/X_model"][:, 0].tolist() == [3, 2, 1, 0]
        assert "model_score" in file["obs"].attrs["column-order"]


def test_a_second_merge_leaves_no_reasons_of_the_first(h5ad: Callable[..., Path]) -> None:
    first = added(h5ad(np.eye(4), NAMES[:4], ids=list("abcd")), result(["a", "b"]))
    second = added(first, result(list("abcd")), to=first.with_name("second.h5ad"))
    with h5py.File(first) as before, h5py.File(second) as after:
        assert list(before["obs"].attrs["column-order"]) == ["model_error"]
        assert not len(after["obs"].attrs["column-order"]) and "model_error" not in after["obs"]
        assert np.isfinite(after["obsm/X_model"][:]).all()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9), st.integers(1, 4))
def test_cells_are_found_by_name_whatever_their_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], count: int, step: int
) -> None:
    original = tmp_path_factory.mktemp("into") / "cells.h5ad"
    with h5py.File(original, "w") as file:
        file["obs/_index"] = [f"c{n}" for n in range(9)]
        file["obs"].attrs["_index"] = "_index"
    some = order[:count]
    whole = result([f"c{n}" for n in some], number=pa.array(some, pa.int64()))
    parts = [whole[first : first + step] for first in range(0, count, step)] or [whole]
    with h5py.File(added(original, *parts)) as file:
        vectors = file["obsm/X_model"][:]
        expected = {cell: [float(row), row + 0.5] for row, cell in enumerate(some)}
        for cell in range(9):
            known = expected.get(cell)
            assert vectors[cell].tolist() == known if known else np.isnan(vectors[cell]).all()
        if count < 9:
            texts = file["obs/model_error/categories"].asstr()[:].tolist()
            codes = file["obs/model_error/codes"][:].tolist()
            assert texts == ["not in the run"]
            assert [code < 0 for code in codes] == [cell in expected for cell in range(9)]
            assert file["obs/model_number/mask"][:].tolist() == [c not in some for c in range(9)]
        else:
            assert "model_error" not in file["obs"]
            assert file["obs/model_number"][:].tolist() == list(range(9))


def test_cells_that_are_not_just_one_are_refused(h5ad: Callable[..., Path]) -> None:
    original = h5ad(np.eye(4), NAMES[:4], ids=["a", "b", "b", "d"])
    to = added(original, result(["a", "b", "b", "d"]))  # each in its place: no doubt
    with h5py.File(to) as file:
        assert file["obsm/X_model"][:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(MgenError, match="several cells 'b'"):
        added(original, result(["b", "a", "d"]))
    with pytest.raises(MgenError, match="no cell 'e'"):
        added(original, result(["a", "e"]))
    with pytest.raises(MgenError, match="several rows of the run are the cell 'a'"):
        added(original, result(["a", "a"]))
    original.write_bytes(b"nothing")
    with pytest.raises(MgenError, match="no whole HDF5 file"):
        added(original, result(["a"]))


def test_the_command_adds_to_a_copy(
    weights: Path, h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    counts = np.random.default_rng(1).poisson(0.5, (5, 30))
    counts[1] = 0
    original, folder, to = h5ad(counts, NAMES), tmp_path / "run", tmp_path / "out.h5ad"
    run(
        "embed", original, "--backbone", "aido_cell_3m", "--weights", weights, "--output", folder,
        "--keep", "kind",
    )  # fmt: skip
    run("merge", folder, "--into", original, "--to", to)
    expected = mgen_core.read(folder)["embedding"].to_pylist()
    with h5py.File(to) as file:
        for vector, row in zip(file["obsm/X_aido_cell_3m"][:], expected):
            assert np.isnan(vector).all() if row is None else vector.tolist() == row
        assert file["obs/aido_cell_3m_error/codes"][:].tolist() == [-1, 0, -1, -1, -1]
        assert "aido_cell_3m_kind" not in file["obs"]  # it is there as `kind`
        assert file["uns/mgen/aido_cell_3m/task"].asstr()[()] == "embed"

    def refused(*words: str | Path) -> str:
        error = CliRunner().invoke(app, ["merge", str(folder), *map(str, words)]).exception
        assert isinstance(error, MgenError)
        return error.what

    assert "would be overwritten" in refused("--into", original, "--to", original)
    assert "cannot add to a file" in refused("--into", original, "--to", tmp_path / "out.parquet")
    assert "no such file" in refused("--into", tmp_path / "none.h5ad", "--to", tmp_path / "b.h5ad")
    assert "makes one file" in refused("--into", original, "--to", to, "--rows-per-file", "2")
