"""Good files, damaged at random, end well in every reader. `MGEN_FUZZ_EXAMPLES`: how many of each.

`nox -s fuzz` does the same with a fuzzer that sees which lines of code an input reaches.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from targets import targets

EXAMPLES = int(os.environ.get("MGEN_FUZZ_EXAMPLES", "40"))
SECONDS = 30


@st.composite
def damaged(draw, seeds, words):
    """A seed, cut, doubled, overwritten and mixed up in a few places."""
    data = bytearray(draw(st.sampled_from(seeds)))
    piece = st.one_of(st.binary(max_size=4), st.sampled_from([b"", *words, *seeds]))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 8)))
        data[start:stop] = draw(piece) * draw(st.sampled_from([1, 1, 1, 2, 300]))
    return bytes(data[: draw(st.sampled_from([len(data), len(data) // 2, 1 << 16]))])


@contextlib.contextmanager
def in_time():
    """A hang is a failure, not the end of the test session."""

    def hangs(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", targets())
def test_a_damaged_file_ends_well(name):
    target = targets()[name]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(damaged(target.seeds, target.words))
    def ends_well(data):
        with in_time():
            target.run(data)

    for seed in target.seeds:
        target.run(seed)
    ends_well()
