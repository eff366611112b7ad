"""Processes that are killed, disks that are full, files that were damaged: real ones, with figures.

Takes minutes: MGEN_TEST_FAULTS=1 (`nox -s faults`), which ends with a table of what came of them.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from faults import commands, tiny
from faults.commands import Child, embed, merge, merged, mgen

from mgen_core import MgenError, RunError, storage

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("MGEN_TEST_FAULTS") != "1", reason="takes minutes: MGEN_TEST_FAULTS=1"
    ),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
DRAW = random.Random()


class Whole:
    """A table, an undisturbed run over it, and how long that took."""

    def __init__(self, folder):
        self.data, self.run, said = (
            commands.table(folder / "in.csv"),
            folder / "run",
            folder / "said",
        )
        child = Child(embed(self.data, self.run), said)
        assert child.wait() == 0, said.read_text()
        self.seconds = child.seconds
        child = Child(merge(self.run), said)
        assert child.wait() == 0, said.read_text()
        self.merging = child.seconds
        self.merged = merged(self.run).read_bytes()
        self.batches = json.loads((self.run / "run.json").read_text())["plan"]["batches"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def said(tmp_path):
    return tmp_path / "said"


def finish(whole, run, said):
    """Start the same command again, and merge."""
    assert mgen(embed(whole.data, run), said) == 0, said.read_text()
    assert mgen(merge(run), said) == 0, said.read_text()


def no_traceback(said):
    assert "Traceback" not in said.read_text(), said.read_text()


# --------------------------------------------------------------------------- processes


def test_killed_at_random_times(tmp_path, whole, tally, said):
    for number in range(100):
        run = tmp_path / f"{number}/run"
        run.parent.mkdir()
        child = Child(embed(whole.data, run), said)
        time.sleep(DRAW.random() * whole.seconds)
        child.send(signal.SIGKILL)
        child.wait()
        kept = tiny.acknowledged(run)
        with tally.recovering("SIGKILL at a random time") as check:
            finish(whole, run, said)
            check.same(merged(run), whole.merged)
        assert not tiny.lost(run, kept)
        assert tiny.temporaries(run.parent) == []
        shutil.rmtree(run.parent)
    no_traceback(said)


@pytest.mark.parametrize("victim", ["all", "one rank"])
def test_killed_with_two_ranks(tmp_path, whole, tally, victim):
    start = [
        sys.executable,
        "-m",
        "mgen_core",
        *embed(whole.data, tmp_path / "run", "--devices", 2),
    ]
    for _ in range(3):
        run = tmp_path / "run"
        group = subprocess.Popen(start, stderr=subprocess.DEVNULL, start_new_session=True)
        while group.poll() is None and not tiny.acknowledged(run):
            time.sleep(0.001)
        time.sleep(DRAW.random() * whole.seconds / 2)
        with contextlib.suppress(ProcessLookupError):
            if victim == "all":
                os.killpg(group.pid, signal.SIGKILL)
            else:
                os.kill(DRAW.choice(ranks_of(group.pid)), signal.SIGKILL)
        group.wait(timeout=120)
        with contextlib.suppress(ProcessLookupError):  # its ranks may take longer to be gone
            while victim == "all":
                os.killpg(group.pid, 0)
                time.sleep(0.001)
        kept = tiny.acknowledged(run)
        with tally.recovering(f"--devices 2, SIGKILL of {victim}") as check:
            subprocess.run(start, stderr=subprocess.DEVNULL, check=True)
            subprocess.run(
                [sys.executable, "-m", "mgen_core", *merge(run)],
                stderr=subprocess.DEVNULL,
                check=True,
            )
            check.same(merged(run), whole.merged)
        assert not tiny.lost(run, kept)
        shutil.rmtree(run)


def ranks_of(process):
    """The processes that it has started, or itself where it has none."""
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()] or [process]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_at_random_times(tmp_path, whole, tally, said, number, code):
    for place in range(40):
        run = tmp_path / f"{place}/run"
        run.parent.mkdir()
        child = Child(embed(whole.data, run), said)
        time.sleep(DRAW.random() * whole.seconds)
        child.send(number)
        assert child.wait() in (code, 0), said.read_text()
        assert tiny.temporaries(run.parent) == []
        parts = {str(path.relative_to(run)) for path in run.glob("parts/*/*")}
        kept = tiny.acknowledged(run)
        assert parts == {part.file for part in kept}, "a part that no line names"
        with tally.recovering("SIGTERM" if code == 143 else "Ctrl-C") as check:
            finish(whole, run, said)
            check.same(merged(run), whole.merged)
        assert not tiny.lost(run, kept)
        shutil.rmtree(run.parent)
    no_traceback(said)


def test_a_merge_killed_at_random_times(tmp_path, whole, tally, said):
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    before = tiny.contents(run)
    for number in range(60):
        old = None if number % 2 else b"a merged file of last year"
        merged(run).unlink(missing_ok=True)
        if old is not None:
            merged(run).write_bytes(old)
        child = Child(merge(run), said)
        time.sleep(DRAW.random() * whole.merging)
        child.send(signal.SIGKILL)
        child.wait()
        there = merged(run).read_bytes() if merged(run).exists() else None
        assert there in (old, whole.merged)
        with tally.recovering("merge, SIGKILL at a random time") as check:
            assert mgen(merge(run), said) == 0
            check.same(merged(run), whole.merged)
        assert tiny.contents(run) == before
        assert tiny.temporaries(tmp_path) == []
    no_traceback(said)


def test_two_runs_at_once_in_one_directory(tmp_path, whole, tally, said):
    for number in range(20):
        run = tmp_path / f"{number}/run"
        run.parent.mkdir()
        pair = [Child(embed(whole.data, run), tmp_path / f"said-{n}") for n in (0, 1)]
        codes = sorted(child.wait() for child in pair)
        assert codes in ([0, 1], [0, 0])  # both, when one began after the other was through
        with tally.recovering("two runs at once") as check:
            finish(whole, run, said)
            check.same(merged(run), whole.merged)
    told = (tmp_path / "said-0").read_text() + (tmp_path / "said-1").read_text()
    assert "is at work in" in told and "Traceback" not in told


# --------------------------------------------------------------------------- disks


@contextlib.contextmanager
def mounted(folder, kilobytes):
    """A disk of so few kilobytes; yields a function that mounts it anew with other options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk takes root")
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "mgen-faults", folder],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", folder], check=True
        )
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path, whole, tally, said, monkeypatch):
    with mounted(tmp_path / "disk", 8) as remount:
        run = tmp_path / "disk/run"
        monkeypatch.setattr(storage, "free_bytes", lambda path: 2**40)  # it fills up later on
        needed = sum(path.stat().st_size for path in whole.run.rglob("*") if path.is_file()) // 1024
        for kilobytes in range(8, 16 * needed, 4):
            shutil.rmtree(run, ignore_errors=True)
            remount(f"size={kilobytes}k")
            said.unlink(missing_ok=True)
            if mgen(embed(whole.data, run), said) == 0:
                assert kilobytes > 8, "the disk was never full"
                break
            told = said.read_text()
            assert "No space left on device" in told and "make room" in told, told
            no_traceback(said)
            kept = tiny.acknowledged(run)
            assert tiny.temporaries(run.parent) == []
            remount("size=64m")  # how many parts there are depends on how fast they are written
            with tally.recovering("full disk") as check:
                finish(whole, run, said)
                check.same(merged(run), whole.merged)
            assert not tiny.lost(run, kept)
            merged(run).unlink()
        else:
            pytest.fail("the disk was always full")


