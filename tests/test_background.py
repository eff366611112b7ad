"""Items made ahead and work done behind: order kept, failures heard, threads ended."""

import threading
import time

import pytest

from mgen_core.background import Behind, ahead


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("mgen-")]


def test_ahead_keeps_order_and_stays_ahead():
    made = []
    items = ahead((made.append(n) or n for n in range(20)), depth=3)
    assert next(items) == 0
    time.sleep(0.3)
    assert 2 <= len(made) <= 6  # ahead, but not the whole input
    assert list(items) == list(range(1, 20))
    assert threads() == []


def test_ahead_raises_what_the_producer_raised_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("line 2")

    seen = []
    with pytest.raises(ValueError, match="line 2"):
        for item in ahead(items()):
            seen.append(item)
    assert seen == [1]


def test_leaving_early_ends_the_thread():
    items = ahead(iter(range(10**9)))
    next(items)
    items.close()
    assert threads() == []


def test_behind_works_in_order_and_finishes_on_exit():
    done = []
    with Behind(done.extend) as behind:
        for n in range(50):
            behind.put(n)
    assert done == list(range(50))
    assert threads() == []


def test_what_waits_is_worked_on_together():
    calls, free = [], threading.Event()

    def work(numbers):
        free.wait()
        calls.append(list(numbers))

    with Behind(work, most=8) as behind:
        for n in range(7):
            behind.put(n)
        time.sleep(0.1)
        free.set()
    assert [number for call in calls for number in call] == list(range(7))
    assert len(calls) <= 2


def test_between_two_calls_it_rests_as_often_as_it_was_told():
    calls = []

    def work(numbers):
        calls.append(list(numbers))
        time.sleep(0.01)

    with Behind(work, rest=9) as behind:
        for n in range(40):
            behind.put(n)
            time.sleep(0.005)
        begun = time.monotonic()
    assert time.monotonic() - begun < 0.09, "it rested at the end"
    assert [number for call in calls for number in call] == list(range(40))
    assert len(calls) <= 6  # of 0.1 s each, in 0.2 s and more


@pytest.mark.parametrize("limit", [{"most": 4}, {"room": 40}, {"room": 100}])
def test_what_needs_room_ends_its_rest(limit):
    def work(numbers):
        time.sleep(0.01)

    begun = time.monotonic()
    with Behind(work, rest=1000, **limit) as behind:
        for size in [10] * 8 + [90]:
            behind.put(size, size)
    assert time.monotonic() - begun < 0.5


@pytest.mark.parametrize("limit", [{"most": 3}, {"room": 30}])
def test_no_more_waits_than_there_is_room_for(limit):
    taken, free = [], threading.Event()

    def work(numbers):
        taken.append(len(numbers))
        free.wait()

    with Behind(work, **limit) as behind:
        putting = threading.Thread(target=lambda: [behind.put(n, size=10) for n in range(8)])
        putting.start()
        putting.join(0.2)
        assert putting.is_alive(), "nothing held it back"
        free.set()
        putting.join()
    assert sum(taken) == 8 and max(taken) <= 3


def test_one_item_is_taken_however_large():
    done = []
    with Behind(done.extend, room=30) as behind:
        behind.put("large", size=100)
        behind.put("small", size=1)
    assert done == ["large", "small"]


def test_behind_stops_working_after_a_failure_and_says_so():
    done = []

    def work(numbers):
        if max(numbers) >= 3:
            raise OSError("disk full")
        done.extend(numbers)

    with pytest.raises(OSError, match="disk full"), Behind(work) as behind:
        for n in range(100):
            behind.put(n)
    assert done == list(range(len(done))) and len(done) <= 3
    assert threads() == []
