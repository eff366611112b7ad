"""csv, tsv, jsonl and fasta: values as written, memory flat, faults by line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mgen_formats.plugin import READERS
from mgen_formats.readers import delimited

from mgen_core import InputError, Reader, ReaderOptions, RowError, Rows

Make = Callable[[str, "bytes | str"], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def reader_of(path: Path) -> Reader:
    fitting = [c for c in READERS if any(path.name.lower().endswith(s) for s in c.suffixes)]
    (card,) = fitting
    return card.load(card, ReaderOptions())


def open_rows(path: Path) -> Rows:
    return reader_of(path).open(str(path))


def values(path: Path, columns: list[str] | None = None) -> dict[str, list[Any]]:
    rows = open_rows(path)
    wanted = columns or list(rows.columns)
    found: dict[str, list[Any]] = {name: [] for name in wanted}
    for chunk in rows.chunks(wanted):
        assert set(chunk) == set(wanted)
        for name in wanted:
            found[name].extend(chunk[name])
    return found


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        values(path)
    assert str(path) in caught.value.what
    assert caught.value.hint
    return caught.value


ROWS = b"id,sequence\n007,ACGT\n1e5,acgu*-\nNA,\n"
EXPECTED = {"id": ["007", "1e5", "NA"], "sequence": ["ACGT", "acgu*-", ""]}


# ------------------------------------------------------------------------------ csv, tsv


def test_cells_stay_as_written(make: Make) -> None:
    assert values(make("a.csv", ROWS)) == EXPECTED


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(ROWS.replace(b"\n", b"\r\n"), id="crlf"),
        pytest.param(ROWS.replace(b"\n", b"\r"), id="cr"),
        pytest.param(b"\xef\xbb\xbf" + ROWS.replace(b"\n", b"\r"), id="cr and a mark"),
        pytest.param(b"\xef\xbb\xbf" + ROWS, id="byte order mark"),
        pytest.param(ROWS.rstrip(b"\n"), id="no last line end"),
        pytest.param(b"\n" + ROWS + b"\n\n", id="blank lines"),
    ],
)
def test_line_ends_and_marks_do_not_matter(make: Make, content: bytes) -> None:
    assert values(make("a.csv", content)) == EXPECTED


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".GZ", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda raw: pa.Codec("zstd").compress(raw, asbytes=True)),
    ],
)
def test_compressed_files_read_the_same(make: Make, suffix: str, pack: Any) -> None:
    assert values(make("a.csv" + suffix, pack(ROWS))) == EXPECTED
    assert values(make("a.tsv" + suffix, pack(ROWS.replace(b",", b"\t")))) == EXPECTED
    assert values(make("a.faa" + suffix, pack(b">a b\nMK\n")))["sequence"] == ["MK"]
    assert values(make("a.jsonl" + suffix, pack(b'{"id": "x"}\n'))) == {"id": ["x"]}


def test_several_gzip_members_are_one_file(make: Make) -> None:
    path = make("a.csv.gz", gzip.compress(ROWS[:20]) + gzip.compress(ROWS[20:]))
    assert values(path) == EXPECTED


def test_a_cut_gzip_file_is_refused(make: Make) -> None:
    refused(make("a.csv.gz", gzip.compress(ROWS * 1000)[:-20]))
    refused(make("a.fa.gz", gzip.compress(b">a\nACGT\n" * 1000)[:-20]))


def test_quotes_separators_and_line_ends_in_cells(make: Make) -> None:
    content = 'id,note\n"a,b","two\nlines"\n"say ""hi""","\t"\n'
    assert values(make("a.csv", content)) == {
        "id": ["a,b", 'say "hi"'],
        "note": ["two\nlines", "\t"],
    }


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=8)


