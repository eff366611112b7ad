"""Writers: what is read back is what was written, and other tools can read it too."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from mgen_formats.plugin import WRITERS
from mgen_formats.writers import parquet
from mgen_formats.writers import zarr as zarr_writer

from mgen_core import MgenError, RunError, Writer, storage

CARDS = {card.name: card for card in WRITERS}
EXACT = ("parquet", "pt", "safetensors", "npz", "zarr")
BFLOAT16 = {"mgen.dtype": "bfloat16"}

torch.set_num_threads(1)


def writer(name: str) -> Writer:
    return CARDS[name].load(CARDS[name])


def pieces(table: pa.Table, cuts: list[int]) -> Iterator[pa.Table]:
    bounds = [0, *sorted(min(cut, len(table)) for cut in cuts), len(table)]
    for start, stop in itertools.pairwise(bounds):
        yield table.slice(start, stop - start)


def same(found: pa.Table, expected: pa.Table) -> None:
    assert found.schema == expected.schema
    assert found.schema.metadata == expected.schema.metadata
    assert [f.metadata for f in found.schema] == [f.metadata for f in expected.schema]
    # repr: NaN equals itself there, and -0.0 is not 0.0.
    assert repr(found.to_pydict()) == repr(expected.to_pydict())


# ------------------------------------------------------------------------------ any table

LEAVES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.float32(): st.floats(width=32),
    pa.float16(): st.floats(width=16),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.uint16(): st.integers(0, 2**16 - 1),
    pa.bool_(): st.booleans(),
}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6)


@st.composite
def columns(draw: st.DrawFn, rows: int, doubtful: bool) -> tuple[pa.Field, pa.Array]:
    """A column; a doubtful one is of text that looks like a list, or of bfloat16."""
    null = st.none() if draw(st.booleans()) else st.nothing()
    if draw(st.booleans()):
        text = TEXT if doubtful else TEXT.filter(lambda text: not text.startswith("["))
        entries = draw(st.lists(text | null, min_size=rows, max_size=rows))
        return pa.field("c", pa.string()), pa.array(entries, pa.string())
    leaf = draw(st.sampled_from([leaf for leaf in LEAVES if doubtful or leaf != pa.uint16()]))
    kind, value = leaf, LEAVES[leaf]
    for size in draw(st.lists(st.integers(1, 4), max_size=2)):
        kind, value = pa.list_(kind, size), st.lists(value, min_size=size, max_size=size)
    if draw(st.booleans()):
        kind, value = pa.list_(kind), st.lists(value, max_size=4)
    entries = draw(st.lists(value | null, min_size=rows, max_size=rows))
    mark = BFLOAT16 if leaf == pa.uint16() else None
    return pa.field("c", kind, metadata=mark), pa.array(entries, kind)


@st.composite
def tables(draw: st.DrawFn, doubtful: bool = True) -> pa.Table:
    rows = draw(st.integers(0, 6))
    held = draw(st.lists(columns(rows, doubtful), max_size=3))
    fields = [pa.field("row", pa.int64(), nullable=False), pa.field("id", pa.string())]
    fields += [field.with_name(f"c{number}") for number, (field, _) in enumerate(held)]
    ids = pa.array(draw(st.lists(TEXT, min_size=rows, max_size=rows)), pa.string())
    arrays = [pa.array(range(rows), pa.int64()), ids, *(array for _, array in held)]
    if draw(st.booleans()):
        fields.append(pa.field("error", pa.string()))
        reason = st.none() | TEXT.filter(bool)
        arrays.append(pa.array(draw(st.lists(reason, min_size=rows, max_size=rows)), pa.string()))
    metadata = draw(st.dictionaries(TEXT.filter(bool), TEXT, max_size=3))
    return pa.table(arrays, schema=pa.schema(fields, metadata=metadata or None))


def put(one: Writer, path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Through the core's own stream, which cannot seek."""
    storage.write_atomic(path, lambda file: one.write(file, tables, schema))


def got(one: Writer, path: Path) -> pa.Table:
    with path.open("rb") as file:
        return one.read(file)


def holds(name: str, table: pa.Table) -> bool:
    marked = any((field.metadata or {}).get(b"mgen.dtype") for field in table.schema)
    return not marked or name in ("pt", "safetensors")


cuts = st.lists(st.integers(0, 6), max_size=3)


@pytest.mark.parametrize("name", EXACT)
@given(table=tables(), cuts=cuts)
def test_equal_values_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, table: pa.Table, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp(name) / ".file.tmp"
    one = writer(name)
    if not holds(name, table):
        with pytest.raises(MgenError, match="bfloat16"):
            put(one, path, pieces(table, cuts), table.schema)
        assert not path.exists()
        return
    put(one, path, pieces(table, cuts), table.schema)
    same(got(one, path), table)
    cut = path.read_bytes()
    put(one, path, [table], table.schema)
    assert path.read_bytes() == cut, "the file depends on how the rows were cut into tables"
    assert list(path.parent.iterdir()) == [path]


