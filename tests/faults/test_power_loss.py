"""The machine loses power before the k-th change of the disk, for every k.

What was not made durable by then is lost or torn; what was acknowledged must be there. With
MGEN_TEST_FAULTS=1 each k is tried with many a selection of what came through.
"""

import contextlib
import os
import random
import shutil

import pytest
from faults import tiny
from faults.disks import PowerLost, Quick, Volatile
from faults.tiny import another, fresh, half

from mgen_core import RunError, storage

TRIES = 8 if os.environ.get("MGEN_TEST_FAULTS") == "1" else 1
MOST = 1000


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    tiny.make_small(monkeypatch)
    monkeypatch.setattr(storage, "disk", Quick())


@pytest.fixture
def told(monkeypatch):
    """The lines that some process was told are durable, by log."""
    lines = []
    append = storage.append_lines

    def heard(path, more):
        append(path, more)
        lines.extend(more)

    monkeypatch.setattr(storage, "append_lines", heard)
    return lines


@pytest.mark.parametrize("before", [fresh, half, another])
def test_what_was_acknowledged_outlives_the_power(
    tmp_path, source, catalog, monkeypatch, tally, told, before
):
    more = {"overwrite": True} if before is another else {}
    disk_folder = tmp_path / "disk"
    run = disk_folder / "run"
    for k, seed in ((k, seed) for k in range(1, MOST) for seed in range(TRIES)):
        shutil.rmtree(disk_folder, ignore_errors=True)
        disk_folder.mkdir()
        before(source, run)
        told[:] = [] if before is another else tiny.lines(run)
        disk = Volatile(disk_folder, k)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            with contextlib.suppress(PowerLost):
                tiny.start(source.data, run, catalog, **more)
        if not disk.lost:
            break
        disk.restore(random.Random(1000 * k + seed))
        kept = tiny.parts(told)
        assert not tiny.lost(run, kept), "acknowledged, and gone with the power"
        with tally.recovering(f"power loss, {before.__name__}") as check:
            try:
                tiny.start(source.data, run, catalog)
            except RunError as error:  # it was lost before the new run took its place
                assert before is another and not kept and "holds another run" in error.what
                tiny.start(source.data, run, catalog, **more)
            check.same(tiny.merged(run, catalog), source.merged)
        assert not tiny.lost(run, kept)
        assert tiny.temporaries(disk_folder) == []
    else:
        pytest.fail(f"a run makes over {MOST} changes")


def test_killed_and_then_the_power_goes(tmp_path, source, catalog, monkeypatch, tally):
    """What a killed process had not made durable, and the next one counts as done."""
    disk_folder = tmp_path / "disk"
    run = disk_folder / "run"
    for k, seed in ((k, seed) for k in range(1, MOST) for seed in range(TRIES)):
        shutil.rmtree(disk_folder, ignore_errors=True)
        disk_folder.mkdir()
        disk = Volatile(disk_folder, k)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            with contextlib.suppress(PowerLost):
                tiny.start(source.data, run, catalog)
            if not disk.lost:
                break
            disk.go_on(10 * MOST)
            tiny.start(source.data, run, catalog)
        disk.restore(random.Random(1000 * k + seed))
        with tally.recovering("killed, then power loss") as check:
            check.same(tiny.merged(run, catalog), source.merged)
    else:
        pytest.fail(f"a run makes over {MOST} changes")


def test_a_merged_file_is_the_old_one_or_the_new_one(tmp_path, source, catalog, monkeypatch, tally):
    disk_folder = tmp_path / "disk"
    old = b"a merged file of last year"
    for k, seed in ((k, seed) for k in range(1, MOST) for seed in range(TRIES)):
        shutil.rmtree(disk_folder, ignore_errors=True)
        shutil.copytree(source.run, disk_folder / "run")
        target = disk_folder / "run.parquet"
        target.write_bytes(old)
        disk = Volatile(disk_folder, k)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            with contextlib.suppress(PowerLost):
                tiny.merged(disk_folder / "run", catalog)
        if not disk.lost:
            break
        disk.restore(random.Random(1000 * k + seed))
        assert target.read_bytes() in (old, source.merged)
        with tally.recovering("power loss while merging") as check:
            check.same(tiny.merged(disk_folder / "run", catalog), source.merged)
    disk.restore(random.Random(k))  # the power goes when all is said and done
    assert target.read_bytes() == source.merged
