"""Merge: every row once and in order, in bounded memory, all of a file or nothing of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mgen_core import MgenError, Row, RunError, WriterCard, order, result, spent, storage
from mgen_core.catalog import discover
from mgen_core.cli import app
from mgen_core.columns import HostColumn, to_table
from mgen_core.config import make_config
from mgen_core.errors import Stopped
from mgen_core.manifest import FORMAT, RECORD, Manifest
from mgen_core.merge import Selection, merge, read
from mgen_core.parts import Computed, write_parts
from mgen_core.plan import Batch, Entry, Failure
from mgen_core.run import run
from mgen_core.screen import Screen

CATALOG = discover()
WIDTH = 3


def vector(row, width=WIDTH):
    return [float(row), row / 2, 1.0] + [0.5] * (width - 3)


def residues(row):
    return row % 4 + 1


def make_run(folder, windows, planned=(), failed=(), ragged=False, width=WIDTH, commit=1, seed=0):
    """A finished run: `windows` are lists of batches, each a number of rows.

    Rows in `planned` were set aside in the plan, those in `failed` while computing.
    """
    draw = np.random.default_rng(seed)
    described, batches, first = [], [], 0
    for window in windows:
        count = sum(window)
        rows = first + draw.permutation(count)
        dealt = [part.tolist() for part in np.split(rows, np.cumsum(window)[:-1])]
        computed = [part for rows in dealt if (part := [r for r in rows if r not in planned])]
        described.append((first, count, len(batches), len(computed)))
        batches += computed
        first += count
    for name in ("done", "failed"):
        (folder / name).mkdir(parents=True)
    lines = b"".join(Failure(row, f"r{row}", "bad").line().encode() for row in sorted(planned))
    written = storage.write_atomic(folder / "failed/plan.jsonl", lambda file: file.write(lines))
    record = {
        "format": FORMAT,
        "identity": dict.fromkeys(("task", "backbone", "weights", "input"), "x")
        | {"dtype": "float32"},
        "command": ["mgen", "embed", "in.csv"],
        "directory": str(folder),
        "config": {"writer": "parquet"},
        "versions": {"mgen": "0"},
        "plan": {
            "rows": first,
            "failed": len(planned),
            "failures_sha256": written.sha256,
            "digest": "x",
            "batches": len(batches),
            "windows": described,
        },
    }
    (folder / RECORD).write_text(json.dumps(record))
    manifest, card = Manifest.open(folder), CATALOG.find(WriterCard, "parquet")
    job = SimpleNamespace(writer=card.load(card))
    made = [computed_batch(*numbered, failed, ragged, width) for numbered in enumerate(batches)]
    for start in range(0, len(made), commit):
        write_parts(job, manifest, 0, made[start : start + commit])
    return folder


def computed_batch(number, rows, failed, ragged, width):
    """As the run hands it to its parts."""
    entries = tuple(Entry(1, (Row(row, f"r{row}", ""),)) for row in rows)
    reasons = {place: "worse" for place, row in enumerate(rows) if row in failed}
    good = [row for row in rows if row not in failed]
    lengths = np.array([residues(row) for row in good], np.int64) if ragged else None
    values = [vector(row, width) for row in good for _ in range(residues(row) if ragged else 1)]
    columns = {"embedding": HostColumn(np.array(values, np.float32), lengths)} if good else {}
    batch = Batch(number, entries, len(rows))
    table, failures = to_table(batch, columns, {}, "float32", reasons)
    return Computed(batch, table, failures, 0.0)


def expected(rows, planned=(), failed=(), ragged=False):
    """What the merged file holds: row, id, embedding and error."""
    found = []
    for row in rows:
        reason = "bad" if row in planned else "worse" if row in failed else None
        told = [vector(row)] * residues(row) if ragged else vector(row)
        found.append((row, f"r{row}", None if reason else told, reason))
    return found


def tuples(table):
    if "error" not in table.column_names:
        table = table.append_column("error", pa.nulls(len(table), pa.string()))
    return list(zip(*(table[name].to_pylist() for name in ("row", "id", "embedding", "error"))))


@st.composite
def runs(draw):
    windows = draw(
        st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=4), min_size=1, max_size=4)
    )
    rows = sum(map(sum, windows))
    some = st.sets(st.integers(0, rows - 1), max_size=rows // 3)
    return windows, rows, draw(some), draw(some), draw(st.integers(0, 99)), draw(st.integers(1, 3))


@pytest.mark.parametrize("ragged", [False, True])
@settings(max_examples=20, deadline=None)
@given(drawn=runs(), size=st.sampled_from([1, 60, 1 << 22]), drop=st.booleans())
def test_rows_come_once_and_in_order(tmp_path_factory, ragged, drawn, size, drop):
    windows, rows, planned, failed, seed, commit = drawn
    failed -= planned
    if len(failed | planned) == rows:
        return  # nothing came of it: the run said so
    folder = make_run(
        tmp_path_factory.mktemp("run") / "run",
        windows,
        planned,
        failed,
        ragged,
        commit=commit,
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "SLICE_BYTES", size)
        patch.setattr(order, "CHUNK_BYTES", 4 * size)
        patch.setattr(order, "MEMORY", size)
        whole = read(folder, CATALOG, Selection(drop_failed=drop))
        some = read(folder, CATALOG, Selection(("embedding",), "row % 3 = 0", drop_failed=drop))
    told = expected(range(rows), planned, failed, ragged)
    kept = [row for row in told if not drop or row[3] is None]
    assert tuples(whole) == kept
    assert some.column_names == ["embedding"]
    assert some["embedding"].to_pylist() == [row[2] for row in kept if row[0] % 3 == 0]


def test_a_window_of_very_many_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.Disk, "sync", lambda self, descriptor: None)
    run = make_run(tmp_path / "run", [[2] * 1000])
    assert tuples(read(run, CATALOG, Selection())) == expected(range(2000))


def test_memory_is_bounded(tmp_path):
    """160 MB of vectors in windows of 8 MB are merged in 150 MB more than a small run takes."""
    width = 2000
    run = make_run(tmp_path / "big", [[250] * 4] * 20, width=width, commit=4)
    small = make_run(tmp_path / "small", [[10]], width=width)
    peaks = [peak_of(small, tmp_path / "a.npz"), peak_of(run, tmp_path / "b.npz")]
    assert (tmp_path / "b.npz").stat().st_size > 4 * width * 20_000
    assert peaks[1] - peaks[0] < 150e6


def peak_of(run, to):
    code = (
        "import sys, threading, time; from pathlib import Path\n"
        "from mgen_core import order; from mgen_core.merge import *\n"
        "from mgen_core.catalog import discover\n"
        "order.MEMORY = 16 << 20; peak = 0\n"
        "def anonymous():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(text.split('RssAnon:')[1].split()[0]) * 1024\n"
        "def watch():\n"
        "    global peak\n"
        "    while True: peak = max(peak, anonymous()); time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "merge(Path(sys.argv[1]), Path(sys.argv[2]), discover(), Selection())\n"
        "print(peak)"
    )
    words = [sys.executable, "-c", code, str(run), str(to)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_wide_columns_are_decoded_only_where_rows_are_wanted(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [[4, 4], [4, 4]])
    seen = []
    card = CATALOG.find(WriterCard, "parquet")
    kind = type(card.load(card))
    whole = kind.read

    def spy(self, file, columns=None):
        seen.append(columns)
        return whole(self, file, columns)

    monkeypatch.setattr(kind, "read", spy)
    read(run, CATALOG, Selection(where="row < 8"))
    narrow = [columns for columns in seen[1:] if "embedding" not in columns]
    assert len(narrow) == 4, "each part once, without its vectors"
    assert 1 <= len(seen) - 1 - len(narrow) <= 2, "vectors of the first window alone"
    seen.clear()
    assert read(run, CATALOG, Selection(columns=("id",)))["id"].to_pylist()[:2] == ["r0", "r1"]
    assert all("embedding" not in columns for columns in seen[1:])


def test_where_sees_failures_and_what_it_cannot_mean_is_told(tmp_path):
    run = make_run(tmp_path / "run", [[6]], planned={1}, failed={4})
    found = read(run, CATALOG, Selection(where="error IS NOT NULL OR id = 'r2'"))
    assert found["row"].to_pylist() == [1, 2, 4]
    for bad in ("nonsense", "count(*) > 1", "embedding IS NULL", "1; DROP TABLE x"):
        with pytest.raises(MgenError, match="--where") as caught:
            read(run, CATALOG, Selection(where=bad))
        assert "row, id, error" in caught.value.hint


# ------------------------------------------------------------------------------ files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_several_files_tell_how_many_they_are(tmp_path):
    run = make_run(tmp_path / "run", [[5, 4], [3, 5]], planned={3})
    out = tmp_path / "out"
    found = merge(run, out / "a.parquet", CATALOG, Selection(), rows_per_file=5)
    assert names(out) == [f"a-{n:05d}-of-00004.parquet" for n in range(4)]
    assert [path.name for path in found.paths] == names(out)
    tables = [pq.read_table(path) for path in found.paths]
    assert [len(table) for table in tables] == [5, 5, 5, 2]
    assert tuples(pa.concat_tables(tables)) == expected(range(17), {3})
    merge(run, out / "a.parquet", CATALOG, Selection(where="row < 9"), rows_per_file=3)
    assert names(out) == [f"a-{n:05d}-of-00003.parquet" for n in range(3)]
    merge(run, out / "a.parquet", CATALOG, Selection(where="false"), rows_per_file=3)
    assert names(out) == ["a-00000-of-00001.parquet"]
    assert pq.read_table(out / "a-00000-of-00001.parquet").num_rows == 0


def test_a_signal_leaves_what_was_there(tmp_path):
    run = make_run(tmp_path / "run", [[4], [4]])
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.parquet").write_text("old")
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Stopped) as caught:
            merge(
                run,
                out / "a.parquet",
                CATALOG,
                Selection(),
                told=lambda rows, number=number: signal.raise_signal(number),
            )
        assert caught.value.signal == number and "no file" in caught.value.what
        assert names(out) == ["a.parquet"]
        assert (out / "a.parquet").read_text() == "old"


def test_a_damaged_part_leaves_what_was_there(tmp_path):
    run = make_run(tmp_path / "run", [[4], [4]])
    part = sorted(run.glob("parts/*/*"))[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(RunError, match="damaged") as caught:
        merge(run, tmp_path / "out/a.parquet", CATALOG, Selection())
    assert str(part) in caught.value.what
    assert names(tmp_path / "out") == []


def test_two_merges_at_once_do_not_meet(tmp_path):
    run = make_run(tmp_path / "run", [[4], [4]])
    path = tmp_path / "out/a.parquet"

    def second(rows):
        if not path.exists():
            merge(run, path, CATALOG, Selection(("row",)))

    merge(run, path, CATALOG, Selection(), told=second)
    assert tuples(pq.read_table(path)) == expected(range(8))
    assert names(path.parent) == ["a.parquet"]


def test_what_a_killed_merge_left_goes_and_what_is_at_work_stays(tmp_path):
    run = make_run(tmp_path / "run", [[4]])
    out = tmp_path / "out"
    (out / ".a.parquet.0123abcd.tmp").mkdir(parents=True)
    (out / ".a.parquet.0123abcd.tmp/00000").write_text("half")
    (out / ".b.parquet.0123abcd.tmp").mkdir()
    with result.beside(out / "a.parquet") as files:
        merge(run, out / "a.parquet", CATALOG, Selection())
        assert names(out) == sorted([files.folder.name, ".b.parquet.0123abcd.tmp", "a.parquet"])


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [[100]])
    monkeypatch.setattr(storage, "free_bytes", lambda path: 100)
    with pytest.raises(RunError, match="GB are free"):
        merge(run, tmp_path / "out/a.npz", CATALOG, Selection())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ parts deleted


def test_parts_are_deleted_on_request_and_the_run_says_where_its_rows_are(tmp_path):
    run = make_run(tmp_path / "run", [[4], [4]], failed={2})
    path = tmp_path / "a.parquet"
    merge(run, path, CATALOG, Selection(), delete_parts=True)
    assert not list(run.glob("parts/*/*"))
    assert tuples(pq.read_table(path)) == expected(range(8), failed={2})
    with pytest.raises(RunError, match="were deleted after merging") as caught:
        merge(run, tmp_path / "b.parquet", CATALOG, Selection())
    assert str(path) in caught.value.what
    told = CliRunner().invoke(app, ["status", str(run)]).stdout
    assert f"to {path}; then the parts were deleted" in told and "next" not in told
    assert spent.merged_files(Manifest.open(run)) == [str(path)]
    (run / RECORD).write_text((run / RECORD).read_text() + "\n")  # another run took its place
    assert spent.merged_files(Manifest.open(run)) == []


def test_a_start_after_parts_were_deleted_computes_nothing_again(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["ACD", "GG"])
    values = {"task": "embed", "backbone": "toy", "data": str(data), "output": tmp_path / "run"}
    run(make_config(values), toy.catalog(), Screen())
    merge(tmp_path / "run", None, toy.catalog(), Selection(), delete_parts=True)
    with pytest.raises(RunError, match="were deleted after merging") as caught:
        run(make_config(values), toy.catalog(), Screen())
    assert "--overwrite" in caught.value.hint
    run(make_config({**values, "overwrite": True}), toy.catalog(), Screen())
    assert read(tmp_path / "run", toy.catalog(), Selection()).num_rows == 2
    assert not (tmp_path / "run/merged.json").exists()


def test_parts_stay_where_the_file_does_not_read_back(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [[4]])
    move = result.Results.publish

    def damaged(self, suffix, numbered):
        paths = move(self, suffix, numbered=numbered)
        content = paths[0].read_bytes()
        paths[0].write_bytes(content[:-1] + b"x")
        return paths

    monkeypatch.setattr(result.Results, "publish", damaged)
    with pytest.raises(RunError, match="does not read back"):
        merge(run, tmp_path / "a.parquet", CATALOG, Selection(), delete_parts=True)
    assert len(list(run.glob("parts/*/*"))) == 1


@pytest.mark.parametrize(
    "selection", [Selection(("id",)), Selection(where="true"), Selection(allow_missing=True)]
)
def test_parts_are_not_deleted_after_a_merge_of_some(tmp_path, selection):
    run = make_run(tmp_path / "run", [[4]])
    with pytest.raises(MgenError, match="--delete-parts"):
        merge(run, tmp_path / "a.parquet", CATALOG, selection, delete_parts=True)
    assert len(list(run.glob("parts/*/*"))) == 1


# ------------------------------------------------------------------------------ what is refused


def test_on_error_stop_names_the_rows(tmp_path):
    run = make_run(tmp_path / "run", [[6]], planned={1}, failed={4})
    words = ["merge", str(run), "--to", str(tmp_path / "a.tsv"), "--on-error", "stop"]
    with pytest.raises(RunError, match=r"2 of 6 rows .* row 1 \(id r1\): bad; row 4") as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert "--failed" in caught.value.hint and not (tmp_path / "a.tsv").exists()
    found = CliRunner().invoke(app, [*words[:-1], "skip", "--rows-per-file", "4"])
    assert found.exit_code == 0
    assert "a-00000-of-00002.tsv to a-00001-of-00002.tsv: 6 rows, 2 of them" in found.stdout


def test_rows_twice_or_missing_or_from_elsewhere(tmp_path):
    run = make_run(tmp_path / "run", [[4, 4], [4]])
    manifest, card = Manifest.open(run), CATALOG.find(WriterCard, "parquet")
    writer, parts = card.load(card), manifest.done()
    log = run / "done/rank-00000.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    schema = read(run, CATALOG, Selection()).schema
    with (run / parts[0].file).open("rb") as file:
        a, b, c, d = writer.read(file, ["row"])["row"].to_pylist()
    for rows, told in (
        ([a, b, c, c], f"twice {c}; missing {d};"),
        ([a, b, c, 99], f"missing {d}; from elsewhere 1"),
    ):
        table = pa.table({"row": rows, "id": ["x"] * 4, "embedding": [vector(0)] * 4})
        table = table.cast(schema)
        written = storage.write_atomic(
            run / parts[0].file, lambda file, table=table: writer.write(file, [table], table.schema)
        )
        first = {**lines[0], "bytes": written.bytes, "sha256": written.sha256}
        log.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines[1:]]))
        with pytest.raises(RunError, match=told):
            read(run, CATALOG, Selection())


def test_the_bench_measures_both_shapes(tmp_path):
    bench = Path(__file__).parent.parent / "bench/merge.py"
    words = [sys.executable, str(bench), "--share", "0.0004", "--rounds", "1"]
    told = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert told.stdout.count("a vector a") == 2
    assert names(tmp_path) == []