def test_a_merge_to_a_full_disk(tmp_path, whole, tally, said, monkeypatch):
    with mounted(tmp_path / "disk", 8) as remount:
        shutil.copytree(whole.run, tmp_path / "run")
        target = tmp_path / "disk/run.parquet"
        words = ["merge", str(tmp_path / "run"), "--to", str(target)]
        assert mgen(words, said) == 1
        assert "GB are free" in said.read_text(), "told before the first byte"
        monkeypatch.setattr(storage, "free_bytes", lambda path: 2**40)
        assert mgen(words, said) == 1
        assert "No space left on device" in said.read_text()
        assert list((tmp_path / "disk").iterdir()) == []
        remount("size=8m")
        with tally.recovering("merge to a full disk") as check:
            assert mgen(words, said) == 0
            check.same(target, whole.merged)
        no_traceback(said)


def test_a_read_only_disk(tmp_path, whole, tally, said):
    with mounted(tmp_path / "disk", 2**14) as remount:
        run = tmp_path / "disk/run"
        remount("ro")
        assert mgen(embed(whole.data, run), said) == 1
        assert "Read-only file system" in said.read_text()
        remount("rw")
        shutil.copytree(whole.run, run)
        log = run / "done/rank-00000.jsonl"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:1]))
        kept = tiny.acknowledged(run)
        remount("ro")
        assert mgen(embed(whole.data, run), said) == 1
        assert mgen(["merge", str(run), "--to", str(tmp_path / "out.parquet")], said) == 1
        assert "are missing" in said.read_text()
        remount("rw")
        with tally.recovering("read-only disk") as check:
            finish(whole, run, said)
            check.same(merged(run), whole.merged)
        assert not tiny.lost(run, kept)
        remount("ro")  # a finished run can be read from such a disk
        out = tmp_path / "out.parquet"
        assert mgen(["merge", str(run), "--to", str(out)], said) == 0
        assert out.read_bytes() == whole.merged
        no_traceback(said)