@given(table=tables(doubtful=False), cuts=cuts)
def test_equal_values_come_back_from_tsv(
    tmp_path_factory: pytest.TempPathFactory, table: pa.Table, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "file"
    put(writer("tsv"), path, pieces(table, cuts), table.schema)
    found = got(writer("tsv"), path)
    for field in found.schema:  # a list is a FixedSizeList or a List as it was
        if not pa.types.is_null(field.type) and pa.types.is_nested(field.type):
            wanted = table.schema.field(field.name).type
            assert pa.types.is_list(field.type) == pa.types.is_list(wanted)
    same(found.cast(table.schema), table)


# ------------------------------------------------------------------------------ one table

N, WIDTH = 50, 8


@pytest.fixture
def table() -> pa.Table:
    """Row 3 failed; `tokens` is ragged."""
    rng = np.random.default_rng(0)
    failed = np.arange(N) == 3
    numbers = pa.array(rng.standard_normal(N * WIDTH).astype(np.float32))
    lengths = np.where(failed, 0, rng.integers(1, 5, N))
    tokens = pa.array(rng.standard_normal(lengths.sum() * WIDTH).astype(np.float32))
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    mask = pa.array(failed)
    rows = {
        "row": pa.array(np.arange(N)),
        "id": pa.array([f"prot-{i}" for i in range(N)]),
        "embedding": pa.FixedSizeListArray.from_arrays(numbers, WIDTH, mask=mask),
        "tokens": pa.ListArray.from_arrays(
            offsets, pa.FixedSizeListArray.from_arrays(tokens, WIDTH), mask=mask
        ),
        "error": pa.array(["empty sequence" if bad else None for bad in failed]),
    }
    return pa.table(rows).replace_schema_metadata({"mgen.vocabulary": '["A","C"]'})


def embedding(table: pa.Table) -> Any:
    return np.array([row or [np.nan] * WIDTH for row in table["embedding"].to_pylist()], np.float32)


def write(name: str, table: pa.Table, folder: Path) -> Path:
    path = folder / f"file{CARDS[name].suffix}"
    put(writer(name), path, [table], table.schema)
    return path


def test_duckdb_reads_parquet(tmp_path: Path, table: pa.Table) -> None:
    half = pa.array(np.ones(N * 2, np.float16))
    more = table.append_column("half", pa.FixedSizeListArray.from_arrays(half, 2))
    path = write("parquet", more, tmp_path)
    found = duckdb.sql(f"select row, embedding, tokens, half from '{path}' order by row").fetchall()
    assert [list(row[1]) if row[1] else None for row in found] == table["embedding"].to_pylist()
    assert [row[2] and [list(v) for v in row[2]] for row in found] == table["tokens"].to_pylist()
    assert all(list(row[3]) == [1, 1] for row in found)


def test_parquet_row_groups_are_bounded_and_follow_the_rows(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4000)
    long = pa.concat_tables([table] * 20)
    path = tmp_path / "a.parquet"
    put(writer("parquet"), path, pieces(long, list(range(0, len(long), 7))), long.schema)
    cut = path.read_bytes()
    put(writer("parquet"), path, [long], long.schema)
    assert path.read_bytes() == cut
    with pq.ParquetFile(path) as file:
        rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sum(rows) == len(long) and len(rows) > 20
    row_bytes = 8 * WIDTH * 6 + 40  # at most five tokens and a pooled vector
    assert max(rows) * 8 * WIDTH < 4000 + row_bytes
    same(got(writer("parquet"), path), long)


def test_parquet_holds_one_row_group_at_a_time(tmp_path: Path) -> None:
    taken = 0

    def stream() -> Iterator[pa.Table]:
        nonlocal taken
        for _ in range(30):
            taken += 1
            numbers = pa.array(np.zeros(10_000 * 100, np.float32))
            yield pa.table({"e": pa.FixedSizeListArray.from_arrays(numbers, 100)})

    schema = pa.schema([("e", pa.list_(pa.float32(), 100))])
    before = pa.total_allocated_bytes()
    highest = 0
    for group in parquet.groups(stream(), schema):
        highest = max(highest, pa.total_allocated_bytes() - before)
        assert group.nbytes < 1.1 * parquet.GROUP_BYTES
    assert taken == 30 and highest < 3 * parquet.GROUP_BYTES


def test_pt_is_plain_tensors_and_lists(tmp_path: Path, table: pa.Table) -> None:
    found = torch.load(write("pt", table, tmp_path), weights_only=True)
    assert found["row"].tolist() == list(range(N))
    assert found["id"] == table["id"].to_pylist()
    assert found["error"] == table["error"].to_pylist()
    np.testing.assert_array_equal(found["embedding"].numpy(), embedding(table))
    assert found["embedding.valid"].tolist() == [i != 3 for i in range(N)]
    assert found["tokens"][3] is None
    assert found["tokens"][4].tolist() == table["tokens"][4].as_py()
    assert found["metadata"]["mgen.vocabulary"] == '["A","C"]'


def test_a_slice_drags_no_storage_along(tmp_path: Path) -> None:
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4_000_000, np.float32)), 100)
    offsets = pa.array(np.arange(0, 40_001, 1000), pa.int32())
    table = pa.table({"v": pa.ListArray.from_arrays(offsets, numbers)}).slice(5, 2)
    path = write("pt", table, tmp_path)
    assert path.stat().st_size < 2 * 400_000 + 10_000
    (first, second) = torch.load(path, weights_only=True)["v"]
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 400_000
    dense = pa.table({"v": numbers}).slice(7, 10)
    assert write("pt", dense, tmp_path).stat().st_size < 4000 + 10_000


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    wanted = torch.randn(6, 4).bfloat16()
    bits = pa.array(wanted.view(torch.uint16).numpy().reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(bits, 4)
    ragged = pa.ListArray.from_arrays(pa.array([0, 2, 6], pa.int32()), values)
    field = pa.field("v", ragged.type, metadata=BFLOAT16)
    table = pa.table([ragged], schema=pa.schema([field]))
    found = torch.load(write("pt", table, tmp_path), weights_only=True)["v"]
    assert torch.equal(torch.cat(found), wanted) and found[0].dtype == torch.bfloat16
    path = write("safetensors", table, tmp_path)
    assert torch.equal(safetensors.torch.load_file(path)["v"], wanted)
    for name in ("parquet", "tsv", "npz", "zarr"):
        with pytest.raises(MgenError, match="bfloat16") as caught:
            write(name, table, tmp_path)
        assert "--dtype float16" in caught.value.hint


def texts(found: dict[str, Any], name: str) -> list[str]:
    raw, offsets = found[f"{name}.utf8"].tobytes(), found[f"{name}.offsets"]
    return [raw[a:b].decode() for a, b in itertools.pairwise(offsets)]


def test_safetensors_is_values_and_offsets(tmp_path: Path, table: pa.Table) -> None:
    path = write("safetensors", table, tmp_path)
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["embedding"], embedding(table))
    start, stop = found["tokens.offsets"][4:6]
    assert found["tokens"][start:stop].tolist() == table["tokens"][4].as_py()
    assert texts(found, "id") == table["id"].to_pylist()
    assert texts(found, "error") == [text or "" for text in table["error"].to_pylist()]
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["mgen.vocabulary"] == '["A","C"]'


