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
HOW = {
    "a file": {},
    "files": {"rows_per_file": 4},
    "a file for the parts": {"delete_parts": True},
    "files for the parts": {"rows_per_file": 4, "delete_parts": True},
}
QUICK_MERGE = {
    "a file": QUICK[fresh],
    "files": [("write", errno.ENOSPC, False), ("rename", errno.EIO, False)],
    "a file for the parts": [("sync", errno.EIO, False), ("remove", errno.EIO, True)],
    "files for the parts": [("rename", errno.EIO, True), ("remove", errno.EIO, False)],
}
WITHIN_A_MERGE = [
    pytest.param(how, fault, id=f"{how}-{'-'.join(map(str, fault))}")
    for how in HOW
    for fault in (EVERY if FULL else QUICK_MERGE[how])
]
PIECES = {f"run-{number:05d}-of-00002.parquet" for number in range(2)}
OLD = dict.fromkeys(["run.parquet", *PIECES], b"of a merge of last year")


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


@pytest.mark.parametrize(("how", "fault"), WITHIN_A_MERGE)
def test_a_merge_whose_disk_fails_is_made_good_by_the_next_one(
    tmp_path, source, catalog, monkeypatch, tally, how, fault
):
    expected = undisturbed(tmp_path / "undisturbed", source, catalog, how)
    for k, old in itertools.product(range(1, MOST), ({}, OLD)):
        run = tmp_path / f"{k}-{len(old)}/run"
        shutil.copytree(source.run, run)
        before = tiny.contents(run)
        for name, content in old.items():
            (run.parent / name).write_bytes(content)
        disk = Failing(fault[0], k, fault[1], sticky=fault[2])
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            try:
                tiny.merged(run, catalog, **HOW[how])
            except MgenError as error:
                assert disk.fired and error.what and error.hint
        there = results(run)
        for name, content in there.items():
            assert content in (old.get(name), expected.get(name)), "half a file has a whole name"
        if tiny.contents(run) != before:
            assert HOW[how].get("delete_parts"), "merge changed the run"
            assert expected.items() <= there.items(), "parts were deleted before the files stood"
        if not disk.fired:
            break
        with tally.recovering(f"merge to {how}, {kind(fault)}") as check:
            tiny.merged(run, catalog, **HOW[how])
            for name, content in expected.items():
                check.same(run.parent / name, content)
        untouched = {
            name: old[name] for name in old if (name in PIECES) != ("rows_per_file" in HOW[how])
        }
        assert results(run) == {**untouched, **expected}
        parts = list(run.glob("parts/*/*"))
        assert not parts if HOW[how].get("delete_parts") else tiny.contents(run) == before
        assert tiny.temporaries(tmp_path) == []
        shutil.rmtree(run.parent)
    else:
        pytest.fail(f"a merge takes over {MOST} calls")


def undisturbed(folder, source, catalog, how):
    """The files of a merge of this kind, by name."""
    shutil.copytree(source.run, folder / "run")
    tiny.merged(folder / "run", catalog, **HOW[how])
    return results(folder / "run")


def results(run):
    """The merged files beside a run, by name."""
    return {path.name: path.read_bytes() for path in run.parent.glob("*.parquet")}
