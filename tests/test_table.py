"""Inputs become rows: columns chosen, several files joined, an index for life."""

from dataclasses import replace

import pytest

from mgen_core import (
    BackboneCard,
    InputError,
    PluginError,
    Reader,
    ReaderCard,
    RowError,
    Rows,
    hookimpl,
)
from mgen_core.catalog import Catalog
from mgen_core.config import RunConfig
from mgen_core.notebook import MemoryRows
from mgen_core.table import choose_columns, find_reader, open_table


class Lines(Reader):
    def open(self, uri):
        with open(uri) as file:
            return MemoryRows({"sequence": file.read().split()})


class Odd(Reader):
    """Cells as the test wants them: the file is not looked at."""

    chunks = ()

    def open(self, uri):
        rows = MemoryRows({"id": [], "sequence": [], "msa": []})
        rows.chunks = lambda columns: iter(self.chunks)
        return rows


class Plugin:
    @hookimpl
    def mgen_readers(self):
        return [
            ReaderCard("odd", "", Odd, suffixes=(".odd",)),
            ReaderCard("lines", "", Lines, suffixes=(".txt",)),
            ReaderCard("zipped", "", Lines, suffixes=(".txt.gz", ".gz")),
            ReaderCard("hub", "", Lines, claims=lambda uri: uri.count("/") == 1 and ":" in uri),
        ]


PLAIN = BackboneCard("b", "", "dna", load=lambda *_: None)
CATALOG = Catalog.of(Plugin())


def config(*data, **more):
    return RunConfig(task="embed", backbone="b", data=data, **more)


def rows_of(columns, **more):
    return list(choose_columns((MemoryRows(columns),), config("memory", **more), PLAIN))


def test_index_runs_through_all_files_and_globs_are_sorted(tmp_path):
    (tmp_path / "b.txt").write_text("GG TT")
    (tmp_path / "a.txt").write_text("AA CC AA")
    rows = list(open_table(config(str(tmp_path / "*.txt")), CATALOG, PLAIN))
    assert [(row.index, row.id, row.data) for row in rows] == [
        (0, "0", "AA"),
        (1, "1", "CC"),
        (2, "2", "AA"),
        (3, "3", "GG"),
        (4, "4", "TT"),
    ]


@pytest.mark.parametrize("name", ["sequence", "sequences", "seq", "Sequence", "SEQ"])
def test_the_input_column_has_usual_names(name):
    assert [row.data for row in rows_of({"note": ["x"], name: ["ACGT"]})] == ["ACGT"]


def test_ids_may_repeat_or_be_missing():
    rows = rows_of({"id": ["p1", None, "p1", ""], "seq": ["A", "C", "G", "T"]})
    assert [row.id for row in rows] == ["p1", "1", "p1", "3"]


def test_columns_can_be_named_and_the_mistake_lists_them():
    table = {"name": ["x"], "peptide": ["ACGT"]}
    (row,) = rows_of(table, id_col="name", x_col="peptide")
    assert (row.id, row.data) == ("x", "ACGT")
    with pytest.raises(InputError) as caught:
        rows_of(table)
    assert "name, peptide" in caught.value.hint and "--x-col" in caught.value.hint
    with pytest.raises(InputError, match="no column 'nope'") as caught:
        rows_of(table, x_col="nope")
    assert "name, peptide" in caught.value.hint


def test_limit_and_fields():
    columns = {"seq": ["A", "C", "G"], "msa": [["A"], ["C"], ["G"]]}
    source, limited = MemoryRows(columns), config("memory", limit=2)
    needy = replace(PLAIN, needs=("msa",), takes=("str_emb",))
    rows = list(choose_columns((source,), limited, needy))
    assert [row.fields for row in rows] == [{"msa": ["A"]}, {"msa": ["C"]}]
    assert next(iter(choose_columns((source,), limited, PLAIN))).fields == {}
    with pytest.raises(InputError, match="no column 'str_emb'") as caught:
        choose_columns((source,), limited, replace(PLAIN, needs=("str_emb",)))
    assert "b needs it" in caught.value.hint


