"""Files of counts, read as they are written by AnnData, Cell Ranger and people."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_cell.plugin import READERS
from mgen_cell.readers import matrix
from scipy import sparse
from typer.testing import CliRunner

import mgen_core
from mgen_core import InputError, RowError, Rows, RunError
from mgen_core.cli import app

NAMES = [f"GENE{number}" for number in range(30)]  # of the model in conftest
GENES = ["A", "B", "C", "D"]
COUNTS = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4], [5, 6, 7, 8]], dtype=np.float32)
Write = Callable[[h5py.Group, Any, str], None]


def open_rows(path: Path, reader: str = "h5ad", **options: Any) -> Rows:
    card = next(card for card in READERS if card.name == reader)
    return card.load(card, card.options(**options)).open(str(path))


def table_of(rows: Rows, column: str = "X") -> list[list[float]]:
    cells = [cell for chunk in rows.chunks([column]) for cell in chunk[column]]
    return [np.bincount(c.places, c.counts, len(c.genes.names)).tolist() for c in cells]


def test_the_plugin_is_light() -> None:
    heavy = {"torch", "numpy", "pyarrow", "h5py"}
    code = f"import sys, mgen_cell.plugin; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_every_kind_of_matrix_is_the_same_table(
    kind: str, h5ad: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = open_rows(h5ad(COUNTS, GENES, kind))
    assert table_of(rows) == COUNTS.tolist()
    assert table_of(rows, "layers/doubled") == (COUNTS * 2).tolist()
    # Blocks of a few numbers and rows: the same in many pieces.
    monkeypatch.setattr(matrix, "BLOCK", 2)
    monkeypatch.setattr(matrix, "MOST_ROWS", 1)
    assert table_of(rows) == COUNTS.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=9),
    st.integers(1, 7),
    st.sampled_from(["csr", "csc"]),
)
def test_blocks_hold_every_row_once(
    write_sparse: Write, counts: list[list[int]], block: int, kind: str
) -> None:
    with h5py.File.in_memory() as file, pytest.MonkeyPatch.context() as patch:
        write_sparse(file.create_group("X"), np.array(counts), kind)
        patch.setattr(matrix, "BLOCK", block)
        patch.setattr(matrix, "MOST_ROWS", 2)
        found = [row for b in matrix.open_matrix(file["X"], "X").blocks() for row in b]
    assert [np.bincount(*pair, 3).tolist() for pair in found] == counts


def test_columns_of_cells_come_along(h5ad: Callable[..., Path]) -> None:
    rows = open_rows(h5ad(COUNTS, GENES, ids=["007", "b", "c", "d"]))
    assert rows.length == 4 and rows.default_x == "X" and rows.default_id == "obs_names"
    (chunk,) = rows.chunks(["X", "obs_names", "kind"])
    assert chunk["obs_names"] == ["007", "b", "c", "d"]
    assert chunk["kind"] == [None, "B", "T", None]


def test_genes_are_named_by_the_index_or_a_column(h5ad: Callable[..., Path]) -> None:
    path = h5ad(COUNTS, ["ENSG1", "ENSG2", "ENSG3", "ENSG4"], feature_name=GENES)

    def names(**options: Any) -> Any:
        return next(iter(open_rows(path, **options).chunks(["X"])))["X"][0].genes.names

    assert names() == ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
    assert names(gene_col="feature_name") == GENES
    with pytest.raises(InputError, match="no column 'symbol'") as caught:
        names(gene_col="symbol")
    assert "feature_name" in caught.value.hint


def test_10x_antibodies_are_no_genes(tmp_path: Path, write_sparse: Write) -> None:
    path = tmp_path / "matrix.h5"
    with h5py.File(path, "w") as file:
        write_sparse(file.create_group("matrix"), COUNTS, "csr")
        file["matrix/barcodes"] = [f"AAAC-{number}" for number in range(4)]
        file["matrix/features/name"] = ["CD4", "CD8A", "CD4", "TP53"]
        file["matrix/features/id"] = ["ENSG1", "ENSG2", "CD4_TotalSeq", "ENSG4"]
        kinds = ["Gene Expression", "Gene Expression", "Antibody Capture", "Gene Expression"]
        file["matrix/features/feature_type"] = kinds
    rows = open_rows(path, "10x")
    (chunk,) = rows.chunks(["X", "obs_names"])
    assert table_of(rows) == COUNTS.tolist()
    assert chunk["X"][0].genes.names == ["CD4", "CD8A", "", "TP53"]
    assert chunk["obs_names"][3] == "AAAC-3"


def test_csv_of_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text(",A,B\nc0,1,2\n\nc1,x,0\nc2,1\nc3,0,4\n")
    rows = open_rows(path, "counts")
    (chunk,) = rows.chunks(["obs_names", "X"])
    good = [cell.counts.tolist() for cell in chunk["X"] if not isinstance(cell, RowError)]
    assert good == [[1, 2], [4]]
    assert [str(cell) for cell in chunk["X"][1:3]] == [
        "a count is no number",
        "2 columns, the first line has 3",
    ]
    assert list(chunk["obs_names"]) == ["c0", "c1", "c2", "c3"]


def damage(path: Path, name: str, values: Any) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = values


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("X/indices", np.array([9] * 8), "outside of its shape"),
        ("X/indices", np.array([-1] * 8), "outside of its shape"),
        ("X/indices", np.array([1] * 7), "do not fit"),
        ("X/indptr", np.array([0, 9, 2, 4, 8]), "does not fit"),
        ("X/indptr", np.array([0, 2, 8]), "do not fit"),
        ("X/data", np.array(["a"] * 8, dtype="S1"), "not hold numbers"),
        ("var/_index", ["A", "B"], "obs and var are 4 x 2"),
        ("X", np.zeros(3), "1 dimensions"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(
    name: str, values: Any, what: str, h5ad: Callable[..., Path]
) -> None:
    path = h5ad(COUNTS, GENES)
    damage(path, name, values)
    with pytest.raises(InputError, match=what):
        table_of(open_rows(path))


def test_what_is_no_hdf5_or_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with pytest.raises(InputError, match="No such file"):
        open_rows(path)
    path.write_text("no")
    with pytest.raises(InputError, match="not a whole HDF5 file"):
        open_rows(path)


def test_digest_follows_the_content(h5ad: Callable[..., Path]) -> None:
    before = open_rows(h5ad(COUNTS, GENES)).digest()
    assert open_rows(h5ad(COUNTS + 1, GENES)).digest() != before


def test_from_a_file_of_cells_to_a_table(
    weights: Path, h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    draw = np.random.default_rng(1)
    counts = draw.poisson(0.5, (6, 30))
    counts[2] = 0
    path = h5ad(counts, NAMES, "csc")
    words = ["embed", str(path), "--backbone", "aido_cell_3m", "--weights", str(weights)]
    words += ["--output", str(tmp_path / "run"), "--x-col", "layers/doubled"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table = mgen_core.read(tmp_path / "run")
    assert table["id"].to_pylist() == [f"cell-{number}" for number in range(6)]
    assert [e is None for e in table["error"].to_pylist()] == [n != 2 for n in range(6)]
    assert [e is None for e in table["embedding"].to_pylist()] == [n == 2 for n in range(6)]


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_neighbours_come_nearest_first(kind: str, h5ad: Callable[..., Path]) -> None:
    rows = open_rows(h5ad(COUNTS, GENES, kind), neighbours=2)  # at 0, 1, 4 and 9 on a line
    found = [cell for chunk in rows.chunks(["X", "obs_names"]) for cell in chunk["X"]]
    for place, near in enumerate([[1, 2], [0, 2], [1, 0], [2, 1]]):
        counts = [np.bincount(c.places, c.counts, 4).tolist() for c in found[place].cells]
        assert counts == COUNTS[[place, *near]].tolist()
        assert found[place].xy.tolist() == [[n**2, 0] for n in (place, *near)]


def test_cells_in_one_place_are_not_their_own_neighbours(h5ad: Callable[..., Path]) -> None:
    path = h5ad(COUNTS[:3], GENES)
    damage(path, "obs/x", np.zeros(3))
    (chunk,) = open_rows(path, neighbours=2).chunks(["X"])
    for place, around in enumerate(chunk["X"]):
        counts = [np.bincount(c.places, c.counts, 4).tolist() for c in around.cells]
        assert counts[0] == COUNTS[place].tolist()
        assert sorted(counts) == sorted(COUNTS[:3].tolist())


def test_neighbours_that_cannot_be_had_are_told(h5ad: Callable[..., Path]) -> None:
    path = h5ad(COUNTS, GENES)
    with pytest.raises(InputError, match="4 neighbours, in 4 cells"):
        table_of(open_rows(path, neighbours=4))
    with pytest.raises(InputError, match="no 'column'"):
        table_of(open_rows(path, neighbours=1, xy=("column", "y")))
    with pytest.raises(InputError, match="stored by cells"):
        table_of(open_rows(h5ad(COUNTS, GENES, "csc"), neighbours=1))
    damage(path, "obs/x", np.array([0, np.nan, 1, 2]))
    with pytest.raises(InputError, match="where cell 1 is"):
        table_of(open_rows(path, neighbours=1))


def test_a_tissue_from_a_file_to_a_table(
    tissue_weights: Path, h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    path = h5ad(np.random.default_rng(1).poisson(0.5, (6, 30)), NAMES)
    words = ["embed", str(path), "--backbone", "aido_tissue_3m", "--weights", str(tissue_weights)]
    for number in (0, 2):
        run = tmp_path / str(number)
        options = ["--option", f"neighbours={number}", "--output", str(run)]
        done = CliRunner().invoke(app, [*words, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    # How many come with each is part of what a run is.
    refused = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "2")]).exception
    assert isinstance(refused, RunError) and "neighbours was" in refused.what
    alone, among = (mgen_core.read(tmp_path / n)["embedding"].to_pylist() for n in ("0", "2"))
    assert len(alone) == len(among) == 6 and np.isfinite([*alone, *among]).all()
    assert not np.allclose(alone, among)


# --------------------------------------------------------------------------- zarr, memory


def copied(node: h5py.Group, to: Any) -> None:
    """An HDF5 tree as AnnData lays it out in zarr."""
    for name, value in node.attrs.items():
        to.attrs[name] = value.tolist() if isinstance(value, np.ndarray) else value
    for name, found in node.items():
        if isinstance(found, h5py.Group):
            copied(found, to.create_group(name))
            continue
        if h5py.check_string_dtype(found.dtype) is None:
            to.create_array(name, data=found[:])
            continue
        texts = to.create_array(name, shape=found.shape, dtype="str")
        texts[:] = found.asstr()[:]


def in_zarr(path: Path, form: int = 2) -> Path:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    to = path.with_suffix(".zarr")
    with h5py.File(path) as file:
        copied(file, zarr.open_group(str(to), mode="w", zarr_format=form))
    return to


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_a_folder_of_zarr_is_the_same_table(
    kind: str, form: int, h5ad: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = h5ad(COUNTS, GENES, kind, ids=["007", "b", "c", "d"])
    rows = open_rows(in_zarr(path, form))
    assert table_of(rows) == COUNTS.tolist()
    assert table_of(rows, "layers/doubled") == (COUNTS * 2).tolist()
    (chunk,) = rows.chunks(["X", "obs_names", "kind", "x"])
    assert chunk["obs_names"] == ["007", "b", "c", "d"]
    assert chunk["kind"] == [None, "B", "T", None] and chunk["x"] == [0, 1, 4, 9]
    assert chunk["X"][0].genes.names == GENES
    monkeypatch.setattr(matrix, "BLOCK", 2)
    assert table_of(rows) == COUNTS.tolist()


def test_a_folder_of_zarr_is_known_by_its_content(h5ad: Callable[..., Path]) -> None:
    folder = in_zarr(h5ad(COUNTS, GENES))
    before = open_rows(folder).digest()
    piece = next(path for path in sorted(folder.rglob("data/*")) if not path.name.startswith("."))
    piece.write_bytes(piece.read_bytes()[::-1])
    assert open_rows(folder).digest() != before


def test_a_folder_that_is_no_zarr_is_told(tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(InputError, match="no group of zarr"):
        open_rows(tmp_path / "a.zarr")


def test_pickles_in_zarr_are_not_read(h5ad: Callable[..., Path], tmp_path: Path) -> None:
    folder = in_zarr(h5ad(COUNTS, GENES))
    array = folder / "obs/_index/.zarray"
    told = json.loads(array.read_text())
    array.write_text(json.dumps({**told, "filters": [{"id": "pickle", "protocol": 5}]}))
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (mark.touch, ())

    (folder / "obs/_index/0").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(InputError):
        list(open_rows(folder).chunks(["X", "obs_names"]))
    assert not mark.exists()


def held(counts: Any, ids: Sequence[str], **obs: Sequence[Any]) -> Any:
    """An object like an AnnData: what is read of one."""
    frame = pd.DataFrame(obs, index=ids)
    var = pd.DataFrame({"symbol": [f"G{name}" for name in GENES]}, index=GENES)
    parts = {"X": counts, "obs": frame, "var": var, "layers": {"half": counts / 2}, "raw": None}
    return type("AnnData", (), {"__module__": "anndata._core.anndata", **parts})()


@pytest.mark.parametrize(
    "kind", [np.asarray, sparse.csr_matrix, sparse.csc_array, sparse.coo_array]
)
def test_an_anndata_in_memory_is_the_same_table(kind: Callable[[Any], Any]) -> None:
    kinds, some = pd.Categorical(["B", None, "T", "B"]), pd.array([1, None, 2, 3], dtype="Int64")
    cells = held(kind(COUNTS), list("abcd"), kind=kinds, n=range(4), some=some)
    (card,) = (card for card in READERS if card.takes is not None and card.takes(cells))
    rows = card.load(card, card.options(gene_col="symbol")).open(cells)
    assert table_of(rows) == COUNTS.tolist()
    assert table_of(rows, "layers/half") == (COUNTS / 2).tolist()
    (chunk,) = rows.chunks(["X", "obs_names", "kind", "n", "some"])
    assert chunk["some"] == [1, None, 2, 3]
    assert chunk["obs_names"] == list("abcd") and chunk["n"] == [0, 1, 2, 3]
    assert chunk["kind"] == ["B", None, "T", "B"]
    assert chunk["X"][0].genes.names == [f"G{name}" for name in GENES]
    before = rows.digest()
    assert before == card.load(card, card.options()).open(cells).digest()
    cells.obs.iloc[0, 1] = 7
    assert card.load(card, card.options()).open(cells).digest() != before


def test_an_anndata_in_memory_to_a_table(weights: Path) -> None:
    counts = sparse.csr_matrix(np.random.default_rng(1).poisson(1.0, (3, 4)))
    cells = held(counts, list("abc"), kind=["x", "y", "z"])
    cells.var.index = NAMES[:4]
    found = mgen_core.embed(cells, backbone="aido_cell_3m", weights=weights, keep=["kind"])
    assert found["id"].to_pylist() == list("abc") and found["kind"].to_pylist() == ["x", "y", "z"]
    assert np.isfinite(found["embedding"].to_pylist()).all()
