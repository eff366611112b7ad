"""A user's mistakes: one line what, one line what to do, exit 1, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from layouts import esm2_folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("id,sequence\na,ACGT\nb,GGTT\n")
    return path


def mgen(tmp_path, *words, code=1):
    """Run mgen in the folder; its stderr, after checking how it ended."""
    done = subprocess.run(
        [sys.executable, "-m", "mgen_core", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def refused(tmp_path, *words):
    """Run mgen embed with the dummy, which must refuse in two lines and leave nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    told = mgen(tmp_path, "embed", *words)
    lines = told.strip().splitlines()
    assert lines[-2].startswith("error: ") and lines[-1].startswith("  try: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return told


DUMMY = ("--backbone", "aido_dna_dummy")


def test_no_such_file(tmp_path):
    assert "no such file: nothing.csv" in refused(tmp_path, "nothing.csv", *DUMMY)


def test_no_input(tmp_path):
    assert "add DATA" in refused(tmp_path, *DUMMY)


@pytest.mark.parametrize("name", ["in.csv", "in.fasta", "in.jsonl", "in.parquet", "in.tsv"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    refused(tmp_path, name, *DUMMY)


def test_a_missing_column_lists_those_there_are(tmp_path):
    (tmp_path / "in.csv").write_text("name,peptide\na,ACGT\n")
    assert "name, peptide" in refused(tmp_path, "in.csv", *DUMMY)
    told = refused(tmp_path, "in.csv", *DUMMY, "--x-col", "dna")
    assert "no column 'dna'" in told and "name, peptide" in told


def test_an_unknown_backbone_suggests_near_names(tmp_path, data):
    told = refused(tmp_path, data, "--backbone", "aido_dna_dumy")
    assert "no backbone 'aido_dna_dumy'" in told and "aido_dna_dummy" in told


def test_an_unknown_writer_option_and_pool(tmp_path, data):
    assert "no writer 'xlsx'" in refused(tmp_path, data, *DUMMY, "--writer", "xlsx")
    assert "no option 'speed'" in refused(tmp_path, data, *DUMMY, "--option", "speed=1")
    assert "is not KEY=VALUE" in refused(tmp_path, data, *DUMMY, "--option", "speed")
    assert "pool" in refused(tmp_path, data, *DUMMY, "--pool", "median")
    assert "is not a number" in refused(tmp_path, data, *DUMMY, "--batch-tokens", "lots")


def test_usage_errors_exit_with_2(tmp_path, data):
    mgen(tmp_path, "embed", data, *DUMMY, "--dtype", "float8", code=2)
    mgen(tmp_path, "embde", code=2)


def test_unreadable_parquet(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and then nothing")
    assert "in.parquet" in refused(tmp_path, "in.parquet", *DUMMY)


def test_broken_yaml(tmp_path, data):
    (tmp_path / "run.yaml").write_text("backbone: [aido\n")
    assert "run.yaml: line 2 is not YAML" in refused(tmp_path, data, "--config", "run.yaml")
    (tmp_path / "run.yaml").write_text("limit: !!python/object/apply:os.mkdir [made]\n")
    assert "runs Python" in refused(tmp_path, data, "--config", "run.yaml")


def test_a_damaged_record_of_a_run(tmp_path, data):
    mgen(tmp_path, "embed", data, *DUMMY, code=0)
    record = tmp_path / "predictions/run.json"
    for verb, text in (("merge", '{"format": 1}'), ("status", "[" * 5000)):
        record.write_text(text)
        assert "run.json" in mgen(tmp_path, verb, "predictions")


def test_bad_rows_are_set_aside_with_letter_and_position(tmp_path):
    (tmp_path / "in.csv").write_text("id,sequence\na,ACGT\nb,AC1T\nc,\na,GGTT\n")
    told = mgen(tmp_path, "embed", "in.csv", *DUMMY, code=0)
    assert "1 row: illegal character '1'" in told and "1 row: empty sequence" in told
    assert "2 of 4 rows" in told and "predictions/failed" in told
    mgen(tmp_path, "merge", "predictions", code=0)
    lines = (tmp_path / "predictions/failed/plan.jsonl").read_text().splitlines()
    reasons = [json.loads(line) for line in lines]
    assert reasons[0]["reason"] == "illegal character '1' at position 3"
    assert [reason["row"] for reason in reasons] == [1, 2]


def merged(tmp_path, name, content, *words):
    """Ids, errors and rows with a vector of the merged file of an input with these bytes."""
    (tmp_path / name).write_bytes(content)
    mgen(tmp_path, "embed", name, *DUMMY, *words, code=0)
    mgen(tmp_path, "merge", "predictions", "--to", "out.parquet", code=0)
    table = pq.read_table(tmp_path / "out.parquet")
    errors = table["error"].to_pylist() if "error" in table.column_names else None
    good = [row for row, vector in enumerate(table["embedding"].to_pylist()) if vector is not None]
    return table["id"].to_pylist(), errors, good


def test_a_bad_line_of_jsonl_costs_a_row_and_is_told(tmp_path):
    lines = [b'{"id": "a", "sequence": "ACGT"}', b'{"id": "b"', b'{"id": "c", "sequence": 5}', b""]
    ids, errors, good = merged(tmp_path, "in.jsonl", b"\n".join(lines))
    assert (ids, good) == (["a", "1", "c"], [0])
    assert errors[0] is None and "of line 2" in errors[1] and errors[2]


def test_a_bad_line_of_a_table_costs_a_row_and_is_told(tmp_path):
    content = b"id,sequence\na,ACGT\nb\n\nc\xff,GGTT\nd,AC,GT\ne,AC\n"
    ids, errors, good = merged(tmp_path, "in.csv", content)
    assert (ids, good) == (["a", "1", "2", "3", "e"], [0, 4])
    assert errors[1:4] == [
        "csv cannot read it: 1 columns, but the header has 2: line 3",
        "csv cannot read it: not UTF-8 text: line 5",
        "csv cannot read it: 3 columns, but the header has 2: line 6",
    ]


def test_odd_fasta_keeps_every_record(tmp_path):
    content = b">a first\r\nacgt\r\n\r\nACGT\r\n>\r\n>c\r\nAC*\r\n>d\r\nAC-GT"
    ids, errors, good = merged(tmp_path, "in.fa", content)
    assert (ids, good) == (["a", "1", "c", "d"], [0])
    assert errors[1:] == [
        "empty sequence",
        "illegal character '*' at position 3",
        "illegal character '-' at position 3",
    ]


def test_a_csv_of_a_windows_table_is_read_as_any_other(tmp_path):
    content = '\ufeffid,sequence\r\n"a\nb",ACGT\r\n../../x,GG'.encode()
    assert merged(tmp_path, "in.csv", content) == (["a\nb", "../../x"], None, [0, 1])


def test_files_that_are_something_else_are_refused(tmp_path):
    for name, content, told in [
        ("in.jsonl", b'[{"id": "a", "sequence": "AC"}]', "line 1"),
        ("in.fa", b"ACGT\n", "line 1: expected '>'"),
        ("in.csv", b'id,sequence\na,AC\n"b,AC\nc,AC\n', "line 3: 1 columns, but the header has 2"),
        ("in.csv.zst", b"\x1f\x8b\x08", "cannot read in.csv.zst"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert told in refused(tmp_path, name, *DUMMY)


def test_too_long_rows_fail_or_are_cut(tmp_path):
    (tmp_path / "in.csv").write_text(f"id,sequence\na,{'ACGT' * 30}\nb,ACGT\n")
    told = mgen(tmp_path, "embed", "in.csv", *DUMMY, "--max-length", 50, code=0)
    assert "1 row: longer than 50 tokens" in told
    told = mgen(tmp_path, "embed", "in.csv", *DUMMY, "--max-length", 50, "--too-long", "truncate",
                "--output", "cut", code=0)  # fmt: skip
    assert "1 row: truncated" in told and "2 of 2 rows" in told


def test_an_output_that_is_a_file(tmp_path, data):
    (tmp_path / "out").write_text("mine")
    assert "a file stands" in refused(tmp_path, data, *DUMMY, "--output", "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, and how to remount it; only root may have one."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        again = "remount," if os.path.ismount(folder) else ""
        return subprocess.run(["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", folder])

    if mount("size=220k").returncode:
        pytest.skip("mounting is not allowed here")
    yield folder, mount
    subprocess.run(["umount", folder], check=True)


def test_an_output_that_cannot_be_written(tmp_path, data, disk):
    folder, mount = disk
    (folder / "locked").mkdir(mode=0o500)
    mount("ro")
    told = refused(tmp_path, data, *DUMMY, "--output", folder / "locked/out")
    assert "cannot write" in told and "choose another folder" in told


@pytest.mark.parametrize(
    ("pool", "reason"),
    [("tokens", "GB are free"), ("mean", "No space left")],
    ids=["foreseen", "met"],
)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path, disk, pool, reason):
    folder, mount = disk
    mount("size=20k")  # room for the numbers of "mean", and not for all that goes with them
    rows = [f"r{n},{'ACGT' * 20}{'ACGT'[n % 4] * (n + 1)}" for n in range(60)]
    (tmp_path / "in.csv").write_text("\n".join(["id,sequence", *rows]) + "\n")
    words = ("embed", "in.csv", *DUMMY, "--output", folder / "out", "--batch-tokens", 90)
    told = mgen(tmp_path, *words, "--pool", pool)
    assert reason in told
    assert not list(folder.rglob("*.tmp"))
    mount("size=100m")
    mgen(tmp_path, *words, "--pool", pool, code=0)
    mgen(tmp_path, "merge", folder / "out", code=0)


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "esm2"
    esm2_folder(folder)
    return folder


def test_a_weights_folder_without_weights(tmp_path, data, weights):
    for file in weights.glob("*.safetensors"):
        file.unlink()
    told = refused(tmp_path, data, "--backbone", "esm2_8m", "--weights", "esm2")
    assert "esm2" in told


def test_weights_that_are_not_there(tmp_path, data):
    told = refused(tmp_path, data, "--backbone", "esm2_8m", "--weights", "./nowhere")
    assert "nowhere" in told


def test_weights_with_missing_and_wrong_tensors(tmp_path, data, weights):
    from safetensors.torch import load_file, save_file

    file = weights / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layer.0.intermediate.dense.weight"))
    whole = tensors[name]
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    told = refused(tmp_path, data, "--backbone", "esm2_8m", "--weights", "esm2")
    assert "missing" in told and "layer.0.intermediate.dense.weight" in told
    save_file({**tensors, name: whole[:, :-1].contiguous()}, file)
    told = refused(tmp_path, data, "--backbone", "esm2_8m", "--weights", "esm2")
    assert "layer.0.intermediate.dense.weight" in told


def test_no_weights_and_no_hub_gives_the_download_command(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    told = refused(tmp_path, data, "--backbone", "esm2_8m")
    assert "hf download facebook/esm2_t6_8M_UR50D" in told


def test_merge_says_what_is_wrong(tmp_path, data):
    assert "no run in nowhere" in mgen(tmp_path, "merge", "nowhere")
    mgen(tmp_path, "embed", data, *DUMMY, code=0)
    assert "no column 'nope'" in mgen(tmp_path, "merge", "predictions", "--columns", "row,nope")
    told = mgen(tmp_path, "merge", "predictions", "--where", "lenght(id) > 1")
    assert "--where" in told and "row, id, error" in told
    assert "no writer for x.xlsx" in mgen(tmp_path, "merge", "predictions", "--to", "x.xlsx")
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob("x*"))
    mgen(tmp_path, "merge", "predictions", "--where", "id = 'b'", "--to", "b.tsv", code=0)
    assert len((tmp_path / "b.tsv").read_text().splitlines()) == 2
    shutil.rmtree(tmp_path / "predictions")
