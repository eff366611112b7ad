"""parquet and Hugging Face datasets: typed tables in, text and Python values out."""

from __future__ import annotations

import contextlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mgen_formats.plugin import READERS

from mgen_core import InputError, Rows

CARDS = {card.name: card for card in READERS}

TABLE = pa.table(
    {
        "id": pa.array([7, 12345678901234567, None], pa.int64()),
        "sequence": pa.array(["ACGT", "", None]),
        "label": pa.array(["a", "b", "a"]).dictionary_encode(),
        "big": pa.array(["x", "y", "z"], pa.large_string()),
        "score": pa.array([0.5, None, 2.0], pa.float32()),
        "ok": pa.array([True, False, None]),
        "counts": pa.array([[1, 2], [], None], pa.list_(pa.int32())),
        "half": pa.array([[0.5, 1.5]] * 3, pa.list_(pa.float16(), 2)),
    }
)
EXPECTED: dict[str, list[Any]] = {
    "id": ["7", "12345678901234567", None],
    "sequence": ["ACGT", "", None],
    "label": ["a", "b", "a"],
    "big": ["x", "y", "z"],
    "score": [0.5, None, 2.0],
    "ok": [True, False, None],
    "counts": [[1, 2], [], None],
    "half": [[0.5, 1.5]] * 3,
}


def open_rows(name: str, path: Path | str, split: str | None = None) -> Rows:
    options = CARDS[name].options(split=split) if split else CARDS[name].options()
    return CARDS[name].load(CARDS[name], options).open(str(path))


def values(rows: Rows, columns: list[str] | None = None) -> dict[str, list[Any]]:
    wanted = columns or list(rows.columns)
    found: dict[str, list[Any]] = {name: [] for name in wanted}
    for chunk in rows.chunks(wanted):
        for name in wanted:
            found[name].extend(chunk[name])
    return found


# ------------------------------------------------------------------------------ parquet


def test_parquet_values(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    rows = open_rows("parquet", tmp_path / "a.parquet")
    assert rows.length == 3
    assert list(rows.columns) == TABLE.column_names
    assert values(rows) == EXPECTED
    assert values(rows, ["label", "id"]) == {k: EXPECTED[k] for k in ("label", "id")}


def test_parquet_rows_keep_their_order_over_row_groups(tmp_path: Path) -> None:
    ids = [str(i) for i in range(20_000)]
    pq.write_table(pa.table({"id": ids}), tmp_path / "a.parquet", row_group_size=777)
    rows = open_rows("parquet", tmp_path / "a.parquet")
    assert values(rows)["id"] == ids
    assert max(len(chunk["id"]) for chunk in rows.chunks(["id"])) <= 4096


def test_parquet_chunks_of_long_rows_are_small(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"] * 200, "sequence": [f"{i:x<1000000}" for i in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    rows = open_rows("parquet", tmp_path / "a.parquet")
    assert max(len(chunk["sequence"]) for chunk in rows.chunks(["sequence"])) <= 40


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet") as caught:
        open_rows("parquet", path)
    assert caught.value.hint


def test_a_parquet_file_damaged_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [str(i) for i in range(50_000)]}), path)
    raw = bytearray(path.read_bytes())
    raw[1000:3000] = bytes(2000)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        values(open_rows("parquet", path))


def test_a_parquet_file_with_any_bit_of_its_footer_flipped_ends_well(tmp_path: Path) -> None:
    # Some sizes of columns, once damaged, make Arrow abort the process where they are asked for.
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"sequence": ["ACGT", None, "GG"]}), path, store_schema=False)
    raw = path.read_bytes()
    footer = int.from_bytes(raw[-8:-4], "little") + 8
    for place in range(len(raw) - footer, len(raw)):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 3
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            values(open_rows("parquet", path))