@given(st.lists(st.tuples(cells, cells), max_size=20), st.sampled_from([",", "\t"]))
def test_any_table_that_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]], delimiter: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["a", "b"])
    writer.writerows(table)
    path = tmp_path_factory.mktemp("any") / ("t.csv" if delimiter == "," else "t.tsv")
    path.write_bytes(text.getvalue().encode())
    assert values(path) == {"a": [a for a, _ in table], "b": [b for _, b in table]}


def test_rows_longer_than_any_block_come_once_and_in_order(make: Make) -> None:
    sequence = "ACGTN" * 1_000_000
    lines = [f"r{i},{sequence if i in (3, 500) else 'A' * 900}" for i in range(3000)]
    found = values(make("a.csv", "\n".join(["id,sequence", *lines])))
    assert found["id"] == [f"r{i}" for i in range(3000)]
    assert [i for i, text in enumerate(found["sequence"]) if text == sequence] == [3, 500]


def test_chunks_are_small_and_only_of_wanted_columns(make: Make) -> None:
    path = make("a.csv", "a,b,c\n" + "1,2,3\n" * 20_000)
    chunks = list(open_rows(path).chunks(["c", "a"]))
    assert all(set(chunk) == {"a", "c"} for chunk in chunks)
    assert max(len(chunk["a"]) for chunk in chunks) < 10_000
    assert sum(len(chunk["a"]) for chunk in chunks) == 20_000


