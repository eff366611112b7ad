"""The disk fails at its k-th call, for every k: the next start makes it good, and nothing is lost.

MGEN_TEST_FAULTS=1 tries every call with every error, once and for good.
"""

import errno
import itertools
import os
import shutil

import pytest
from faults import tiny
from faults.disks import CALLS, ERRORS, Failing, Quick
from faults.tiny import another, fresh, half

from mgen_core import MgenError, storage

FULL = os.environ.get("MGEN_TEST_FAULTS") == "1"
SHORT = None  # of a write: it takes only some of the bytes
MOST = 1000

# A call that a signal interrupts is made again, by Python too: nothing interrupts it for good.
EVERY = [
    *((call, error, False) for call in CALLS for error in ERRORS),
    *((call, error, True) for call in CALLS for error in ERRORS if error != errno.EINTR),
    *(("write", SHORT, sticky) for sticky in (False, True)),
]
QUICK = {
    fresh: [
        ("open", errno.ENOSPC, False),
        ("write", errno.ENOSPC, True),
        ("write", SHORT, True),
        ("sync", errno.EIO, False),
        ("close", errno.EIO, False),
        ("rename", errno.EINTR, False),
        ("make_folder", errno.ENOSPC, False),
    ],
    half: [("truncate", errno.EIO, False), ("write", errno.EIO, False)],
    another: [("remove", errno.EIO, False), ("remove_folder", errno.EIO, False)],
}
WITHIN_A_RUN = [
    pytest.param(before, fault, id=f"{before.__name__}-{'-'.join(map(str, fault))}")
    for before in QUICK
    for fault in (EVERY if FULL else QUICK[before])
]
WITHIN_A_MERGE = [
    pytest.param(fault, id="-".join(map(str, fault))) for fault in (EVERY if FULL else QUICK[fresh])
]


def kind(fault):
    call, error, sticky = fault
    told = os.strerror(error) if error else "takes some bytes"
    return f"{call}: {told}{', for good' if sticky else ''}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    tiny.make_small(monkeypatch)
    monkeypatch.setattr(storage, "disk", Quick())


@pytest.mark.parametrize(("before", "fault"), WITHIN_A_RUN)
def test_a_run_whose_disk_fails_is_made_good_by_the_next_start(
    tmp_path, source, catalog, monkeypatch, tally, before, fault
):
    more = {"overwrite": True} if before is another else {}
    for k in range(1, MOST):
        run = tmp_path / f"{k}/run"
        run.parent.mkdir()
        before(source, run)
        disk = Failing(fault[0], k, fault[1], sticky=fault[2])
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            try:
                tiny.start(source.data, run, catalog, **more)
            except MgenError as error:
                assert disk.fired
                assert error.what and error.hint, "the user is not told what to do"
        if not disk.fired:
            break
        kept = [] if before is another else tiny.acknowledged(run)
        assert not tiny.lost(run, kept)
        with tally.recovering(kind(fault)) as check:
            tiny.start(source.data, run, catalog, **more)
            check.same(tiny.merged(run, catalog), source.merged)
        assert not tiny.lost(run, kept)
        assert tiny.temporaries(tmp_path) == []
        shutil.rmtree(run.parent)
    else:
        pytest.fail(f"a run takes over {MOST} calls")


@pytest.mark.parametrize("fault", WITHIN_A_MERGE)
def test_a_merge_whose_disk_fails_is_made_good_by_the_next_one(
    tmp_path, source, catalog, monkeypatch, tally, fault
):
    shutil.copytree(source.run, tmp_path / "run")
    before = tiny.contents(tmp_path / "run")
    target = tmp_path / "run.parquet"
    for k, old in itertools.product(range(1, MOST), (None, b"a merged file of last year")):
        target.unlink(missing_ok=True)
        if old is not None:
            target.write_bytes(old)
        disk = Failing(fault[0], k, fault[1], sticky=fault[2])
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            try:
                tiny.merged(tmp_path / "run", catalog)
            except MgenError as error:
                assert disk.fired and error.what and error.hint
                there = target.read_bytes() if target.exists() else None
                assert there in (old, source.merged), "half a file has the name of a whole one"
        if not disk.fired:
            break
        with tally.recovering(f"merge, {kind(fault)}") as check:
            check.same(tiny.merged(tmp_path / "run", catalog), source.merged)
        assert tiny.contents(tmp_path / "run") == before, "merge changed the run"
        assert tiny.temporaries(tmp_path) == []
    else:
        pytest.fail(f"a merge takes over {MOST} calls")