# --------------------------------------------------------------------------- damaged files


def flipped(data, draw):
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def garbage(data, draw):
    place = draw.randrange(len(data))
    rubbish = bytes(draw.randrange(256) for _ in range(draw.randint(1, 200)))
    return data[:place] + rubbish + data[place:]


@pytest.fixture
def small(tmp_path, source, catalog, monkeypatch):
    """A copy of the tiny run; a function that makes another, and one that makes it whole again."""
    tiny.make_small(monkeypatch)
    numbers = itertools.count()

    def copy():
        folder = tmp_path / str(next(numbers))
        shutil.copytree(source.run, folder / "run")
        return folder / "run"

    return copy


def refused_or_right(run, source, catalog, tally, fault):
    """Merge, then do what its hint says until it merges; never other rows than there must be."""
    with tally.recovering(fault) as check:
        steps = {
            "at once": lambda: None,
            "by the next start": lambda: tiny.start(source.data, run, catalog),
            "by --overwrite": lambda: tiny.start(source.data, run, catalog, overwrite=True),
        }
        for how, step in steps.items():
            try:
                step()
                check.same(tiny.merged(run, catalog), source.merged)
                return how
            except MgenError as error:
                assert error.hint
                delete_what_it_names(error, run)
        pytest.fail("not even --overwrite helps")


def delete_what_it_names(error, run):
    if error.hint.startswith("delete the file"):
        storage.remove(run / error.what.partition(f"{run}/")[2].partition(" ")[0])


@pytest.mark.parametrize("damage", [flipped, cut])
def test_a_damaged_part(small, source, catalog, tally, damage):
    for _ in range(100):
        run = small()
        part = run / DRAW.choice(tiny.acknowledged(run)).file
        part.write_bytes(damage(part.read_bytes(), DRAW))
        fault = "a bit of a part flipped" if damage is flipped else "a part cut off"
        assert refused_or_right(run, source, catalog, tally, fault) == "by the next start"
        shutil.rmtree(run.parent)


def test_a_deleted_part(small, source, catalog, tally):
    for number, part in enumerate(tiny.acknowledged(source.run)):
        run = small()
        (run / part.file).unlink()
        if number % 2:
            with pytest.raises(RunError, match="are missing"):
                tiny.merged(run, catalog)
        found = refused_or_right(run, source, catalog, tally, "a part deleted")
        assert found == "by the next start"


@pytest.mark.parametrize("name", ["plan.jsonl", "rank-00000/*"])
def test_damaged_rows_set_aside(small, source, catalog, tally, name):
    for damage in (flipped, cut, garbage) * 20:
        run = small()
        file = next((run / "failed").glob(name))
        file.write_bytes(damage(file.read_bytes(), DRAW))
        refused_or_right(run, source, catalog, tally, "a list of rows set aside damaged")
        shutil.rmtree(run.parent)


