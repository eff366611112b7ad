"""Columns of the input that go through to the result."""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mgen_core
from mgen_core import InputError, MgenError, Reader, ReaderCard, ReaderOptions, RunError
from mgen_core.catalog import Catalog
from mgen_core.cli import app
from mgen_core.columns import of_kind
from mgen_core.kept import common, kind
from mgen_core.notebook import MemoryRows

TEXTS = ["ACD", "GG", "ACD", "K!"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(),
    st.lists(st.integers(), max_size=2),
)


@given(st.lists(VALUES, max_size=6))
def test_a_column_of_anything_has_one_type_and_loses_nothing(values):
    array = of_kind(values, common({kind(value) for value in values}))
    for value, found in zip(values, array.to_pylist()):
        if found is None or not isinstance(found, str):
            assert found == value or (isinstance(value, int) and found == float(value))
        elif not isinstance(value, str):
            assert found in (str(value), json.dumps(value))


def table_of(data, **more):
    return mgen_core.embed(data, backbone="toy", catalog=toy.catalog(), **more)


def test_equal_rows_share_the_vector_and_not_what_is_kept():
    rows = {"sequence": TEXTS, "n": [1, 2, 3, 4], "mixed": ["a", 2, None, 1], "no": [None] * 4}
    found = table_of(rows, keep=["n", "mixed", "no", "sequence"], batch_tokens=4).to_pydict()
    assert found["embedding"][0] == found["embedding"][2] == pytest.approx(toy.mean_of("ACD"))
    assert found["n"] == [1, 2, 3, None]  # the last one is set aside
    assert found["mixed"] == ["a", "2", None, None]
    assert found["no"] == [None] * 4
    assert found["sequence"] == ["ACD", "GG", "ACD", None]


def test_a_backbone_that_makes_rows_anew_loses_nothing():
    class Forgetful(toy.Toy):
        def prepare(self, row):
            return mgen_core.Row(row.index, row.id, row.data.upper())

    card = mgen_core.BackboneCard("forgetful", "", "protein", load=Forgetful, width=toy.WIDTH)

    class Plugin:
        @mgen_core.hookimpl
        def mgen_backbones(self):
            return [card]

    catalog = Catalog((*toy.catalog().plugins, *Catalog.of(Plugin()).plugins))
    rows = {"sequence": ["acd"], "label": ["x"]}
    found = mgen_core.embed(rows, backbone="forgetful", catalog=catalog, keep=("label",))
    assert found["label"].to_pylist() == ["x"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_the_command_keeps_columns_of_a_file(tmp_path, suffix):
    path, rows = tmp_path / f"in.{suffix}", [{"id": "a", "sequence": "ACD", "kind": "x,y"}] * 2
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        cells = [[f'"{cell}"' for cell in line] for line in lines]
        path.write_text("".join(("," if suffix == "csv" else "\t").join(c) + "\n" for c in cells))
    words = ["embed", str(path), "-b", "protein_onehot", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*words, "--keep", "kind"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert mgen_core.read(tmp_path / "run")["kind"].to_pylist() == ["x,y"] * 2
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, RunError) and "keep was" in again.exception.what


def test_columns_that_cannot_be_kept_are_named():
    rows = {"sequence": ["A"], "embedding": ["x"], "id": ["a"]}
    with pytest.raises(InputError, match="no column 'kind'"):
        table_of(rows, keep=["kind"])
    with pytest.raises(InputError, match="every result has a column"):
        table_of(rows, keep=["id"])
    with pytest.raises(MgenError, match="has a column 'embedding' of its own"):
        table_of(rows, keep=["embedding"])


# --------------------------------------------------------------------------- readers


class Held:
    """An object that a reader takes."""

    texts = ("ACD", "GG")


@dataclass(frozen=True)
class Repeat(ReaderOptions):
    times: int = 1


class HeldReader(Reader):
    def open(self, uri):
        return MemoryRows({"sequence": [text * self.options.times for text in uri.texts]})


class HeldPlugin:
    @mgen_core.hookimpl
    def mgen_readers(self):
        takes = lambda data: isinstance(data, Held)  # noqa: E731
        return [ReaderCard("held", "", HeldReader, takes=takes, options=Repeat)]


def test_a_reader_takes_an_object_of_its_own_and_its_options_are_part_of_the_run(tmp_path):
    catalog = Catalog((*toy.catalog().plugins, *Catalog.of(HeldPlugin()).plugins))
    same = {"backbone": "toy", "catalog": catalog, "output": tmp_path / "run"}
    found = mgen_core.embed(Held(), **same, options={"times": 2})
    expected = [pytest.approx(toy.mean_of(text * 2)) for text in Held.texts]
    assert found["embedding"].to_pylist() == expected
    with pytest.raises(RunError, match="times was"):
        mgen_core.embed(Held(), **same)