def test_odd_types_come_as_text_or_python_values(tmp_path: Path) -> None:
    columns = {
        "nanoseconds": (pa.array([1, None], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "day": (pa.array([1, None], pa.date32()), "1970-01-02"),
        "never": (pa.array([2**31 - 1, None], pa.date32()), "<value out of range: 2147483647>"),
        "decimal": (pa.array([Decimal("1.50"), None]), "1.50"),
        "bytes": (pa.array([b"AC", None]), "AC"),
        "struct": (pa.array([{"a": 1}, None]), {"a": 1}),
        "lists": (pa.array([[["x"]], None]), [["x"]]),
        "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())), [("a", 1)]),
        "nothing": (pa.nulls(2), None),
    }
    table = pa.table({name: column for name, (column, _) in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    found = values(open_rows("parquet", tmp_path / "a.parquet"))
    assert found == {name: [expected, None] for name, (_, expected) in columns.items()}


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    raw = pa.array([b"AC", b"\xff"])
    column = pa.Array.from_buffers(kind, 2, raw.buffers())
    pq.write_table(pa.table({"sequence": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        values(open_rows("parquet", tmp_path / "a.parquet"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_text_that_is_stored_once_is_not_multiplied_in_memory(
    tmp_path: Path, shared: bool
) -> None:
    numbers = pa.array([0] * 10_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(numbers, pa.array(["A" * 20_000_000]))
    schema = None if shared else pa.schema({"sequence": pa.string()})
    with pq.ParquetWriter(
        tmp_path / "a.parquet",
        schema or pa.schema({"sequence": column.type}),
        dictionary_pagesize_limit=1 << 30,
        store_schema=shared,
    ) as file:
        table = pa.table({"sequence": column})
        file.write_table(table if shared else table.slice(0, 3).cast(schema))
    chunks = open_rows("parquet", tmp_path / "a.parquet").chunks(["sequence"])
    assert len(next(iter(chunks))["sequence"]) == 1  # of 20 MB: two would be beyond a chunk


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_garbage_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        open_rows("parquet", tmp_path / "a.parquet")


def test_twin_columns_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["id", "id"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="two columns named 'id'"):
        open_rows("parquet", tmp_path / "a.parquet")


# ------------------------------------------------------------------------------ datasets


def saved(path: Path, **splits: list[str]) -> Path:
    tables = {name: datasets.Dataset.from_dict({"id": ids}) for name, ids in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(path)
    return path


def test_a_saved_dataset(tmp_path: Path) -> None:
    data = {"id": [3, 4], "x": ["AC", None], "label": [1, 0], "v": [[0.5], []]}
    features = datasets.Features(
        id=datasets.Value("int64"),
        x=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
        v=datasets.List(datasets.Value("float32")),
    )
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "d")
    rows = open_rows("huggingface", tmp_path / "d")
    assert rows.length == 2
    expected = {"id": ["3", "4"], "x": ["AC", None], "label": ["1", "0"], "v": [[0.5], []]}
    assert values(rows) == expected
    assert values(rows, ["x"]) == {"x": ["AC", None]}


def test_a_split_is_chosen_or_asked_for(tmp_path: Path) -> None:
    both = saved(tmp_path / "both", train=["a", "b"], test=["c"])
    assert values(open_rows("huggingface", both, "test")) == {"id": ["c"]}
    with pytest.raises(InputError, match="train, test") as caught:
        open_rows("huggingface", both)
    assert "--split" in caught.value.hint
    with pytest.raises(InputError, match="no split 'dev'") as caught:
        open_rows("huggingface", both, "dev")
    assert "train, test" in caught.value.hint
    one = saved(tmp_path / "one", test=["c"])
    assert values(open_rows("huggingface", one)) == {"id": ["c"]}


def test_the_digest_of_a_folder_follows_its_content(tmp_path: Path) -> None:
    first = saved(tmp_path / "1", train=["a"])
    other = saved(tmp_path / "2", train=["b"])
    digest = open_rows("huggingface", first).digest()
    assert digest == open_rows("huggingface", first).digest()
    assert digest != open_rows("huggingface", other).digest()


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d", train=["a"])
    next(folder.rglob("*.arrow")).unlink()
    with pytest.raises(InputError, match="cannot read"):
        open_rows("huggingface", folder)


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"org/name .*Couldn't reach 'org/name'") as caught:
        open_rows("huggingface", "org/name")
    assert "hf download" in caught.value.hint


def test_a_hub_dataset_is_known_by_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    train = datasets.Dataset.from_dict({"id": ["a"]})
    found = datasets.DatasetDict(train=train)
    monkeypatch.setattr(datasets, "load_dataset", lambda uri: found)
    rows = open_rows("huggingface", "org/name")
    assert values(rows) == {"id": ["a"]}
    assert rows.digest() == train._fingerprint


def test_which_names_are_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = CARDS["huggingface"].claims
    assert claims is not None
    saved(tmp_path / "dict", train=["a"])
    datasets.Dataset.from_dict({"id": ["a"]}).save_to_disk(tmp_path / "one")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert claims("dict") and claims("one") and claims("org/name-1.b")
    for other in ("org", "org/file", "../data", "a/b/c", "name", "org/*", "./org/name"):
        assert not claims(other), other