def test_a_done_log_torn_at_every_byte(small, source, catalog, tally):
    whole = (source.run / "done/rank-00000.jsonl").read_bytes()
    for length in range(0, len(whole), 7):
        run = small()
        (run / "done/rank-00000.jsonl").write_bytes(whole[:length])
        found = refused_or_right(run, source, catalog, tally, "done-log torn")
        assert found == "by the next start"
        shutil.rmtree(run.parent)


@pytest.mark.parametrize("damage", [flipped, garbage])
def test_a_damaged_done_log(small, source, catalog, tally, damage):
    for _ in range(150):
        run = small()
        log = run / "done/rank-00000.jsonl"
        log.write_bytes(damage(log.read_bytes(), DRAW))
        told = "a bit of the done-log flipped" if damage is flipped else "garbage in the done-log"
        refused_or_right(run, source, catalog, tally, told)
        shutil.rmtree(run.parent)


@pytest.mark.parametrize("damage", [flipped, cut, garbage])
def test_a_damaged_record(small, source, catalog, tally, damage):
    for _ in range(100):
        run = small()
        record = run / "run.json"
        record.write_bytes(damage(record.read_bytes(), DRAW))
        refused_or_right(run, source, catalog, tally, f"run.json {damage.__name__}")
        shutil.rmtree(run.parent)


# --------------------------------------------------------------------------- the world around


def test_an_input_written_to_while_it_is_read(tmp_path, whole, tally, said):
    before = whole.data.read_bytes()
    for number in range(40):
        run, data = tmp_path / f"{number}/run", tmp_path / f"{number}/in.csv"
        run.parent.mkdir()
        data.write_bytes(before)
        child = Child(embed(data, run), said)
        time.sleep(DRAW.random() * whole.seconds)
        data.write_bytes(flipped_letter(before))
        code = child.wait()
        data.write_bytes(before)
        with tally.recovering("input written to while it is read") as check:
            if mgen(embed(data, run), said):  # the other input was there from the start
                told = said.read_text()
                assert "input has changed" in told or "its plan differs" in told, told
                assert mgen(embed(data, run, "--overwrite"), said) == 0
            assert mgen(merge(run), said) == 0
            check.same(merged(run), whole.merged)
        assert code in (0, 1)
    no_traceback(said)


def flipped_letter(data):
    """Another table of the same length."""
    place = DRAW.choice([n for n, byte in enumerate(data) if byte == ord("A")])
    return data[:place] + b"C" + data[place + 1 :]


@pytest.mark.parametrize("clock", ["time", "monotonic", "perf_counter"])
def test_clocks_that_jump(tmp_path, source, catalog, monkeypatch, tally, clock):
    tiny.make_small(monkeypatch)
    for number in range(10):
        run = tmp_path / f"{number}/run"
        run.parent.mkdir()
        with monkeypatch.context() as patch, tally.recovering(f"clock jumps: {clock}") as check:
            patch.setattr(time, clock, jumping(getattr(time, clock)))
            tiny.start(source.data, run, catalog)
            check.same(tiny.merged(run, catalog), source.merged)


def jumping(clock):
    return lambda: clock() + DRAW.uniform(-1e6, 1e6)


def test_four_thousand_parts(tmp_path, whole, tally, said):
    data = commands.table(tmp_path / "in.csv", rows=4500)
    words = embed(data, tmp_path / "run", "--batch-tokens", 1)  # a batch a row

    def a_part_a_batch():
        from mgen_core import parts

        parts.PART_BYTES = 0

    assert Child(words, said, a_part_a_batch).wait() == 0, said.read_text()
    run = tmp_path / "run"
    assert len(list(run.glob("parts/*/*"))) > 4000
    assert mgen(merge(run), said) == 0, said.read_text()
    expected = merged(run).read_bytes()
    log = run / "done/rank-00000.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2000]))
    with tally.recovering("4,000 parts, half of them lost") as check:
        assert Child(words, said, a_part_a_batch).wait() == 0
        assert mgen(merge(run), said) == 0
        check.same(merged(run), expected)
    assert log.read_bytes().splitlines(keepends=True)[:2000] == lines[:2000]
    no_traceback(said)
