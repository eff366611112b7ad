"""Forward passes in turns: what is learned of the memory, and groups that keep step."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import MgenError, Row
from mgen_core.plan import Batch, Work
from mgen_core.turns import OutOfMemory, Pass, PeerFailed, Turn, Turns


def passes(lengths: Sequence[Sequence[int]]) -> list[Pass]:
    """A pass for each list of row lengths; the rows' letters tell them apart."""
    found, index = [], 0
    for number, counts in enumerate(lengths):
        rows = []
        for count in counts:
            rows.append(Row(index, str(index), "A" * count))
            index += 1
        found.append(Pass(Batch(number, (), 0), Work((), ()), rows, rows))
    return found


def cost(rows: Sequence[Row]) -> int:
    return sum(len(row.data) for row in rows)


class Device:
    """Runs passes of at most `memory` tokens."""

    def __init__(self, memory: int = 10**9) -> None:
        self.memory = memory
        self.idled = 0
        self.ran: list[list[int]] = []

    def agree(self, turn: Turn) -> Turn:
        return turn

    def forward(self, rows, inputs):
        if cost(rows) > self.memory:
            raise OutOfMemory
        assert inputs == rows
        self.ran.append([row.index for row in rows])
        return {"index": [row.index for row in rows]}

    def idle(self) -> None:
        self.idled += 1


class Together:
    """Threads that agree as the ranks of a group do."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.told: list[Turn] = [Turn()] * size
        self.turns = 0

    def member(self, place: int, memory: int) -> Device:
        device = Device(memory)

        def gather(pass_: Callable[..., Any]) -> Callable[..., Any]:
            """A pass is one of all ranks: it waits for those of the others."""

            def gathered(*args: Any) -> Any:
                self.barrier.wait()
                return pass_(*args)

            return gathered

        device.forward = gather(device.forward)  # type: ignore[method-assign]
        device.idle = gather(device.idle)  # type: ignore[method-assign]

        def agree(turn: Turn) -> Turn:
            self.told[place] = turn
            self.barrier.wait()
            found = Turn(*map(max, zip(*self.told)))
            self.barrier.wait()
            self.turns += place == 0
            return found

        device.agree = agree  # type: ignore[method-assign]
        return device


def run_group(shares, memories, break_at=None, fail_at=None):
    """What each rank computed, or raised; and the turns that the group took."""
    group = Together(len(shares))
    devices = [group.member(place, memory) for place, memory in enumerate(memories)]
    ends: list[object] = [None] * len(shares)

    def work(place: int) -> None:
        def check() -> None:
            if break_at == (place, len(devices[place].ran)):
                raise MgenError("disk full")

        def use(place: int, columns: Any) -> None:
            if fail_at == (place, len(devices[place].ran)):
                raise MgenError("no such column")
            found.extend(columns["index"])

        turns = Turns(devices[place], lambda rows: rows, cost)
        found: list[int] = []
        try:
            turns.run(passes(shares[place]), lambda _, columns: use(place, columns), check=check)
            ends[place] = found
        except Exception as error:
            ends[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for another"
    return ends, devices, group.turns


LENGTHS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), max_size=5)


@given(lengths=LENGTHS, memory=st.integers(30, 200))
def test_every_row_is_computed_once_in_order_whatever_the_memory(lengths, memory):
    device, limits = Device(memory), []
    turns = Turns(device, lambda rows: rows, cost, limits.append)
    whole = passes(lengths)
    found: list[int] = []
    turns.run(whole, lambda _, columns: found.extend(columns["index"]))
    assert found == [row.index for one in whole for row in one.rows]
    assert limits == sorted(limits, reverse=True)
    if turns.limit is not None:  # at most half of what failed was tried from then on
        assert turns.limit <= max(map(sum, lengths)) // 2


@given(shares=st.lists(LENGTHS, min_size=2, max_size=4), data=st.data())
def test_ranks_take_the_same_number_of_turns(shares, data):
    memories = [data.draw(st.integers(30, 200)) for _ in shares]
    ends, devices, turns = run_group(shares, memories)
    for share, end, device in zip(shares, ends, devices):
        assert end == [row.index for one in passes(share) for row in one.rows]
        assert len(device.ran) + device.idled <= turns


def test_one_rank_out_of_memory_makes_all_of_them_use_less():
    shares = [[[10, 10, 10, 10]], [[10, 10, 10, 10], [10, 10, 10, 10]]]
    ends, devices, _ = run_group(shares, [20, 1000])
    assert ends == [list(range(4)), list(range(8))]
    assert devices[0].ran == [[0, 1], [2, 3]]
    assert devices[1].ran[0] == [0, 1, 2, 3]  # was through with it when the other failed
    assert devices[1].ran[1:] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_error_of_one_ends_all_and_nothing_of_that_turn_is_kept():
    shares = [[[1], [1], [1]]] * 3
    ends, _, _ = run_group(shares, [100] * 3, break_at=(1, 1))
    assert [type(end) for end in ends] == [PeerFailed, MgenError, PeerFailed]
    assert str(ends[1]) == "disk full"


@pytest.mark.parametrize("turn", [1, 3])
def test_what_cannot_be_used_ends_all_too(turn):
    ends, _, _ = run_group([[[1], [1], [1]]] * 2, [100] * 2, fail_at=(0, turn))
    assert str(ends[0]) == "no such column"
    # After the last turn there is nothing left in which another could wait for it.
    assert type(ends[1]) is (PeerFailed if turn == 1 else list)


def test_a_row_too_large_for_one_rank_ends_all():
    ends, _, _ = run_group([[[50]], [[5], [5]]], [40, 40])
    assert "one row alone: row 0" in str(ends[0]) and type(ends[1]) is PeerFailed


def test_a_signal_to_one_rank_stops_all_after_the_same_turn():
    group = Together(2)
    found = {}

    def work(place):
        device = group.member(place, 100)
        turns = Turns(device, lambda rows: rows, cost)
        stopped = lambda: place == 1 and len(device.ran) == 2  # noqa: E731
        found[place] = []
        use = lambda _, columns: found[place].append(columns["index"])  # noqa: E731
        turns.run(passes([[1]] * 5), use, stopped)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert found == {0: [[0], [1]], 1: [[0], [1]]}


def test_what_the_producer_raises_comes_out():
    def broken():
        yield passes([[1]])[0]
        raise MgenError("the file ends here")

    turns = Turns(Device(), lambda rows: rows, cost)
    with pytest.raises(MgenError, match="ends here"):
        turns.run(broken(), lambda piece, columns: None)
