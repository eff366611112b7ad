"""Who may work in a run directory on a store."""

import threading
import time

import pytest
from remote.runs import go, table

from mgen_core import RunError, lease, place, storage
from mgen_core.lease import Lease


@pytest.fixture
def folder(memory):
    return place(f"{memory}/run") / "run.lock"


def waited_for(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_is_told_who_the_first_is(folder):
    import os

    with (
        storage.lock(folder),
        pytest.raises(RunError, match=f"another mgen .*-{os.getpid()}") as caught,
        storage.lock(folder),
    ):
        pass
    assert "if it was killed, wait 60 s" in caught.value.hint
    with storage.lock(folder):
        pass
    assert list(folder.iterdir()) == []


def test_ranks_share_and_the_first_sees_them_end(folder):
    with storage.lock(folder) as first:
        with pytest.raises(RunError), storage.lock(folder, shared=True):
            pass
        first.share()
        with storage.lock(folder, shared=True), storage.lock(folder, shared=True):
            assert not first.alone()
            with pytest.raises(RunError), storage.lock(folder):
                pass
        assert first.alone()


def test_of_many_that_start_at_once_at_most_one_goes_on(bucket):
    for attempt in range(3):
        folder = place(f"{bucket}/run-{attempt}") / "run.lock"
        gate, held = threading.Barrier(4), []

        def start(folder=folder, gate=gate, held=held):
            one = Lease(folder)
            gate.wait()
            try:
                one.take(shared=False)
                held.append(one)
            except RunError:
                pass

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) <= 1
        for one in held:
            one.drop()
        assert not list(folder.iterdir())


def test_what_a_killed_process_left_is_in_the_way_for_a_while(folder, hasty):
    dead = Lease(folder)
    dead.take(shared=False)
    dead._over.set()  # nobody renews it
    with pytest.raises(RunError, match="another mgen"), storage.lock(folder):
        pass

    def free():
        try:
            with storage.lock(folder):
                return True
        except RunError:
            return False

    waited_for(free)
    assert not dead.path.exists()


def test_who_renews_is_never_taken_for_dead(folder, hasty):
    with storage.lock(folder):
        end = time.monotonic() + 1.5 * lease.STALE_S
        while time.monotonic() < end:
            with pytest.raises(RunError), storage.lock(folder):
                pass
            time.sleep(0.2)


def test_who_was_taken_for_dead_acknowledges_nothing_more(folder, hasty):
    run = folder.parent
    with lease.lease(folder) as held:
        storage.append_lines(run / "done/rank-00000.jsonl", ["{}"])
        storage.remove(held.path)  # as another does, once it is old
        waited_for(lambda: held._lost)
        for write in (
            lambda: storage.append_lines(run / "done/rank-00000.jsonl", ["{}"]),
            lambda: storage.write_text(run / "run.json", "{}"),
        ):
            with pytest.raises(RunError, match="another began"):
                write()
        storage.write_text(place(f"{run}-2") / "run.json", "{}")  # not of this run
    assert len(list((run / "done").iterdir())) == 1


def test_two_runs_in_one_directory(bucket, tmp_path, catalog):
    data = table(tmp_path)
    with (
        storage.lock(place(f"{bucket}/run") / "run.lock"),
        pytest.raises(RunError, match="another mgen"),
    ):
        go(data, f"{bucket}/run", catalog)
    assert go(data, f"{bucket}/run", catalog).done == 32


def test_a_store_that_fails_to_renew_is_asked_again(bucket, faulty, hasty):
    folder = place(f"{bucket}/run") / "run.lock"
    with lease.lease(folder) as held:
        before = held.path.stat().modified
        faulty.plan("500", 1, 10**9)
        time.sleep(0.5)
        assert faulty.heal() > 0
        waited_for(lambda: held.path.stat().modified > before)
        held.check()
