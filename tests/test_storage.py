"""Atomic files, durable logs, the lock."""

import errno
import os
import subprocess
import sys

import pytest

from mgen_core import RunError, storage


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "part"
    storage.write_text(path, "old")

    def fail(file):
        file.write(b"half of the n")
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        storage.write_atomic(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


def test_a_full_disk_is_told_in_words(tmp_path):
    def full(file):
        file.write(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError) as caught:
        storage.write_atomic(tmp_path / "part", full)
    assert "No space left" in caught.value.what
    assert "make room" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ["", "{", '{"batch": 7', "x" * 100])
def test_a_torn_line_is_cut_off_before_the_next(tmp_path, torn):
    log = tmp_path / "log"
    log.write_text("first\n" + torn)
    storage.append_lines(log, ["second", "third"])
    assert log.read_text() == "first\nsecond\nthird\n"


def test_the_lock_is_held_by_one_process_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from mgen_core import storage\n"
        f"with storage.lock(Path({str(path)!r})): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {other.pid}"), storage.lock(path):
        pass
    other.kill()
    other.wait()
    with storage.lock(path):
        pass


def test_checksum_is_sha256sum(tmp_path):
    path = tmp_path / "file"
    written = storage.write_atomic(path, lambda file: file.write(b"ACGT" * 10**6))
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert written == (4 * 10**6, printed.stdout.split()[0])


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError) as caught:
        storage.make_folder(tmp_path / "out/parts")
    assert "a file stands" in caught.value.hint
    assert (tmp_path / "out").read_text() == "mine"
