"""Forward passes in turns: what is learned of the memory, rows that fail, groups in step."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import MgenError, Row, RowError
from mgen_core.plan import Batch, Work
from mgen_core.turns import Fault, OutOfMemory, Pass, PeerFailed, Turn, Turns, collated


def rows_of(lengths: Sequence[Sequence[int]]) -> list[list[Row]]:
    """Rows of these lengths, numbered through."""
    numbers = itertools.count()
    named = lambda count: Row(number := next(numbers), str(number), "A" * count)  # noqa: E731
    return [[named(count) for count in counts] for counts in lengths]


def passes(lengths: Sequence[Sequence[int]], device: Any = None) -> list[Pass]:
    """A pass for each list of row lengths, collated by the device if there is one."""
    return [
        Pass(Batch(number, (), 0), Work((), ()), rows, collated(device, rows) if device else rows)
        for number, rows in enumerate(rows_of(lengths))
    ]


def cost(rows: Sequence[Row]) -> int:
    return sum(len(row.data) for row in rows)


class Device:
    """Runs passes of at most `memory` tokens, without rows that are `bad` in a place."""

    def __init__(self, memory: int = 10**9, bad: Mapping[int, str] = MappingProxyType({})) -> None:
        self.memory = memory
        self.bad = bad
        self.idled = 0
        self.ran: list[list[int]] = []

    def agree(self, turn: Turn) -> Turn:
        return turn

    def check(self, rows: Sequence[Row], place: str) -> None:
        for row in rows:
            if self.bad.get(row.index) == place:
                raise RowError(f"bad in {place}")

    def collate(self, rows):
        self.check(rows, "collate")
        return rows

    def forward(self, rows, inputs):
        if cost(rows) > self.memory:
            raise OutOfMemory
        assert inputs == rows
        self.check(rows, "forward")
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

    def member(
        self, place: int, memory: int, bad: Mapping[int, str] = MappingProxyType({})
    ) -> Device:
        device = Device(memory, bad)

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


def run_group(shares, memories, break_at=None, fail_at=None, bad=None):
    """What each rank computed, or raised; and the turns that the group took.

    A row that was set aside stands there as its reason.
    """
    group = Together(len(shares))
    bad = bad or [{}] * len(shares)
    devices = [group.member(place, *of_rank) for place, of_rank in enumerate(zip(memories, bad))]
    ends: list[object] = [None] * len(shares)

    def work(place: int) -> None:
        def check() -> None:
            if break_at == (place, len(devices[place].ran)):
                raise MgenError("disk full")

        def use(place: int, columns: Any) -> None:
            if fail_at == (place, len(devices[place].ran)):
                raise MgenError("no such column")
            found.extend([columns.reason] if isinstance(columns, Fault) else columns["index"])

        turns = Turns(devices[place], cost)
        found: list[int] = []
        work = passes(shares[place], devices[place])
        try:
            turns.run(work, lambda _, columns: use(place, columns), check=check)
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
    turns = Turns(device, cost, limits.append)
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


def test_a_row_too_large_for_one_rank_is_set_aside_there():
    ends, _, turns = run_group([[[50, 3], [50]], [[5], [5]]], [40, 40])
    alone = "out of memory with one row alone: 50 tokens"
    assert ends == [[alone, 1, alone], [0, 1]]
    assert turns == 4  # two rows of one pass, tried together first, and the other pass


BAD = st.dictionaries(st.integers(0, 29), st.sampled_from(["collate", "forward"]), max_size=4)


@given(shares=st.lists(LENGTHS, min_size=1, max_size=3), data=st.data())
def test_a_row_that_fails_is_set_aside_on_its_rank_and_no_other(shares, data):
    memories = [data.draw(st.integers(30, 200)) for _ in shares]
    bad = [data.draw(BAD) for _ in shares]
    ends, _, _ = run_group(shares, memories, bad=bad)
    for share, end, places in zip(shares, ends, bad):
        rows = [row.index for rows in rows_of(share) for row in rows]
        assert end == [f"bad in {places[row]}" if row in places else row for row in rows]


def test_what_is_raised_while_a_pass_is_split_ends_all():
    class Broken(Device):
        def collate(self, rows):
            if len(rows) == 1:
                raise MgenError("the table of letters is gone")
            return super().collate(rows)

    device = Broken(memory=15)
    with pytest.raises(MgenError, match="letters is gone"):
        Turns(device, cost).run(passes([[10, 10]], device), lambda *_: None)


def test_a_pass_without_rows_comes_back_without_columns():
    device, came = Device(), []
    Turns(device, cost).run(passes([[], [3]], device), lambda _, columns: came.append(columns))
    assert came == [{}, {"index": [0]}]


def test_a_signal_to_one_rank_stops_all_after_the_same_turn():
    group = Together(2)
    found = {}

    def work(place):
        device = group.member(place, 100)
        turns = Turns(device, cost)
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

    turns = Turns(Device(), cost)
    with pytest.raises(MgenError, match="ends here"):
        turns.run(broken(), lambda piece, columns: None)