def test_rows_are_read_as_often_as_asked(make: Make) -> None:
    rows = open_rows(make("a.csv", ROWS))
    assert list(rows.chunks(["id"])) == list(rows.chunks(["id"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('a,b\n1,2\n3,"4\n5","6"\n7,8\n', ("line 3", "3 columns", "2")),
        ('a,b\n1\n2,"3\n4",5\n', ("line 3", "3 columns", "2")),
        ('a,b\n1,2\n"left open', ("line 3", "1 columns")),
        ('a,b\n1,2\n3,"left open\n4,5\n6,7\n', ("line 3", "never closed")),
        ('a,b\n1,2\n"left open,4\n5,6\n', ("line 3", "1 columns")),
        ("a,a\n1,2\n", ("'a'", "two columns")),
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ("é,b\n1,2\n".encode("latin1"), ("UTF-8",)),
        ("a,b\n1,2\n".encode("utf-16"), ("UTF-8",)),
        ("a,b\n1,2\n".encode("utf-16-le"), ("UTF-8",)),
        (b"PK\x03\x04\x14\0\0\0\x08\0", ("UTF-8",)),
        ("a,b,,\n1,2,,\n", ("''", "two columns")),
        (",".join(["a"] * 200_000), ("'a'", "two columns")),
        ("a" * 200_000 + ",b\n1,2\n", ("header", "larger than field limit")),
    ],
)
def test_faults_in_csv_are_named(make: Make, content: bytes | str, words: tuple[str, ...]) -> None:
    error = refused(make("a.csv", content))
    assert all(word in error.what for word in words), error.what


def told(found: list[Any]) -> list[Any]:
    """Cells, the reasons of bad ones in brackets."""
    return [[str(cell)] if isinstance(cell, RowError) else cell for cell in found]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_the_wrong_width_is_a_bad_row(make: Make, end: str) -> None:
    lines = ["a,b", "1", "2,3", "", '"4",5,6', ",,", '7,"8', '9"', "10"]
    found = values(make("a.csv", end.join(lines)))
    assert told(found["b"]) == [
        ["1 columns, but the header has 2: line 2"],
        "3",
        ["3 columns, but the header has 2: line 5"],
        ["3 columns, but the header has 2: line 6"],
        f"8{end}9",
        ["1 columns, but the header has 2: line 9"],
    ]
    assert [str(cell) for cell in found["a"] if isinstance(cell, RowError)] == [
        str(cell) for cell in found["b"] if isinstance(cell, RowError)
    ]


def test_bytes_that_are_no_text_cost_their_row(make: Make) -> None:
    content = b"id,note,sequence\na,\xff,AC\nb\xe9\xe9,,GG\nc,\xc3\xa9,A\xed\xa0\x80C\nd\xff\n"
    found = values(make("a.csv", content), ["id", "sequence"])
    assert told(found["id"]) == [
        "a",
        ["not UTF-8 text: line 3"],
        "c",
        ["1 columns, but the header has 3: line 5"],
    ]
    assert told(found["sequence"])[:3] == ["AC", "GG", ["not UTF-8 text: line 4"]]


bad_lines = st.sampled_from([b"x", b"1,2,3", b"1,2,3,4,\xff", b"\xff\xfe", b"\xe2\x82"])
good_lines = st.tuples(cells, cells).map(
    lambda row: ",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row).encode()
)


@given(st.lists(st.one_of(good_lines, bad_lines), max_size=40), st.integers(16, 99))
def test_good_rows_are_as_they_are_without_the_bad_ones(
    tmp_path_factory: pytest.TempPathFactory, table: list[bytes], block: int
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    bad = [line.count(b'"') < 4 for line in table]
    good = [line for line, wrong in zip(table, bad) if not wrong]
    for name, lines in (("all.csv", table), ("good.csv", good)):
        (folder / name).write_bytes(b"\n".join([b"a,b", *lines, b""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCKS", (block, 1 << 20))
        found = values(folder / "all.csv")
    assert [isinstance(cell, RowError) for cell in found["a"]] == bad
    expected = values(folder / "good.csv")
    for name, column in expected.items():
        assert [cell for cell, wrong in zip(found[name], bad) if not wrong] == column
    starts = [2 + sum(1 + line.count(b"\n") for line in table[:place]) for place in range(len(bad))]
    lines = [str(cell).split("line ")[1] for cell in found["a"] if isinstance(cell, RowError)]
    assert lines == [str(line) for line, wrong in zip(starts, bad) if wrong]


def test_a_table_of_bad_rows_alone(make: Make) -> None:
    found = values(make("a.csv", "a,b\n" + "1\n" * 300_000))["a"]
    assert len(found) == 300_000 and str(found[-1]).endswith("line 300001")


def test_bad_rows_before_a_row_longer_than_a_block(make: Make) -> None:
    lines = ["1", "2,3", "4", f"5,{'A' * (3 << 20)}", "6", "7,8"]
    found = values(make("a.csv", "\n".join(["a,b", *lines])))["a"]
    assert told(found)[::2] == [[f"1 columns, but the header has 2: line {n}"] for n in (2, 4, 6)]
    assert found[1::2] == ["2", "5", "7"]


def test_bytes_that_are_no_text_far_into_the_file(make: Make) -> None:
    found = values(make("a.csv", b"a,b\n" + b"1,\xc3\xa9\n" * 300_000 + b"3,\xe9\n4,5\n"))["b"]
    assert len(found) == 300_002 and set(found[:300_000]) == {"é"} and found[-1] == "5"
    assert told(found[-2:-1]) == [["not UTF-8 text: line 300002"]]


def test_cells_may_hold_nearly_anything(make: Make) -> None:
    odd = [
        "a\0b",
        "\0",
        "=cmd()|' /C calc'!A0",
        "../../x",
        "\u202eabc",
        "\x1b[31m",
        "x" * 10_000_000,
    ]
    rows = "".join(f'"{cell}",A\n' for cell in odd)
    assert values(make("a.csv", f"id,sequence\n{rows}"))["id"] == odd


def test_columns_without_a_name_are_columns(make: Make) -> None:
    assert values(make("a.csv", ",id\n0,x\n")) == {"": ["0"], "id": ["x"]}


def test_no_row_can_pass_for_the_end(make: Make) -> None:
    # What was the mark of the end once; a batch that ends with it must not lose rows after it.
    mark = "\x1eend of table\x1e"
    ids = [mark] * 50_000
    assert values(make("a.csv", "id\n" + "\n".join(ids)))["id"] == ids


@pytest.mark.parametrize("content", ["a,b\n", "a,b", '"a","b"\r\n'])
def test_a_header_alone_is_a_table_without_rows(make: Make, content: str) -> None:
    assert values(make("a.csv", content)) == {"a": [], "b": []}


# ------------------------------------------------------------------------------ jsonl


def test_jsonl_gives_text_and_python_values(make: Make) -> None:
    path = make("a.ndjson", '{"id": 7, "x": "007"}\n\n{"x": null, "v": [1, 2.5], "ok": true}\n')
    assert values(path) == {
        "id": ["7", None],
        "x": ["007", None],
        "v": [None, [1, 2.5]],
        "ok": [None, True],
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": 1', "not JSON: Expecting ',' delimiter at character 10 of line 2"),
        ('{"id": "a"} {"id": "b"}', "not JSON: Extra data at character 13 of line 2"),
        ("[1, 2]", "not a JSON object: line 2: [1, 2]"),
        ('{"id": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep: line 2"),
        ('{"id": ' + "9" * 5000 + "}", "a number with too many digits: line 2"),
        (r'{"id": "\ud83d"}', "half a character: a lone surrogate in line 2"),
        (r'{"id": "x", "\uDE00": 1}', "half a character: a lone surrogate in line 2"),
        ("\0", "not JSON: Expecting value at character 1 of line 2"),
        (b'{"id": "\xe9"}', "not UTF-8 text: line 2"),
    ],
)
def test_a_bad_line_of_jsonl_is_a_bad_row(make: Make, line: bytes | str, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    found = values(make("a.jsonl", b'{"id": "a"}\n%b\n{"id": "c"}\n' % line))["id"]
    assert (found[0], found[2]) == ("a", "c")
    assert isinstance(found[1], RowError) and str(found[1]) == reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"id": "a"},\n{"id": "b"}]\n', ("line 1", "not JSON")),
        ('[{"id": "a"}, {"id": "b"}]', ("line 1", "not a JSON object", '[{"id": "a"}')),
        ('{\n  "id": "a"\n}\n', ("line 1", "not JSON")),
        ("id,sequence\na,ACGT\n", ("line 1", "not JSON")),
        ("{}\n{}\n", ("empty",)),
        ('{"id": "é"}\n'.encode("latin1"), ("UTF-8",)),
        ('{"id": "a"}\n'.encode("utf-16"), ("UTF-8",)),
    ],
)
def test_what_is_no_jsonl_is_refused(
    make: Make, content: bytes | str, words: tuple[str, ...]
) -> None:
    error = refused(make("a.jsonl", content))
    assert all(word in error.what for word in words), error.what


def test_more_keys_than_any_table_are_refused(make: Make) -> None:
    lines = (json.dumps({f"{line} {key}": 1 for key in range(2000)}) for line in range(60))
    assert "different keys" in refused(make("a.jsonl", "\n".join(lines))).what


def test_values_of_jsonl_come_as_python_reads_them(make: Make) -> None:
    content = (
        '{"id": "a", "x": 1e400, "id": "b"}\r\n'  # of equal keys the last one counts
        r'{"id": "\ud83d\ude00", "x": -12345678901234567890123}'
    )
    assert values(make("a.jsonl", content)) == {
        "id": ["b", "\N{GRINNING FACE}"],
        "x": [float("inf"), "-12345678901234567890123"],
    }


def test_a_bad_line_far_down_has_its_number(make: Make) -> None:
    lines = [json.dumps({"id": str(i)}) for i in range(5000)]
    lines[4321] = "{"
    assert str(values(make("a.jsonl", "\n".join(lines)))["id"][4321]).endswith("line 4322")


# ------------------------------------------------------------------------------ fasta


def test_fasta_records(make: Make) -> None:
    path = make(
        "a.fa",
        "\ufeff>sp|P1 first protein, E. coli\r\nMKV\r\nacgu*-\r\n\r\n"
        ">empty\n>Müller\ttab after\nNN\n> spaced name\nA",
    )
    rows = open_rows(path)
    assert (rows.default_id, rows.default_x) == ("id", "sequence")
    assert values(path) == {
        "id": ["sp|P1", "empty", "Müller", "spaced"],
        "sequence": ["MKVacgu*-", "", "NN", "A"],
        "description": ["first protein, E. coli", "", "tab after", "name"],
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_odd_fasta_records(make: Make, end: str) -> None:
    lines = [">", "", "MK*", "", "mk-.", ">>x", "# not a letter", "A", "  B  ", ">last"]
    found = values(make("a.fa", end.join(lines)))
    assert found["id"] == ["", ">x", "last"]
    assert found["sequence"] == ["MK*mk-.", "AB", ""]


names = st.from_regex(r"[!-~]{1,12}", fullmatch=True)
letters = st.text("ACDEFGHIKLMNPQRSTVWYacgt*-", max_size=300)


@given(st.lists(st.tuples(names, letters), min_size=1, max_size=20), st.integers(1, 90))
def test_fasta_does_not_depend_on_line_breaks(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]], width: int
) -> None:
    text = "".join(
        f">{name} d\n" + "".join(f"{seq[i : i + width]}\n" for i in range(0, len(seq), width))
        for name, seq in records
    )
    path = tmp_path_factory.mktemp("fasta") / "t.fasta"
    path.write_text(text)
    found = values(path, ["sequence", "id"])
    assert list(zip(found["id"], found["sequence"])) == records


def test_a_chromosome_on_one_line(make: Make) -> None:
    sequence = "ACGTN" * 10_000_000
    assert values(make("a.fna", f">chr1\n{sequence}\n>chr2\nA\n"))["sequence"] == [sequence, "A"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ACGT\n>a\nAC\n", ("line 1", "ACGT")),
        ("\n# comment\nACGT\n", ("line 3", "ACGT")),
        (">a\nAC\n".encode("utf-16"), ("UTF-8",)),
        ("", ("empty",)),
        ("Müller\n>a\nAC\n".encode("latin1"), ("UTF-8",)),
    ],
)
def test_faults_in_fasta_are_named(
    make: Make, content: bytes | str, words: tuple[str, ...]
) -> None:
    error = refused(make("a.fasta", content))
    assert all(word in error.what for word in words), error.what


