"""One call from Python: rows in whatever form, an Arrow table out."""

import pandas as pd
import pyarrow as pa
import pytest
import toy

import mgen_core
from mgen_core import InputError, MgenError

TEXTS = ["ACD", "GG", "ACD"]


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        [{"sequence": text} for text in TEXTS],
        {"sequence": TEXTS},
        pd.DataFrame({"sequence": TEXTS}),
        pa.table({"sequence": TEXTS}),
    ],
    ids=["list", "dicts", "dict", "pandas", "arrow"],
)
def test_rows_in_memory(data):
    table = mgen_core.embed(data, backbone="toy", catalog=toy.catalog())
    assert table["id"].to_pylist() == ["0", "1", "2"]
    assert table["embedding"].to_pylist() == [pytest.approx(toy.mean_of(t)) for t in TEXTS]


def test_a_path_and_a_kept_run(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", TEXTS)
    table = mgen_core.embed(
        data, backbone="toy", pool="tokens", output=tmp_path / "run", catalog=toy.catalog()
    )
    assert [len(entry) for entry in table["embedding"].to_pylist()] == [3, 2, 3]
    assert mgen_core.read(tmp_path / "run").equals(table)
    assert mgen_core.read(tmp_path / "run", where="id = 's1'")["row"].to_pylist() == [1]
    assert mgen_core.read(tmp_path / "run", columns=["id"]).column_names == ["id"]


def test_nothing_is_left_behind_without_an_output(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    mgen_core.embed(TEXTS, backbone="toy", catalog=toy.catalog())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_named():
    with pytest.raises(InputError, match="cannot read rows from list"):
        mgen_core.embed([1, 2], backbone="toy", catalog=toy.catalog())
    with pytest.raises(MgenError, match="no backbone 'tyo'"):
        mgen_core.embed(TEXTS, backbone="tyo", catalog=toy.catalog())


def test_a_call_is_one_process(tmp_path):
    with pytest.raises(MgenError, match="one process") as caught:
        mgen_core.embed(TEXTS, backbone="toy", catalog=toy.catalog(), devices=2)
    assert "--devices" in caught.value.hint
