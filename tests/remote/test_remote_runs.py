"""Runs whose input, directory and merged file lie on an S3 server."""

import gzip
import sys

import fsspec
import pytest
from remote.runs import acknowledged, go, merged, table

import mgen_core
from mgen_core import MgenError, RunError, objects, place
from mgen_core.cli import main


def mgen(monkeypatch, capsys, *words):
    """Exit code, what it printed and what it said."""
    monkeypatch.setattr(sys, "argv", ["mgen", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code or 0, out, err


def put(url, content):
    fsspec.open(url, "wb").open().close()
    fs, key = fsspec.core.url_to_fs(url)
    fs.pipe_file(key, content)
    return url


@pytest.fixture(scope="module")
def here(tmp_path_factory, catalog):
    """A table, and the run of it on this machine: its merged bytes."""
    folder = tmp_path_factory.mktemp("here")
    data = table(folder)
    go(data, folder / "run", catalog)
    return data, merged(folder / "run", folder / "run.parquet", catalog)


def test_a_run_on_s3_gives_the_bytes_of_one_here(bucket, here, tmp_path, catalog):
    data, expected = here
    source = put(f"{bucket}/in/data.csv", data.read_bytes())
    assert go(source, f"{bucket}/out/run", catalog).done == 32
    assert merged(f"{bucket}/out/run", tmp_path / "merged.parquet", catalog) == expected


def test_the_command_line_from_input_to_merged_file(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "".join(f">g{n}\nACGT{'ACGT' * n}\n" for n in range(9))
    source = put(f"{bucket}/genes.fasta.gz", gzip.compress(text.encode()))
    words = ("embed", "--backbone", "aido_dna_dummy", "--batch-tokens", 64)
    run = f"{bucket}/runs/first"
    code, _, said = mgen(monkeypatch, capsys, *words, source, "--output", run)
    assert code == 0 and f"9 of 9 rows in {run}" in said
    code, told, _ = mgen(monkeypatch, capsys, "status", run)
    assert code == 0 and "9 of 9 done" in told and f"mgen merge {run}" in told
    code, told, _ = mgen(monkeypatch, capsys, "merge", run)
    assert code == 0 and told.startswith(f"{run}.parquet: 9 rows")
    code, _, said = mgen(monkeypatch, capsys, *words, source, "--output", run)
    assert code == 0 and "9 of 9 rows were done before" in said
    code, _, said = mgen(monkeypatch, capsys, *words, source, "--output", run, "--dtype", "float16")
    assert code == 1 and "holds another run" in said
    again = (*words, source, "--output", run, "--dtype", "float16", "--overwrite")
    assert mgen(monkeypatch, capsys, *again)[0] == 0
    assert list(tmp_path.iterdir()) == [], "something was left on this machine"


@pytest.mark.parametrize("form", ["csv.gz", "jsonl", "parquet", "fasta", "tsv.zst"])
def test_every_format_is_read_from_a_url(form, bucket, memory, tmp_path, catalog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["ACDE" * n for n in range(1, 40)]
    if form == "parquet":
        pq.write_table(pa.table({"sequence": texts}), tmp_path / "data.parquet")
        content = (tmp_path / "data.parquet").read_bytes()
    else:
        lines = {
            "csv.gz": ["sequence", *texts],
            "tsv.zst": ["sequence", *texts],
            "jsonl": [f'{{"sequence": "{text}"}}' for text in texts],
            "fasta": [f">{n}\n{text}" for n, text in enumerate(texts)],
        }[form]
        content = "\n".join([*lines, ""]).encode()
        if form.endswith(".gz"):
            content = gzip.compress(content)
        if form.endswith(".zst"):
            content = pa.compress(content, "zstd", asbytes=True)
    url = put(f"{bucket}/data.{form}", content)
    found = mgen_core.embed(url, backbone="toy", catalog=catalog, output=f"{memory}/run")
    assert len(found) == 39
    assert mgen_core.read(f"{memory}/run").equals(found)


def test_a_pattern_stands_for_the_files_it_matches(bucket, memory, catalog):
    for name in ("b", "a", "c"):
        put(f"{bucket}/in/{name}.csv", f"id,sequence\n{name},ACDE\n".encode())
    put(f"{bucket}/in/other.txt", b"")
    found = mgen_core.embed(f"{bucket}/in/*.csv", backbone="toy", catalog=catalog)
    assert found["id"].to_pylist() == ["a", "b", "c"]
    with pytest.raises(MgenError, match="nothing matches"):
        mgen_core.embed(f"{bucket}/in/*.tsv", backbone="toy", catalog=catalog)


def test_a_part_that_was_deleted_is_computed_again(bucket, here, tmp_path, catalog):
    data, expected = here
    run = f"{bucket}/run"
    go(data, run, catalog)
    first, *_ = before = acknowledged(run)
    fs, key = fsspec.core.url_to_fs(f"{run}/{first}")
    fs.rm_file(key)
    with pytest.raises(RunError, match="missing"):
        merged(run, tmp_path / "merged.parquet", catalog)
    go(data, run, catalog)
    assert acknowledged(run).keys() >= before.keys()
    assert merged(run, tmp_path / "merged.parquet", catalog) == expected


def test_a_log_is_read_once_at_a_start(bucket, here, tmp_path, catalog, monkeypatch):
    data, expected = here
    go(data, f"{bucket}/run", catalog)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    real, asked = fs.cat_file, []
    monkeypatch.setattr(fs, "cat_file", lambda key, **more: asked.append(key) or real(key, **more))
    objects._once.cache_clear()  # as in another process
    go(data, f"{bucket}/run", catalog)
    logs = [key for key in asked if "/done/" in key]
    assert len(logs) == len(set(logs)) == len(list((place(f"{bucket}/run") / "done").iterdir()))
    assert merged(f"{bucket}/run", tmp_path / "merged.parquet", catalog) == expected


def test_a_damaged_part_is_told(bucket, here, tmp_path, catalog):
    data, _ = here
    run = f"{bucket}/run"
    go(data, run, catalog)
    first, *_ = acknowledged(run)
    content = bytearray((place(run) / first).read_bytes())
    content[len(content) // 2] ^= 1
    put(f"{run}/{first}", bytes(content))
    with pytest.raises(RunError, match="is damaged"):
        merged(run, tmp_path / "merged.parquet", catalog)


def test_a_folder_with_other_files_is_left_alone(bucket, here, catalog):
    data, _ = here
    put(f"{bucket}/mine/thesis.tex", b"words")
    with pytest.raises(RunError, match=r"is not empty and holds no run \(thesis.tex\)"):
        go(data, f"{bucket}/mine", catalog)
    assert [path.name for path in place(f"{bucket}/mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (("--output", "s3://none-such/run"), "bucket does not exist", "check the name"),
        (("--output", "foo://x/run"), "nothing here opens foo://", "known are s3://"),
        (("--output", "adl://x/run"), "what opens adl:// is not installed", "pip install adlfs"),
        (("--weights", "s3://x/model"), "weights are not read from a URL", "copy them"),
        (("s3://none-such/more.csv",), "No such file", "check the path"),
        (("hf+s3::x://y.csv",), "nothing here opens", "known are"),
    ],
)
def test_what_cannot_be_is_told_at_once(words, what, hint, bucket, here, monkeypatch, capsys):
    command = ("embed", "--backbone", "aido_protein_dummy", here[0], "--plan-only")
    command = command[:-1] if words[0] == "--output" else command
    code, _, said = mgen(monkeypatch, capsys, *command, *words)
    told, tried = said.splitlines()[-2:]
    assert code == 1 and what in told and hint in tried


def test_no_permission_is_told_at_once(bucket, here, faulty, catalog):
    faulty.plan("403", 1, 10**9, only="PUT")
    with pytest.raises(RunError) as caught:
        go(here[0], f"{bucket}/run", catalog)
    assert "injected" in caught.value.what and "credentials" in caught.value.hint
    assert faulty.heal() == 1, "it was tried again"


def test_without_credentials(bucket, here, catalog, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(RunError) as caught:
            go(here[0], f"{bucket}/run", catalog)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert "NoCredentialsError" in caught.value.what and "credentials" in caught.value.hint