def test_bytes_that_are_no_text_cost_their_record(make: Make) -> None:
    content = b">a\nAC\n>M\xfcller first\nGG\n\n>c \xff\nTT\n>d\nAC\n\x80\nGT\n>e\nA\n"
    found = values(make("a.fa", content))
    assert told(found["id"]) == ["a", ["not UTF-8 text: the record of line 3"], "c", "d", "e"]
    assert found["sequence"][:3] == ["AC", "GG", "TT"] and found["sequence"][4] == "A"
    assert told(found["sequence"])[3] == ["not UTF-8 text: the record of line 8"]
    assert told(found["description"])[2] == ["not UTF-8 text: the record of line 6"]


def test_real_fasta_files() -> None:
    proteome = Path(__file__).parents[3] / "../shared/data/bacterial-proteome.faa"
    if not proteome.exists():
        pytest.skip("no ../shared/data beside the repository")
    found = values(proteome)
    lines = proteome.read_text().splitlines()
    assert len(found["id"]) == sum(line.startswith(">") for line in lines)
    assert sum(map(len, found["sequence"])) == sum(
        len(line) for line in lines if not line.startswith(">")
    )


# ------------------------------------------------------------------------------ all files


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".fasta", ".parquet"])
def test_what_is_no_readable_file_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "folder" in refused(folder).what
    assert "No such file" in refused(tmp_path / f"missing{suffix}").what


def test_the_digest_follows_the_content(make: Make) -> None:
    first = open_rows(make("a.csv", ROWS)).digest()
    assert open_rows(make("b.csv", ROWS)).digest() == first
    assert open_rows(make("a.csv", ROWS.replace(b"NA", b"NB"))).digest() != first