def test_npz_loads_without_pickle(tmp_path: Path, table: pa.Table) -> None:
    with np.load(write("npz", table, tmp_path), allow_pickle=False) as found:
        assert found["id"].tolist() == table["id"].to_pylist()
        np.testing.assert_array_equal(found["embedding"], embedding(table))
        start, stop = found["tokens.offsets"][4:6]
        assert found["tokens"][start:stop].tolist() == table["tokens"][4].as_py()
        assert json.loads(str(found["metadata"]))["mgen.vocabulary"] == '["A","C"]'


def test_npz_refuses_what_numpy_would_change(tmp_path: Path) -> None:
    with pytest.raises(MgenError, match="NUL"):
        write("npz", pa.table({"id": ["a\0"]}), tmp_path)
    with pytest.raises(MgenError, match="as wide as the longest"):
        write("npz", pa.table({"id": ["x" * 1_000_000] + [""] * 1100}), tmp_path)


def test_zarr_opens_with_the_library(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr(zarr_writer, "CHUNK_BYTES", 300)
    monkeypatch.setattr(zarr_writer, "CHUNK_TEXTS", 7)
    path = write("zarr", table, tmp_path)
    with zarr.storage.ZipStore(path, mode="r") as store:
        found = zarr.open(store, mode="r")
        np.testing.assert_array_equal(found["embedding"][:], embedding(table))
        assert found["embedding"].nchunks > 3
        assert found["embedding.valid"][:].tolist() == [i != 3 for i in range(N)]
        assert found["id"][:].tolist() == table["id"].to_pylist()
        start, stop = found["tokens.offsets"][4:6]
        assert found["tokens"][start:stop].tolist() == table["tokens"][4].as_py()
        assert found.attrs["mgen.vocabulary"] == '["A","C"]'
    same(got(writer("zarr"), path), table)


def test_zarr_refuses_names_that_are_paths(tmp_path: Path) -> None:
    with pytest.raises(MgenError, match="cannot name"):
        write("zarr", pa.table({"../v": [1]}), tmp_path)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_some_columns_come_back_alone(tmp_path: Path, table: pa.Table, name: str) -> None:
    path = write(name, table, tmp_path)
    with path.open("rb") as file:
        found = writer(name).read(file, ["tokens", "row"])
    assert found.column_names == ["tokens", "row"]
    assert found["row"].to_pylist() == list(range(N))
    assert [entry and len(entry) for entry in found["tokens"].to_pylist()] == [
        entry and len(entry) for entry in table["tokens"].to_pylist()
    ]


@pytest.mark.parametrize("name", sorted(set(CARDS) - {"parquet", "tsv"}))
def test_arrays_are_streamed(tmp_path: Path, name: str) -> None:
    """Thirty tables of 4 MB go through temporary files or chunks, not through Arrow's memory."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1_000_000, np.float32)), 100)
    schema = pa.schema([("e", vectors.type)])
    start, highest = pa.total_allocated_bytes(), 0

    def stream() -> Iterator[pa.Table]:
        nonlocal highest
        for _ in range(30):
            highest = max(highest, pa.total_allocated_bytes() - start)
            yield pa.table([pa.concat_arrays([vectors])], schema=schema)

    one = writer(name)
    one.scratch = tmp_path
    put(one, tmp_path / "file", stream(), schema)
    assert highest < 60e6
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert got(one, tmp_path / "file").num_rows == 300_000


def test_tsv_is_lines_and_json(tmp_path: Path) -> None:
    vectors = pa.array([[0.1, -1e-7], None, [1.0, float("nan")]], pa.list_(pa.float32(), 2))
    table = pa.table(
        {
            "row": [0, 1, 2],
            "id": ["a", "tab\there", 'quo"te\n'],
            "v": vectors,
            "score": pa.array([0.1, 2.0, None], pa.float32()),
            "label": ["007", None, ""],
        }
    )
    assert write("tsv", table, tmp_path).read_text() == (
        "row\tid\tv\tscore\tlabel\n"
        "0\ta\t[0.1,-1e-7]\t0.1\t007\n"
        '1\t"tab\there"\t\t2\t\n'
        '2\t"quo""te\n"\t[1.0, NaN]\t\t""\n'
    )


def test_tsv_guesses_types_that_keep_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(
        "row\tid\tint\tfloat\tbool\tcode\tnone\tlist\tragged\tnotes\n"
        "0\t1\t5\t0.5\ttrue\t007\t\t[1.0,2.5]\t[ 1,2]\t[see]\n"
        "1\t\t-7\t-2\tfalse\t1\t\t[3.0,4.0]\t[ 3]\t[1]\n"
    )
    types = {field.name: str(field.type) for field in got(writer("tsv"), path).schema}
    assert types == {
        "row": "int64",
        "id": "string",
        "int": "int64",
        "float": "double",
        "bool": "bool",
        "code": "string",
        "none": "null",
        "list": "fixed_size_list<item: float>[2]",
        "ragged": "list<item: int64>",
        "notes": "string",
    }


@pytest.mark.parametrize("name", ["tsv", "pt", "safetensors", "npz", "zarr"])
def test_types_that_arrays_lack_are_refused_before_a_table_is_taken(
    tmp_path: Path, name: str
) -> None:
    def untouched() -> Iterator[pa.Table]:
        pytest.fail("a table was taken")
        yield

    schema = pa.schema([("deep", pa.list_(pa.list_(pa.float32())))])
    with pytest.raises(MgenError, match="'deep'") as caught:
        put(writer(name), tmp_path / "x", untouched(), schema)
    assert "parquet" in caught.value.hint
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", EXACT)
def test_names_that_clash_never_lose_a_column(tmp_path: Path, name: str) -> None:
    table = pa.table({"file": [1], "v": [[1.0]], "v.offsets": [2], "metadata": ["m"]})
    try:
        path = write(name, table, tmp_path)
    except MgenError as error:
        assert "two arrays would be named" in error.what
    else:
        same(got(writer(name), path), table)


def damage_half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def damage_all(raw: bytes) -> bytes:
    return b"\xff" * 100


@pytest.mark.parametrize("name", sorted(CARDS))
@pytest.mark.parametrize("damage", [damage_half, damage_all])
def test_a_damaged_file_is_refused(
    tmp_path: Path, table: pa.Table, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = write(name, table.drop_columns("error"), tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"no .* file of mgen") as caught:
        got(writer(name), path)
    assert caught.value.hint