def test_the_longest_suffix_chooses_the_reader():
    assert find_reader("x.txt", CATALOG).name == "lines"
    assert find_reader("X.TXT.GZ", CATALOG).name == "zipped"
    assert find_reader("hub:/name", CATALOG).name == "hub"
    with pytest.raises(InputError) as caught:
        find_reader("x.docx", CATALOG)
    assert "--reader" in caught.value.hint and ".txt" in caught.value.hint


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_table(config(str(tmp_path / "no.txt")), CATALOG, PLAIN)
    with pytest.raises(InputError, match="nothing matches"):
        open_table(config(str(tmp_path / "*.txt")), CATALOG, PLAIN)


def test_the_digest_tells_content_and_columns_apart():
    def digest(columns, **more):
        return choose_columns((MemoryRows(columns),), config("memory", **more), PLAIN).digest()

    table = {"id": ["a", "b"], "seq": ["A", "C"]}
    assert digest(table) == digest(dict(table))
    assert digest(table) != digest({**table, "seq": ["A", "G"]})
    assert digest(table) != digest(table, limit=1)
    assert digest(table) != digest(table, id_col="seq")


def test_rows_is_the_contract_of_readers():
    assert isinstance(MemoryRows(["ACGT"]), Rows)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """What a table makes of a reader's chunks."""
    (tmp_path / "in.odd").write_text("")
    card = replace(PLAIN, takes=("msa",))

    def rows(*chunks):
        monkeypatch.setattr(Odd, "chunks", chunks)
        return open_table(config(str(tmp_path / "in.odd")), CATALOG, card)

    return rows


@pytest.mark.parametrize("column", ["id", "sequence", "msa"])
def test_a_cell_that_could_not_be_read_is_its_rows_with_the_readers_name(odd, column):
    good = {"id": ["a", "b"], "sequence": ["A", "C"], "msa": ["x", "y"]}
    bad = {**good, column: [good[column][0], RowError("torn")]}
    rows = list(odd(good, bad))
    assert [row.data for row in rows[:3]] == ["A", "C", "A"]
    assert isinstance(rows[3].data, RowError) and str(rows[3].data) == "odd cannot read it: torn"
    assert (rows[3].index, rows[3].id) == (3, "3" if column == "id" else "b")


def test_columns_of_different_lengths_lose_no_row_in_silence(odd):
    good = {"id": ["a", "b"], "sequence": ["A", "C"], "msa": ["x", "y"]}
    with pytest.raises(PluginError, match=r"after row 2: odd failed with .*different lengths"):
        list(odd(good, {**good, "id": ["a"]}))
    with pytest.raises(PluginError, match=r"after row 0: odd failed with KeyError: 'msa'"):
        list(odd({"id": ["a"], "sequence": ["A"]}))


def test_half_a_character_in_an_id_is_replaced(odd):
    (row,) = odd({"id": ["a\ud800b\u00e9"], "sequence": ["A"], "msa": ["x"]})
    assert row.id == "a?b\u00e9"


def test_a_reader_that_cannot_open_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_bytes(b"\xff")
    with pytest.raises(PluginError, match=r"lines failed with UnicodeDecodeError") as caught:
        open_table(config(str(tmp_path / "in.txt")), CATALOG, PLAIN)
    assert "the reader lines" in caught.value.hint


def test_a_folder_is_told_from_a_file_of_no_known_kind(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(InputError, match="data is a folder") as caught:
        find_reader(str(folder), CATALOG)
    assert "name files of a known kind" in caught.value.hint
    for name in ("a.txt", "b.txt", "c.odd", "README"):
        (folder / name).touch()
    with pytest.raises(InputError, match="is a folder") as caught:
        find_reader(str(folder), CATALOG)
    assert caught.value.hint == f"give its files: '{folder}/*.txt'"
