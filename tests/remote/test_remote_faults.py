"""The store fails at its k-th request: what is acknowledged stays, and the same command goes on.

MGEN_TEST_FAULTS=1 tries every request with every fault, once and for good, and kills processes.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import fsspec
import pytest
from faults.disks import Failing
from faults.tally import TALLY
from remote.bucket import FAULTS
from remote.runs import acknowledged, go, logged, merged, table

from mgen_core import MgenError, RunError, place, storage, upload
from mgen_core.lease import Lease

FULL = os.environ.get("MGEN_TEST_FAULTS") == "1"
FOR_GOOD = 10**9
QUICK_BLIPS = [("503", 9), ("answer lost", 17), ("cut short", 26)]
QUICK_OUTAGES = [("500", 5), ("dropped", 29)]


@pytest.fixture(scope="module")
def here(tmp_path_factory, catalog):
    """A table, and the merged bytes of a run of it on this machine."""
    folder = tmp_path_factory.mktemp("here")
    data = table(folder)
    go(data, folder / "run", catalog)
    return data, merged(folder / "run", folder / "run.parquet", catalog)


@pytest.fixture
def source(bucket, here):
    """The table, on the store."""
    fs, key = fsspec.core.url_to_fs(f"{bucket}/data.csv")
    fs.pipe_file(key, here[0].read_bytes())
    return f"{bucket}/data.csv"


def left_by_the_dead(run):
    """As if a minute had passed."""
    storage.remove(place(run) / "run.lock")


def recovered(what, source, run, expected, to, catalog):
    """Start again where nothing fails; all that was acknowledged is there still."""
    left_by_the_dead(run)
    kept = acknowledged(run)
    with TALLY.recovering(what) as check:
        go(source, run, catalog)
        merged(run, to, catalog)
    check.same(to, expected)
    assert kept.items() <= acknowledged(run).items(), "an acknowledged part was lost"


def tried(fault, at, faulty, bucket, source, expected, to, catalog, length=1):
    """One run with a fault; False when it ended before the fault came."""
    run = f"{bucket}/run-{fault.replace(' ', '-')}-{at}-{length}"
    faulty.plan(fault, at, length)
    try:
        go(source, run, catalog)
    except MgenError as error:
        assert error.what and error.hint, "the user is not told what to do"
        assert length > 1, f"one {fault} ended the run: {error.what}"
    if not faulty.heal():
        return False
    what = f"S3: {fault}{', for good' if length > 1 else ''}"
    recovered(what, source, run, expected, to, catalog)
    return True


@pytest.mark.parametrize(("fault", "at"), [] if FULL else QUICK_BLIPS)
def test_a_request_that_fails_once_is_made_again(
    fault, at, faulty, bucket, source, here, tmp_path, catalog
):
    assert tried(fault, at, faulty, bucket, source, here[1], tmp_path / "to.parquet", catalog)


@pytest.mark.parametrize(("fault", "at"), [] if FULL else QUICK_OUTAGES)
def test_a_store_that_is_gone_for_good_loses_nothing(
    fault, at, faulty, bucket, source, here, tmp_path, catalog
):
    to = tmp_path / "to.parquet"
    assert tried(fault, at, faulty, bucket, source, here[1], to, catalog, FOR_GOOD)


@pytest.mark.skipif(not FULL, reason="MGEN_TEST_FAULTS=1 tries every request")
@pytest.mark.parametrize("length", [1, FOR_GOOD])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_a_run(fault, length, faulty, bucket, source, here, tmp_path, catalog):
    to = tmp_path / "to.parquet"
    for at in itertools.count(1, 9 if fault == "late" else 1):  # late ones take their time
        if not tried(fault, at, faulty, bucket, source, here[1], to, catalog, length):
            break
    assert at > 30


@pytest.mark.parametrize("fault", FAULTS if FULL else ("cut short",))
def test_a_merge_whose_store_fails_leaves_no_half_file(
    fault, faulty, bucket, source, here, tmp_path, catalog
):
    go(source, f"{bucket}/run", catalog)
    for at in range(1, 99, 1 if FULL and fault != "late" else 11):
        to = f"{bucket}/{fault[:3]}-{at}.parquet"
        faulty.plan(fault, at, FOR_GOOD)
        try:
            merged(f"{bucket}/run", to, catalog)
        except RunError as error:
            assert error.what and error.hint
        if not faulty.heal():
            break
        path = place(to)
        assert not path.exists() or path.read_bytes() == here[1]
        assert merged(f"{bucket}/run", to, catalog) == here[1]
    assert at > 7


def test_a_large_file_that_fails_half_way_is_not_there(faulty, bucket, monkeypatch):
    monkeypatch.setattr(upload, "SMALL", 5 << 20)
    path = place(f"{bucket}/large")

    def write(file, broken=False):
        for _ in range(16):
            file.write(bytes(1 << 20))
        if broken:
            raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError):
        storage.write_atomic(path, partial(write, broken=True))
    fs, key = fsspec.core.url_to_fs(bucket)
    assert not path.exists()
    assert not fs.call_s3("list_multipart_uploads", Bucket=key).get("Uploads")
    # The third request that puts something is a piece of the file.
    faulty.plan("500", 3, FOR_GOOD, only="PUT")
    with pytest.raises(RunError, match="cannot write"):
        storage.write_atomic(path, write)
    faulty.heal()
    assert not path.exists()
    assert not fs.call_s3("list_multipart_uploads", Bucket=key).get("Uploads")
    written = storage.write_atomic(path, write)
    assert path.stat().st_size == written.bytes == 16 << 20


def test_a_part_that_is_not_all_there_is_not_acknowledged(bucket, source, catalog, monkeypatch):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    real = fs.pipe_file

    def short(key, data):
        real(key, data[: len(data) // 2] if "/parts/" in key else data)

    monkeypatch.setattr(fs, "pipe_file", short)
    with pytest.raises(RunError, match="bytes"):
        go(source, f"{bucket}/run", catalog)
    assert acknowledged(f"{bucket}/run") == {}


@pytest.mark.skipif(not FULL, reason="MGEN_TEST_FAULTS=1 kills processes")
@pytest.mark.parametrize("devices", ["1", "2"])
def test_killed_again_and_again(devices, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MGEN_LEASE_SECONDS", "2")
    monkeypatch.setenv("MGEN_SILENT_SECONDS", "3")
    draw = random.Random(7)
    texts = ["".join(draw.choices("ACGT", k=draw.randint(20, 400))) for _ in range(300)]
    data = tmp_path / "data.fna"
    data.write_text("".join(f">g{n}\n{text}\n" for n, text in enumerate(texts)))
    program = [sys.executable, "-m", "mgen_core"]

    def words(output, ranks):
        return [*program, "embed", str(data), "--backbone", "aido_dna_dummy", "--output", output,
                "--batch-tokens", "512", "--devices", ranks, "--pool", "tokens"]  # fmt: skip

    def wait_and_merge(output, to):
        deadline = time.monotonic() + 60
        while True:
            ended = subprocess.run(words(output, devices), capture_output=True, text=True)
            if ended.returncode == 0:
                break
            assert "another mgen" in ended.stderr and time.monotonic() < deadline, ended.stderr
        subprocess.run([*program, "merge", output, "--to", str(to)], check=True)
        return to

    subprocess.run(words(str(tmp_path / "here"), "1"), check=True, capture_output=True)
    merge = [*program, "merge", str(tmp_path / "here"), "--to", str(tmp_path / "here.parquet")]
    subprocess.run(merge, check=True)
    expected = (tmp_path / "here.parquet").read_bytes()
    for number in range(5):
        run = f"{bucket}/killed-{number}"
        with subprocess.Popen(
            words(run, devices), stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            while process.poll() is None and not place(f"{run}/done").exists():
                time.sleep(0.01)
            time.sleep(draw.random() * 0.5)
            os.killpg(process.pid, signal.SIGKILL)
        kept = acknowledged(run)
        with TALLY.recovering(f"S3: SIGKILL, {devices} ranks") as check:
            to = wait_and_merge(run, tmp_path / "merged.parquet")
        check.same(to, expected)
        assert kept.items() <= acknowledged(run).items()
        assert logged(run) == set(acknowledged(run))
        assert Lease(place(run) / "run.lock").alone()


def test_no_room_to_make_the_merged_file_in(memory, here, catalog, monkeypatch, tmp_path):
    go(here[0], f"{memory}/run", catalog)
    to = f"{memory}/merged.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        patch.setattr(storage, "free_bytes", lambda path: 100 if path == tmp_path else None)
        with pytest.raises(RunError, match=f"are free in {tmp_path}$") as caught:
            merged(f"{memory}/run", to, catalog)
        assert "TMPDIR" in caught.value.hint
        patch.setattr(storage, "free_bytes", lambda path: None)
        patch.setattr(storage, "disk", Failing("write", 1, errno.ENOSPC))
        with pytest.raises(RunError, match=f"{tmp_path}.* No space left on device") as caught:
            merged(f"{memory}/run", to, catalog)
        assert to in caught.value.what and "TMPDIR" in caught.value.hint
    assert not place(to).exists() and not list(tmp_path.iterdir())
    assert merged(f"{memory}/run", to, catalog) == here[1]
