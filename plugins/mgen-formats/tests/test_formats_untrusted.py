"""Files made to do harm: a bomb costs bounded memory, and no id becomes a path."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mgen_formats.plugin import READERS

import mgen_core
from mgen_core.catalog import discover
from mgen_core.merge import Selection, merge

HOSTILE = [
    "a/b",
    "../../x",
    "/etc/passwd",
    "..\\..\\x",
    'quote\'s "and" more',
    "two\nlines",
    "carriage\rreturn",
    "tab\there",
    "nul\0inside",
    "\u202eright to left",
    "=cmd()|' /C calc'!A0",
    "\x1b[31mred",
    "[/bold]",
    "\x1eend of table\x1e",
    " blanks ",
    "007",
    "1e5",
    "None",
    "ä\N{GRINNING FACE}",
    "x" * 10_000,
]


def write_input(path: Path) -> None:
    rows = [(name, "ACGT" * (number + 1)) for number, name in enumerate(HOSTILE)]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "sequence"), *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "sequence": s}) + "\n" for i, s in rows))
    else:
        pq.write_table(pa.table({"id": HOSTILE, "sequence": [text for _, text in rows]}), path)


@pytest.mark.parametrize("writer", ["parquet", "tsv", "pt", "npz", "safetensors"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_hostile_ids_come_out_as_they_went_in_and_name_no_file(
    tmp_path: Path, writer: str, suffix: str
) -> None:
    data, run = tmp_path / f"in{suffix}", tmp_path / "run"
    write_input(data)
    before = {*Path.cwd().iterdir(), *tmp_path.parent.iterdir()}
    mgen_core.embed(str(data), backbone="aido_dna_dummy", output=run, writer=writer)
    merged = tmp_path / f"out.{writer}"
    merge(run, merged, discover(), Selection())

    card = next(o.card for o in discover().offers(mgen_core.WriterCard) if o.card.name == writer)
    with merged.open("rb") as file:
        table = card.load(card).read(file)
    assert table["id"].to_pylist() == HOSTILE
    assert table["row"].to_pylist() == list(range(len(HOSTILE)))

    assert {*Path.cwd().iterdir(), *tmp_path.parent.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {data.name, "run", merged.name}
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    part = f"parts/rank-00000/batch-00000000.{writer}"
    assert files <= {"run.json", "run.lock", "done/rank-00000.jsonl", "failed/plan.jsonl", part}


# ------------------------------------------------------------------------------ bombs

at_length = pytest.mark.skipif(
    "MGEN_TEST_BOMBS" not in os.environ, reason="takes a minute: MGEN_TEST_BOMBS=1 (nox -s fuzz)"
)
MOST_MB = 2000  # torch and pyarrow are a quarter of it
READ = """
import sys
from mgen_core import InputError, ReaderOptions
from mgen_formats.plugin import READERS
card = next(card for card in READERS if sys.argv[1].endswith(card.suffixes))
rows = 0
try:
    found = card.load(card, ReaderOptions()).open(sys.argv[1])
    for chunk in found.chunks(found.columns):
        rows += len(next(iter(chunk.values())))
except InputError as error:
    sys.exit(f"{rows} rows, then {error.what}")
finally:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    status = open("/proc/self/status").read()
    print(int(status.split("VmHWM:")[1].split()[0]) >> 10)
"""


def read_apart(path: Path) -> tuple[str, int, int]:
    """What reading a file in a process of its own told, its exit code and its most memory in MB."""
    command = [sys.executable, "-c", READ, path]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.stderr, process.returncode, int(process.stdout)


@pytest.mark.parametrize(
    ("name", "head", "told"),
    [
        ("a.csv.gz", b"", "line 1: longer than 256 MiB"),
        ("a.jsonl.gz", b'{"id": "a"}\n{"id": "', "line 2: longer than 256 MiB"),
        pytest.param(
            *("a.csv.gz", b"id,sequence\na,", "a row after row 0 is longer than 256 MiB"),
            marks=at_length,
        ),
        pytest.param(
            *("a.csv.gz", b'id,sequence\na,b\nc,"', "a row after row 1 is longer than 256 MiB"),
            marks=at_length,
        ),
        pytest.param("a.fa.gz", b">a\n", "line 2: longer than 256 MiB", marks=at_length),
        pytest.param("a.fa.bz2", b">a\nA\n", "line 3: longer than 256 MiB", marks=at_length),
    ],
)
def test_ten_gigabytes_of_zeros_in_ten_megabytes_are_refused(
    tmp_path: Path, name: str, head: bytes, told: str
) -> None:
    pack = gzip.compress if name.endswith(".gz") else bz2.compress
    zeros, times = pack(bytes(32 << 20)), 320
    with (tmp_path / name).open("wb") as file:
        file.write(pack(head))
        file.writelines([zeros] * times)
    said, code, peak = read_apart(tmp_path / name)
    assert code == 1 and told in said, said
    assert peak < MOST_MB


def test_a_sequence_of_many_short_lines_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgen_formats.readers import fasta

    monkeypatch.setattr(fasta, "LONGEST", 1000)
    path = tmp_path / "a.fa"
    path.write_text(">a\n" + "AC\n" * 501)
    with pytest.raises(mgen_core.InputError, match="line 502: a sequence: longer than"):
        list(fasta.FastaRows(path).chunks(["sequence"]))


@at_length
def test_long_rows_are_not_read_far_ahead(tmp_path: Path) -> None:
    row = gzip.compress(b"a," + b"A" * (20 << 20) + b"\n")
    with (tmp_path / "a.csv.gz").open("wb") as file:
        file.write(gzip.compress(b"id,sequence\n", mtime=0))
        file.writelines([row] * 50)
    told, code, peak = read_apart(tmp_path / "a.csv.gz")
    assert (told, code) == ("", 0)
    assert peak < MOST_MB


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.zst", gzip.compress(b"id\na\n", mtime=0)),
        ("a.csv.gz", b"id\na\n"),
        ("a.csv.gz", gzip.compress(b"id\na\n", mtime=0) + b"garbage"),
        ("a.fa.bz2", b">a\nAC\n"),
    ],
)
def test_what_is_not_packed_as_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    card = next(card for card in READERS if name.endswith(card.suffixes))
    with pytest.raises(mgen_core.InputError, match=f"cannot read .*{name}"):
        list(card.load(card, card.options()).open(str(tmp_path / name)).chunks(["id"]))
